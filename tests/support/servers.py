"""The S3 servers of the table in docs/stores.md, each started on the loopback."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from support.paths import ROOT
from support.s3_server import ACCESS, SECRET, free_ports

#: Where `make servers` installs those that are not among the requirements of the tests.
FOLDER = ROOT / ".venv-servers"

#: Endpoint, access key and secret.
Reached = tuple[str, str, str]


@contextlib.contextmanager
def _process(command: list, port: int, **environment: str) -> Iterator[Reached]:
    """A server in a process of its own."""
    env = {**os.environ, **environment}
    process = subprocess.Popen([*map(str, command)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None, f"{command[0]} ended"
            assert time.monotonic() < end, f"{command[0]} does not answer"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", ACCESS, SECRET
    finally:
        process.terminate()
        process.wait(20)
