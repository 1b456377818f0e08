"""Delta and Iceberg tables that follow a published table: the rows of `read_predictions` after every night, in one commit."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.command import run_cli
from support.tables import publish_images

import tlbatch
from tlbatch.commands import sync as command
from tlbatch.errors import ConfigError, OutputError, UnfinishedError
from tlbatch.storage.resolve import resolve

IMAGE = st.fixed_dictionaries({"score": st.sampled_from([0.25, 1.0]), "kind": st.sampled_from([None, None, "empty"])})
NIGHT = st.tuples(st.dictionaries(st.sampled_from("abcdefgh"), IMAGE, min_size=1), st.sets(st.sampled_from("ij")))
STEP = st.one_of(NIGHT, st.integers(0, 3))
FORMATS = pytest.mark.parametrize("form", ["delta", "iceberg"])


pytestmark = pytest.mark.usefixtures("iceberg_catalog")


class Lake:
    """A folder with an output and its copy in a format."""

    def __init__(self, folder: Path, form: str) -> None:
        self.output, self.form = resolve(str(folder / "out")), form
        self.name = f"of_{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}.predictions"
        self.to = str(folder / "copy") if form == "delta" else f"lake.{self.name}"
        self.nights = 0

    def night(self, images: dict, removed: tuple | list = ()) -> None:
        publish_images(self.output, f"n{self.nights}", images, removed=sorted(removed))
        self.nights += 1

    def sync(self, **more) -> dict:
        return tlbatch.sync(**{"output": self.output.url, "to": self.to, "as": self.form, **more})

    def rows(self) -> list[dict]:
        if self.form == "delta":
            from deltalake import DeltaTable

            found = DeltaTable(self.to).to_pyarrow_table()
        else:
            found = self.table().scan().to_arrow()
        return sorted(found.to_pylist(), key=lambda row: row["uri"])

    def table(self):
        from pyiceberg.catalog import load_catalog

        return load_catalog("lake").load_table(self.name)

    def versions(self) -> int:
        if self.form == "delta":
            from deltalake import DeltaTable

            return DeltaTable(self.to).version()
        return len(self.table().metadata.metadata_log)

    def published(self) -> list[dict]:
        found = tlbatch.read_predictions(self.output.url, format="arrow")
        return sorted(found.to_pylist(), key=lambda row: row["uri"])


@pytest.fixture
def lake(tmp_path):
    return lambda form: Lake(tmp_path, form)


@FORMATS
@settings(deadline=None, max_examples=6, derandomize=True)
@given(steps=st.lists(STEP, max_size=4))
def test_after_each_night_and_each_rollback_the_rows_are_those_of_the_table(form, steps):
    with TemporaryDirectory() as folder:
        lake = Lake(Path(folder), form)
        lake.night({key: {"score": 0.5} for key in "jihgfedcba"})
        assert lake.sync()["written"] == "all"
        for step in steps:
            if isinstance(step, tuple):
                lake.night(*step)
            else:
                published = [one["run_id"] for one in tlbatch.status(lake.output.url)["runs"]]
                tlbatch.rollback(lake.output.url, published[step % len(published)])
            assert lake.sync()["written"] in ("changes", "nothing")
            assert lake.rows() == lake.published()
        versions = lake.versions()
        assert lake.sync()["written"] == "nothing"
        assert lake.versions() == versions


@FORMATS
def test_a_reader_sees_the_table_before_or_after(lake, form):
    lake = lake(form)
    lake.night({key: {"score": 0.5} for key in "abc"})
    lake.sync()
    versions = lake.versions()
    lake.night({"b": {"score": 1.0}, "d": {"score": 1.0}}, removed="a")
    found = lake.sync()
    assert (found["written"], found["added"]) == ("changes", 2)
    assert lake.versions() == versions + 1, "one commit"
    assert [row["key"] for row in lake.rows()] == ["b", "c", "d"]


@FORMATS
def test_of_two_that_change_it_at_once_one_fails_and_says_so(lake, form, monkeypatch):
    lake = lake(form)
    lake.night({"a": {"score": 0.5}})
    lake.sync()
    lake.night({"b": {"score": 0.5}})

    def changes_since(*arguments):
        monkeypatch.undo()
        assert lake.sync()["written"] == "changes"
        return found(*arguments)

    found = command.changes_since
    monkeypatch.setattr(command, "changes_since", changes_since)
    with pytest.raises(UnfinishedError, match=r"Another command changed .* meanwhile\. Run `tlbatch sync` again\."):
        lake.sync()
    assert lake.rows() == lake.published()
    assert lake.sync()["written"] == "nothing"


@FORMATS
def test_a_table_that_shares_no_run_is_written_anew(lake, form):
    lake = lake(form)
    lake.night({"a": {"score": 0.5}, "b": {"score": 0.5}})
    lake.sync()
    publish_images(lake.output, "n1", {"c": {"score": 0.25}}, alone=True)
    assert lake.sync()["written"] == "all"
    assert lake.rows() == lake.published()


def test_files_that_somebody_puts_together_meanwhile_change_nothing(lake):
    from deltalake import DeltaTable

    lake = lake("delta")
    lake.night({"a": {"score": 0.5}})
    lake.sync()
    lake.night({"b": {"score": 0.5}})
    lake.sync()
    assert DeltaTable(lake.to).optimize.compact()["numFilesRemoved"] == 2
    lake.night({"a": {"score": 1.0}, "c": {"score": 1.0}})
    assert lake.sync()["written"] == "changes"
    assert lake.rows() == lake.published()


def test_a_table_of_somebody_else_is_left_alone(lake):
    import pyarrow as pa
    from deltalake import write_deltalake
    from pyiceberg.catalog import load_catalog

    other = pa.table({"uri": ["x"]})
    delta = lake("delta")
    delta.night({"a": {"score": 0.5}})
    write_deltalake(delta.to, other)
    with pytest.raises(OutputError, match="is a Delta table that `tlbatch sync` did not make"):
        delta.sync()
    iceberg = lake("iceberg")
    catalog = load_catalog("lake")
    catalog.create_namespace(iceberg.name.partition(".")[0])
    catalog.create_table(iceberg.name, other.schema)
    with pytest.raises(OutputError, match="is an Iceberg table that `tlbatch sync` did not make"):
        iceberg.sync()


def test_other_engines_read_the_same_rows(lake):
    lake = lake("delta")
    lake.night({key: {"score": 0.5} for key in "abc"})
    lake.sync()
    lake.night({"b": {"score": 1.0}}, removed="a")
    lake.sync()
    from deltalake import DeltaTable, QueryBuilder

    asked = QueryBuilder().register("t", DeltaTable(lake.to)).execute("select key, score from t order by key")
    rows = asked.read_all() if hasattr(asked, "read_all") else asked
    import pyarrow as pa

    assert pa.table(rows).to_pylist() == [{"key": "b", "score": 1.0}, {"key": "c", "score": 0.5}]


def test_the_command(lake):
    lake = lake("delta")
    lake.night({"a": {"score": 0.5}})
    done = run_cli("sync", lake.output.url, "--to", lake.to, "--as", "delta")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"Written to {lake.to}: the whole table, 1 rows added\n"
    done = run_cli("sync", lake.output.url, "--to", lake.to, "--json")
    assert json.loads(done.stdout)["written"] == "nothing"
    done = run_cli("sync", lake.output.url, "--to", lake.to, "--as", "hudi")
    assert done.returncode == 2
    assert "as" in done.stderr


def test_mistakes_are_sentences(lake, tmp_path, monkeypatch):
    with pytest.raises(OutputError, match="Nothing is published"):
        lake("delta").sync()
    lake = lake("iceberg")
    lake.night({"a": {"score": 0.5}})
    with pytest.raises(ConfigError, match=r"an Iceberg table is named CATALOG\.NAMESPACE\.TABLE; found 'lake\.x'"):
        lake.sync(to="lake.x")
    with pytest.raises((ConfigError, OutputError), match="nowhere"):
        lake.sync(to="nowhere.photos.predictions")
    for inside in ("out", "out/", "out/table"):
        with pytest.raises(ConfigError, match="is in the output, whose files are all tlbatch's own"):
            lake.sync(to=str(tmp_path / inside), **{"as": "delta"})
    monkeypatch.setitem(sys.modules, "deltalake", None)
    with pytest.raises(ConfigError, match=r"install tlbatch\[delta\]"):
        lake.sync(to=str(tmp_path / "t"), **{"as": "delta"})
