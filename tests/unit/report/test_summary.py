"""A table and the one before it are summarized in one pass, with the numbers that each has by itself."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tables import publish_images

from tlbatch.output import table
from tlbatch.output.run import read_output, read_table_runs
from tlbatch.report.summary import TableSummary, summarize
from tlbatch.storage.resolve import resolve

IMAGE = st.fixed_dictionaries(
    {
        "label": st.sampled_from(["cat", "dog", "cow"]),
        "score": st.sampled_from([0.1, 0.25, 0.5, 1.0]),
        "abstained": st.booleans(),
        "kind": st.sampled_from([None, None, "empty", "timeout"]),
    }
)
NIGHT = st.tuples(st.dictionaries(st.sampled_from("abcdefgh"), IMAGE, min_size=1), st.sets(st.sampled_from("ij")))


def same(one: TableSummary, other: TableSummary, *, pictures: bool = True) -> None:
    assert (one.images, one.abstained, one.side) == (other.images, other.abstained, other.side)
    if pictures:
        assert list(one.labels) == list(other.labels)
        pd.testing.assert_frame_equal(one.shown, other.shown)
        pd.testing.assert_frame_equal(one.examples, other.examples)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(nights=st.lists(NIGHT, min_size=1, max_size=4), alone=st.booleans())
def test_both_tables_have_the_numbers_that_they_have_alone(nights, alone):
    with TemporaryDirectory() as folder:
        output = resolve(str(Path(folder) / "out"))
        publish_images(output, "n0", {key: {"score": 0.75} for key in "abcij"})
        for number, (images, removed) in enumerate(nights, 1):
            last = alone and number == len(nights)
            publish_images(output, f"n{number}", images, removed=[] if last else sorted(removed), alone=last)
        state = read_output(output)
        before = state.table_after(state.previous(state.newest))
        assert len(before) == len(nights)
        found = summarize(state.table, before, predictions=True, threshold=0.3)
        same(found[0], summarize(state.table, predictions=True, threshold=0.3)[0])
        same(found[1], summarize(before, predictions=True)[0], pictures=False)


@pytest.mark.parametrize("nights", [1, 3])
def test_each_file_is_read_once_for_both_tables(tmp_path, monkeypatch, nights):
    output = resolve(str(tmp_path / "out"))
    for night in range(nights + 1):
        publish_images(output, f"n{night}", {key: {} for key in "abcdefgh"[night:]})
    runs = read_table_runs(output)
    files = sum(len(run.location.join(folder).names()) for run in runs for folder in ("predictions", "errors"))
    opened, real = [], table.open_range_file
    monkeypatch.setattr(table, "open_range_file", lambda *one: opened.append(one[0].url) or real(*one))
    now, before = summarize(runs, runs[:-1], predictions=True)
    assert (now.images, before.images) == (8, 8)
    assert len(opened) == len(set(opened)) == files
