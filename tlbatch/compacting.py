"""The runs of many nights -> one run with the same table. No image is read and no model is run.

It is a run like any other: with a manifest, receipts, and a pointer that is swapped last. One that died is forgotten, because
the table is whole without it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tlbatch import commit, ledger, schema
from tlbatch.commit import Order, Promise
from tlbatch.config import CompactConfig
from tlbatch.errors import OutputError
from tlbatch.execution import Watcher, continued_later, heartbeat, small_pool, stage, write_windows
from tlbatch.features import FeatureRun, FeatureTable
from tlbatch.lease import require_free
from tlbatch.ledger import Published, Run, require_unchanged
from tlbatch.overlay import visible_layers
from tlbatch.publish import Each
from tlbatch.rescorer import Source, SourceReader, blocks_of, shaped, sources_of
from tlbatch.session import ray_session
from tlbatch.storage import resolve

#: What of the newest run is said of the compacted one: all but what is of a run itself.
_OF_THE_RUN = {"run_id", "began", "manifest_sha256", "objects", "fingerprint", "list_seconds", "counts", "on", "removed_sha256"}


def compact(config: CompactConfig, watch: Watcher | None = None) -> dict[str, Any]:
    """Fold the runs that make up a table into one.

    Returns:
        The report of the new run; of the one there is, with `already_done`, where the table is one run's.

    Raises:
        OutputError: nothing is published, or by several bundles.
    """
    output = resolve(config.output, config.storage_options)
    published = ledger.read_latest(output)
    if not published:
        raise OutputError(f"Nothing is published at {output.url}: it has no {schema.LATEST}.")
    runs = ledger.read_published(output, published)
    if len(runs) == 1:
        return {**commit.read_report(runs[0]), "already_done": True}
    seen = visible_layers(runs)
    bundles = sorted({layer.run.facts["bundle"][:12] for layer in seen})
    if len(bundles) > 1:
        raise OutputError(
            f"The table of {output.url} is of several bundles ({', '.join(bundles)}); bring it to one with "
            "`classify --incremental`, which does again what is of another one, and compact it then."
        )
    require_free(output)
    with ray_session(config.address) as start_ray:
        table = FeatureTable(tuple(FeatureRun(one.run, commit.read_report(one.run), one.hidden) for one in seen))
        work = _Compacting(config, table, published, watch)
        run_id = ledger.new_run_id()
        each = lambda function, windows: write_windows(start_ray, run_id, function, windows)  # noqa: E731
        start_ray()
        with continued_later(run_id):
            return commit.carry_out(output, work.order(each), run_id)


@dataclass
class _Compacting:
    """What the steps of one command share."""

    config: CompactConfig
    table: FeatureTable
    published: Published
    watch: Watcher | None

    def promise(self, published: Published) -> Promise:
        """All that the table holds; raises where somebody has published since it was read."""
        require_unchanged(self.published, published)
        return Promise(self.table.manifest, self.table.newest.facts["skipped"], 0.0)

    @cached_property
    def features(self) -> pa.Schema | None:
        """Schema of the features that every run of the table has; None where one lacks them or has others."""
        specs = [one.run.facts["spec"] for one in self.table.runs]
        kinds = {(spec["features"], spec.get("features_dtype")) for spec in specs}
        if len(kinds) > 1 or not specs[0]["features"]:
            return None
        name = next(name for name in self.table.runs[0].report["files"] if name.startswith("features/"))
        vector = pq.read_schema(pa.BufferReader(self.table.newest.place.join(*name.split("/")).read())).field("features").type
        return schema.features_schema(vector.list_size, specs[0]["features_dtype"])

    def order(self, each: Each) -> Order:
        """A run of the newest one's bundle and settings over all that the table holds."""
        newest = self.table.newest.facts
        folded = [one.run.run_id for one in reversed(self.table.runs)]
        spec = {**newest["spec"], "features": self.features is not None, "compacted": folded}
        return Order(
            spec=spec,
            bundle=newest["bundle"],
            base=newest["base"],
            predictions=newest["spec"]["predictions"],
            features=self.features,
            listing=self.promise,
            work=self.execute,
            facts={name: value for name, value in newest.items() if name not in _OF_THE_RUN | {"spec", "bundle", "skipped"}},
            each=each,
            final=True,
        )

    def execute(self, runs: Sequence[Run], left: pa.Table) -> None:
        """Everything between manifest and receipts: one block for all rows that stand in the same files."""
        held = self.table.held()
        blocks = blocks_of(held, left["row"].to_numpy())
        sources = sources_of(held, predictions=True)
        wanted = schema.outcome_schema(
            classified=runs[0].facts["spec"]["predictions"],
            features_length=self.features.field("features").type.list_size if self.features else None,
            features_dtype=runs[0].facts["spec"].get("features_dtype", "float32"),
        )
        job = Job(sources, self.config.storage_options, wanted)
        with heartbeat(runs[0], self.watch):
            stage(runs, blocks, [(Copier, small_pool(len(blocks), 1, None))], job)


@dataclass(frozen=True)
class Job:
    """What a `Copier` must know."""

    sources: tuple[Source, ...]
    storage_options: Mapping[str, Any]
    wanted: pa.Schema


class Copier:
    """The actor: rows of a run's manifest -> the outcome rows that its files have of them."""

    def __init__(self, job: Job, *, after_a_death: bool = False) -> None:  # noqa: ARG002 - Ray's signature
        self._read = SourceReader(job.sources, job.storage_options)
        self._wanted = job.wanted

    def __call__(self, block: pa.Table) -> pa.Table:
        """One window's rows."""
        began = time.perf_counter()
        found = self._read(block)
        rows = len(found.good) + len(found.bad)
        spent = {"fetch": (time.perf_counter() - began) / max(1, rows), "decode": 0.0, "predict": 0.0}
        each = {f"{name}_seconds": spent[name] for name in schema.TIMINGS}
        columns = [{name: table[name] for name in table.column_names} for table in found]
        return pa.concat_tables([shaped(one, each, self._wanted) for one in columns])
