"""MLflow's own server for the tests: on the loopback, with SQLite and a folder for files."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from support.paths import ROOT
from support.s3_server import free_ports

#: Where the Makefile installs it: it wants an older pyarrow than tlbatch has.
MLFLOW = ROOT / ".venv-mlflow" / "bin" / "mlflow"
#: What it is asked until it answers: the first question opens its database.
_FIRST = "api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Run it with its data in a folder; gives its address."""
    (port,) = free_ports(1)
    words = ["server", "--host", "127.0.0.1", "--port", port, "--workers", 1]
    words += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", folder / "files"]
    # Its runner of jobs is eight processes, whose imports take a minute of both cores and leave requests unanswered.
    env = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PYTHONPATH": ""}
    with (folder / "log").open("wb") as log:
        running = subprocess.Popen(
            [str(MLFLOW), *map(str, words)], env=env, stdout=log, stderr=log, start_new_session=True, cwd=folder
        )
        try:
            address, end = f"http://127.0.0.1:{port}", time.monotonic() + 200
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"{address}/{_FIRST}", timeout=60).close()
                    break
                assert running.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < end, "MLflow does not answer"
                time.sleep(0.2)
            yield address
        finally:  # its worker is a process of its own, in the same group; nothing of it is needed any more
            os.killpg(running.pid, signal.SIGKILL)
            running.wait(30)
