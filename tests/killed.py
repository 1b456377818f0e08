"""The command line, killed on purpose: SIGKILL right before the N-th thing this process does to an output folder.

    python tests/killed.py OUTPUT N classify --images …

Things are counted as Python reports them to audit hooks: opening a file to write, renaming, linking, removing, making a
folder. Those of `progress.json`, which a clock writes, are not counted. A process that is not killed says how many there were.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

_DOES = ("os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir")


class Counter:
    """Counts what is done below a folder and ends the process at the N-th."""

    def __init__(self, folder: str, last: int) -> None:
        self.count = 0
        self._folder = os.path.abspath(folder)
        self._last = last
        self._lock = threading.Lock()

    def __call__(self, event: str, arguments: tuple) -> None:
        """An audit hook."""
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in _DOES:
            path = arguments[0]
        else:
            return
        if not isinstance(path, str) or not path.startswith(self._folder) or "progress.json" in path:
            return
        with self._lock:
            self.count += 1
            if self.count == self._last:
                os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Run the command."""
    counter = Counter(sys.argv[1], int(sys.argv[2]))
    sys.addaudithook(counter)
    sys.argv = ["tlbatch", *sys.argv[3:]]
    from tlbatch import cli

    try:
        cli.main()
    finally:
        print(f"{counter.count} things done", file=sys.stderr)


if __name__ == "__main__":
    main()
