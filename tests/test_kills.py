"""SIGKILL of the command at everything it does to its output, while somebody reads the table; then the same command.

`make chaos` kills it at each of them, `make test` at a few. `TLBATCH_KILLS` is how many.
"""

import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT, write_store

import tlbatch
from tlbatch.report.verify import verify

#: Things a command does to an output of this size, as `tests/killed.py` counts them.
THINGS = 50
KILLS = int(os.environ.get("TLBATCH_KILLS", "3"))
POINTS = sorted(random.Random(4).sample(range(1, THINGS + 1), min(KILLS, THINGS)))


def run_killed(output: Path, point: int, store: Path, bundle: str) -> subprocess.CompletedProcess[str]:
    """The command, killed before the `point`-th thing it does; 0 for never."""
    flags = ["--images", store, "--bundle", bundle, "--output", output, "--set", "run_id=new", "--set", "rows_per_task=5"]
    command = [sys.executable, ROOT / "tests" / "killed.py", output, point, "classify", *flags]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture(scope="module")
def evening(tmp_path_factory, bundle_url) -> tuple[Path, Path]:
    """A store that has grown since its table was published, and that output."""
    folder = tmp_path_factory.mktemp("evening")
    store = write_store(folder / "store", 10)
    settings = {"images": str(store), "bundle": bundle_url, "output": str(folder / "out")}
    tlbatch.classify(**settings, run_id="old")
    return write_store(store, 5, first=10), folder / "out"


def tables(output: Path) -> dict[str, bytes]:
    """The published files of the new run."""
    run = output / "runs" / "new"
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("part-*.parquet")}


@pytest.fixture(scope="module")
def undisturbed(evening, bundle_url, tmp_path_factory) -> dict[str, bytes]:
    """What the command publishes when nobody kills it."""
    store, out = evening
    output = shutil.copytree(out, tmp_path_factory.mktemp("undisturbed") / "out")
    done = run_killed(output, 0, store, bundle_url)
    assert done.returncode == 0, done.stderr
    things = int(done.stderr.split(" things done", maxsplit=1)[0].rsplit(None, 1)[-1])
    assert abs(things - THINGS) <= 5, "POINTS should reach the last thing it does"
    return tables(output)


class Reading:
    """Somebody who reads the table all the time, and notes how many rows of which runs it had."""

    def __init__(self, output: Path) -> None:
        self._output = str(output)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self.saw: list[tuple[str, int]] = []
        self.error: Exception | None = None

    def _read(self) -> None:
        try:
            while not self._stop.wait(0.02):
                table = tlbatch.read_predictions(self._output, ["key", "run_id"])
                self.saw.append((",".join(sorted(set(table["run_id"]))), table["key"].nunique()))
        except Exception as error:
            self.error = error

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


@pytest.mark.parametrize("point", POINTS)
def test_a_command_that_is_killed_anywhere_is_continued_by_the_same_one(point, evening, undisturbed, bundle_url, tmp_path):
    store, out = evening
    output = shutil.copytree(out, tmp_path / "out")
    with Reading(output) as reading:
        killed = run_killed(output, point, store, bundle_url)
        again = run_killed(output, 0, store, bundle_url)
    print(f"killed before thing {point}: exit {killed.returncode}, {len(reading.saw)} reads")
    assert killed.returncode in (-9, 0), killed.stderr
    assert again.returncode == 0, again.stderr
    assert tables(output) == undisturbed
    assert verify(str(output))["ok"]
    assert reading.error is None
    assert set(reading.saw) <= {("old", 30), ("new", 45)}
    assert reading.saw == sorted(reading.saw, reverse=True), "once the new table was seen, the old one never came back"
