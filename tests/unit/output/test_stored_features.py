"""Stored features: which of them an object has, found by ranges of uris, and read some rows at a time."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tables import publish_images

from tlbatch.errors import CountsError
from tlbatch.output import features, ranges
from tlbatch.output.features import FeatureRun, FeatureTable, find_features, look_up, match_stored_features, runs_with_features
from tlbatch.output.run import read_output, read_report
from tlbatch.output.table import current_runs
from tlbatch.schema import MANIFEST_SCHEMA
from tlbatch.storage.resolve import resolve

ETAG = st.sampled_from(["e", "f", None])
STORED = st.fixed_dictionaries({"etag": ETAG, "kind": st.sampled_from([None, None, "timeout"])})
RUNS = st.lists(st.dictionaries(st.sampled_from("abcdefgh"), STORED, min_size=1), min_size=1, max_size=3)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(runs=RUNS, asked=st.dictionaries(st.sampled_from("abcdefghi"), ETAG), backwards=st.booleans())
def test_the_first_run_with_the_version_of_an_object_has_its_features(runs, asked, backwards):
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "ROWS_AT_ONCE", 2)
        output = resolve(str(Path(folder) / "out"))
        for number, images in enumerate(runs):
            rows = {key: {**image, "transient": image["kind"] is not None} for key, image in images.items()}
            publish_images(output, f"n{number}", rows, features=True)
        sources = runs_with_features(read_output(output))
        keys = sorted(asked, reverse=backwards)
        rows = [{"uri": f"/store/{key}", "key": key, "etag": asked[key], "format": "image", "size": 1} for key in keys]
        table = pa.Table.from_pylist(rows, MANIFEST_SCHEMA).append_column("row", pa.array(np.arange(len(rows)) + 100))
        found = {}
        for match in match_stored_features(sources, table):
            assert (match.target >= 0).any()
            stored = match.source.run.manifest["key"].to_pylist()
            found |= {row: (match.source.run.run_id, stored[place]) for place, row in enumerate(match.target) if row >= 0}
        expected = {}
        for row, key in enumerate(keys):
            for number in reversed(range(len(runs))):
                image = runs[number].get(key, {"etag": None, "kind": None})
                same = asked[key] is not None and image["etag"] == asked[key] and image["kind"] is None
                if same and row + 100 not in expected:
                    expected[row + 100] = (f"n{number}", key)
        assert found == expected


def test_matching_holds_a_few_rows_of_each_manifest(tmp_path, monkeypatch):
    monkeypatch.setattr(ranges, "ROWS_AT_ONCE", 10)
    output = resolve(str(tmp_path / "out"))
    publish_images(output, "n0", {f"{number:03d}": {} for number in range(200)}, features=True, rows_per_file=100)
    most = []
    real = features._same_versions
    monkeypatch.setattr(features, "_same_versions", lambda *one: most.append(one[0].num_rows + one[1].num_rows) or real(*one))
    (source,) = runs_with_features(read_output(output))
    rows = source.run.manifest.append_column("row", pa.array(np.arange(200)))
    (match,) = match_stored_features([source], rows)
    assert match.target.tolist() == list(range(200))
    assert max(most) <= 20


@settings(deadline=None, max_examples=20, derandomize=True)
@given(nights=st.lists(st.sets(st.sampled_from("abcdefghijkl"), min_size=1), min_size=1, max_size=3))
def test_the_objects_of_a_table_are_sorted_by_key(nights):
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "ROWS_AT_ONCE", 3)
        output = resolve(str(Path(folder) / "out"))
        publish_images(output, "n0", {key: {"etag": "n0"} for key in "acegik"})
        for number, keys in enumerate(nights, 1):
            publish_images(output, f"n{number}", {key: {"etag": f"n{number}"} for key in keys})
        newest = {key: f"n{number}" for number, keys in enumerate([set("acegik"), *nights]) for key in keys}
        current = current_runs(read_output(output).table)
        table = FeatureTable(tuple(FeatureRun(one.run, read_report(one.run), one.superseded) for one in current))
        assert table.manifest.schema.equals(MANIFEST_SCHEMA, check_metadata=True)
        assert list(zip(*(table.manifest[name].to_pylist() for name in ("key", "etag")), strict=True)) == sorted(newest.items())
        for match in table.matches():
            for key, place in zip(match.source.run.manifest["key"].to_pylist(), match.target.tolist(), strict=True):
                own = newest[key] == match.source.run.run_id
                assert place == (sorted(newest).index(key) if own else -1)


@pytest.fixture
def stored(tmp_path):
    output = resolve(str(tmp_path / "out"))
    publish_images(output, "n0", {f"{number:02d}": {"features": [number, 1]} for number in range(20)}, features=True)
    return output


def test_vectors_come_some_rows_at_a_time(stored, monkeypatch):
    monkeypatch.setattr(features, "_VECTORS_AT_ONCE", 2)
    (run,) = find_features(stored.url).runs
    assert [table.num_rows for table in run.vectors()] == [2, 1] * 6 + [2]
    assert [table["key"].to_pylist() for table in run.vectors(np.array([4, 19]))] == [["03", "04"], ["05"], ["18", "19"]]
    found = look_up(find_features(stored.url), pa.array(["/store/03"]), pa.array(["17", "nothing"]))
    assert found["features"].to_pylist() == [[3, 1], [17, 1]]
    assert look_up(find_features(stored.url), pa.array([], pa.string()), pa.array(["nothing"])).num_rows == 0


def test_vectors_of_a_damaged_file_are_not_used(stored):
    file = stored.join("runs", "n0", "features", "part-00002.parquet")
    file.write(file.read() + b"x")
    with pytest.raises(CountsError, match=r"n0/features/part-00002.parquet differs from its recorded sha256"):
        list(find_features(stored.url).runs[0].vectors(np.array([7])))
