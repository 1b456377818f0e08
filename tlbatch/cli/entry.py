"""The first instructions of the command: it takes the signals before it imports what takes time."""

from __future__ import annotations

from tlbatch import signals


def main() -> None:
    """Run the command line; its exit code is the command's."""
    signals.take()
    from tlbatch.cli.main import main as run

    run()
