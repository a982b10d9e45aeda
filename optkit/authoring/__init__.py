"""What the author of a plugin gets: scaffolds and the conformance kit."""
