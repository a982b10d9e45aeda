"""Passes that make weights zero, so that formats which store zeros in one bit store them smaller."""
