"""Packages: the contract of a toolchain, writing, sealing, opening, running, checking."""
