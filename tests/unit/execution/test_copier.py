"""Rows that `compact` copies are staged so that each published file is made from parts with few other rows."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from support.tables import publish_images

from tlbatch import schema
from tlbatch.execution import rescorer
from tlbatch.execution.rescorer import Copier, CopyJob, blocks_of_matches, sources_of
from tlbatch.output.features import FeatureRun, FeatureTable
from tlbatch.output.parts import stage_parts
from tlbatch.output.publish import TableSpec, cut_file_tasks, write_files
from tlbatch.output.receipts import read_receipts
from tlbatch.output.run import Run, begin_run, read_report, read_table_runs
from tlbatch.output.table import current_runs, read_run_table, read_table
from tlbatch.storage.resolve import resolve

#: Rows of a published file.
FILE = 10


@pytest.fixture
def output(tmp_path):
    """Files whose ranges of rows begin elsewhere than those of the folded table: some objects have left."""
    output = resolve(str(tmp_path / "out"))
    publish_images(output, "n0", {f"{number:03d}": {"score": number / 100} for number in range(63)}, rows_per_file=FILE)
    publish_images(output, "n1", {"007": {"label": "dog"}, "041": {"kind": "empty"}}, removed=["002", "013", "014"])
    return output


def folded(output, cuts: np.ndarray) -> tuple[Run, pa.Table, int]:
    """The begun run with all rows staged, the table, and how many rows of parts its files are made from."""
    runs = read_table_runs(output)
    found = [FeatureRun(one.run, read_report(one.run), one.superseded) for one in current_runs(runs)]
    table = FeatureTable(tuple(found))
    facts = {"spec": runs[0].facts["spec"], "bundle": "b" * 64, "skipped": 0}
    run = begin_run(output, "n2", table.manifest, facts)
    copier = Copier(CopyJob(sources_of(table.matches(), predictions=True), {}, outcomes_wanted(), cuts))
    for block in blocks_of_matches(table.matches(), np.arange(60)):
        stage_parts([run.staged], copier(block))
    tasks = cut_file_tasks(read_receipts(run), 60, FILE)
    return run, read_table(runs, "predictions"), sum(count(part) for task in tasks for part in task.parts.values())


def outcomes_wanted() -> pa.Schema:
    return schema.outcome_schema(classified=True, features_length=None, features_dtype="float32")


def count(part) -> int:
    return sum(end - start for start, end in part["rows"])


def test_each_staged_row_is_read_about_once(output, monkeypatch):
    monkeypatch.setattr(rescorer, "_LEAST_OF_PART", 2)
    run, before, read = folded(output, np.arange(0, 60, FILE))
    assert read <= 1.2 * 60
    counts = write_files(run, read_receipts(run), TableSpec("n2", "b" * 64, "base", predictions=True, features=None))
    assert (counts.listed, counts.predicted, counts.failed) == (60, 59, 1)
    after = read_run_table(run.location, "predictions").drop_columns(["run_id"])
    assert after.to_pylist() == before.drop_columns(["run_id"]).sort_by("key").to_pylist()


def test_a_small_block_is_one_part(output):
    run, _, read = folded(output, np.arange(0, 60, FILE))
    assert len(read_receipts(run).bodies) == 8
    assert read > 1.5 * 60


def test_the_actors_read_the_manifest_and_are_not_sent_it(output):
    runs = read_table_runs(output)
    table = FeatureTable(tuple(FeatureRun(one.run, read_report(one.run), one.superseded) for one in current_runs(runs)))
    left = np.array([0, 1, 59])
    blocks = blocks_of_matches(table.matches(), left)
    assert [block.num_rows for block in blocks] == [1, 1], "only ranges with a wanted row"
    assert sum(block.nbytes for block in blocks) <= 8 * 2 * FILE + 100
    copier = Copier(CopyJob(sources_of(table.matches(), predictions=True), {}, outcomes_wanted(), np.array([0])))
    assert sorted(row for block in blocks for row in copier(block)["row"].to_pylist()) == left.tolist()
    assert not blocks_of_matches(table.matches(), np.array([], np.int64))
