"""Passes that change precision."""
