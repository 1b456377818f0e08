"""Receipts -> what is done and what is left.

Everything is computed from the manifest and the receipts. Nothing else remembers progress, so nothing can disagree with them.
"""

from __future__ import annotations

import json
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from tlbatch import schema
from tlbatch.errors import BooksError, LeaseHeldError, OutputError
from tlbatch.schema import RECEIPT_SUFFIX, from_parquet, seal, sha256, to_parquet, unseal
from tlbatch.storage import Place, resolve

#: Receipts or parts read at once. Each is a small object, so a remote store is waited for and not this machine.
PARTS_AT_ONCE = 32


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

    @cached_property
    def removed(self) -> pa.Table:
        """Uri and key of what the run takes from the table it adds to, checked as the manifest is; mostly nothing."""
        if "removed_sha256" not in self.facts:
            return schema.REMOVED_SCHEMA.empty_table()
        data = self.place.join(schema.REMOVED).read()
        if sha256(data) != self.facts["removed_sha256"]:
            raise BooksError(f"{schema.REMOVED} of run {self.run_id} differs from its recorded sha256; it cannot be trusted.")
        return from_parquet(data)

    @property
    def on(self) -> list[dict[str, str]]:
        """The published runs that it adds to; empty where its table is whole by itself."""
        return list(self.facts.get("on", []))

    def promises(self) -> bool:
        """Whether its manifest is there, which is written first: someone who tidied up may have been faster than `run.json`."""
        return self.place.join(schema.MANIFEST).exists()

    def finished(self) -> bool:
        """Whether all of it is published."""
        return self.place.join(schema.SUCCESS).exists()


#: The runs that make up a table, as `latest.json` has them.
Published = Sequence[dict[str, str]]


def runs(output: Place) -> list[Run]:
    """Every run of an output, oldest first. A folder without `run.json` never began.

    Raises:
        BooksError: a `run.json` is damaged.
    """
    folder = output.join(schema.RUNS)
    with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
        found = [run for run in pool.map(lambda name: _read_run(folder.join(name)), folder.names()) if run is not None]
    return sorted(found, key=lambda run: (run.facts["began"], run.run_id))  # a run may be named by its user


def _read_run(place: Place) -> Run | None:
    try:
        return Run(place, read_sealed(place.join(schema.RUN)))
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_sealed(place: Place) -> dict[str, Any]:
    """What a sealed object says; raises BooksError where it is damaged."""
    body = unseal(place.read())
    if body is None:
        raise BooksError(f"{place.url} is damaged; it does not match its own seal.")
    return body


def read_latest(output: Place) -> list[dict[str, str]]:
    """The published runs that make up the table, oldest first; empty where nothing was published yet.

    Raises:
        BooksError: the pointer is damaged.
    """
    try:
        return list(read_sealed(output.join(schema.LATEST))["runs"])
    except (FileNotFoundError, NotADirectoryError):
        return []


def published_runs(output: Place) -> list[Run]:
    """The runs that make up the table, the oldest first; none where nothing is published."""
    return read_published(output, read_latest(output))


def table_after(output: Place, run: Run) -> list[Run]:
    """A run as the table that it made: with those it adds to, the oldest first."""
    return [*read_published(output, run.on), run]


def require_unchanged(read: Published, now: Published) -> None:
    """Raises LeaseHeldError where a table is not the one that somebody began to work from."""
    if list(read) != list(now):
        raise LeaseHeldError("Another run was published meanwhile; run the same command again.")


def newest_published(output: Place) -> Run | None:
    """The newest of the runs that make up the table; None where nothing is published."""
    latest = read_latest(output)
    return _read_run(output.join(schema.RUNS, latest[-1]["run_id"])) if latest else None


def run_before(output: Place, run: Run) -> Run | None:
    """The newest run with predictions of the table that a run was added to, or followed; None where there was none."""
    earlier = [one for one in runs(output) if (one.facts["began"], one.run_id) < (run.facts["began"], run.run_id)]
    candidates = read_published(output, run.on) if run.on else earlier
    return next((one for one in reversed(candidates) if one.facts["spec"]["predictions"] and _was_published(one)), None)


def _was_published(run: Run) -> bool:
    return run.finished() and not run.place.join(schema.KEPT_BACK).exists()


def run_at(url: str, options: Mapping[str, Any] | None) -> tuple[Place, Run] | None:
    """The output and the run of a run's folder; None where the address is of something else."""
    place = resolve(url, options)
    run = _read_run(place)
    return None if run is None else (resolve(place.url.rsplit(f"/{schema.RUNS}/", 1)[0], options), run)


def read_published(output: Place, published: Published) -> list[Run]:
    """The runs that a pointer names, in its order.

    Raises:
        BooksError: one of them is not there.
    """
    with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
        found = list(pool.map(lambda entry: _read_run(output.join(schema.RUNS, entry["run_id"])), published))
    for entry, run in zip(published, found, strict=True):
        if run is None:
            raise BooksError(f"{output.url}/{schema.LATEST} names run {entry['run_id']}, which is not there.")
    return [run for run in found if run is not None]


def unfinished_run(output: Place) -> Run | None:
    """The newest run, if it was begun and never published. One whose manifest is gone promises nothing."""
    found = runs(output)
    if not found or found[-1].finished() or not found[-1].promises():
        return None
    return found[-1]


def require_runs(output: str, options: Mapping[str, Any] | None) -> Place:
    """The place of an output; raises OutputError where there is none."""
    place = resolve(output, options)
    if schema.RUNS not in place.names():
        raise OutputError(f"There is no tlbatch output at {place.url}: it has no folder {schema.RUNS}.")
    return place


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


def require_same(run: Run, spec: Mapping[str, Any], bundle: str, *, incremental: bool = False) -> None:
    """Raises OutputError with the fields that differ when an unfinished run was begun with another spec or bundle.

    A whole run may be finished by an incremental command, but not the other way round.
    """
    begun = {**run.facts["spec"], "bundle": run.facts["bundle"], "incremental": bool(run.on)}
    asked = {**spec, "bundle": bundle, "incremental": incremental and bool(run.on)}
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


def begin(
    output: Place,
    run_id: str,
    manifest: pa.Table,
    facts: Mapping[str, Any],
    *,
    began: float | None = None,
    on: Published = (),
    removed: pa.Table | None = None,
    still_mine: Callable[[], None] = lambda: None,
) -> Run:
    """Write the manifest, then `run.json`, which makes the run real.

    Args:
        output: the folder.
        run_id: the run's name.
        manifest: what it promises.
        facts: `spec`, `bundle` and whatever else `run.json` says.
        began: when the lease was taken, in seconds since the epoch. Not now: a run that slept over its lease and wakes up
            here must not look younger than its heir's.
        on: the published runs that this one adds to; without them its table is whole by itself.
        removed: uri and key of what it takes from their table.
        still_mine: raises if the lease is no longer ours; asked right before `run.json` is written.

    Raises:
        OutputError: there is a run of this name, which only a person can have given.
    """
    place = output.join(schema.RUNS, run_id)
    if place.join(schema.RUN).exists():
        raise OutputError(f"run_id: {output.url} has a run {run_id!r} already; give another name, or none.")
    place.join(schema.STAGED).delete()  # receipts of a run of this name whose `run.json` somebody removed
    data = to_parquet(manifest)
    manifest_sha256 = sha256(data)
    place.join(schema.MANIFEST).write(data)
    increment = increment_facts(on, removed)
    if removed is not None and removed.num_rows:
        place.join(schema.REMOVED).write(to_parquet(removed))
    full = {
        "schema_version": schema.SCHEMA_VERSION,
        "run_id": run_id,
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "manifest_sha256": manifest_sha256,
        "objects": manifest.num_rows,
        **facts,
        **increment,
        "fingerprint": fingerprint(facts["spec"], facts["bundle"], manifest_sha256, increment),
    }
    still_mine()
    place.join(schema.RUN).write(seal(full))
    return Run(place, full)


def increment_facts(on: Published, removed: pa.Table | None) -> dict[str, Any]:
    """What `run.json` says of a run that adds to others; empty for one whose table is whole by itself."""
    facts: dict[str, Any] = {"on": list(on)} if on else {}
    if removed is not None and removed.num_rows:
        facts["removed_sha256"] = sha256(to_parquet(removed))
    return facts


def fingerprint(spec: Mapping[str, Any], bundle: str, manifest_sha256: str, increment: Mapping[str, Any] | None = None) -> str:
    """sha256 over all that a run's answer depends on; `increment` is what it adds to and takes from a table, if it does."""
    asked = {"spec": {**spec, "bundle": bundle}, "manifest": manifest_sha256, **(increment or {})}
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
    with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
        bodies = list(pool.map(lambda name: unseal(run.staged.join(name).read()), wanted))
    good = [body for body in bodies if body is not None and body["part"] in there]
    broken = tuple(name for name, body in zip(wanted, bodies, strict=True) if body is None)
    return Receipts(tuple(sorted(good, key=lambda body: (body["rows"][0][0], body["part"]))), broken)


def settle(run: Run, receipts: Receipts) -> Receipts:
    """Fix once for all which parts a run is published from, and return their receipts.

    The first to put the plan decides. Whoever publishes the run later, after a crash or beside one that slept over its lease,
    writes the same files from the same parts, whatever else was staged meanwhile. A plan whose parts are no longer all there
    is put anew.

    Raises:
        BooksError: an object of the manifest is in no part.
    """
    missing = np.flatnonzero(receipts.owners(run.manifest.num_rows) < 0)
    if len(missing):
        raise BooksError(f"{run.manifest['key'][int(missing[0])]} was listed and is in no part; nothing is published.")
    place = run.staged.join(schema.PLAN)
    plan = seal({"parts": [body["part"] for body in receipts.bodies]})
    if place.create(plan):
        return receipts
    there = place.read()
    planned = set((unseal(there) or {"parts": [""]})["parts"])
    kept = Receipts(tuple(body for body in receipts.bodies if body["part"] in planned))
    if len(kept.bodies) == len(planned):
        return kept
    if not place.swap(plan, there):
        raise BooksError(f"Run {run.run_id} is being published by somebody else; nothing is published.")
    return receipts


def read_history(run: Run) -> list[list[float]]:
    """[seconds since the epoch, images done] while a run was at work; nothing where nobody kept it."""
    try:
        return list(json.loads(run.place.join(schema.PROGRESS).read()).get("history", []))
    except (FileNotFoundError, ValueError):
        return []


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
