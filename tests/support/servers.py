"""The S3 servers of the table in docs/stores.md but for SeaweedFS, each started on the loopback."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from support.odd_s3 import OddS3
from support.paths import ROOT
from support.s3_server import ACCESS, SECRET, free_ports

#: Where `make servers` installs those that are not among the requirements of the tests.
_FOLDER = ROOT / ".venv-servers"


@contextlib.contextmanager
def moto(folder: Path) -> Iterator[str]:
    """In this process."""
    server = OddS3()
    with server.serve():
        yield server.endpoint


@contextlib.contextmanager
def process(folder: Path, *command: str) -> Iterator[str]:
    """A server in a process of its own; PORT and DATA stand in its command for what it gets."""
    (port,) = free_ports(1)
    words = [word.replace("PORT", str(port)).replace("DATA", str(folder)) for word in command]
    env = {**os.environ, "NANIO_ACCESS_KEY": ACCESS, "NANIO_SECRET_KEY": SECRET}
    env["NODE_OPTIONS"] = "--openssl-legacy-provider"  # s3rver encrypts the tokens of its listings with DES
    here = Path(sys.executable).parent.parent if words[0] == "bin/rclone" else _FOLDER
    running = subprocess.Popen([here / words[0], *words[1:]], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert running.poll() is None, f"{words[0]} ended"
            assert time.monotonic() < end, f"{words[0]} does not answer"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        running.terminate()
        running.wait(20)


def rclone(folder: Path) -> contextlib.AbstractContextManager[str]:
    """`rclone serve s3` of a folder."""
    keys = f"{ACCESS},{SECRET}"
    config = str(folder / "none")
    return process(
        folder, "bin/rclone", "serve", "s3", "--addr", "127.0.0.1:PORT", "--auth-key", keys, "--config", config, "DATA"
    )


def nanio(folder: Path) -> contextlib.AbstractContextManager[str]:
    """Files of a folder, in Python."""
    return process(folder, "bin/nanio", "serve", "--host", "127.0.0.1", "--port", "PORT", "--data-dir", "DATA")


def localbucket(folder: Path) -> contextlib.AbstractContextManager[str]:
    """The same, in one file of Python."""
    return process(folder, "bin/localbucket", "--port", "PORT", "DATA")


def s3rver(folder: Path) -> contextlib.AbstractContextManager[str]:
    """In JavaScript; it knows one access key."""
    words = ("-d", "DATA", "-p", "PORT", "-a", "127.0.0.1", "--silent")
    return process(folder, "node_modules/.bin/s3rver", *words)


#: Gives the endpoint of a server that keeps its data in a folder.
SERVERS: dict[str, Callable[[Path], contextlib.AbstractContextManager[str]]] = {
    "moto": moto,
    "rclone": rclone,
    "nanio": nanio,
    "localbucket": localbucket,
    "s3rver": s3rver,
}
