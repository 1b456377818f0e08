"""SIGKILL: of the command at everything it does to its output and at any moment, of its workers, of a node; then once more.

The published files are those of a run that nobody disturbed, and whoever reads the table meanwhile sees a whole one.
`make chaos` kills at every step and more often, and takes a node away; `make test` takes a sample (of nodes,
`test_cluster.py` cuts a host off). `TLBATCH_KILLS` is how many.
"""

import contextlib
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster
from support.paths import SUPPORT
from support.pictures import COLORS, encoded, noisy, write_store

import tlbatch
from tlbatch.output.verify import verify

#: Kills at a thing done to the output, spread evenly over all of them, and races; the others are a part of it.
KILLS = int(os.environ.get("TLBATCH_KILLS", "1"))


def started(how: str, output: Path, store: Path, bundle: str, rows_per_task: int = 5) -> subprocess.Popen[str]:
    """The command at work, disturbed as `tests/support/disturbed.py` says."""
    flags = ["--images", store, "--bundle", bundle, "--output", output]
    flags += ["--set", "run_id=new", "--set", f"rows_per_task={rows_per_task}"]
    command = [sys.executable, SUPPORT / "disturbed.py", output, how, "classify", *flags]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(how: str, output: Path, store: Path, bundle: str) -> tuple[int, str]:
    """The command from its start to its end: exit code and stderr."""
    process = started(how, output, store, bundle)
    _, said = process.communicate(timeout=200)
    return process.returncode, said


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


def require_same(output: Path, files: dict[str, bytes]) -> None:
    """What is published is whole, and byte for byte what an undisturbed run publishes."""
    assert tables(output) == files
    assert verify(str(output))["ok"]


@pytest.fixture(scope="module")
def undisturbed(evening, bundle_url, tmp_path_factory) -> tuple[dict[str, bytes], int]:
    """What the command publishes when nobody kills it, and how many things it does to the output."""
    store, out = evening
    output = shutil.copytree(out, tmp_path_factory.mktemp("undisturbed") / "out")
    code, said = run("kill=0", output, store, bundle_url)
    assert code == 0, said
    return tables(output), int(said.split(" things done", maxsplit=1)[0].rsplit(None, 1)[-1])


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


@pytest.mark.sampled(1)
@pytest.mark.parametrize("number", range(KILLS))
def test_a_command_that_is_killed_anywhere_is_continued_by_the_same_one(number, evening, undisturbed, bundle_url, tmp_path):
    store, out = evening
    files, things = undisturbed
    point = 1 + things * (2 * number + 1) // (2 * KILLS)
    output = shutil.copytree(out, tmp_path / "out")
    with Reading(output) as reading:
        killed, why = run(f"kill={point}", output, store, bundle_url)
        again, said = run("kill=0", output, store, bundle_url)
    print(f"killed before thing {point} of about {things}: exit {killed}, {len(reading.saw)} reads")
    assert killed in (-9, 0), why  # the clock renews the lease: there may be one thing more or less
    assert again == 0, said
    require_same(output, files)
    assert reading.error is None
    assert set(reading.saw) <= {("old", 30), ("new", 45)}
    assert reading.saw == sorted(reading.saw, reverse=True), "once the new table was seen, the old one never came back"


@pytest.fixture(scope="module")
def large(tmp_path_factory, bundle_url) -> tuple[Path, dict[str, bytes], float]:
    """A store that is some seconds' work, what is published of it, and how many seconds the command took."""
    folder = tmp_path_factory.mktemp("large")
    store = folder / "store"
    for label, color in COLORS.items():
        (store / label).mkdir(parents=True)
        for number in range(100):
            (store / label / f"{number:04d}.jpg").write_bytes(encoded(noisy(color, number, (640, 480)), quality=95))
    began = time.monotonic()
    require_published(started("kill=0", folder / "out", store, bundle_url, 20))
    return store, tables(folder / "out"), time.monotonic() - began


def require_published(process: subprocess.Popen[str]) -> None:
    """The command ends well."""
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said


def receipts(output: Path) -> int:
    """How many of the 15 parts of the large store are staged."""
    return len(list(output.glob("runs/new/staged/*.json")))


def await_receipts(process: subprocess.Popen[str], output: Path, wanted: int) -> None:
    """Until so many parts are staged, or the command has ended."""
    while receipts(output) < wanted and process.poll() is None:
        time.sleep(0.01)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("seed", range(max(1, KILLS // 3)))
def test_a_command_that_is_killed_at_any_moment_is_continued_by_the_same_one(seed, large, bundle_url, tmp_path):
    store, files, seconds = large
    chance = random.Random(seed)
    began = time.monotonic()
    process = started("kill=0", tmp_path / "out", store, bundle_url, 20)
    if seed % 2:  # most of so small a run is its start: every other one dies while parts are written
        await_receipts(process, tmp_path / "out", chance.randrange(1, 15))
        time.sleep(chance.uniform(0.0, 0.2))
    else:
        with contextlib.suppress(subprocess.TimeoutExpired):  # it may be faster than the one that was measured
            process.communicate(timeout=chance.uniform(0.0, seconds))
    process.kill()
    process.communicate()
    moment, there = time.monotonic() - began, receipts(tmp_path / "out")
    print(f"seed {seed}: killed after {moment:.2f} of {seconds:.2f} s, with {there} of 15 receipts")
    require_published(started("kill=0", tmp_path / "out", store, bundle_url, 20))
    require_same(tmp_path / "out", files)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("seed", range(max(1, KILLS // 5)))
def test_workers_that_are_killed_are_replaced(seed, large, bundle_url, tmp_path):
    """Two of them: an image that was alone with both when they died would rightly be held to have killed them."""
    store, files, _ = large
    chance = random.Random(seed)
    process = started("kill=0", tmp_path / "out", store, bundle_url, 20)
    killed: list[str] = []
    while len(killed) < 2 and process.poll() is None:
        await_receipts(process, tmp_path / "out", chance.choice([0, 2, 5]))
        time.sleep(chance.uniform(0.0, 1.0))
        workers = workers_of(process.pid)
        if workers:
            title, victim = chance.choice(workers)
            victim.kill()
            killed.append(title)
    require_published(process)
    print(f"seed {seed}: killed {' and '.join(killed)}")
    assert killed
    require_same(tmp_path / "out", files)


def workers_of(pid: int) -> list[tuple[str, psutil.Process]]:
    """Ray's processes below a command that work for it."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error, IndexError):
                found.append((process.cmdline()[0], process))
    return [(title, process) for title, process in found if title.startswith("ray::MapWorker")]


@pytest.mark.parametrize("seed", range(KILLS // 10))
def test_a_node_that_is_lost_and_replaced(seed, large, bundle_url, tmp_path):
    """Three nodes on the loopback, each with its own raylet and object store; one raylet is killed in mid-run."""
    store, files, _ = large
    each = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, connect=False, head_node_args={"include_dashboard": False, **each})
    try:
        nodes = [cluster.add_node(**each) for _ in range(2)]
        process = started(f"join={cluster.address}", tmp_path / "out", store, bundle_url, 20)
        await_receipts(process, tmp_path / "out", random.Random(seed).randrange(1, 10))
        there = receipts(tmp_path / "out")
        cluster.remove_node(nodes[seed % 2], allow_graceful=False)
        cluster.add_node(**each)
        require_published(process)
    finally:
        cluster.shutdown()
    print(f"seed {seed}: a node lost with {there} of 15 receipts")
    require_same(tmp_path / "out", files)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("number", range(max(1, KILLS // 2)))
def test_of_two_commands_one_wins(number, evening, undisturbed, bundle_url, tmp_path):
    """Both stand before the lease; then both go on."""
    store, out = evening
    files, _ = undisturbed
    output = shutil.copytree(out, tmp_path / "out")
    (tmp_path / "meeting").mkdir()
    with ThreadPoolExecutor(2) as pool, Reading(output) as reading:
        both = list(pool.map(lambda _: run(f"meet={tmp_path / 'meeting'}", output, store, bundle_url), range(2)))
    assert sorted(code for code, _ in both) == [0, 4], both
    (said,) = [said for code, said in both if code == 4]
    print(f"race {number}: {said.splitlines()[0]}")
    require_same(output, files)
    assert reading.error is None
    assert set(reading.saw) <= {("old", 30), ("new", 45)}
