"""A real S3 server for the tests: SeaweedFS on the loopback, which checks credentials and honours conditions on a PUT."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

BUCKET = "photos"
#: Identities: one may do all, one may list and not read.
ACCESS, SECRET = "tlbatch-tests", "only-on-the-loopback"
LISTER = "tlbatch-lister"
#: One more may list all, and read what is below this folder of the bucket.
HALF, HALF_OPEN = "tlbatch-half", "refusals/open"

#: A bucket that anybody may list and read, but for this identity.
PUBLIC, STRANGER = "public", "tlbatch-stranger"

#: Training seeds `random`, and two workers that have trained would find the same ports.
_SYSTEM = random.SystemRandom()
_WORKER, _WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")), 4
_given: set[int] = set()


def environment(endpoint: str, access: str = ACCESS, secret: str = SECRET) -> dict[str, str]:
    """What a process needs in its environment to use a server as `access`, and nothing of this machine's own."""
    return {
        "AWS_ACCESS_KEY_ID": access,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


def options(endpoint: str) -> dict:
    return {"endpoint_url": endpoint}


class S3Server:
    """`weed mini` with its data in a folder; it can be stopped and started again with the same data and address."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = free_ports(5)
        self._process: subprocess.Popen[bytes] | None = None
        self.endpoint = f"http://127.0.0.1:{self._ports[0]}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "data").mkdir(exist_ok=True)
        half = _identity(HALF, ["List", f"Read:{BUCKET}/{HALF_OPEN}/*"])
        identities = [_identity(ACCESS, ["Admin"]), _identity(LISTER, ["List"]), half, _identity(STRANGER, ["Read:none"])]
        identities.append({"name": "anonymous", "actions": [f"List:{PUBLIC}", f"Read:{PUBLIC}"]})
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))

    def start(self) -> None:
        """Start and wait until it answers and its bucket is there."""
        weed = shutil.which("weed") or str(Path(sys.executable).parent / "weed")
        s3, master, volume, filer, admin = self._ports
        command = [weed, "mini", f"-dir={self._folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-bucket={BUCKET}"]
        command += [f"-s3.port={s3}", f"-s3.config={self._folder / 's3.json'}", "-s3.autoCreateBucket=false", "-webdav=false"]
        command += [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-admin.port={admin}"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false", "-admin.ui=false"]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder)
        end = time.monotonic() + 60
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                tail = (self._folder / "log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"the S3 server did not start:\n{tail}")
            time.sleep(0.1)

    def _answers(self) -> bool:
        import s3fs

        try:
            return bool(s3fs.S3FileSystem(**client_options(self.endpoint), skip_instance_cache=True).exists(BUCKET))
        except OSError:
            return False
        except Exception as error:
            if type(error).__name__ in ("EndpointConnectionError", "ConnectionClosedError", "HTTPClientError"):
                return False
            raise

    def stop(self) -> None:
        """Stop the server; its data stays."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


def client_options(endpoint: str, access: str = ACCESS, secret: str = SECRET) -> dict:
    """What s3fs needs to reach a server, whatever the environment says."""
    return {
        "key": access,
        "secret": secret,
        "endpoint_url": endpoint,
        "use_listings_cache": False,
        "client_kwargs": {"region_name": "us-east-1"},
        "config_kwargs": {"retries": {"max_attempts": 1}},
    }


def filesystem(endpoint: str):
    """An s3fs to prepare and inspect buckets with."""
    import s3fs

    return s3fs.S3FileSystem(**client_options(endpoint), skip_instance_cache=True)


def _identity(name: str, actions: list[str]) -> dict:
    return {"name": name, "credentials": [{"accessKey": name, "secretKey": SECRET}], "actions": actions}


def free_ports(count: int) -> list[int]:
    """Free ports whose gRPC twins 10,000 above are free too; no worker of Ray and no outgoing connection takes such ones.

    A server that is stopped finds its ports again: none is given out twice, by this process or by the other worker of pytest.
    """
    found: list[int] = []
    while len(found) < count:
        port = _SYSTEM.randrange(20_000 + _WORKER % _WORKERS, 22_700, _WORKERS)
        if port not in _given and _is_free(port) and _is_free(port + 10_000):
            found.append(port)
            _given.add(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as taken:
        try:
            taken.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
