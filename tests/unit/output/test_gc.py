"""What dead runs leave is found, told and removed; what anybody needs is not."""

import json
import os
import time

import pytest
from support.command import run_cli
from support.tables import begin, manifest, outcome

import tlbatch
from tlbatch import schema
from tlbatch.errors import LeaseHeldError, OutputError
from tlbatch.output.lease import Lease
from tlbatch.output.parts import stage_part
from tlbatch.output.receipts import read_receipts
from tlbatch.output.run import begin_run, read_runs
from tlbatch.storage.resolve import resolve

DAY = 24.0


@pytest.fixture
def output(tmp_path):
    return resolve(str(tmp_path / "out"))


def run_called(output, run_id: str, began: float):
    facts = {"spec": {"images": "/store"}, "bundle": "b" * 64, "skipped": 0}
    return begin_run(output, run_id, manifest(10), facts, began=began)


def age(output, hours: float) -> None:
    """Make everything look as if it was written long ago."""
    then = time.time() - hours * 3600
    for path in output.path.rglob("*"):
        os.utime(path, (then, then))


def told(output, **settings) -> dict[str, str]:
    return {one["path"]: one["why"] for one in tlbatch.gc(output.url, **settings)["leftovers"]}


def test_all_that_dead_runs_leave_is_found_and_nothing_else(output):
    given_up = run_called(output, "given-up", 1.0)
    stage_part(given_up.staged, outcome([0, 1]))
    published = run_called(output, "published", 2.0)
    stage_part(published.staged, outcome([0]))
    published.location.join(schema.SUCCESS).write(b"")
    published.location.join("predictions", "part-00000.parquet").write(b"x")
    now = run_called(output, "now", 3.0)
    stage_part(now.staged, outcome([2, 3]))
    lost = stage_part(now.staged, outcome([4]))["part"].removesuffix(".parquet")
    next(path for path in now.staged.path.glob(f"{lost}*.json")).unlink()
    output.join("runs", "never", "manifest.parquet").write(b"x")
    now.location.join(".report.json.abc.tmp").write(b"half")
    age(output, 30.0)
    assert told(output) == {
        "runs/given-up": "unfinished run followed by a later run",
        "runs/published/staged": "staged files of a published run",
        f"runs/now/staged/{lost}.parquet": "part without a receipt",
        "runs/never": "run that never began",
        "runs/now/.report.json.abc.tmp": "interrupted write",
    }
    before = {path for path in output.path.rglob("*") if path.is_file()}
    shown = tlbatch.gc(output.url)
    assert {path for path in output.path.rglob("*") if path.is_file()} == before, "it only shows"
    assert shown["bytes"] == sum(path.stat().st_size for path in before) - sum(
        path.stat().st_size for path in before if not _goes(output, path, shown)
    )
    assert tlbatch.gc(output.url, remove=True)["removed"]
    left = {path.relative_to(output.path).as_posix() for path in output.path.rglob("*") if path.is_file()}
    assert {name for name in left if "/staged/" not in name} == {
        "runs/published/run.json",
        "runs/published/manifest.parquet",
        "runs/published/_SUCCESS",
        "runs/published/predictions/part-00000.parquet",
        "runs/now/run.json",
        "runs/now/manifest.parquet",
    }
    assert sorted(name.name for name in (output.path / "runs").iterdir()) == ["now", "published"]
    assert read_receipts(read_runs(output)[-1]).images(10).nonzero()[0].tolist() == [2, 3], "what is done stays done"
    assert told(output) == {}


def _goes(output, path, shown) -> bool:
    key = path.relative_to(output.path).as_posix()
    return any(key == one["path"] or key.startswith(one["path"] + "/") for one in shown["leftovers"])


def test_what_is_young_stays(output):
    run_called(output, "given-up", 1.0)
    run_called(output, "now", 2.0)
    assert told(output) == {}
    assert list(told(output, older_than=0.0)) == ["runs/given-up"]
    age(output, 30.0)
    (output.path / "runs" / "given-up" / "staged").mkdir()
    (output.path / "runs" / "given-up" / "staged" / "part").write_bytes(b"")
    assert told(output) == {}, "something of it was written just now"


def test_a_run_at_work_is_left_alone(output):
    begin(output)
    with Lease(output, "first"), pytest.raises(LeaseHeldError, match="Run first has been working on this output"):
        tlbatch.gc(output.url)
    assert not output.join(schema.LEASE).exists()


def test_no_output_is_a_sentence(tmp_path):
    with pytest.raises(OutputError, match="There is no tlbatch output"):
        tlbatch.gc(str(tmp_path))


def test_the_command_shows_first_and_removes_when_told(output):
    run_called(output, "given-up", 1.0)
    run_called(output, "now", 2.0)
    age(output, 30.0)
    done = run_cli("gc", output.url)
    assert done.returncode == 0, done.stderr
    assert "runs/given-up: unfinished run followed by a later run" in done.stdout
    assert "Nothing was removed; add --remove" in done.stdout
    assert json.loads(run_cli("gc", output.url, "--older-than", "48", "--json").stdout)["leftovers"] == []
    assert json.loads(run_cli("gc", output.url, "--remove", "--json").stdout)["removed"]
    assert "Nothing to remove." in run_cli("gc", output.url).stdout


def test_of_runs_that_are_no_part_of_the_table_as_many_are_kept_as_one_says(output):
    """And whatever a kept one adds to: a table that can be rolled back to is whole."""
    names = ["first", "second", "third", "fourth", "now"]
    for number, name in enumerate(names):
        facts = {"spec": {"images": "/store"}, "bundle": "b" * 64, "skipped": 0}
        on = [{"run_id": "first", "books_sha256": ""}] if name == "fourth" else []
        run = begin_run(output, name, manifest(10), facts, began=float(number), on=on)
        run.location.join("predictions", "part-00000.parquet").write(b"x")
        run.location.join(schema.SUCCESS).write(b"")
    output.join(schema.LATEST).write(schema.seal({"runs": [{"run_id": "now", "books_sha256": ""}]}))
    age(output, 30.0)
    assert not told(output)
    why = "run that is no longer part of the table"
    assert told(output, keep=1) == {"runs/second": why, "runs/third": why}
    assert told(output, keep=9) == {}
    tlbatch.gc(output.url, keep=0, remove=True)
    assert output.join("runs").names() == ["now"]
