"""Stored features -> predictions of another head, by actors: rows of a run with features -> outcome rows.

No image is read. The features of one run's input may be stored in several runs, in files that contain other rows, too.
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
from tlbatch.execution.blocks import ManifestRows
from tlbatch.execution.executor import run_actors
from tlbatch.execution.predictor import prediction_format_of
from tlbatch.execution.resources import ActorPool, io_pool
from tlbatch.model.bundle import load_bundle
from tlbatch.model.engines import load_head
from tlbatch.output.features import FeatureMatch, StoredOutcomes, matrix, range_of_row, read_range
from tlbatch.output.progress import Staged
from tlbatch.output.run import Run
from tlbatch.output.table import FileRange
from tlbatch.storage.resolve import resolve

#: Columns of a block, which has one row: the number of its source, the first manifest row of its range, and for each row of the
#: range the row of the input, or -1.
_SOURCE, _START, _TARGET = "source", "start", "target"
#: Rows from which a part costs less than reading a larger part twice.
_LEAST_OF_PART = 10_000


@dataclass(frozen=True)
class Source:
    """A run with features, as far as an actor needs it."""

    url: str
    ranges: tuple[FileRange, ...]


@dataclass(frozen=True)
class RescoreJob:
    """The job of a `Rescorer`. It travels with every task, so it contains no credentials."""

    bundle_url: str
    storage_options: Mapping[str, Any]
    sources: tuple[Source, ...]
    engine: str
    threads: int
    top_k: int
    #: Precision of the features that are written again; None if they are not.
    features_dtype: str | None = None


def sources_of(matches: Sequence[FeatureMatch], *, predictions: bool = False) -> tuple[Source, ...]:
    """The runs to read, in the order of their numbers in the blocks; their predictions only if they are wanted."""
    return tuple(Source(one.source.run.location.url, tuple(one.source.ranges(predictions=predictions))) for one in matches)


def blocks_of_matches(matches: Sequence[FeatureMatch], left: np.ndarray) -> list[pa.Table]:
    """One block for each range of files that contains a wanted row; the actors read the manifest rows of the range.

    Args:
        matches: where the features of the input's rows are stored.
        left: the rows of the input that are still to do.
    """
    blocks = []
    wanted = np.zeros(1 + max((int(one.target.max(initial=0)) for one in matches), default=0), bool)
    wanted[left[left < len(wanted)]] = True
    for number, one in enumerate(matches):
        for files in one.source.ranges():
            target = one.target[files.start : files.end]
            mask = (target >= 0) & wanted[target]
            if mask.any():
                columns = {_SOURCE: [number], _START: [files.start], _TARGET: [np.where(mask, target, -1)]}
                blocks.append(pa.table(columns))
    return blocks


class SourceReader:
    """In an actor: blocks of `blocks_of_matches` -> the stored outcomes of the wanted rows, numbered like the input."""

    def __init__(self, sources: Sequence[Source], storage_options: Mapping[str, Any]) -> None:
        runs = [resolve(one.url, storage_options) for one in sources]
        self._sources = [(run, one.ranges, ManifestRows(run)) for run, one in zip(runs, sources, strict=True)]

    def __call__(self, block: pa.Table) -> StoredOutcomes:
        """One block: the files of one range."""
        run, ranges, manifest = self._sources[block[_SOURCE][0].as_py()]
        files = range_of_row(ranges, block[_START][0].as_py())
        target = block[_TARGET][0].values.to_numpy()
        found = read_range(run, files, manifest.between(files.start, files.end))
        return StoredOutcomes(*(_renumbered(table, target, files.start) for table in found))


def _renumbered(table: pa.Table, target: np.ndarray, start: int) -> pa.Table:
    rows = target[table["row"].to_numpy() - start]
    table = table.set_column(table.column_names.index("row"), "row", pa.array(rows, pa.int64()))
    return table.filter(pa.array(rows >= 0))


class Rescorer:
    """The actor: blocks of `blocks_of_matches` -> outcome rows, from the files with their features."""

    def __init__(self, job: RescoreJob, *, after_a_death: bool = False) -> None:  # noqa: ARG002 - Ray's signature
        bundle = load_bundle(job.bundle_url, job.storage_options)
        self._head = load_head(bundle, job.engine, threads=job.threads)
        self._predictions = prediction_format_of(bundle, job.top_k)
        self._read = SourceReader(job.sources, job.storage_options)
        self._wanted = schema.outcome_schema(
            classified=True,
            features_length=bundle.features_length if job.features_dtype else None,
            features_dtype=job.features_dtype or "float32",
        )
        self._lock = threading.Lock()

    def __call__(self, block: pa.Table) -> pa.Table:
        """The predictions of one range."""
        began = time.perf_counter()
        found = self._read(block)
        read = time.perf_counter() - began
        values = matrix(found.good["features"])
        with self._lock:  # Ray gives this actor a second block before the first one is done
            began = time.perf_counter()
            scores = self._head.predict(values)
        seconds = {"fetch": read, "decode": 0.0, "predict": time.perf_counter() - began}
        return self._outcomes(found, values, scores, seconds)

    def _outcomes(
        self, found: StoredOutcomes, values: np.ndarray, scores: np.ndarray, seconds: Mapping[str, float]
    ) -> pa.Table:
        """The rows to stage: new predictions of good images, and the stored failures."""
        finite = np.isfinite(values).all(axis=1) & np.isfinite(scores).all(axis=1)
        mask = pa.array(finite)
        predicted = {name: found.good[name].filter(mask) for name in found.good.column_names}
        failure = Failure("predict", ErrorKind.PREDICT_FAILED, "the features, or the scores computed from them, are not finite")
        failed = found.good.drop_columns(["features"]).filter(pc.invert(mask))
        reason = {
            "stage": failure.stage,
            "kind": str(failure.kind),
            "message": failure.message,
            "attempts": 1,
            "transient": False,
        }
        tables = [
            {**predicted, **self._predictions.columns(scores[finite])},
            {name: failed[name] for name in failed.column_names}
            | {name: pa.array([value] * len(failed)) for name, value in reason.items()},
            {name: found.bad[name] for name in found.bad.column_names},
        ]
        rows = len(found.good) + len(found.bad)
        each = {f"{name}_seconds": seconds[name] / max(1, rows) for name in schema.TIMINGS}
        return pa.concat_tables([with_schema(columns, each, self._wanted) for columns in tables])


def rescore_matches(
    runs: Sequence[Run],
    matches: Sequence[FeatureMatch],
    left: np.ndarray,
    job: RescoreJob,
    concurrency: int | None,
    staged: Staged,
) -> ActorPool:
    """Stage predictions from stored features; returns the pool of actors.

    Args:
        runs: the runs that get the parts.
        matches: where the features of the input's rows are stored.
        left: the rows of the input that are still to do.
        job: the job of the actors.
        concurrency: the most actors at once.
        staged: called with the receipts of each part.
    """
    blocks = blocks_of_matches(matches, left)
    pool = io_pool(len(blocks), job.threads, concurrency)
    run_actors(runs, blocks, [(Rescorer, pool)], job, staged)
    return pool


def with_schema(columns: Mapping[str, Any], each: Mapping[str, float], wanted: pa.Schema) -> pa.Table:
    """Columns as a table of a schema. `each` gives columns with one value for all rows; missing columns are null."""
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


@dataclass(frozen=True)
class CopyJob:
    """The job of a `Copier`.

    Attributes:
        sources: the runs to read.
        storage_options: fsspec's options for them.
        wanted: the columns of the outcome.
        cuts: sorted rows of the input at which a large block is cut into parts. The published files begin about there, so that
            each is made from parts with few other rows.
    """

    sources: tuple[Source, ...]
    storage_options: Mapping[str, Any]
    wanted: pa.Schema
    cuts: np.ndarray


class Copier:
    """The actor: blocks of `blocks_of_matches` -> the stored outcome rows."""

    def __init__(self, job: CopyJob, *, after_a_death: bool = False) -> None:  # noqa: ARG002 - Ray's signature
        self._read = SourceReader(job.sources, job.storage_options)
        self._wanted, self._cuts = job.wanted, job.cuts

    def __call__(self, block: pa.Table) -> pa.Table:
        """The rows of one range."""
        began = time.perf_counter()
        found = self._read(block)
        rows = len(found.good) + len(found.bad)
        spent = {"fetch": (time.perf_counter() - began) / max(1, rows), "decode": 0.0, "predict": 0.0}
        each = {f"{name}_seconds": spent[name] for name in schema.TIMINGS}
        columns = [{name: table[name] for name in table.column_names} for table in found]
        outcomes = pa.concat_tables([with_schema(one, each, self._wanted) for one in columns])
        parts = np.searchsorted(self._cuts, outcomes["row"].to_numpy(), side="right")
        worthwhile = outcomes.num_rows >= _LEAST_OF_PART * len(np.unique(parts))
        return outcomes.append_column(schema.PART, pa.array(parts if worthwhile else np.zeros_like(parts)))
