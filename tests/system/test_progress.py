"""What a person sees while a command works: calm lines in a real terminal of 80 columns, and a plain log elsewhere."""

import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl

import pyte
import pytest
from support.paths import TLBATCH
from support.pictures import write_store

from tlbatch.output.status import status
from tlbatch.report import progress
from tlbatch.report.progress import _Log, follow, in_words

#: What Ray, TensorFlow and OpenVINO say when nobody keeps them from it.
STRAY = re.compile(r"warn|INFO|oneDNN|cuda|raylet|Tip:|deprecat|telemetry|usage stats|\(pid=|I0000|E0000", re.IGNORECASE)


def numbers(predicted: int, failed: int = 0, listed: int = 2624, rate: float = 156.4, left: int | None = 12) -> dict:
    return {"predicted": predicted, "failed": failed, "listed": listed, "images_per_second": rate, "seconds_left": left}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (numbers(1024, 3), "1,027 of 2,624, 3 failed, 156/s, 12 s left"),
        (numbers(0, 0, rate=0.0, left=None), "0 of 2,624, 0 failed"),
        (numbers(5, left=600), "5 of 2,624, 0 failed, 156/s, 10 min left"),
        (numbers(5, left=9000), "5 of 2,624, 0 failed, 156/s, 2.5 h left"),
        ({"stage": "list", "objects": 50_000, "seconds": 5.0}, "50,000 objects, 10,000/s"),
        ({"stage": "publish", "done": 3, "of": 20}, "3 of 20 files"),
        ({"stage": "fit", "done": 7, "of": 76}, "7 of 76 fits"),
    ],
)
def test_how_far_a_stage_is_in_words(given, words):
    assert in_words(given) == words


def test_a_line_of_ten_million_images_fits_eighty_columns():
    words = in_words(numbers(8_888_888, 888_888, 9_999_999, 1234.5, 9000))
    assert len("classifying" + " " + 8 * "-" + " " + words) <= 80


def test_the_log_says_something_every_half_minute(capsys):
    now = [0.0]
    log = _Log("classifying", lambda: now[0])
    for second in range(0, 125, 2):
        now[0] = float(second)
        log(numbers(second))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4
    assert re.fullmatch(r"\d\d:\d\d:\d\d classifying: 30 of 2,624, 0 failed, 156/s, 12 s left", said[0])


def record(command: list[str], frames: list[list[str]], columns: int = 80, rows: int = 24) -> tuple[int, list[str]]:
    """Run a command in a pseudo-terminal; `frames` gets every screen that differs from the one before."""
    screen = pyte.Screen(columns, rows)
    stream = pyte.ByteStream(screen)
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": str(rows)}
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment, close_fds=True)
    os.close(slave)
    end = time.monotonic() + 240
    while time.monotonic() < end:
        if select.select([master], [], [], 0.2)[0]:
            try:
                stream.feed(os.read(master, 65536))
            except OSError:
                break
            shown = [line.rstrip() for line in screen.display if line.strip()]
            if not frames or frames[-1] != shown:
                frames.append(shown)
    os.close(master)
    return process.wait(30), [line.rstrip() for line in screen.display if line.strip()]


@pytest.fixture(scope="module")
def recorded(bundle_url, tmp_path_factory) -> tuple[list[list[str]], list[str]]:
    """A run in a terminal of 80 columns, and how the screen ended."""
    folder = tmp_path_factory.mktemp("terminal")
    store = write_store(folder / "images", 500)
    frames: list[list[str]] = []
    code, last = record(
        [TLBATCH, "classify", "--images", str(store), "--bundle", bundle_url, "--output", str(folder / "table")], frames
    )
    assert code == 0, last
    return frames, last


@pytest.mark.sampled(1)
def test_a_terminal_shows_calm_lines_and_nothing_else(recorded):
    frames, last = recorded
    print("\n".join(max(frames, key=lambda frame: any("left" in line for line in frame))))
    print("\n".join(last))
    lines = {line for frame in frames[:-1] for line in frame}
    at_work = [line for line in lines if line.startswith("classifying")]
    assert any(re.search(r"[1-9][\d,]* of 1,500, 0 failed, \d+/s", line) for line in at_work)
    assert any(line.startswith("starting") for line in lines)
    assert [line for line in lines if STRAY.search(line)] == []
    assert max(map(len, lines)) <= 80
    assert all(len(frame) <= 8 for frame in frames[:-3]), "lines are renewed, not added"


def test_what_is_left_on_the_screen_is_the_result(recorded):
    _, last = recorded
    assert last[0].startswith("1,500 listed = 1,500 predicted + 0 failed")
    assert "report.html" in "".join(last)
    assert not any("classifying" in line for line in last)


@pytest.mark.sampled(1)
def test_without_a_terminal_there_is_a_plain_log(bundle_url, tmp_path):
    """The real command with a clock that is thirty times as fast."""
    store = write_store(tmp_path / "images", 300)
    code = (
        "import sys; from tlbatch.report import progress; progress._LOG_SECONDS = 1.0\n"
        "from tlbatch.cli import main; sys.argv[0] = 'tlbatch'; main()"
    )
    command = [sys.executable, "-c", code, "classify", "--images", store, "--bundle", bundle_url]
    command += ["--output", tmp_path / "table"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert said
    for line in said:
        assert re.fullmatch(r"\d\d:\d\d:\d\d (listing|classifying|publishing): [\d,]+ .*", line), done.stderr
    assert "900 listed = 900 predicted" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr


def test_status_watches_until_nobody_is_at_work(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
    run = {"run_id": "r", "state": "unfinished", "listed": 9, "predicted": 3, "failed": 0, "left": 6}
    lease = {"run_id": "r", "host": "h", "pid": 1, "since": "now"}
    before = {**run, "run_id": "earlier", "state": "published"}
    answers = [
        {"runs": [before, {**run, "progress": {"images_per_second": 7.0}}, before], "lease": lease},
        {"runs": [{**run, "state": "published", "predicted": 9, "left": 0}], "lease": None},
    ]
    waited: list[float] = []
    assert follow(lambda: answers[len(waited)], waited.append)["lease"] is None
    assert waited == [2.0]
    assert "r  unfinished: 9 listed, 3 predicted, 0 failed, 6 left, 7 images/s" in capsys.readouterr().err


@pytest.mark.sampled(1)
def test_status_of_a_run_at_work_as_another_process_sees_it(bundle_url, tmp_path):
    store = write_store(tmp_path / "images", 300)
    command = [TLBATCH, "classify", "--images", str(store), "--bundle", bundle_url, "--output", str(tmp_path / "table")]
    classify = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 120
        while not (tmp_path / "table" / "lease.json").exists() or not (tmp_path / "table" / "runs").exists():
            assert time.monotonic() < end
            time.sleep(0.1)
        classify.send_signal(signal.SIGSTOP)  # it would be done before another process has looked
        command = [TLBATCH, "status", str(tmp_path / "table"), "--watch", "--json"]
        watcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        said = watcher.stderr.readline()
        classify.send_signal(signal.SIGCONT)
        stdout, stderr = watcher.communicate(timeout=240)
        assert watcher.returncode == 0, stderr
        assert json.loads(stdout)["lease"] is None
        assert "Active: run" in said or "unfinished" in said
    finally:
        classify.send_signal(signal.SIGCONT)
        assert classify.wait(120) == 0
    assert status(str(tmp_path / "table"))["runs"][0]["state"] == "published"
