"""Parts become the table: each image once, in order, the same bytes whatever the scheduling, or nothing at all."""

import re
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.tables import begin, outcome, publish_run

from tlbatch import schema
from tlbatch.commands.read import read_predictions
from tlbatch.errors import CountsError
from tlbatch.output import publish
from tlbatch.output.parts import stage_part
from tlbatch.output.publish import TableSpec, mark_complete, remove_staged, write_files
from tlbatch.output.receipts import freeze_part_plan, read_receipts
from tlbatch.output.run import begin_run, read_pointer
from tlbatch.storage.resolve import resolve

TABLES = TableSpec("20260101T000000Z-000000", "b" * 64, "base", predictions=True, features=None)

REPORT = {
    "listed": 100,
    "predicted": 100,
    "failed": 0,
    "failed_by_kind": {},
    "labels": {},
    "manifest_sha256": "",
    "files": {},
}


@pytest.fixture
def run(tmp_path):
    return begin(resolve(str(tmp_path / "out")), 100)


def stage(run, cuts: list[int], failed: tuple[int, ...] = ()) -> None:
    """The rows of the manifest in parts that begin at `cuts`."""
    edges = [0, *cuts, 100]
    for start, end in pairwise(edges):
        stage_part(run.staged, outcome(list(range(start, end)), failed))


def write(run, tables=TABLES):
    return write_files(run, freeze_part_plan(run, read_receipts(run)), tables)


def test_each_image_is_in_one_table_in_manifest_order(run):
    stage(run, [30, 60], failed=(7, 61))
    books = write(run)
    assert (books.predicted, books.failed, books.failed_by_kind, books.labels) == (98, 2, {"empty": 2}, {"cat": 98})
    predictions = pq.read_table(run.location.path / "predictions" / "part-00000.parquet")
    errors = pq.read_table(run.location.path / "errors" / "part-00000.parquet")
    assert predictions.schema.equals(schema.PREDICTIONS, check_metadata=True)
    assert errors.schema.equals(schema.ERRORS, check_metadata=True)
    assert predictions["key"].to_pylist() == [f"{n:06d}.jpg" for n in range(100) if n not in (7, 61)]
    assert errors["key"].to_pylist() == ["000007.jpg", "000061.jpg"]
    assert set(predictions["run_id"].to_pylist()) == {TABLES.run_id}


def test_the_same_rows_give_the_same_bytes_however_they_were_cut_and_repeated(run, tmp_path):
    stage(run, [10, 50])
    reference = write(run).files
    for seed in range(5):
        other = begin(resolve(str(tmp_path / f"other{seed}")), 100)
        random = np.random.default_rng(seed)
        stage(other, sorted(random.choice(np.arange(1, 100), 7, replace=False).tolist()))
        stage_part(other.staged, outcome(sorted(random.choice(100, 20, replace=False).tolist())))  # a retried task
        assert write(other).files == reference


def test_files_are_cut_by_the_manifest(run, monkeypatch):
    monkeypatch.setattr(publish, "ROWS_PER_FILE", 40)
    stage(run, [33, 66], failed=(50,))
    books = write(run)
    assert {name: facts["rows"] for name, facts in books.files.items()} == {
        "predictions/part-00000.parquet": 40,
        "errors/part-00000.parquet": 0,
        "predictions/part-00001.parquet": 39,
        "errors/part-00001.parquet": 1,
        "predictions/part-00002.parquet": 20,
    }


def test_features_are_cut_by_their_bytes():
    tables = TableSpec("r", "b", "base", predictions=False, features=schema.features_schema(1280, "float16"))
    assert tables.rows_per_file == 256 * 1024 * 1024 // 2560


@pytest.mark.parametrize("missing", [0, 57, 99])
def test_a_missing_image_is_named_and_nothing_is_published(run, missing):
    rows = [row for row in range(100) if row != missing]
    stage_part(run.staged, outcome(rows))
    with pytest.raises(CountsError, match=rf"{missing:06d}\.jpg was listed and is in no part; nothing is published"):
        write(run)


def test_no_part_at_all_is_named_too(run):
    with pytest.raises(CountsError, match=r"000000\.jpg was listed and is in no part"):
        write(run)


def test_a_part_that_differs_from_its_receipt_is_refused(run):
    stage(run, [50])
    name = next(name for name in run.staged.names() if name.endswith(".parquet"))
    data = bytearray(run.staged.join(name).read())
    data[100] ^= 1
    run.staged.join(name).write(bytes(data))
    with pytest.raises(CountsError, match=re.escape(f"{name} differs from its receipt")):
        write(run)


def test_the_flip_is_the_last_word(run, tmp_path):
    output = resolve(str(tmp_path / "out"))
    stage(run, [50])
    write(run)
    assert read_pointer(output) == []
    held = []
    publish_run(output, run, REPORT, lambda: held.append(read_pointer(output)))
    assert held == [[]], "the lease is asked for before the flip"
    assert [entry["run_id"] for entry in read_pointer(output)] == [run.run_id]
    remove_staged(run)
    mark_complete(run)
    assert run.finished()
    assert not run.staged.exists()
    assert len(read_predictions(output.url)) == 100


def test_a_lost_lease_publishes_nothing(run, tmp_path):
    def lost():
        raise CountsError("lost")

    stage(run, [50])
    write(run)
    with pytest.raises(CountsError, match="lost"):
        publish_run(resolve(str(tmp_path / "out")), run, REPORT, lost)
    assert read_pointer(resolve(str(tmp_path / "out"))) == []


def test_a_pointer_that_moved_meanwhile_is_not_overwritten(run, tmp_path):
    output = resolve(str(tmp_path / "out"))
    stage(run, [50])
    write(run)
    theirs = schema.seal({"runs": [{"run_id": "theirs", "books_sha256": ""}]})
    with pytest.raises(CountsError, match="Another process changed"):
        publish_run(output, run, REPORT, lambda: output.join(schema.LATEST).write(theirs))
    assert output.join(schema.LATEST).read() == theirs


def test_the_newest_row_of_a_key_is_the_tables(tmp_path):
    output = resolve(str(tmp_path / "out"))
    for run_id, score in (("1", 0.25), ("2", 0.75)):
        promised = [{"uri": uri, "key": uri, "size": 1, "etag": run_id, "format": "image"} for uri in ("u", run_id)]
        promised = pa.Table.from_pylist(promised, schema.MANIFEST_SCHEMA)
        begin_run(output, run_id, promised, {"spec": {}, "bundle": "b"}, on=read_pointer(output))
        rows = pa.table({field.name: pa.nulls(2, field.type) for field in schema.PREDICTIONS}, schema.PREDICTIONS)
        for name, values in (("uri", ["u", run_id]), ("key", ["k", run_id]), ("score", [score, 0.5])):
            number = rows.column_names.index(name)
            rows = rows.set_column(
                number, schema.PREDICTIONS.field(name), pa.array(values, schema.PREDICTIONS.field(name).type)
            )
        output.join("runs", run_id, "predictions", "part-00000.parquet").write(schema.to_parquet(rows))
        runs = [*read_pointer(output), {"run_id": run_id, "books_sha256": ""}]
        output.join(schema.LATEST).write(schema.seal({"runs": runs}))
    frame = read_predictions(output.url, ["key", "score"])
    assert dict(zip(frame["key"], frame["score"], strict=True)) == {"1": 0.5, "k": 0.75, "2": 0.5}
