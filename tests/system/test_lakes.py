"""`sync` as a night uses it: behind a run, into a bucket, and killed at any moment."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import lake_readers
from support.command import run_cli
from support.paths import ROOT
from support.s3_server import BUCKET, options
from support.tables import publish_images

import tlbatch
from tlbatch.storage.resolve import resolve

#: Moments of a sync at which it is killed, as shares of the time that it takes undisturbed.
MOMENTS = [number / 20 for number in range(20)]
IMAGES = 6_000

#: Says when all is imported and opened, then syncs, and says what was written.
SYNC = """
import sys
import deltalake, pyarrow, pyiceberg.catalog.sql, tlbatch, tlbatch.commands.sync, tlbatch.output.delta, tlbatch.output.iceberg
print("ready", flush=True)
print(tlbatch.sync(**{"output": sys.argv[1], "to": sys.argv[2], "as": sys.argv[3]})["written"])
"""
pytestmark = pytest.mark.usefixtures("iceberg_catalog")
FORMATS = pytest.mark.parametrize("form", ["delta", "iceberg"])
READERS = ROOT / ".venv-lakes" / "bin" / "python"


def rows_of(table: str, **storage: str) -> list[dict]:
    from deltalake import DeltaTable

    found = DeltaTable(table, storage_options=storage or None).to_pyarrow_table().to_pylist()
    return sorted(found, key=lambda row: row["uri"])


def published(output: str, **more) -> list[dict]:
    found = tlbatch.read_predictions(output, format="arrow", **more).to_pylist()
    return sorted(found, key=lambda row: row["uri"])


class Lake:
    """A folder with an output, and with its copy in a format, which commands in processes of their own write."""

    def __init__(self, folder: Path, form: str) -> None:
        self.output, self.form, self._copy, self._first = resolve(str(folder / "out")), form, folder / "copy", folder / "first"
        self._copy.mkdir(parents=True)
        self.to = str(self._copy / "table") if form == "delta" else "pond.nights.predictions"
        self._catalog = {
            "type": "sql",
            "uri": f"sqlite:///{self._copy}/catalog.db",
            "warehouse": f"file://{self._copy}/warehouse",
        }

    def started(self) -> subprocess.Popen[str]:
        """A sync that is about to begin."""
        command = [sys.executable, "-c", SYNC, self.output.url, self.to, self.form]
        catalog = {f"PYICEBERG_CATALOG__POND__{name.upper()}": value for name, value in self._catalog.items()}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **catalog})
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    def sync(self) -> str:
        """What a sync has written."""
        said, _ = self.started().communicate(timeout=120)
        return said.strip()

    def keep(self) -> None:
        """Remember the copy."""
        shutil.copytree(self._copy, self._first)

    def restore(self) -> None:
        """Bring the copy back, at the place that its metadata names."""
        shutil.rmtree(self._copy)
        shutil.copytree(self._first, self._copy)

    def place(self) -> str:
        """Where engines find the copy: of an Iceberg table the newest metadata."""
        return self.to if self.form == "delta" else self._table().metadata_location.removeprefix("file://")

    def rows(self) -> list[dict]:
        if self.form == "delta":
            return rows_of(self.to)
        return sorted(self._table().scan().to_arrow().to_pylist(), key=lambda row: row["uri"])

    def _table(self):
        from pyiceberg.catalog import load_catalog

        catalog = load_catalog("pond", **self._catalog)
        table = catalog.load_table("nights.predictions")
        catalog.engine.dispose()
        return table


@pytest.fixture(scope="module")
def lakes(tmp_path_factory):
    """By format: an output of two nights, a copy of the first one, and the seconds of a sync of the second one."""
    made = {}

    def lake_in(form: str) -> tuple[Lake, float]:
        if form not in made:
            lake = Lake(tmp_path_factory.mktemp(form), form)
            publish_images(lake.output, "n0", {f"{n:05d}": {"score": 0.5} for n in range(IMAGES)}, rows_per_file=IMAGES)
            assert lake.sync() == "all"
            lake.keep()
            later = {f"{n:05d}": {"score": 0.25} for n in range(0, IMAGES, 2)}
            gone = [f"{n:05d}" for n in range(1, IMAGES, 4)]
            publish_images(lake.output, "n1", later, removed=gone, rows_per_file=IMAGES)
            with lake.started() as process:
                began = time.monotonic()
                assert process.wait() == 0
            made[form] = lake, time.monotonic() - began
        return made[form]

    return lake_in


@pytest.mark.sampled(4)
@pytest.mark.parametrize("moment", MOMENTS)
@FORMATS
def test_killed_at_any_moment_it_has_changed_all_or_nothing(lakes, form, moment):
    lake, seconds = lakes(form)
    lake.restore()
    before = lake.rows()
    with lake.started() as process:
        time.sleep(moment * seconds)
        process.send_signal(signal.SIGKILL)
    after = lake.rows()
    assert after in (before, published(lake.output.url))
    assert lake.sync() == ("changes" if after == before else "nothing")
    assert lake.rows() == published(lake.output.url)


@FORMATS
def test_after_five_nights_other_engines_read_the_same_rows(form, tmp_path):
    """Nights of new, changed and deleted images, of none at all, of a failing one, and of another model."""
    if not READERS.exists():
        pytest.skip("DuckDB's and Polars' readers are not installed; `make test` installs them")
    lake = Lake(tmp_path, form)
    nights = [
        ({key: {"score": 0.5} for key in "abcdef"}, "", "all"),
        ({"b": {"score": 0.25}, "x": {"score": 1.0}}, "c", "changes"),
        (None, "", "nothing"),
        ({"d": {"kind": "truncated"}, "a": {"score": 0.125}}, "ef", "changes"),
        ({key: {"score": 0.75} for key in "abdx"}, "", "all"),
    ]
    for number, (images, removed, written) in enumerate(nights):
        if images is not None:
            publish_images(lake.output, f"n{number}", images, removed=list(removed), alone=number == 4)
        assert lake.sync() == written
        read = subprocess.run([READERS, lake_readers.__file__, lake.place()], capture_output=True, text=True, check=True)
        found, wanted = json.loads(read.stdout), json.loads(json.dumps(published(lake.output.url)))
        assert list(found) == (["by_duckdb", "by_polars"] if form == "delta" else ["by_polars"])
        for engine, rows in found.items():
            assert rows == wanted, (number, engine)


def test_a_copy_in_a_bucket(s3_server):
    storage = options(s3_server.endpoint)
    output = resolve(f"s3://{BUCKET}/lake/out", storage)
    settings = {"output": output.url, "to": f"s3://{BUCKET}/lake/table", "storage_options": storage}
    publish_images(output, "n0", {"a": {"score": 0.5}, "b": {"score": 0.5}})
    assert tlbatch.sync(**settings)["written"] == "all"
    publish_images(output, "n1", {"b": {"score": 1.0}, "c": {"score": 1.0}}, removed=["a"])
    assert tlbatch.sync(**settings)["written"] == "changes"
    table = resolve(settings["to"], storage)
    assert rows_of(settings["to"], **table.object_store_settings()) == published(output.url, storage_options=storage)


def test_a_run_is_followed_by_its_sync(store, bundle_url, tmp_path):
    table, lake = str(tmp_path / "table"), ["--sync", f"delta:{tmp_path}/table"]
    arguments = ["classify", "--images", store, "--bundle", bundle_url, "--output", str(tmp_path / "out")]
    done = run_cli(*arguments, *lake, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["synced"] == {"to": table, "as": "delta", "written": "all", "added": report["predicted"]}
    assert rows_of(table) == published(str(tmp_path / "out"))
    (tmp_path / "file").write_text("no folder")
    done = run_cli(*arguments, "--sync", f"delta:{tmp_path}/file/table")
    assert done.returncode == 4
    assert f"The run is published, and {tmp_path}/file/table is not up to date" in done.stderr
    done = run_cli(*arguments, *lake)
    assert done.returncode == 0, done.stderr
    assert f"Written to {table}: nothing, it is up to date" in done.stdout
