"""A table in each form that a reader may want: which rows, in which order, and how much is read for them."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tables import publish_images

import tlbatch
from tlbatch import schema
from tlbatch.errors import ConfigError, OutputError
from tlbatch.output import table as tables
from tlbatch.storage.resolve import resolve

IMAGE = st.fixed_dictionaries(
    {
        "label": st.sampled_from(["cat", "dog"]),
        "score": st.sampled_from([0.25, 0.5, 1.0]),
        "kind": st.sampled_from([None, None, "empty"]),
    }
)
NIGHT = st.tuples(st.dictionaries(st.sampled_from("abcdefgh"), IMAGE, min_size=1), st.sets(st.sampled_from("ij")))
FILTERS = st.sampled_from(
    [
        None,
        [("score", "<", 0.75)],
        [[("score", "==", 1.0)], [("key", "in", ["a", "i"]), ("label", "=", "cat")]],
        pc.field("label") == "dog",
        (pc.field("score") > 0.3) & (pc.field("label") != "dog"),
    ]
)


def by_hand(frame: pd.DataFrame, filters) -> pd.DataFrame:
    if filters is None:
        return frame
    return schema.to_frame(pa.Table.from_pandas(frame, preserve_index=False).filter(pa.parquet.filters_to_expression(filters)))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(nights=st.lists(NIGHT, min_size=0, max_size=3), filters=FILTERS)
def test_filters_select_current_rows_and_batches_are_in_the_order_of_uris(nights, filters):
    with TemporaryDirectory() as folder:
        output = resolve(str(Path(folder) / "out"))
        publish_images(output, "n0", {key: {"score": 0.5} for key in "jihgfedcba"})
        for number, (images, removed) in enumerate(nights, 1):
            publish_images(output, f"n{number}", images, removed=sorted(removed))
        columns = ["key", "label", "score", "index"]
        expected = by_hand(tlbatch.read_predictions(output.url, columns), filters)
        found = tlbatch.read_predictions(output.url, columns, filters=filters)
        pd.testing.assert_frame_equal(found, expected, check_dtype=False)
        table = tlbatch.read_predictions(output.url, columns, format="arrow", filters=filters)
        assert table.to_pylist() == schema.to_frame(table).to_dict("records") == expected.to_dict("records")
        batches = list(tlbatch.read_predictions(output.url, columns, format="batches", filters=filters))
        rows = [row for batch in batches for row in batch.to_pylist()]
        assert rows == expected.sort_values("key").to_dict("records")
        failed = tlbatch.read_errors(output.url, ["key", "kind"]).sort_values("key")
        errors = tlbatch.read_errors(output.url, ["key", "kind"], format="batches")
        assert [row for batch in errors for row in batch.to_pylist()] == failed.to_dict("records")


def test_a_hidden_row_stays_hidden_though_the_newer_one_is_not_wanted(tmp_path):
    output = resolve(str(tmp_path / "out"))
    publish_images(output, "n0", {"a": {"score": 0.25}, "b": {"score": 0.25}, "c": {"score": 0.25}, "d": {"score": 0.25}})
    publish_images(output, "n1", {"a": {"score": 1.0}, "b": {"kind": "empty"}}, removed=["c"])
    for form in ("pandas", "arrow", "batches"):
        found = tlbatch.read_predictions(output.url, ["key"], format=form, filters=[("score", "<", 0.5)])
        found = pa.Table.from_batches(found) if form == "batches" else found
        assert list(found["key"] if form == "pandas" else found["key"].to_pylist()) == ["d"], form


@pytest.mark.parametrize("form", ["pandas", "arrow", "batches"])
def test_row_groups_that_cannot_have_wanted_rows_are_not_read(tmp_path, monkeypatch, form):
    monkeypatch.setattr(schema, "ROWS_OF_GROUP", 4)
    output = resolve(str(tmp_path / "out"))
    images = {f"{number:02d}": {"score": number / 32} for number in range(32)}
    publish_images(output, "n0", images, rows_per_file=16)
    read = []
    real = tables.read_group
    monkeypatch.setattr(tables, "read_group", lambda *one: read.append(one[1:]) or real(*one))
    found = tlbatch.read_predictions(output.url, ["key"], format=form, filters=[("score", ">=", 30 / 32)])
    rows = sum(batch.num_rows for batch in found) if form == "batches" else len(found)
    assert rows == 2
    of_all_columns = [(number, names) for number, names in read if "score" in names]
    assert of_all_columns == [(3, ["key", "uri", "score"])]


def test_batches_hold_a_few_pieces_of_a_table(tmp_path, monkeypatch):
    """Of 60 files of three rows, few are open while the first batches are used."""
    output = resolve(str(tmp_path / "out"))
    publish_images(output, "n0", {f"{number:03d}": {} for number in range(180)})
    read = []
    real = tables.read_group
    monkeypatch.setattr(tables, "read_group", lambda *one: read.append(one[2]) or real(*one))
    batches = tlbatch.read_predictions(output.url, ["key", "label"], format="batches")
    assert not read, "nothing is read before it is asked for"
    keys = next(batches)["key"].to_pylist()
    assert keys == [f"{number:03d}" for number in range(len(keys))]
    assert len([names for names in read if "label" in names]) <= 3
    assert sum(batch.num_rows for batch in batches) + len(keys) == 180


def test_a_table_that_is_not_in_the_order_of_its_uris_is_sorted(tmp_path):
    output = resolve(str(tmp_path / "out"))
    uris = np.random.default_rng(3).permutation(50)
    publish_images(output, "n0", {f"{number:02d}": {"uri": f"/s/{uris[number]:02d}"} for number in range(50)})
    publish_images(output, "n1", {f"{number:02d}": {"uri": f"/s/{uris[number]:02d}", "label": "dog"} for number in (40, 3)})
    found = pa.Table.from_batches(tlbatch.read_predictions(output.url, ["uri", "label"], format="batches"))
    assert found["uri"].to_pylist() == [f"/s/{number:02d}" for number in range(50)]
    dogs = found.filter(pc.field("label") == "dog")["uri"].to_pylist()
    assert dogs == sorted(f"/s/{uris[number]:02d}" for number in (40, 3))


def test_an_older_file_without_an_index_is_read_and_filtered(tmp_path):
    output = resolve(str(tmp_path / "out"))
    run = publish_images(output, "n0", {"a": {}, "b": {}})
    file = run.location.join("predictions", schema.part_name(0))
    file.write(schema.to_parquet(schema.from_parquet(file.read()).drop_columns([schema.INDEX])))
    (batch,) = tlbatch.read_predictions(output.url, format="batches", filters=[("key", "=", "b")])
    assert batch.to_pylist()[0]["index"] is None
    assert batch.schema.names == schema.PREDICTIONS.names
    assert tlbatch.read_predictions(output.url, filters=[("index", "=", 0)]).empty
    assert list(tlbatch.read_predictions(output.url).columns) == list(batch.schema.names)


@pytest.mark.parametrize("filters", [[], "score", [("nothing", "<", 1)], [("score", "~", 1)], pc.field("score"), [1]])
@pytest.mark.parametrize("form", ["pandas", "batches"])
def test_wrong_filters_are_a_sentence(tmp_path, filters, form):
    output = resolve(str(tmp_path / "out"))
    publish_images(output, "n0", {"a": {}})
    with pytest.raises(ConfigError, match="filters: "):
        tlbatch.read_predictions(output.url, format=form, filters=filters)


def test_nothing_published_is_said_before_the_first_batch(tmp_path):
    with pytest.raises(OutputError, match="Nothing is published"):
        tlbatch.read_errors(str(tmp_path), format="batches")
    with pytest.raises(ConfigError, match="format: write pandas, arrow, batches or ray; found 'csv'"):
        tlbatch.read_errors(str(tmp_path), format="csv")
