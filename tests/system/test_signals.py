"""SIGTERM and SIGINT at seeded moments, from the first instruction to the last: exit code, sentence, notice, output.

`make test` takes one moment, `make long` all.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.paths import TLBATCH
from support.pictures import write_store

from tlbatch.model.bundle import load_bundle
from tlbatch.output.verify import verify

#: Seconds that the commands take on two busy CPUs.
SECONDS = {"classify": 15.0, "train": 30.0, "rescore": 12.0}
#: What exists once a command's work is done: what follows is its end.
RESULT = {"classify": "out/runs/*/_SUCCESS", "train": "out/bundle.json", "rescore": "out/runs/*/_SUCCESS"}
#: Of the 20 moments of a command, six are counted from that result.
MOMENTS = [
    (verb, (signal.SIGTERM, signal.SIGINT)[seed % 2], begin, random.Random(f"{verb} {seed}").uniform(0, longest))
    for verb in SECONDS
    for seed in range(20)
    for begin, longest in [("the start", SECONDS[verb]) if seed < 14 else ("the result", 1.5)]
]
#: Whoever runs the tests in the background has SIGINT ignored, and so have all their children.
HEEDING = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"


@pytest.fixture(scope="module")
def features(tmp_path_factory, store, bundle_url) -> Path:
    """An output with features, for `rescore`."""
    import tlbatch

    output = tmp_path_factory.mktemp("features") / "out"
    tlbatch.extract(images=str(store), bundle=bundle_url, output=str(output))
    return output


def command(verb: str, request, folder: Path, address: str) -> list[str]:
    """A whole command; its output is `out` in the folder."""
    if verb == "train":
        images = write_store(folder / "images", 6)
        base = ["--base", "MobileNetV2", "--weights", "random", "--set", "size=32", "--set", "epochs=2"]
        return ["train", "--images", str(images), *base, "--bundle", str(folder / "out"), "--notify", address]
    flags = ["--output", str(folder / "out"), "--notify", address, "--bundle", request.getfixturevalue("bundle_url")]
    if verb == "rescore":
        return ["rescore", "--features", str(request.getfixturevalue("features")), *flags]
    return ["classify", "--images", str(request.getfixturevalue("store")), *flags]


def taken(process: subprocess.Popen[str]) -> bool:
    """Whether a process has begun with its own instructions: before that, while Python starts, SIGTERM ends it."""
    blocked = int(Path(f"/proc/{process.pid}/status").read_text().split("SigBlk:")[1].split()[0], 16)
    return bool(blocked >> (signal.SIGTERM - 1) & 1) or process.poll() is not None


def require_sound(verb: str, output: Path) -> None:
    if verb == "train":
        load_bundle(str(output), {}).require_whole()
        assert not (output / ".training").exists()
    else:
        assert verify(str(output))["ok"]


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("verb", "number", "begin", "seconds"), MOMENTS)
def test_a_signal_at_any_moment(verb, number, begin, seconds, request, receiver, tmp_path):
    address, posted = receiver
    words = [TLBATCH, *command(verb, request, tmp_path, address)]
    env = {**os.environ, "RAY_ADDRESS": "local"}
    process = subprocess.Popen(
        [sys.executable, "-c", HEEDING, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    while not taken(process):
        time.sleep(0.001)
    while begin == "the result" and process.poll() is None and not any(tmp_path.glob(RESULT[verb])):
        time.sleep(0.001)
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        began = time.monotonic()
        _, said = process.communicate(timeout=60)
        took = time.monotonic() - began
        print(f"{verb}, {number.name} {seconds:.2f} s after {begin}: exit {process.returncode} {took:.1f} s later")
    assert process.returncode in (0, 4), said
    assert ("interrupted" in said) == (process.returncode == 4), said
    assert "Traceback" not in said
    assert len([line for line in said.splitlines() if line.strip()]) <= 1, said
    assert [message["exit_code"] for message in posted] == [process.returncode]
    if process.returncode == 4:
        assert not (tmp_path / "out" / "lease.json").exists()
        again = subprocess.run(words, capture_output=True, text=True, check=False, env=env, timeout=200)
        assert again.returncode == 0, again.stderr
    require_sound(verb, tmp_path / "out")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("seconds", [2.0, 4.0, 6.0, 8.0])
def test_a_signal_to_all_processes_of_a_command(seconds, request, receiver, tmp_path):
    """`timeout` and a unit of systemd without KillMode=mixed end Ray's processes at the same moment as the command."""
    address, posted = receiver
    words = [TLBATCH, *command("classify", request, tmp_path, address)]
    env = {**os.environ, "RAY_ADDRESS": "local"}
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True
    )
    while not taken(process):
        time.sleep(0.001)
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode in (0, 4), said
    assert "Traceback" not in said
    assert len([line for line in said.splitlines() if line.strip()]) <= 1, said
    assert [message["exit_code"] for message in posted] == [process.returncode]
    again = subprocess.run(words, capture_output=True, text=True, check=False, env=env, timeout=200)
    assert again.returncode == 0, again.stderr
    require_sound("classify", tmp_path / "out")
