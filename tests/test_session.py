"""What a Ray on this machine opens to others: nothing."""

import os
import stat
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from conftest import TLBATCH

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


@pytest.mark.parametrize("asked", [[], ["--set", "address=local"]], ids=["by default", "asked for"])
def test_nothing_listens_off_the_loopback_and_the_token_is_its_owners(store, bundle_url, tmp_path, asked):
    command = [TLBATCH, "classify", "--images", store, "--bundle", bundle_url, "--output", tmp_path / "out", *asked]
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    process = subprocess.Popen(command, env={**env, "HOME": str(tmp_path / "home")}, stderr=subprocess.PIPE, text=True)
    seen = set()
    try:
        while process.poll() is None:
            seen |= listening(psutil.Process(process.pid))
            time.sleep(0.3)
    finally:
        process.kill()
        _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert {"gcs_server", "raylet"} <= {name for name, _ in seen}, "they would be seen"
    assert {address for _, address in seen} <= LOOPBACK, sorted(seen)
    token = Path(tmp_path, "home", ".ray", "auth_token")
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
