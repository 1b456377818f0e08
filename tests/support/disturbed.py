"""The command line, disturbed on purpose at what this process does to its output folder.

    python tests/support/disturbed.py OUTPUT HOW classify --images …

HOW is one of: `kill=7`, SIGKILL right before the 7th write (0: never); `meet=FOLDER`, wait before the first write for another
command in FOLDER; `join=HOST:PORT`, no disturbance, but a cluster on the loopback.

Writes are counted as Python reports them to audit hooks: opening a file to write, renaming, linking, removing, making a folder.
Those of `progress.json`, which a clock writes, are not counted. A process that is not killed prints how many there were.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

_DOES = ("os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir")


class Counter:
    """Counts what is done below a folder, and says so before it is done."""

    def __init__(self, folder: str, before: Callable[[int], None]) -> None:
        self.count = 0
        self._folder = os.path.abspath(folder)
        self._before = before
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
            self._before(self.count)


def kill(last: str) -> Callable[[int], None]:
    """The process ends at the N-th thing."""

    def before(number: int) -> None:
        if number == int(last):
            os.kill(os.getpid(), signal.SIGKILL)

    return before


def meet(folder: str) -> Callable[[int], None]:
    """The process waits, for a minute at most, until a second one is about to do its first thing."""

    def before(number: int) -> None:
        if number == 1:
            Path(folder, str(os.getpid())).touch()
            end = time.monotonic() + 60
            while len(os.listdir(folder)) < 2 and time.monotonic() < end:
                time.sleep(0.0005)

    return before


def join(address: str) -> Callable[[int], None]:
    """Use a cluster at 127.0.0.1, which Ray would look for at this machine's address in the network."""
    from ray._private import services

    os.environ["RAY_ADDRESS"] = address
    services.get_node_ip_address = lambda *_: "127.0.0.1"
    return lambda _: None


def main() -> None:
    """Run the command."""
    how, value = sys.argv[2].split("=", 1)
    counter = Counter(sys.argv[1], {"kill": kill, "meet": meet, "join": join}[how](value))
    sys.addaudithook(counter)
    sys.argv = ["tlbatch", *sys.argv[3:]]
    from tlbatch import cli

    try:
        cli.main()
    finally:
        print(f"{counter.count} things done", file=sys.stderr)


if __name__ == "__main__":
    main()
