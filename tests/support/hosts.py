"""Hosts of a network of their own on this machine: each a network namespace with an address, joined by a bridge.

Nothing of it is reached from outside, and what runs in it is ended with it. It needs root and `ip`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

BIN = str(Path(sys.executable).parent)


def why_not() -> str | None:
    """Why there can be no such hosts here; None where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "there is no `ip` (iproute2)"
    name = f"tlbatch-{uuid.uuid4().hex[:6]}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"network namespaces cannot be made here: {done.stderr.strip()}"
    done = subprocess.run(
        ["ip", "-n", name, "link", "add", "b0", "type", "bridge"], capture_output=True, text=True, check=False
    )
    ip("netns", "del", name)
    return f"no bridge can be made here: {done.stderr.strip()}" if done.returncode else None


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Host:
    """A namespace with one address."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        self._started: list[subprocess.Popen] = []
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")

    def start(self, *command: object, env: Mapping[str, str] | None = None, log: Path | None = None) -> subprocess.Popen:
        """Start a command on this host."""
        words = ["ip", "netns", "exec", self.name, *map(str, command)]
        full = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **(env or {})}
        with open(log or os.devnull, "ab") as said:
            self._started.append(subprocess.Popen(words, env=full, stdout=said, stderr=said, stdin=subprocess.DEVNULL))
        return self._started[-1]

    def run(self, *command: object, env: Mapping[str, str] | None = None, timeout: float = 300) -> subprocess.CompletedProcess:
        """Run a command on this host to its end."""
        words = ["ip", "netns", "exec", self.name, *map(str, command)]
        full = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **(env or {})}
        return subprocess.run(words, env=full, capture_output=True, text=True, timeout=timeout, check=False)

    def end_processes(self) -> None:
        """End all that runs on this host."""
        for _ in range(20):
            found = subprocess.run(
                ["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False
            ).stdout.split()
            if not found:
                break
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.1)
        for process in self._started:
            process.wait(10)
        self._started.clear()


class Network:
    """A bridge, which is a host itself, and hosts behind it; their addresses are 10.77.`net`.1 and so on.

    Two networks at a time need different ones: Ray looks at all processes' command lines for a cluster of the same address.
    """

    def __init__(self, hosts: int, net: int = 0) -> None:
        self._id = uuid.uuid4().hex[:4]
        self._net = f"10.77.{net}"
        self.middle = Host(f"tl{self._id}-m", f"{self._net}.254")
        ip("-n", self.middle.name, "link", "add", "b0", "type", "bridge")
        ip("-n", self.middle.name, "addr", "add", f"{self._net}.254/24", "dev", "b0")
        ip("-n", self.middle.name, "link", "set", "b0", "up")
        self.hosts = [self._host(number) for number in range(1, hosts + 1)]

    def _host(self, number: int) -> Host:
        host = Host(f"tl{self._id}-{number}", f"{self._net}.{number}")
        middle = self.middle.name
        ip("-n", middle, "link", "add", f"v{number}", "type", "veth", "peer", "name", "eth0", "netns", host.name)
        ip("-n", middle, "link", "set", f"v{number}", "master", "b0")
        ip("-n", middle, "link", "set", f"v{number}", "up")
        ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
        ip("-n", host.name, "link", "set", "eth0", "up")
        ip("-n", host.name, "route", "add", "default", "via", self.middle.address)
        return host

    def cut(self, number: int) -> None:
        """Pull a host's cable; hosts are counted from 1."""
        ip("-n", self.middle.name, "link", "set", f"v{number}", "down")

    def mend(self, number: int) -> None:
        """Put it in again."""
        ip("-n", self.middle.name, "link", "set", f"v{number}", "up")

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        for host in [*self.hosts, self.middle]:
            host.end_processes()
        for host in [*self.hosts, self.middle]:
            ip("netns", "del", host.name)
