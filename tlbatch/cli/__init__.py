"""The command line."""

from tlbatch.cli.main import app, main

__all__ = ["app", "main"]
