"""An image's place in its shard: stored and read back; of older tables it is what their order tells, and else unknown."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.tables import SPEC, outcome, publish_run

from tlbatch import schema
from tlbatch.commands.read import read_predictions
from tlbatch.output.features import _positions
from tlbatch.output.parts import stage_part
from tlbatch.output.publish import TableSpec, write_files
from tlbatch.output.receipts import freeze_part_plan, read_receipts
from tlbatch.output.run import begin_run
from tlbatch.schema import INDEX, UNKNOWN_INDEX, from_parquet, to_parquet
from tlbatch.storage.resolve import resolve

TABLES = TableSpec("20260101T000000Z-000000", "b" * 64, "base", predictions=True, features=None)


def manifest(*formats: str) -> pa.Table:
    rows = range(len(formats))
    columns = {
        "uri": [f"/s/{n}" for n in rows],
        "key": [f"{n}" for n in rows],
        "size": [1] * len(rows),
        "etag": ["e"] * len(rows),
    }
    return pa.table({**columns, "format": list(formats)}, schema.MANIFEST_SCHEMA)


def seen(*images: tuple[str, str, int | None], stored: bool = True) -> pa.Table:
    uris, keys, places = zip(*images, strict=True) if images else ((), (), ())
    columns = {"uri": pa.array(uris, pa.string()), "key": pa.array(keys, pa.string())}
    return pa.table({**columns, INDEX: pa.array(places, pa.int32())} if stored else columns)


def positions(good: pa.Table, bad: pa.Table, rows: pa.Table) -> list[tuple[int, int]]:
    found = _positions([good, bad], rows.append_column("row", pa.array(np.arange(rows.num_rows))))
    return list(zip(found["row"].tolist(), found["index"].tolist(), strict=True))


def test_a_stored_place_is_kept_whatever_failed_between():
    good = seen(("/s/0", "a", 0), ("/s/0", "a", 2), ("/s/1", "1", 0))
    assert positions(good, seen(("/s/0", "a", 1)), manifest("tar", "image")) == [(0, 0), (0, 2), (1, 0), (0, 1)]


def test_a_shard_that_is_listed_twice_has_its_places_twice():
    rows = pa.concat_tables([manifest("tar"), manifest("tar")])
    good, bad = seen(*[("/s/0", "a", 0), ("/s/0", "b", 2)] * 2), seen(*[("/s/0", "c", 1)] * 2)
    assert positions(good, bad, rows) == [(0, 0), (0, 2), (1, 0), (1, 2), (0, 1), (1, 1)]


def test_the_order_of_an_older_table_tells_places_unless_images_failed_among_others():
    good = seen(("/s/0", "a", None), ("/s/0", "b", None), ("/s/1", "1", None), ("/s/2", "x", None), stored=False)
    bad = seen(("/s/2", "y", None), ("/s/3", "t", None), ("/s/3", "u", None), stored=False)
    unknown = [(2, UNKNOWN_INDEX), (2, UNKNOWN_INDEX + 1)]
    expected = [(0, 0), (0, 1), (1, 0), unknown[0], unknown[1], (3, 0), (3, 1)]
    assert positions(good, bad, manifest("tar", "image", "tar", "tar")) == expected
    # The same once it was copied, when unknown places are stored as null.
    nulls = [table.append_column(INDEX, pa.nulls(len(table), pa.int32())) for table in (good, bad)]
    assert positions(*nulls, manifest("tar", "image", "tar", "tar")) == expected


@pytest.fixture
def output(tmp_path):
    return resolve(str(tmp_path / "out"))


def publish(output, places: list[int], skipped: list[str | None]) -> pa.Table:
    """One shard whose images have these places; the published predictions."""
    facts = {"spec": SPEC, "bundle": "b" * 64, "skipped": 0}
    run = begin_run(output, TABLES.run_id, manifest("tar"), facts)
    rows = outcome([0] * len(places))
    rows = rows.set_column(rows.column_names.index(INDEX), INDEX, pa.array(places, pa.int32()))
    rows = rows.set_column(rows.column_names.index(schema.PASSED), schema.PASSED, pa.array(skipped, pa.string()))
    rows = rows.set_column(
        rows.column_names.index(schema.IMAGES), schema.IMAGES, pa.array([len(places)] * len(places), pa.int32())
    )
    for _ in range(2):  # a task that ran twice
        stage_part(run.staged, rows)
    receipts = freeze_part_plan(run, read_receipts(run))
    assert receipts.passed(1) == {"sidecars": 2, "links": 1}
    write_files(run, receipts, TABLES)
    report = {"listed": 3, "predicted": 3, "failed": 0, "failed_by_kind": {}, "labels": {}, "manifest_sha256": "", "files": {}}
    publish_run(output, run, report)
    return pq.read_table(run.location.path / "predictions" / "part-00000.parquet")


def test_places_are_published_and_unknown_ones_are_null(output, tmp_path):
    told = ['{"sidecars": 2, "links": 1}', None, None]
    assert publish(output, [0, 1, 2], told)[INDEX].to_pylist() == [0, 1, 2]
    unknown = [UNKNOWN_INDEX + number for number in range(3)]
    assert publish(resolve(str(tmp_path / "other")), unknown, told)[INDEX].to_pylist() == [None] * 3


def test_an_older_table_is_read_with_null(output):
    publish(output, [0, 1, 2], ['{"sidecars": 2, "links": 1}', None, None])
    file = output.join("runs", TABLES.run_id, "predictions", "part-00000.parquet")
    file.write(to_parquet(from_parquet(file.read()).drop_columns([INDEX])))
    assert read_predictions(output.url)[INDEX].isna().all()
    assert list(read_predictions(output.url, [INDEX, "key"]).columns) == [INDEX, "key"]
    assert list(read_predictions(output.url, ["label"]).columns) == ["label"]
