"""`sync` as a night uses it: behind a run, into a bucket, and killed at any moment."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.command import run_cli
from support.s3_server import BUCKET, options
from support.tables import publish_images

import tlbatch
from tlbatch.storage.resolve import resolve

#: Moments of a sync at which it is killed, as shares of the time that it takes undisturbed.
MOMENTS = [number / 20 for number in range(20)]
IMAGES = 6_000

#: Says when all is imported and opened, and then syncs.
SYNC = """
import sys
import deltalake, pyarrow, tlbatch, tlbatch.commands.sync, tlbatch.output.delta
print("ready", flush=True)
tlbatch.sync(output=sys.argv[1], to=sys.argv[2])
"""


def rows_of(table: str, **storage: str) -> list[dict]:
    from deltalake import DeltaTable

    found = DeltaTable(table, storage_options=storage or None).to_pyarrow_table().to_pylist()
    return sorted(found, key=lambda row: row["uri"])


def published(output: str, **more) -> list[dict]:
    found = tlbatch.read_predictions(output, format="arrow", **more).to_pylist()
    return sorted(found, key=lambda row: row["uri"])


@pytest.fixture(scope="module")
def nights(tmp_path_factory) -> tuple[str, Path]:
    """An output of two nights, and a copy of the first one."""
    folder = tmp_path_factory.mktemp("nights")
    output = resolve(str(folder / "out"))
    publish_images(output, "n0", {f"{n:05d}": {"score": 0.5} for n in range(IMAGES)}, rows_per_file=IMAGES)
    tlbatch.sync(output=output.url, to=str(folder / "first"))
    later = {f"{n:05d}": {"score": 0.25} for n in range(0, IMAGES, 2)}
    publish_images(output, "n1", later, removed=[f"{n:05d}" for n in range(1, IMAGES, 4)], rows_per_file=IMAGES)
    return output.url, folder / "first"


def copied(folder: Path, to: Path) -> str:
    subprocess.run(["cp", "-r", folder, to], check=True)
    return str(to)


def started(output: str, table: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", SYNC, output, table], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture(scope="module")
def undisturbed(nights, tmp_path_factory) -> float:
    """The seconds of a sync of the second night."""
    output, first = nights
    with started(output, copied(first, tmp_path_factory.mktemp("undisturbed") / "table")) as process:
        began = time.monotonic()
        assert process.wait() == 0
    return time.monotonic() - began


@pytest.mark.sampled(3)
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_it_has_changed_all_or_nothing(nights, undisturbed, tmp_path, moment):
    output, first = nights
    table = copied(first, tmp_path / "table")
    before = rows_of(table)
    with started(output, table) as process:
        time.sleep(moment * undisturbed)
        process.send_signal(signal.SIGKILL)
    after = rows_of(table)
    assert after in (before, published(output))
    assert tlbatch.sync(output=output, to=table)["written"] == ("changes" if after == before else "nothing")
    assert rows_of(table) == published(output)


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
