"""What a Ray on this machine opens to others, which is nothing, and which of its processes there are: those that work."""

import contextlib
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.paths import TLBATCH

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def listening(process: psutil.Process) -> set[tuple[str, str]]:
    """(name, address) of all sockets on which a process and those below it wait for others."""
    found = set()
    for one in [process, *process.children(recursive=True)]:
        try:
            found |= {(one.name(), at.laddr.ip) for at in one.net_connections("inet") if at.status == psutil.CONN_LISTEN}
        except psutil.Error:
            continue  # it ended meanwhile
    return found


def programs(process: psutil.Process) -> set[str]:
    """What runs below a process: the file names among the words of each command."""
    found = set()
    for one in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found |= {Path(word).name for word in one.cmdline()[:3]}
    return found


@pytest.mark.sampled(1)
@pytest.mark.parametrize("asked", [[], ["--set", "address=local"]], ids=["by default", "asked for"])
def test_nothing_listens_off_the_loopback_and_the_token_is_its_owners(store, bundle_url, tmp_path, asked):
    command = [TLBATCH, "classify", "--images", store, "--bundle", bundle_url, "--output", tmp_path / "out", *asked]
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    process = subprocess.Popen(command, env={**env, "HOME": str(tmp_path / "home")}, stderr=subprocess.PIPE, text=True)
    seen, ran = set(), set()
    try:
        while process.poll() is None:
            seen |= listening(psutil.Process(process.pid))
            ran |= programs(psutil.Process(process.pid))
            time.sleep(0.3)
    finally:
        process.kill()
        _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert {"gcs_server", "raylet"} <= {name for name, _ in seen}, "they would be seen"
    assert {address for _, address in seen} <= LOOPBACK, sorted(seen)
    assert "agent.py" in ran, "they would be seen"
    assert not ran & {"dashboard.py", "monitor.py", "log_monitor.py"}, "each takes a second to start"
    token = Path(tmp_path, "home", ".ray", "auth_token")
    assert stat.S_IMODE(token.stat().st_mode) == 0o600


def test_no_worker_outlives_its_session_even_if_it_hangs():
    """Its raylet ends without ending it, and it is stopped, mostly before it notices that."""
    words = """
import os, signal, time
import psutil, ray
from tlbatch.execution.session import ray_session

@ray.remote
class Worker:
    def pid(self):
        return os.getpid()

def state():
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return "gone"

def crashing():
    (raylet,) = (one for one in psutil.Process().children() if one.name() == "raylet")
    raylet.kill()
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.5)
    states.append(state())
    shutdown()

shutdown, ray.shutdown, states = ray.shutdown, crashing, []
while psutil.STATUS_STOPPED not in states and len(states) < 8:
    with ray_session() as start:
        start()
        worker = Worker.remote()
        pid = ray.get(worker.pid.remote())
time.sleep(0.5)
print(pid, states[-1], state())
"""
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    pid, before, after = done.stdout.split()[-3:]  # Ray says before that its raylet is gone
    if after == psutil.STATUS_STOPPED:
        psutil.Process(int(pid)).kill()
    assert before == psutil.STATUS_STOPPED
    assert after in ("gone", psutil.STATUS_ZOMBIE)  # some containers have no process that clears up after others


@pytest.mark.sampled(1)
def test_what_workers_say_is_there_for_who_asks(store, bundle_url, tmp_path):
    """`--verbose` starts the reader of their log files, which puts the process before each line."""
    command = [TLBATCH, "classify", "--images", store, "--bundle", bundle_url, "--output", tmp_path / "out", "--verbose"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(r"MapWorker.* pid=\d+\)", done.stdout + done.stderr)
