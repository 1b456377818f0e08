"""Publish a run whose outcomes are generated instead of computed, for measurements of everything after the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pyarrow as pa

from tlbatch.commands.classify import OutputTable
from tlbatch.commands.list_images import list_images
from tlbatch.output.commit import Promotion, RunInput, Target, WorkStats, run_to_publication
from tlbatch.output.run import OutputState, Run

#: Stages the outcome of manifest rows as parts of the runs.
Stage = Callable[[Sequence[Run], pa.Table], None]


def publish_generated(table: OutputTable, stage: Stage) -> None:
    """List the table's store, stage its rows with `stage`, and publish them as run `one`."""
    run_to_publication([Target(table.output, table.spec, _GeneratedWork(table, stage))], "one", began=time.monotonic())


class _GeneratedWork:
    def __init__(self, table: OutputTable, stage: Stage) -> None:
        self._table, self._stage = table, stage

    def plan(self, state: OutputState) -> RunInput:
        listing = list_images(self._table.config, state.output)
        return RunInput(listing.manifest, listing.skipped, listing.seconds)

    def process(self, runs: Sequence[Run], rows: pa.Table) -> WorkStats:
        self._stage(runs, rows)
        return WorkStats()

    def promotion_check(self, *_: object) -> Promotion:
        return Promotion()
