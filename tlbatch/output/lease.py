"""Who may work on an output: one run at a time, until it gives the right back, or is dead.

The lease saves work and never decides what is right: a run that lost it without noticing stages parts that nobody needs and
publishes nothing, because the plan of a run is put once and `latest.json` is swapped (`commit.py`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tlbatch import schema
from tlbatch.errors import LeaseHeldError
from tlbatch.storage.location import Location
from tlbatch.storage.retry import no_retries

log = logging.getLogger(__name__)

#: Clocks of two hosts are taken to differ by less than this many seconds: stores refuse requests signed with a worse one.
_CLOCKS_DIFFER = 900.0


class Lease:
    """The right to work on an output, held while the `with` block runs.

    `lease.json` is put if absent and renewed every few seconds. A holder whose process on this machine is gone, or that
    stopped renewing, is dead; its lease is taken over by compare-and-swap, so that of two heirs one wins. Because two hosts'
    clocks differ, a lease that expired only just now is watched for longer than a heartbeat before it is taken.
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
            LeaseHeldError: somebody alive holds it; says who, since when, and until when at most.
        """
        mine = self._renewed()
        if not self._location.create(mine):
            old = self._read()
            if old is not None:
                self._require_dead(old)
                mine = self._renewed()
            if not self._location.swap(mine, old):
                raise LeaseHeldError("Another run took the lease of this output just now; run the same command again later.")
        self._held = mine
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Give the lease back, if it is still ours."""
        self._stop.set()
        with no_retries() if kind is not None else contextlib.nullcontext():
            self._thread.join()
            try:
                if not self._lost.is_set():
                    self._location.remove(self._held)
            except OSError as trouble:  # it expires by itself
                log.warning("the lease could not be given back: %s", trouble)
        if kind is KeyboardInterrupt and self._lost.is_set():
            self.require_held()

    def require_held(self) -> None:
        """Raises LeaseHeldError when the lease is somebody else's, which a pause of a minute allows, or is gone."""
        there = self._read()
        if there is None:
            raise LeaseHeldError(
                f"The lease of {self._output.url} is gone: it was removed, or the output with it, while run "
                f"{self._facts['run_id']} was at work. Nothing more is written; run the same command again."
            )
        if self._lost.is_set() or not self._is_mine(there):
            raise LeaseHeldError("This run lost its lease to another one; run the same command again later.")

    def _require_dead(self, old: bytes) -> None:
        """Raises LeaseHeldError unless the holder is dead: by its process, by its clock, or by its silence."""
        expired_for = _expired_for(old, self._clock())
        if expired_for is None or expired_for > _CLOCKS_DIFFER:
            return
        time.sleep(1.5 * self.HEARTBEAT)
        there = self._read()
        if there is not None and there != old:
            raise LeaseHeldError(
                "Another run holds the lease of this output, by a clock that is behind; run the command later."
            )

    def _renewed(self) -> bytes:
        now = self._clock()
        facts = {**self._facts, "since": _iso(self.since), "expires": _iso(now + self.LIFETIME)}
        return json.dumps({**facts, "expires_at": now + self.LIFETIME}).encode()

    def _is_mine(self, lease: bytes) -> bool:
        """By its token: the heartbeat renews the rest at any moment."""
        return f'"{self._facts["token"]}"'.encode() in lease

    def _read(self) -> bytes | None:
        try:
            return self._location.read()
        except FileNotFoundError:
            return None

    def _beat(self) -> None:
        while not self._stop.wait(self.HEARTBEAT):
            try:
                kept = self._renew()
            except OSError as error:  # a bad minute of the store; the next beat tries again
                log.warning("the lease could not be renewed: %s", error)
                continue
            if not kept:
                self._lost.set()
                if self._in_main_thread:
                    _interrupt_main()  # whatever it works on, nobody needs it
                return

    def _renew(self) -> bool:
        renewed = self._renewed()
        if self._location.swap(renewed, self._held):
            self._held = renewed
            return True
        there = self._read()
        if there is None or not self._is_mine(there):
            return False
        self._held = there  # written by a beat that never heard so
        return True


def _interrupt_main() -> None:
    """End what the main thread does, by a signal this process heeds; one started in the background may ignore Ctrl-C's."""
    heeded = [number for number in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(number))]
    if heeded:
        signal.pthread_kill(threading.main_thread().ident or 0, heeded[0])


def require_free(output: Location) -> None:
    """Raises LeaseHeldError where a run is at work; a first look, before anything is started. The lease itself decides."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        _expired_for(output.join(schema.LEASE).read(), time.time())


def read_lease(output: Location) -> dict[str, Any] | None:
    """Who is at work on an output; None where nobody is, or the holder is dead."""
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
    """Seconds since a lease expired by this clock; None where its holder is gone for certain.

    Raises:
        LeaseHeldError: it has not expired, and its holder may well be alive.
    """
    try:
        facts = json.loads(lease)
        expired = now - float(facts["expires_at"])
        gone = _is_gone(facts)
    except (ValueError, KeyError, TypeError):
        return None  # nobody wrote this to hold anything
    if gone:
        log.info("the lease of run %s may be taken over: its process is gone", facts["run_id"])
        return None
    if expired < 0:
        raise LeaseHeldError(
            f"Run {facts['run_id']} works on this output since {facts['since']}, on {facts['host']} as process "
            f"{facts['pid']}; wait for it, or, if it died, until its lease expires at {facts['expires']}."
        )
    return expired


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _machine() -> str:
    """Where a process number means something: this boot of this kernel, and this container of it. Empty where none tells."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_gone(facts: Mapping[str, Any]) -> bool:
    """Whether the holder ran on this very machine and is no process any more."""
    if not facts.get("machine") or facts["machine"] != _machine():
        return False
    try:
        os.kill(int(facts["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
