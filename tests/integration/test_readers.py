"""Processes that only read a published table end with 0: Arrow's reading threads can abort a process after its work.

TLBATCH_READERS: processes of each kind, for each of the two tables; `make chaos` runs 50, which are 300.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support.paths import TLBATCH
from support.pictures import write_store

import tlbatch
from tlbatch.output import publish

THREADS = """
import os, sys, time
import pandas, pyarrow
import tlbatch
def threads():
    names = [open(f"/proc/self/task/{number}/comm").read() for number in os.listdir("/proc/self/task")]
    return sum(not name.startswith("jemalloc") for name in names)  # which makes its own when it likes
before = threads()
assert len(tlbatch.read_predictions(sys.argv[1])) and not len(tlbatch.read_errors(sys.argv[1]))
end = time.monotonic() + 5
while threads() > before and time.monotonic() < end:  # a thread that was joined needs a moment to be gone
    time.sleep(0.01)
print(threads() - before)
"""
PROCESSES = int(os.environ.get("TLBATCH_READERS", "1"))
READ = "import sys, tlbatch; print(len(tlbatch.read_predictions(sys.argv[1])))"


@pytest.mark.sampled(1)
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("parts", [1, 200])
def test_a_process_that_reads_ends_with_0(tmp_path, tiny_url, monkeypatch, ray_here, parts):
    store, output = write_store(tmp_path / "store", -(-200 // 3)), tmp_path / "out"
    monkeypatch.setattr(publish, "ROWS_PER_FILE", 200 // parts)
    settings = {"max_images": 200, "report": False, "rows_per_task": 50}
    run = tlbatch.classify(images=str(store), bundle=tiny_url, output=str(output), **settings)
    assert len(list(output.glob("runs/*/predictions/*.parquet"))) == parts
    commands = [
        [sys.executable, "-c", READ, str(output)],
        [TLBATCH, "verify", str(output)],
        [TLBATCH, "report", str(output)],
    ]
    for number in range(PROCESSES):
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
            assert (done.returncode, "Traceback" in done.stderr) == (0, False), (number, command, done.stderr)
    assert (output / "runs" / run["run_id"] / "report.html").exists()


def test_reading_a_table_starts_no_thread_that_could_abort_the_process(tmp_path, store, tiny_url, ray_here):
    tlbatch.classify(images=str(store), bundle=tiny_url, output=str(tmp_path / "out"), report=False)
    done = subprocess.run([sys.executable, "-c", THREADS, str(tmp_path / "out")], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
