"""The command line."""

from optkit.cli.app import main

__all__ = ["main"]
