"""An image that kills or hangs its worker is found, recorded, and costs no other its prediction."""

import contextlib
import json
import subprocess
import sys
import time

import pytest
from PIL import Image
from support.paths import SUPPORT
from support.pictures import encoded, noisy, write_store
from support.poison import HANGS, KILLS, POISON

from tlbatch.errors import ErrorKind
from tlbatch.execution.isolation import MAX_DEATHS, Quarantine
from tlbatch.storage.resolve import resolve


def test_two_deaths_in_isolation_make_an_image_a_failure(tmp_path):
    quarantine = Quarantine(resolve(str(tmp_path / "suspects")))
    assert quarantine.failure_of(7, 0) is None
    with contextlib.ExitStack() as never_left:
        for _ in range(MAX_DEATHS):
            assert quarantine.failure_of(7, 0) is None
            never_left.enter_context(quarantine.isolated(7, 0, "decode"))
        found = quarantine.failure_of(7, 0)
    assert (found.kind, found.stage, found.attempts) == (ErrorKind.WORKER_LOST, "decode", MAX_DEATHS)
    assert quarantine.failure_of(70, 0) is None


def test_an_image_that_comes_through_leaves_no_mark(tmp_path):
    quarantine = Quarantine(resolve(str(tmp_path / "suspects")))
    with quarantine.isolated(7, 0, "decode"):
        assert len(list((tmp_path / "suspects").iterdir())) == 1
    with pytest.raises(ValueError, match="bad"), quarantine.isolated(7, 0, "predict"):
        raise ValueError("bad")
    assert not list((tmp_path / "suspects").iterdir())


@pytest.mark.parametrize("work", ["time.sleep(60)", "ctypes.PyDLL(None).sleep(60)"])
def test_the_switch_ends_a_process_that_hangs_with_or_without_pythons_lock(work):
    code = f"import ctypes, time; from tlbatch.execution.isolation import Watchdog\nwith Watchdog(0.5, 0.2).watching(): {work}"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert time.monotonic() - began < 45


def test_the_switch_leaves_a_busy_process_alone():
    code = (
        "import time; from tlbatch.execution.isolation import Watchdog\nswitch = Watchdog(2.0, 1.0)\n"
        "for _ in range(25):\n  with switch.watching(): time.sleep(0.1)\nprint('done')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=True)
    assert done.stdout == "done\n"


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("plan", "lethal"),
    [
        ("fused", {"red/kills.jpg": KILLS, "green/hangs.jpg": HANGS}),
        ("split", {"blue/one_colour.png": None}),
    ],
)
def test_lethal_images_are_recorded_and_every_other_is_predicted(tmp_path, bundle_url, plan, lethal):
    """A Ray of its own, whose workers die of some images while decoding, of one while predicting, and hang on another."""
    store = write_store(tmp_path / "store", 10)
    for name, mark in lethal.items():
        if mark:
            (store / name).write_bytes(encoded(noisy((200, 40, 40), 1)) + mark)
        else:
            Image.new("RGB", (64, 64), POISON).save(store / name)
    code = f"""
import json, ray, sys
sys.path.insert(0, {str(SUPPORT)!r})
import poison, tlbatch
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
         runtime_env={{"worker_process_setup_hook": "poison.install", "env_vars": {{"PYTHONPATH": {str(SUPPORT)!r}}}}})
report = tlbatch.classify(images={str(store)!r}, bundle={bundle_url!r}, output={str(tmp_path / "out")!r},
                          rows_per_task=16, plan={plan!r})
print(json.dumps(report))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert (report["listed"], report["predicted"], report["failed_by_kind"]) == (
        30 + len(lethal),
        30,
        {"worker_lost": len(lethal)},
    )
    import tlbatch

    errors = tlbatch.read_errors(str(tmp_path / "out")).set_index("key")
    assert errors["stage"].to_dict() == {key: "decode" if mark else "predict" for key, mark in lethal.items()}
    assert set(errors["attempts"]) == {MAX_DEATHS}
    assert tlbatch.verify(str(tmp_path / "out"))["ok"]
