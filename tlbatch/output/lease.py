"""`lease.json` -> which run may write to an output: one at a time, until it releases the lease or dies.

The lease only avoids wasted work; correctness does not depend on it. A run that lost its lease without noticing stages parts
that are never used, and publishes nothing: the part plan of a run is created once, and the pointer `latest.json` is replaced by
compare-and-swap (`commit.py`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tlbatch import schema, signals
from tlbatch.errors import LeaseHeldError
from tlbatch.storage.location import Location
from tlbatch.storage.retry import no_retries

log = logging.getLogger(__name__)

#: The clocks of two hosts are assumed to differ by less than this many seconds: stores refuse requests that are signed with a
#: larger difference.
_CLOCKS_DIFFER = 900.0


class Lease:
    """The exclusive right to write to an output, held while the `with` block runs.

    `lease.json` is created if it does not exist, and renewed every `HEARTBEAT` seconds. A holder is dead if its process on this
    machine has ended, or if it stopped renewing. The lease of a dead holder is taken over by compare-and-swap, so only one of
    several contenders gets it. The clocks of two hosts differ, so a lease that has only just expired is observed for longer
    than a heartbeat before it is taken over.
    """

    LIFETIME = 60.0
    HEARTBEAT = 15.0

    def __init__(self, output: Location, run_id: str, clock: Callable[[], float] | None = None) -> None:
        self._output = output
        self._location = output.join(schema.LEASE)
        self._clock = clock or time.time
        self._stop = threading.Event()
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="tlbatch-lease", daemon=True)
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        self._facts = {
            "run_id": run_id,
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "token": secrets.token_hex(8),
        }
        self.since = self._clock()
        self._held = b""

    def __enter__(self) -> Self:
        """Take the lease.

        Raises:
            LeaseHeldError: a live process holds it. The message names the run, host and process, and when the lease expires.
        """
        mine = self._renewed()
        if not self._location.create(mine):
            old = self._read()
            if old is not None:
                self._require_dead(old)
                mine = self._renewed()
            if not self._location.swap(mine, old):
                raise LeaseHeldError("Another run has just taken the lease of this output. Run the same command again later.")
        self._held = mine
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Release the lease if this run still holds it."""
        self._stop.set()
        with no_retries() if kind is not None else contextlib.nullcontext():
            self._thread.join()
            try:
                if not self._lost.is_set():
                    self._location.remove(self._held)
            except OSError as failure:  # the lease expires by itself
                log.warning("the lease could not be released and will expire by itself: %s", failure)
        if kind is KeyboardInterrupt and self._lost.is_set():
            self.require_held()

    def require_held(self) -> None:
        """Raises LeaseHeldError if the lease is gone or another run took it, which is possible after a pause of a minute."""
        stored = self._read()
        if stored is None:
            raise LeaseHeldError(
                f"The lease of {self._output.url} is gone: {schema.LEASE} or the whole output was removed while run "
                f"{self._facts['run_id']} was running. Nothing more is written. Run the same command again."
            )
        if self._lost.is_set() or not self._is_mine(stored):
            raise LeaseHeldError("This run lost its lease to another run. Run the same command again later.")

    def _require_dead(self, old: bytes) -> None:
        """Raises LeaseHeldError unless the process of the holder has ended, or its lease has expired and is not renewed."""
        expired_for = _expired_for(old, self._clock())
        if expired_for is None or expired_for > _CLOCKS_DIFFER:
            return
        time.sleep(1.5 * self.HEARTBEAT)
        stored = self._read()
        if stored is not None and stored != old:
            raise LeaseHeldError(
                "Another run holds the lease of this output; the clock of its host is behind. Run the same command again later."
            )

    def _renewed(self) -> bytes:
        now = self._clock()
        facts = {**self._facts, "since": _iso(self.since), "expires": _iso(now + self.LIFETIME)}
        return json.dumps({**facts, "expires_at": now + self.LIFETIME}).encode()

    def _is_mine(self, lease: bytes) -> bool:
        """Compares the token alone: the heartbeat may change the other fields at any moment."""
        return f'"{self._facts["token"]}"'.encode() in lease

    def _read(self) -> bytes | None:
        try:
            return self._location.read()
        except FileNotFoundError:
            return None

    def _beat(self) -> None:
        while not self._stop.wait(self.HEARTBEAT):
            try:
                renewed = self._renew()
            except OSError as error:  # the store may be unavailable for a while
                log.warning("the lease could not be renewed; the next heartbeat tries again: %s", error)
                continue
            if not renewed:
                self._lost.set()
                if self._in_main_thread:
                    signals.interrupt_main()  # its results would never be published
                return

    def _renew(self) -> bool:
        renewed = self._renewed()
        if self._location.swap(renewed, self._held):
            self._held = renewed
            return True
        stored = self._read()
        if stored is None or not self._is_mine(stored):
            return False
        self._held = stored  # an earlier heartbeat wrote it, but its response was lost
        return True


def require_free(output: Location) -> None:
    """Raises LeaseHeldError if a run holds the lease. An early check before anything is started; `Lease` itself decides."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        _expired_for(output.join(schema.LEASE).read(), time.time())


def read_lease(output: Location) -> dict[str, Any] | None:
    """The run that holds the lease of an output; None if there is no lease or its holder is dead."""
    try:
        lease = output.join(schema.LEASE).read()
        _expired_for(lease, time.time())
    except LeaseHeldError:
        facts: dict[str, Any] = json.loads(lease)
        return {name: facts[name] for name in ("run_id", "host", "pid", "since", "expires")}
    except (FileNotFoundError, NotADirectoryError):
        pass
    return None


def _expired_for(lease: bytes, now: float) -> float | None:
    """Seconds since a lease expired by the local clock; None if its holder is certainly dead.

    Raises:
        LeaseHeldError: the lease has not expired, and its holder may be alive.
    """
    try:
        facts = json.loads(lease)
        expired = now - float(facts["expires_at"])
        dead = _is_dead(facts)
    except (ValueError, KeyError, TypeError):
        return None  # not a lease
    if dead:
        log.info("the lease of run %s can be taken over: its process has ended", facts["run_id"])
        return None
    if expired < 0:
        raise LeaseHeldError(
            f"Run {facts['run_id']} has been working on this output since {facts['since']}, on {facts['host']} as process "
            f"{facts['pid']}. Wait until it ends or, if it died, until its lease expires at {facts['expires']}."
        )
    return expired


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _machine() -> str:
    """The scope in which a process number is unique: boot of the kernel and PID namespace; empty if they are unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_dead(facts: Mapping[str, Any]) -> bool:
    """Whether the holder ran on this machine and its process has ended."""
    if not facts.get("machine") or facts["machine"] != _machine():
        return False
    try:
        os.kill(int(facts["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
