"""`compact` folds the runs of a table into one, whatever files the runs have."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from support.pictures import write_store

import tlbatch
from tlbatch.output import publish

pytestmark = pytest.mark.usefixtures("ray_here")


def table(output: str) -> pd.DataFrame:
    """A table without what tells one run from another."""
    frame = tlbatch.read_predictions(output).drop(columns=["run_id"])
    return frame.sort_values("key").reset_index(drop=True)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("features", [False, True])
def test_a_table_of_several_files_is_folded(tmp_path, tiny_url, monkeypatch, features):
    """A later range without features and without a failed image has neither a features nor an errors file."""
    monkeypatch.setattr(publish, "ROWS_PER_FILE", 5)
    monkeypatch.setattr(publish, "FEATURE_BYTES_PER_FILE", 5 * 8 * 2)
    store = write_store(tmp_path / "store", 4)
    (store / "blue" / "0000.jpg").write_bytes(b"\xff\xd8\xff")
    settings = {"images": str(store), "bundle": tiny_url, "output": str(tmp_path / "out"), "features": features}
    first = tlbatch.classify(**settings, max_failed_ratio=1.0)
    assert [name for name in first["files"] if name.startswith("errors/")] == ["errors/part-00000.parquet"]
    assert len([name for name in first["files"] if name.startswith("predictions/")]) == 3
    write_store(store, 1, first=4)
    tlbatch.classify(**settings, incremental=True)
    before = table(settings["output"])
    assert len(before) == 14
    folded = tlbatch.compact(output=settings["output"])
    assert (folded["listed"], folded["predicted"], folded["failed"]) == (15, 14, 1)
    pd.testing.assert_frame_equal(table(settings["output"]), before)
    assert tlbatch.verify(settings["output"])["ok"]
    assert tlbatch.status(settings["output"])["published"] == [folded["run_id"]]
    assert tlbatch.compact(output=settings["output"])["already_done"]
    assert not list(Path(settings["output"]).rglob("staged"))
