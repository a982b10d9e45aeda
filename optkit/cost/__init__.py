"""What a model costs on a target: its work described, priced, its memory planned."""
