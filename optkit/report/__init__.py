"""What a compilation found out, as data, as text and as a page."""
