"""The engine `jax`, on CPUs: the numbers of OpenVINO, no TensorFlow in its workers, both plans, kills and a resumed run."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.paths import PHOTOS, TLBATCH
from support.pictures import write_store

import tlbatch
from tlbatch.images.decode import decode
from tlbatch.model.bundle import load_bundle
from tlbatch.model.engines import load_engine
from tlbatch.model.jax_engine import _compile_once
from tlbatch.output.verify import verify
from tlbatch.schema import NEW_RULES

#: A worker in a process as Ray starts one: the engine and a head alone, then the actors of both plans.
_WORKER = """
import sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from tlbatch.config import RunConfig
from tlbatch.execution.actors import Classifier, DecodingActor, PredictingActor
from tlbatch.execution.classify_rows import job_of
from tlbatch.execution.sizing import ExecutionPlan
from tlbatch.images.listing import Selection, list_store
from tlbatch.model.bundle import load_bundle
from tlbatch.model.engines import HALF_TOLERANCE, load_engine, load_head
from tlbatch.model.jax_engine import JaxEngine
from tlbatch.output.receipts import numbered
from tlbatch.storage.resolve import resolve

url, pixels, store, scores = sys.argv[1:]
bundle = load_bundle(url)
engine, images = load_engine(bundle, "jax", threads=2), np.load(pixels)
outputs = engine.predict(images)
with ThreadPoolExecutor(2) as pool:
    for given in pool.map(engine.predict, [images[:40], images[40:80]] * 2):
        assert np.array_equal(given.scores, outputs.scores[:40]) or np.array_equal(given.scores, outputs.scores[40:80])
half = JaxEngine(bundle, 2, 16, half=True).predict(images[:16])
assert 0 < np.abs(half.scores - outputs.scores[:16]).max() < HALF_TOLERANCE
assert half.scores.dtype == half.features.dtype == np.float32
np.savez(scores, **outputs._asdict(), of_head=load_head(bundle, "jax").predict(outputs.features))
rows = numbered(list_store(resolve(store), Selection()).manifest)
job = job_of(RunConfig(images=store, bundle=url, output="unused"), url, "jax", ExecutionPlan([], 1, 1, 16), rows)
alone = Classifier(job)(rows)
in_two = PredictingActor(job)(DecodingActor(job)(rows))
for column in ("key", "label", "score"):
    assert alone[column].equals(in_two[column])
assert alone["label"].null_count == 0
assert "tensorflow" not in sys.modules
"""


@pytest.fixture(scope="module")
def pictures(store) -> np.ndarray:
    """(n, 96, 96, 3): all photographs or, where there are none, the pictures of the tests."""
    paths = sorted(PHOTOS.glob("*.JPEG")) if PHOTOS.is_dir() else sorted(store.rglob("*.jpg"))
    return np.stack([decode(path.read_bytes(), (96, 96), rules=NEW_RULES).array for path in paths])


@pytest.mark.sampled(1)
def test_the_engine_gives_openvinos_numbers_and_its_workers_never_import_tensorflow(real_bundle_url, pictures, store, tmp_path):
    np.save(tmp_path / "pixels.npy", pictures)
    words = [real_bundle_url, tmp_path / "pixels.npy", store, tmp_path / "scores.npz"]
    subprocess.run([sys.executable, "-c", _WORKER, *map(str, words)], check=True, timeout=200)
    given, expected = np.load(tmp_path / "scores.npz"), load_engine(load_bundle(real_bundle_url), "openvino").predict(pictures)
    assert (given["scores"].argmax(1) == expected.scores.argmax(1)).all()
    assert np.abs(given["scores"] - expected.scores).max() < 1e-5
    assert given["of_head"] == pytest.approx(given["scores"], abs=1e-6)


@pytest.mark.sampled(1)
def test_a_run_that_lost_its_command_and_then_its_actor_gives_the_files_of_one_that_did_not(tiny_url, tmp_path, ray_here):
    store = write_store(tmp_path / "store", 20)
    settings = {"images": str(store), "bundle": tiny_url, "run_id": "one", "rows_per_task": 4, "engine": "jax", "plan": "split"}
    whole = tlbatch.classify(**settings, output=str(tmp_path / "whole"))
    assert (whole["engine"], whole["predicted"]) == ("jax", 60)
    broken = tmp_path / "broken"
    flags = [word for name in ("run_id", "rows_per_task", "engine", "plan") for word in ("--set", f"{name}={settings[name]}")]
    command = [TLBATCH, "classify", "--images", store, "--bundle", tiny_url, "--output", broken, *flags]
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as started:
        _wait_for_a_part(broken)
        started.kill()
    killed: list[int] = []
    killer = threading.Thread(target=lambda: killed.append(_kill_the_one_with_jax()))
    killer.start()
    continued = tlbatch.classify(**settings, output=str(broken))
    killer.join()
    assert killed
    assert continued["predicted"] == 60
    files = [sorted((output / "runs" / "one" / "predictions").glob("*.parquet")) for output in (tmp_path / "whole", broken)]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]] != []
    assert verify(str(broken))["ok"]


def _wait_for_a_part(output: Path) -> None:
    end = time.monotonic() + 120
    while not any(output.glob("runs/one/staged/*.json")):
        assert time.monotonic() < end, "nothing was staged"
        time.sleep(0.02)


def _kill_the_one_with_jax() -> int:
    """SIGKILL to the predicting actor of this process's Ray as soon as it has loaded JAX; its process id."""
    import psutil

    end = time.monotonic() + 120
    while time.monotonic() < end:
        for process in psutil.Process().children(recursive=True):
            try:
                if "ray::" in " ".join(process.cmdline()) and "libjax_common" in Path(f"/proc/{process.pid}/maps").read_text():
                    os.kill(process.pid, signal.SIGKILL)
                    return process.pid
            except (OSError, psutil.Error):
                continue
        time.sleep(0.02)
    raise AssertionError("no actor has loaded JAX")


def in_a_process(code: str, tmp_path: Path) -> str:
    """What code prints in a process that sees no GPU, where the machine has one too."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100, env=env)
    return done.stdout.strip()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("engine", ["auto", "jax", "tensorflow"])
def test_where_there_is_no_gpu_no_engine_sees_one(engine, tmp_path):
    code = f"from tlbatch.model.engines import engine_on_gpu; print(engine_on_gpu({engine!r}), engine_on_gpu('openvino'), '.')"
    assert in_a_process(code, tmp_path) == "."


_REFUSED = """
import sys
from tlbatch.errors import ConfigError
from tlbatch.model.bundle import load_bundle
from tlbatch.model.engines import load_engine
{before}
try:
    load_engine(load_bundle({url!r}), "jax", gpu={gpu})
except ConfigError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("before", "gpu", "sentence"),
    [
        ("import keras", False, "Keras already runs on tensorflow in this process"),
        ("", True, "a GPU is reserved, but JAX does not see it; install tlbatch[gpu-jax]"),
        (
            "sys.modules['jax'] = None; import importlib.util; importlib.util.find_spec = lambda _: None",
            False,
            "not installed here",
        ),
    ],
)
def test_what_jax_cannot_do_here_is_a_sentence(tiny_url, tmp_path, before, gpu, sentence):
    assert sentence in in_a_process(_REFUSED.format(before=before, gpu=gpu, url=tiny_url), tmp_path)


@pytest.mark.parametrize("found", ["nothing", "a folder of this user", "a folder for all", "a file", "a setting of the user"])
def test_what_is_compiled_is_kept_only_in_a_folder_of_the_users_own(tmp_path, monkeypatch, caplog, found):
    folder = tmp_path / f"tlbatch-jax-{os.getuid()}"
    if "folder" in found:
        folder.mkdir()
        folder.chmod(0o777 if "all" in found else 0o700)
    elif found == "a file":
        folder.write_bytes(b"")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    settings = {}
    config = SimpleNamespace(jax_compilation_cache_dir="/theirs" if "setting" in found else None, update=settings.__setitem__)
    _compile_once(SimpleNamespace(config=config))
    kept = found in ("nothing", "a folder of this user")
    assert settings.get("jax_compilation_cache_dir") == (str(folder) if kept else None)
    assert bool(caplog.messages) == (found in ("a folder for all", "a file"))
