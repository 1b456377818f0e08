"""The proxy of `faulty_s3.py` in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request

from support.paths import SUPPORT
from support.s3_server import free_ports


class FaultyS3:
    """The proxy of `faulty_s3.py` in a process of its own."""

    def __init__(self, upstream: str, seed: int, faults: dict) -> None:
        (port,) = free_ports(1)
        self.endpoint = f"http://127.0.0.1:{port}"
        script = SUPPORT / "faulty_s3.py"
        command = [sys.executable, script, "--upstream", upstream, "--port", port, "--seed", seed]
        self._command = [*map(str, command), "--faults", json.dumps(faults)]

    def __enter__(self):
        self._process = subprocess.Popen(self._command)
        end = time.monotonic() + 30
        while True:
            try:
                self.counts()
                return self
            except OSError:
                assert self._process.poll() is None, "the proxy ended"
                assert time.monotonic() < end, "the proxy does not answer"
                time.sleep(0.05)

    def __exit__(self, *_):
        self._process.terminate()
        self._process.wait(10)

    def set(self, **faults) -> None:
        """Change what goes wrong."""
        data = json.dumps(faults).encode()
        urllib.request.urlopen(urllib.request.Request(f"{self.endpoint}/__faults__", data, method="PUT"), timeout=10).close()

    def counts(self) -> dict:
        """What was asked so far, and what went wrong."""
        with urllib.request.urlopen(f"{self.endpoint}/__counts__", timeout=10) as answer:
            return json.load(answer)
