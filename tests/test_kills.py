"""SIGKILL: of the command at everything it does to its output and at any moment, of its workers, of a node; then the same again.

The published files are those of a run that nobody disturbed, and whoever reads the table meanwhile sees a whole one.
`make chaos` kills at every step and more often, `make test` takes a sample. `TLBATCH_KILLS` is how many.
"""

import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from conftest import COLORS, ROOT, TLBATCH, encoded, noisy, write_store

import tlbatch
from tlbatch.report.verify import verify

#: Kills at a thing done to the output, spread evenly over all of them; a part of it is done of every other kind.
KILLS = int(os.environ.get("TLBATCH_KILLS", "3"))


def run_disturbed(how: str, output: Path, store: Path, bundle: str) -> subprocess.CompletedProcess[str]:
    """The command, disturbed as `tests/disturbed.py` says."""
    flags = ["--images", store, "--bundle", bundle, "--output", output, "--set", "run_id=new", "--set", "rows_per_task=5"]
    command = [sys.executable, ROOT / "tests" / "disturbed.py", output, how, "classify", *flags]
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
def undisturbed(evening, bundle_url, tmp_path_factory) -> tuple[dict[str, bytes], int]:
    """What the command publishes when nobody kills it, and how many things it does to the output."""
    store, out = evening
    output = shutil.copytree(out, tmp_path_factory.mktemp("undisturbed") / "out")
    done = run_disturbed("kill=0", output, store, bundle_url)
    assert done.returncode == 0, done.stderr
    return tables(output), int(done.stderr.split(" things done", maxsplit=1)[0].rsplit(None, 1)[-1])


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


@pytest.mark.parametrize("number", range(KILLS))
def test_a_command_that_is_killed_anywhere_is_continued_by_the_same_one(number, evening, undisturbed, bundle_url, tmp_path):
    store, out = evening
    files, things = undisturbed
    point = 1 + things * (2 * number + 1) // (2 * KILLS)
    output = shutil.copytree(out, tmp_path / "out")
    with Reading(output) as reading:
        killed = run_disturbed(f"kill={point}", output, store, bundle_url)
        again = run_disturbed("kill=0", output, store, bundle_url)
    print(f"killed before thing {point} of about {things}: exit {killed.returncode}, {len(reading.saw)} reads")
    assert killed.returncode in (-9, 0), killed.stderr  # the clock renews the lease: there may be one thing more or less
    assert again.returncode == 0, again.stderr
    assert tables(output) == files
    assert verify(str(output))["ok"]
    assert reading.error is None
    assert set(reading.saw) <= {("old", 30), ("new", 45)}
    assert reading.saw == sorted(reading.saw, reverse=True), "once the new table was seen, the old one never came back"
