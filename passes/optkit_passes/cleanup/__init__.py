"""Exact passes that make the graph smaller or simpler."""
