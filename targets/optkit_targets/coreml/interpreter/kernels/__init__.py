"""Kernels of MIL's operators, one family a file."""
