"""Disks that are full, read-only or gone in mid-run: one sentence, the old table as it was, and the same command continues."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from support.command import run_cli
from support.paths import TLBATCH
from support.pictures import write_store

import tlbatch
from tlbatch.errors import InterruptedRunError
from tlbatch.output import commit

#: Mounts a small disk on $1 and runs the rest on it; nobody else sees the mount.
ON_A_SMALL_DISK = 'mount -t tmpfs -o size=8m tlbatch "$1" && cp -r "$2" "$1/out" && shift 2 && "$@"'


@pytest.fixture(scope="module")
def evening(tmp_path_factory, bundle_url) -> tuple[Path, Path]:
    """A store that has grown since its table was published, and that output."""
    folder = tmp_path_factory.mktemp("evening")
    store = write_store(folder / "store", 10)
    tlbatch.classify(images=str(store), bundle=bundle_url, output=str(folder / "out"), run_id="old")
    return write_store(store, 10, first=10), folder / "out"


def on_a_small_disk(folder: Path, output: Path, script: str) -> str:
    """What a script of the shell says that runs in `folder`: a disk of 8 MB with a copy of the output, `out`."""
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", ON_A_SMALL_DISK, "sh", folder, output]
    if subprocess.run([*map(str, mount), "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a disk of their own (unshare --user --mount)")
    command = [*map(str, mount), "sh", "-c", f'cd "$0"; {script}', str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    return done.stderr + done.stdout


def classify(store: Path, bundle: str) -> str:
    """The command in the words of the shell; then its exit code and which run is the table."""
    flags = f"--images {store} --bundle {bundle} --output out --set run_id=new --set rows_per_task=5"
    return f"{TLBATCH} classify {flags} >&2; echo code $?; grep -o '.run_id.: .[a-z]*' out/latest.json; "


@pytest.mark.sampled(1)
def test_a_full_disk_is_said_and_once_there_is_room_the_run_continues(evening, bundle_url, tmp_path):
    """All but 60 kB are taken: enough to begin, and not for the parts."""
    store, out = evening
    command = classify(store, bundle_url)
    fill = "head -c 8m /dev/zero > ballast 2> /dev/null; truncate -s -60k ballast; "
    said = on_a_small_disk(tmp_path, out, f"{fill} {command} ls out/runs/new; rm ballast; {command} {TLBATCH} verify out")
    assert said.count("tlbatch: ") == 1, said
    why = "stopped: No space left on device. Nothing more is published. Solve the problem, then run the same command again."
    assert why in said
    first, second = said.split("code 4")[1].split("code 0", maxsplit=1)
    assert ('"old' in first, "run.json" in first) == (True, True), said
    assert '"new' in second, said


def test_a_read_only_disk_is_said(evening, bundle_url, tmp_path):
    store, out = evening
    said = on_a_small_disk(tmp_path, out, f"mount -o remount,ro .; {classify(store, bundle_url)}")
    assert said.count("tlbatch: ") == 1, said
    assert f"{tmp_path}/out: Read-only file system. Nothing more is published" in said
    assert ("code 4" in said, '"old' in said) == (True, True), said


@pytest.mark.sampled(1)
def test_an_output_that_is_deleted_in_mid_run_stops_it_and_the_same_command_makes_it_anew(evening, bundle_url, tmp_path):
    store, _ = evening
    output = tmp_path / "out"
    words = ["classify", "--images", store, "--bundle", bundle_url, "--output", output, "--set", "run_id=new"]
    command = [*map(str, [TLBATCH, *words, "--set", "rows_per_task=2"])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(output.glob("runs/new/staged/*.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.rename(output, tmp_path / "gone")  # at once, as an object store's console would not, and a disk does
    _, said = process.communicate(timeout=200)
    assert process.returncode == 4, said
    assert said.strip().lower().endswith("run the same command again."), said
    again = run_cli(*words, "--json")
    assert again.returncode == 0, again.stderr
    report = json.loads(again.stdout)
    assert (report["listed"], report["predicted"]) == (60, 60)
    assert tlbatch.verify(str(output))["ok"]


@pytest.mark.sampled(1)
def test_receipts_of_a_run_that_somebody_removed_in_part_are_not_believed(evening, bundle_url, tmp_path, monkeypatch):
    """A run of the same name, over other images: rows of the one are not rows of the other."""
    store, _ = evening
    first = write_store(tmp_path / "store", 4)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(commit, "freeze_part_plan", stop)
        with pytest.raises(InterruptedRunError):
            tlbatch.classify(images=str(first), bundle=bundle_url, output=str(tmp_path / "out"), run_id="new")
    assert list(tmp_path.glob("out/runs/new/staged/*.json"))
    (tmp_path / "out" / "runs" / "new" / "run.json").unlink()
    report = tlbatch.classify(images=str(store), bundle=bundle_url, output=str(tmp_path / "out"), run_id="new")
    assert (report["listed"], report["predicted"]) == (60, 60)
    assert sorted(tlbatch.read_predictions(str(tmp_path / "out"))["key"]) == sorted(
        str(path.relative_to(store)) for path in store.rglob("*.jpg")
    )
