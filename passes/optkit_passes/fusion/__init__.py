"""Passes that merge several operators into one."""
