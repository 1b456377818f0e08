"""The runs of a table -> one run with the same table. No image is read and no model is run.

It is a run like any other: with a manifest, receipts, and a pointer that is swapped last. If it dies it is abandoned, because
the table is complete without it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tlbatch import schema
from tlbatch.config import CompactConfig
from tlbatch.errors import OutputError
from tlbatch.execution.executor import map_file_tasks, run_actors
from tlbatch.execution.ray_errors import errors_say_how_to_continue
from tlbatch.execution.rescorer import Copier, CopyJob, blocks_of_matches, sources_of
from tlbatch.execution.resources import io_pool
from tlbatch.execution.session import ray_session
from tlbatch.output.commit import Promotion, RunInput, RunSpec, Target, WorkStats, run_to_publication
from tlbatch.output.documents import ReportDocument
from tlbatch.output.features import FeatureRun, FeatureTable
from tlbatch.output.lease import require_free
from tlbatch.output.progress import Watcher, heartbeat
from tlbatch.output.run import OutputState, Pointer, Run, new_run_id, read_output, read_report, require_unchanged
from tlbatch.output.table import current_runs
from tlbatch.storage.resolve import resolve

#: Facts of a run that describe this run alone, and so are not those of the compacted one.
_OF_THE_RUN = {
    "run_id",
    "began",
    "manifest_sha256",
    "objects",
    "bounds",
    "fingerprint",
    "list_seconds",
    "counts",
    "on",
    "removed_sha256",
}


def compact(config: CompactConfig, watch: Watcher | None = None) -> ReportDocument:
    """Fold the runs that make up a table into one.

    Returns:
        The report of the new run; if the table is one run's already, the report of that run, with `already_done`.

    Raises:
        OutputError: nothing is published, or the table has rows of several bundles.
    """
    output = resolve(config.output, config.storage_options)
    state = read_output(output)
    if not state.pointer:
        raise OutputError(f"Nothing is published at {output.url}: it has no {schema.LATEST}.")
    runs = state.table
    if len(runs) == 1:
        return {**read_report(runs[0]), "already_done": True}
    current = current_runs(runs)
    bundles = sorted({one.run.facts["bundle"][:12] for one in current})
    if len(bundles) > 1:
        raise OutputError(
            f"The table of {output.url} has rows of several bundles ({', '.join(bundles)}). Bring it to one bundle with "
            "`classify --incremental`, which redoes the rows of the others, and compact it then."
        )
    require_free(output)
    with ray_session(config.address) as start_ray:
        began = time.monotonic()
        table = FeatureTable(tuple(FeatureRun(one.run, read_report(one.run), one.superseded) for one in current))
        work = CompactWork(config, table, state.pointer, watch)
        run_id = new_run_id()
        start_ray()
        with errors_say_how_to_continue(run_id):
            spread = partial(map_file_tasks, start_ray, run_id, watch)
            (report,) = run_to_publication([Target(output, work.spec, work)], run_id, began=began, map_tasks=spread)
            return report


@dataclass(frozen=True)
class CompactWork:
    """The work of `compact`; `published` is the table that was read."""

    config: CompactConfig
    table: FeatureTable
    published: Pointer
    watch: Watcher | None

    @cached_property
    def features(self) -> pa.Schema | None:
        """Schema of the features that every run of the table has; None if a run lacks them or has others."""
        specs = [one.run.facts["spec"] for one in self.table.runs]
        kinds = {(spec["features"], spec.get("features_dtype")) for spec in specs}
        if len(kinds) > 1 or not specs[0]["features"]:
            return None
        name = next(name for name in self.table.runs[0].report["files"] if name.startswith("features/"))
        data = self.table.newest.location.join(*name.split("/")).read()
        vector = pq.read_schema(pa.BufferReader(data)).field("features").type
        return schema.features_schema(vector.list_size, specs[0]["features_dtype"])

    @property
    def spec(self) -> RunSpec:
        """A run with the newest run's bundle and settings over all that the table holds."""
        newest = self.table.newest.facts
        folded = [one.run.run_id for one in reversed(self.table.runs)]
        facts = cast("Mapping[str, Any]", newest)
        return RunSpec(
            spec={**newest["spec"], "features": self.features is not None, "compacted": folded},
            bundle=newest["bundle"],
            base=newest["base"],
            predictions=newest["spec"]["predictions"],
            features=self.features,
            facts={name: value for name, value in facts.items() if name not in _OF_THE_RUN | {"spec", "bundle", "skipped"}},
            final=True,
        )

    def plan(self, state: OutputState) -> RunInput:
        """All objects of the table; raises if another run was published since it was read."""
        require_unchanged(self.published, state.pointer)
        return RunInput(self.table.manifest, self.table.newest.facts["skipped"], 0.0)

    def process(self, runs: Sequence[Run], rows: pa.Table) -> WorkStats:
        """Copy rows out of the published files: one block for all rows of one file range."""
        matches = self.table.matches()
        blocks = blocks_of_matches(matches, rows["row"].to_numpy())
        wanted = schema.outcome_schema(
            classified=runs[0].facts["spec"]["predictions"],
            features_length=self.features.field("features").type.list_size if self.features else None,
            features_dtype=runs[0].facts["spec"].get("features_dtype", "float32"),
        )
        cuts = np.arange(0, self.table.manifest.num_rows, self.spec.tables(runs[0]).rows_per_file)
        job = CopyJob(sources_of(matches, predictions=True), self.config.storage_options, wanted, cuts)
        with heartbeat(runs, self.watch) as staged:
            run_actors(runs, blocks, [(Copier, io_pool(len(blocks), 1, None))], job, staged)
        return WorkStats()

    def promotion_check(self, *_: object) -> Promotion:
        """A compacted run is always published."""
        return Promotion()
