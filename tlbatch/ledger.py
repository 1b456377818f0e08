"""Receipts -> what is done and what is left; and who may work on an output at all.

Everything is computed from the manifest and the receipts. Nothing else remembers progress, so nothing can disagree with them.
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
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa

from tlbatch import schema
from tlbatch.errors import BooksError, LeaseHeldError, OutputError
from tlbatch.schema import RECEIPT_SUFFIX, from_parquet, seal, sha256, to_parquet, unseal
from tlbatch.storage import Place, hurrying

log = logging.getLogger(__name__)

#: Receipts read at once. Each is a small object, so a remote store is waited for and not this machine.
_READERS = 32


def new_run_id(clock: Callable[[], float] = time.time) -> str:
    """A name that sorts by time, in UTC, with enough chance behind it that two hosts do not meet."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(clock())) + "-" + secrets.token_hex(3)


@dataclass(frozen=True)
class Run:
    """A run's folder and what `run.json` says of it."""

    place: Place
    facts: Mapping[str, Any]

    @property
    def run_id(self) -> str:
        """The run's name, that of its folder."""
        return str(self.facts["run_id"])

    @property
    def fingerprint(self) -> str:
        """sha256 of spec, bundle and manifest: equal fingerprints mean equal files."""
        return str(self.facts["fingerprint"])

    @property
    def staged(self) -> Place:
        """Where parts and receipts are until they are published."""
        return self.place.join(schema.STAGED)

    @cached_property
    def manifest(self) -> pa.Table:
        """What the run promised, checked against the digest in `run.json`."""
        data = self.place.join(schema.MANIFEST).read()
        if sha256(data) != self.facts["manifest_sha256"]:
            raise BooksError(f"The manifest of run {self.run_id} differs from its recorded sha256; the run cannot be trusted.")
        return from_parquet(data)

    def finished(self) -> bool:
        """Whether all of it is published."""
        return self.place.join(schema.SUCCESS).exists()


def runs(output: Place) -> list[Run]:
    """Every run of an output, oldest first. A folder without `run.json` never began.

    Raises:
        BooksError: a `run.json` is damaged.
    """
    found = []
    for name in output.join(schema.RUNS).names():
        place = output.join(schema.RUNS, name)
        try:
            facts = unseal(place.join(schema.RUN).read())
        except (FileNotFoundError, NotADirectoryError):
            continue
        if facts is None:
            raise BooksError(f"{place.join(schema.RUN).url} is damaged; it does not match its own seal.")
        found.append(Run(place, facts))
    return sorted(found, key=lambda run: (run.facts["began"], run.run_id))  # a run may be named by its user


def read_latest(output: Place) -> list[dict[str, str]]:
    """The published runs that make up the table, oldest first; empty where nothing was published yet.

    Raises:
        BooksError: the pointer is damaged.
    """
    try:
        pointer = unseal(output.join(schema.LATEST).read())
    except (FileNotFoundError, NotADirectoryError):
        return []
    if pointer is None:
        raise BooksError(f"{output.join(schema.LATEST).url} is damaged; it does not match its own seal.")
    return list(pointer["runs"])


def unfinished_run(output: Place) -> Run | None:
    """The newest run, if it was begun and never published."""
    found = runs(output)
    return found[-1] if found and not found[-1].finished() else None


def require_output(output: Place, images: str) -> None:
    """Raises OutputError where the folder holds something else, or the table of another store."""
    own = {schema.RUNS, schema.LEASE, schema.BASE, schema.LATEST}
    names = [name for name in output.names() if not name.startswith(".")]  # a write that was killed leaves a hidden one
    strange = sorted(set(names) - own)
    if strange and schema.RUNS not in names:
        raise OutputError(
            f"The output {output.url} is not empty and holds no tlbatch runs ({strange[0]}, …); choose another folder."
        )
    found = runs(output)
    if found and found[-1].facts["spec"]["images"] != images:
        raise OutputError(
            f"The output {output.url} belongs to another run: it holds the table of {found[-1].facts['spec']['images']}, "
            f"not of {images}; choose another --output."
        )


def require_same(run: Run, spec: Mapping[str, Any], bundle: str) -> None:
    """Raises OutputError with the fields that differ when an unfinished run was begun with another spec or bundle."""
    begun = {**run.facts["spec"], "bundle": run.facts["bundle"]}
    asked = {**spec, "bundle": bundle}
    differ = sorted(name for name in begun.keys() | asked.keys() if begun.get(name) != asked.get(name))
    if differ:
        changes = ", ".join(f"{name} was {_short(begun.get(name))} and is {_short(asked.get(name))}" for name in differ)
        raise OutputError(
            f"The output belongs to another run: {run.run_id} is unfinished and {changes}. Finish it with its own command, "
            f"or delete {run.place.url} to give it up."
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:39] + "…"


def begin(output: Place, run_id: str, manifest: pa.Table, facts: Mapping[str, Any]) -> Run:
    """Write the manifest, then `run.json`, which makes the run real.

    Raises:
        OutputError: there is a run of this name, which only a person can have given.
    """
    place = output.join(schema.RUNS, run_id)
    if place.join(schema.RUN).exists():
        raise OutputError(f"run_id: {output.url} has a run {run_id!r} already; give another name, or none.")
    data = to_parquet(manifest)
    manifest_sha256 = sha256(data)
    place.join(schema.MANIFEST).write(data)
    full = {
        "schema_version": schema.SCHEMA_VERSION,
        "run_id": run_id,
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "manifest_sha256": manifest_sha256,
        "objects": manifest.num_rows,
        **facts,
        "fingerprint": fingerprint(facts["spec"], facts["bundle"], manifest_sha256),
    }
    place.join(schema.RUN).write(seal(full))
    return Run(place, full)


def fingerprint(spec: Mapping[str, Any], bundle: str, manifest_sha256: str) -> str:
    """sha256 over all that a run's answer depends on."""
    asked = {"spec": {**spec, "bundle": bundle}, "manifest": manifest_sha256}
    return sha256(json.dumps(asked, sort_keys=True).encode())


@dataclass(frozen=True)
class Receipts:
    """The receipts of a run, in the order of their first row."""

    bodies: tuple[Mapping[str, Any], ...]
    broken: tuple[str, ...] = ()

    def owners(self, rows: int) -> np.ndarray:
        """(rows,) int: for each row of the manifest the number of the first part that holds it, -1 where none does.

        A task that ran twice left two parts; an object's images are all taken from one of them.
        """
        owner = np.full(rows, -1, np.int32)
        for number, body in reversed(list(enumerate(self.bodies))):
            for start, end in body["rows"]:
                owner[start:end] = number
        return owner

    def images(self, rows: int) -> np.ndarray:
        """(rows,) int: how many images each object of the manifest holds, 0 where no part holds it."""
        owner = self.owners(rows)
        images = (owner >= 0).astype(np.int32)
        for number, body in enumerate(self.bodies):
            for row, count in body["images"].items():
                if owner[int(row)] == number:
                    images[int(row)] = count
        return images

    def seconds(self) -> dict[str, float]:
        """Seconds in each stage, summed over all workers."""
        total: Counter[str] = Counter()
        for body in self.bodies:
            total.update(body["stage_seconds"])
        return {stage: round(value, 3) for stage, value in total.items()}


def read_receipts(run: Run) -> Receipts:
    """All receipts of a run. One that is torn or flipped counts as none: its rows are done again."""
    names = run.staged.names()
    there = set(names)
    wanted = [name for name in names if name.endswith(RECEIPT_SUFFIX)]
    with ThreadPoolExecutor(_READERS) as pool:
        bodies = list(pool.map(lambda name: unseal(run.staged.join(name).read()), wanted))
    good = [body for body in bodies if body is not None and body["part"] in there]
    broken = tuple(name for name, body in zip(wanted, bodies, strict=True) if body is None)
    return Receipts(tuple(sorted(good, key=lambda body: (body["rows"][0][0], body["part"]))), broken)


class Staged(NamedTuple):
    """How far a run is: objects of the manifest that are done, and the images that were found in them."""

    objects: int
    predicted: int
    failed: int

    def books(self, objects: int) -> dict[str, int]:
        """The counts of images, of which there are at least as many as objects: what is in a shard is known once it is read."""
        left = max(0, objects - self.objects)
        return {
            "listed": self.predicted + self.failed + left,
            "predicted": self.predicted,
            "failed": self.failed,
            "left": left,
        }


def count_staged(names: Iterable[str]) -> Staged:
    """What is staged, from the names of receipts alone; a part staged twice counts twice until it is published."""
    counts = [
        [int(part[1:]) for part in name.removesuffix(RECEIPT_SUFFIX).rsplit(".", 3)[1:]]
        for name in names
        if name.endswith(RECEIPT_SUFFIX)
    ]
    return Staged(*(sum(column) for column in zip(*counts, strict=True))) if counts else Staged(0, 0, 0)


class Lease:
    """The right to work on an output, held while the `with` block runs.

    `lease.json` is put if absent and renewed every few seconds. A holder that stopped renewing, or whose process on this
    host is gone, is dead, and its lease is taken over by compare-and-swap, so that of two heirs one wins.
    """

    LIFETIME = 60.0
    HEARTBEAT = 15.0

    def __init__(self, output: Place, run_id: str, clock: Callable[[], float] = time.time) -> None:
        self._place = output.join(schema.LEASE)
        self._clock = clock
        self._stop = threading.Event()
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="tlbatch-lease", daemon=True)
        self._facts = {"run_id": run_id, "host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)}
        self._since = clock()
        self._held = b""

    def __enter__(self) -> Self:
        """Take the lease.

        Raises:
            LeaseHeldError: somebody alive holds it; says who, since when, and until when at most.
        """
        mine = self._renewed()
        if not self._place.create(mine):
            old = self._read()
            if old is not None:
                _require_dead(old, self._clock())
            if not self._place.swap(mine, old):
                raise LeaseHeldError("Another run took the lease of this output just now; run the same command again later.")
        self._held = mine
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Give the lease back, if it is still ours."""
        self._stop.set()
        with hurrying() if kind is not None else contextlib.nullcontext():
            self._thread.join()
            try:
                if not self._lost.is_set() and self._is_mine():
                    self._place.delete()
            except OSError as trouble:  # it expires by itself
                log.warning("the lease could not be given back: %s", trouble)

    def require_held(self) -> None:
        """Raises LeaseHeldError when somebody else took the lease, which a pause of a minute allows them to."""
        if self._lost.is_set() or not self._is_mine():
            raise LeaseHeldError("This run lost its lease to another one; run the same command again later.")

    def _renewed(self) -> bytes:
        facts = {**self._facts, "since": _iso(self._since), "expires": _iso(self._clock() + self.LIFETIME)}
        return json.dumps({**facts, "expires_at": self._clock() + self.LIFETIME}).encode()

    def _is_mine(self) -> bool:
        """By its token: the heartbeat renews the rest at any moment."""
        return f'"{self._facts["token"]}"'.encode() in (self._read() or b"")

    def _read(self) -> bytes | None:
        try:
            return self._place.read()
        except FileNotFoundError:
            return None

    def _beat(self) -> None:
        while not self._stop.wait(self.HEARTBEAT):
            renewed = self._renewed()
            try:
                if not self._place.swap(renewed, self._held):
                    log.error("the lease of this output was taken by another run")
                    self._lost.set()
                    return
                self._held = renewed
            except OSError as error:  # a bad minute of the store; the next beat tries again
                log.warning("the lease could not be renewed: %s", error)


def require_free(output: Place) -> None:
    """Raises LeaseHeldError where a run is at work; a first look, before anything is started. The lease itself decides."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        _require_dead(output.join(schema.LEASE).read(), time.time())


def read_lease(output: Place) -> dict[str, Any] | None:
    """Who is at work on an output; None where nobody is, or the holder is dead."""
    try:
        lease = output.join(schema.LEASE).read()
        _require_dead(lease, time.time())
    except LeaseHeldError:
        facts: dict[str, Any] = json.loads(lease)
        return {name: facts[name] for name in ("run_id", "host", "pid", "since", "expires")}
    except (FileNotFoundError, NotADirectoryError):
        pass
    return None


def _require_dead(lease: bytes, now: float) -> None:
    try:
        facts = json.loads(lease)
        alive = now < float(facts["expires_at"]) and not _is_gone(facts)
    except (ValueError, KeyError, TypeError):
        return  # nobody wrote this to hold anything
    if alive:
        raise LeaseHeldError(
            f"Run {facts['run_id']} works on this output since {facts['since']}, on {facts['host']} as process "
            f"{facts['pid']}; wait for it, or, if it died, until its lease expires at {facts['expires']}."
        )
    log.info("the lease of run %s may be taken over: its process is gone", facts["run_id"])


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _is_gone(facts: Mapping[str, Any]) -> bool:
    """Whether the holder ran on this host and is no process any more."""
    if facts["host"] != socket.gethostname():
        return False
    try:
        os.kill(int(facts["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
