"""The actor that gives stored features another head's predictions: rows of a run with features -> outcome rows.

No image is read. The features of what is promised may lie in several runs, and in files that hold much else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tlbatch import schema
from tlbatch.errors import ErrorKind, Failure
from tlbatch.execution import Pool, small_pool, stage
from tlbatch.features import Found, Held, Window, matrix, read_window, window_of
from tlbatch.ledger import Run
from tlbatch.model.bundle import load_bundle
from tlbatch.model.engines import load_head
from tlbatch.storage import resolve
from tlbatch.worker import answers_of

#: Columns of a block beside those of the manifest: which source it is of, and which promised row each of its rows stands for.
_SOURCE, _TARGET = "source", "target"


@dataclass(frozen=True)
class Source:
    """A run with features, as an actor must know it."""

    url: str
    windows: tuple[Window, ...]


@dataclass(frozen=True)
class Job:
    """What a `Rescorer` must know. It travels with every task, so there is no credential in it."""

    bundle_url: str
    storage_options: Mapping[str, Any]
    sources: tuple[Source, ...]
    engine: str
    threads: int
    top_k: int
    #: Precision of the features that are written along; None where they are not.
    features_dtype: str | None = None


def sources_of(held: Sequence[Held], *, predictions: bool = False) -> tuple[Source, ...]:
    """The runs that are read, in the order of the blocks' numbers; their predictions too where they are wanted."""
    return tuple(Source(one.source.run.place.url, tuple(one.source.windows(predictions=predictions))) for one in held)


def blocks_of(held: Sequence[Held], left: np.ndarray) -> list[pa.Table]:
    """One block for all rows that stand in the same files, where one of them is wanted.

    Args:
        held: where the features of the promised rows are.
        left: which promised rows are still wanted.
    """
    blocks = []
    for number, one in enumerate(held):
        target = np.where(np.isin(one.target, left), one.target, -1)
        rows = one.source.run.manifest.select(["uri", "key", "format"])
        rows = rows.append_column("row", pa.array(np.arange(rows.num_rows)))
        rows = rows.append_column(_TARGET, pa.array(target)).append_column(_SOURCE, pa.array(np.full(rows.num_rows, number)))
        wanted = [one for one in one.source.windows() if (target[one.start : one.end] >= 0).any()]
        blocks += [rows.slice(window.start, window.end - window.start) for window in wanted]
    return blocks


class SourceReader:
    """In an actor: blocks of `blocks_of` -> what the runs say of the wanted rows, each with the promised row it stands for."""

    def __init__(self, sources: Sequence[Source], storage_options: Mapping[str, Any]) -> None:
        self._sources = [(resolve(one.url, storage_options), one.windows) for one in sources]

    def __call__(self, block: pa.Table) -> Found:
        """One block: the files of one window."""
        run, windows = self._sources[block[_SOURCE][0].as_py()]
        window = window_of(windows, block["row"][0].as_py())
        target = block[_TARGET].to_numpy()
        return Found(*(_moved(table, target, window.start) for table in read_window(run, window, block)))


def _moved(table: pa.Table, target: np.ndarray, start: int) -> pa.Table:
    rows = target[table["row"].to_numpy() - start]
    table = table.set_column(table.column_names.index("row"), "row", pa.array(rows, pa.int64()))
    return table.filter(pa.array(rows >= 0))


class Rescorer:
    """Blocks of a run's manifest -> outcome rows, out of the files that hold their features."""

    def __init__(self, job: Job, *, after_a_death: bool = False) -> None:  # noqa: ARG002 - Ray's signature
        bundle = load_bundle(job.bundle_url, job.storage_options)
        self._head = load_head(bundle, job.engine, threads=job.threads)
        self._answers = answers_of(bundle, job.top_k)
        self._read = SourceReader(job.sources, job.storage_options)
        self._wanted = schema.outcome_schema(
            classified=True,
            features_length=bundle.features_length if job.features_dtype else None,
            features_dtype=job.features_dtype or "float32",
        )
        self._lock = threading.Lock()

    def __call__(self, block: pa.Table) -> pa.Table:
        """One window's predictions."""
        began = time.perf_counter()
        found = self._read(block)
        read = time.perf_counter() - began
        values = matrix(found.good["features"])
        with self._lock:  # Ray hands a second block to this actor while the first is at work
            began = time.perf_counter()
            scores = self._head.predict(values)
        seconds = {"fetch": read, "decode": 0.0, "predict": time.perf_counter() - began}
        return self._outcomes(found, values, scores, seconds)

    def _outcomes(self, found: Found, values: np.ndarray, scores: np.ndarray, seconds: Mapping[str, float]) -> pa.Table:
        """The rows that the writer stages: predictions of good images, and failures as they were."""
        finite = np.isfinite(values).all(axis=1) & np.isfinite(scores).all(axis=1)
        fine = pa.array(finite)
        known = {name: found.good[name].filter(fine) for name in found.good.column_names}
        failure = Failure("predict", ErrorKind.PREDICT_FAILED, "the features, or the scores made of them, are not finite")
        wrong = found.good.drop_columns(["features"]).filter(pc.invert(fine))
        said = {
            "stage": failure.stage,
            "kind": str(failure.kind),
            "message": failure.message,
            "attempts": 1,
            "transient": False,
        }
        tables = [
            {**known, **self._answers.columns(scores[finite])},
            {name: wrong[name] for name in wrong.column_names}
            | {name: pa.array([value] * len(wrong)) for name, value in said.items()},
            {name: found.bad[name] for name in found.bad.column_names},
        ]
        rows = len(found.good) + len(found.bad)
        each = {f"{name}_seconds": seconds[name] / max(1, rows) for name in schema.TIMINGS}
        return pa.concat_tables([shaped(columns, each, self._wanted) for columns in tables])


def stage_held(runs: Sequence[Run], held: Sequence[Held], left: np.ndarray, job: Job, concurrency: int | None) -> Pool:
    """Stage the predictions of promised rows from the features that are held; returns the actors that did it.

    Args:
        runs: whose parts they are.
        held: where the features are.
        left: the promised rows that are wanted.
        job: what the actors are told.
        concurrency: the most actors at once.
    """
    blocks = blocks_of(held, left)
    pool = small_pool(len(blocks), job.threads, concurrency)
    stage(runs, blocks, [(Rescorer, pool)], job)
    return pool


def shaped(columns: Mapping[str, Any], each: Mapping[str, float], wanted: pa.Schema) -> pa.Table:
    """Columns as a table of a schema; `each` has the same value in every row, and what is missing is null."""
    rows = len(columns["row"])
    arrays = []
    for field in wanted:
        if field.name in each:
            arrays.append(pa.array(np.full(rows, each[field.name]), field.type))
        elif field.name in columns:
            arrays.append(columns[field.name].cast(field.type))
        else:
            arrays.append(pa.nulls(rows, field.type))
    return pa.Table.from_arrays(arrays, schema=wanted)
