"""Passes that several toolchains need."""
