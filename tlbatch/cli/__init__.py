"""The command line."""

from tlbatch.cli.entry import main

__all__ = ["main"]
