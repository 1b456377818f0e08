"""Measure the GPU engine and the split plan on a machine that has a GPU and nothing else: no network, no tlbatch.

    .venv/bin/python benchmarks/gpu.py pack gpu.tar.xz

    mkdir gpu && tar xf gpu.tar.xz -C gpu && cd gpu
    python3 benchmarks/gpu.py run --out results [--seconds 480] [--images 20000 60000] [STEP …]

`pack` makes one archive of the packages that such a machine lacks (it has Python 3.12, JAX with CUDA, PyTorch, pyarrow, Pillow,
h5py and what they need), the project, a bundle with its CPU predictions, and a few photographs. `run` does the steps below,
each in a process of its own, and writes `results.md` after each. It also runs without a GPU; the engine then uses JAX's CPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
#: Packages that a run needs and the bare machine has, with JAX, PyTorch, pyarrow, fsspec and h5py.
BARE = (
    *("numpy", "pandas", "pyarrow", "pillow", "fsspec", "h5py", "jax", "jaxlib", "ml-dtypes", "scipy", "opt-einsum"),
    *("attrs", "filelock", "packaging", "psutil", "pyyaml", "requests", "certifi", "idna", "urllib3", "charset-normalizer"),
    *("jinja2", "markupsafe", "rich", "setuptools", "typing-extensions"),
)
#: Packages of `.ci/requirements.txt` that it lacks.
PACKAGES = (
    *("ray", "keras", "namex", "optree", "msgpack", "jsonschema", "jsonschema-specifications", "referencing", "rpds-py"),
    *("cykooz-resizer", "obstore", "botocore", "jmespath", "google-crc32c", "tenacity"),
    *("pydantic", "pydantic-core", "annotated-types", "typing-inspection"),
    *("absl-py", "click", "protobuf", "python-dateutil", "six", "tifffile"),
)
#: Parts of Ray that a batch run never uses.
LEFT_OUT = re.compile(r"ray/(jars|rllib|tune|serve|train|llm|dashboard/client)/|.*\.pyi$|botocore/data/(?!s3/|[^/]*$)")
PHOTOS, SIZE = 48, 160
#: The bottlenecks of MobileNetV2: expansion, channels, how often, and the stride of the first one.
_BOTTLENECKS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if (ROOT / "site").is_dir():  # in the unpacked archive, for this process and those that it starts
    sys.path.insert(0, str(ROOT / "site"))
    os.environ["PYTHONPATH"] = str(ROOT / "site")


def pack(archive: Path) -> None:
    """Write the archive."""
    from photographs import PHOTOGRAPHS, run, train

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _unpack_wheels(root / "site")
        shutil.copytree(ROOT / "benchmarks", root / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
        (root / "photos").mkdir()
        for path in sorted(PHOTOGRAPHS.glob("*.JPEG"))[:PHOTOS]:
            shutil.copy(path, root / "photos" / path.name.replace(".JPEG", ".jpg"))
        bundle = train(root, size=SIZE)
        (root / "labels.csv").unlink()
        run("classify", "--images", root / "photos", "--bundle", bundle, "--output", root / "on-cpu")
        with tarfile.open(archive, "w:xz", preset=9) as tar:  # with a dictionary that holds several of Ray's programs
            for path in sorted(root.iterdir()):
                tar.add(path, path.name)
    print(f"{archive}: {archive.stat().st_size / 1e6:.1f} MB")


def _unpack_wheels(site: Path) -> None:
    """Download the wheels for Python 3.12 on x86-64 and unpack what is needed of them."""
    pinned = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / ".ci" / "requirements.txt").read_text(), re.MULTILINE))
    platforms = [f"--platform=manylinux{tag}_x86_64" for tag in ("_2_28", "_2_27", "_2_17", "2014", "1")]
    tags = ["--python-version=3.12", "--implementation=cp", *(f"--abi={abi}" for abi in ("cp312", "abi3", "none"))]
    with tempfile.TemporaryDirectory() as wheels:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", wheels]
        subprocess.run(
            [*command, *platforms, "--platform=any", *tags, *(f"{name}=={pinned[name]}" for name in PACKAGES)], check=True
        )
        build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels]
        subprocess.run([*build, str(ROOT)], check=True)
        for wheel in Path(wheels).glob("*.whl"):
            with zipfile.ZipFile(wheel) as opened:
                for name in opened.namelist():
                    if not LEFT_OUT.match(name):
                        written = Path(opened.extract(name, site))
                        if written.is_file() and opened.getinfo(name).external_attr >> 16 & 0o100:
                            written.chmod(0o755)


def run_steps(options: argparse.Namespace) -> None:
    """Do the steps in turn while there is time, and keep each one's results."""
    end, out = time.monotonic() + options.seconds, Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    given = ["--images", *map(str, options.images)]
    for name in options.steps or STEPS:
        left = end - time.monotonic()
        began, said = time.monotonic(), f"no time left for {name}"
        if left > 10:
            command = [sys.executable, __file__, "step", name, *given]
            with open(out / f"{name}.log", "w") as errors:
                try:
                    said = subprocess.run(
                        command, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=left, check=True
                    ).stdout
                except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                    said = f"{type(error).__name__}\n{error.stdout or ''!s}\n{(out / f'{name}.log').read_text()[-1500:]}"
        text = f"### {(STEPS[name].__doc__ or name).rstrip('.')}\n\n{said.strip()}\n\n*{time.monotonic() - began:.0f} s*\n\n"
        print(text, flush=True)
        with open(out / "results.md", "a") as results:
            results.write(text)


def has_gpu() -> bool:
    """Whether there is an NVIDIA card; without one the steps use JAX's CPUs."""
    return shutil.which("nvidia-smi") is not None


def pixels_of(count: int, size: int) -> np.ndarray:
    """(count, size, size, 3) uint8: the photographs, repeated."""
    from tlbatch.images.decode import Pixels, decode

    decoded = [decode(path.read_bytes(), (size, size)) for path in sorted((ROOT / "photos").glob("*.jpg"))]
    found = [one.array for one in decoded if isinstance(one, Pixels)]
    return np.stack([found[number % len(found)] for number in range(count)])


def best_rate(work: Callable[[], int], rounds: int = 3) -> float:
    """Median images a second of some rounds, after one to warm up."""
    rates = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        done = work()
        rates.append(done / (time.perf_counter() - began))
    return float(np.median(rates[1:]))


def machine(_: argparse.Namespace) -> None:
    """The machine."""
    import jax

    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    card = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip() if has_gpu() else "no GPU"
    versions = f"Python {sys.version.split()[0]}, JAX {jax.__version__}, Keras {version('keras')}"
    print(f"{card}; {os.cpu_count()} CPUs; {versions}; devices of JAX: {jax.devices()}")


def probes(_: argparse.Namespace) -> None:
    """The bundle's probes, half precision and float32, and the labels of the photographs."""
    from tlbatch.model.bundle import load_bundle
    from tlbatch.model.engines import _distance
    from tlbatch.model.jax_engine import JaxEngine

    bundle = load_bundle(str(ROOT / "bundle"))
    pixels, scores = pixels_of(PHOTOS, SIZE), {}
    for name, half in (("float32", False), ("float16", has_gpu())):
        began = time.perf_counter()
        engine = JaxEngine(bundle, os.cpu_count() or 1, 64, half=half, gpu=has_gpu())
        ready = time.perf_counter() - began
        scores[name] = engine.predict(pixels).scores
        print(f"- {name}: loaded and compiled in {ready:.1f} s, {_distance(engine, bundle):.1e} from the probes")
    same = (scores["float16"].argmax(1) == scores["float32"].argmax(1)).mean()
    print(f"- same label in both: {same:.2%}; scores apart: {np.abs(scores['float16'] - scores['float32']).max():.1e}")


def model(_: argparse.Namespace) -> None:
    """The model alone, through the engine's `predict`: images a second."""
    from tlbatch.model.jax_engine import JaxEngine

    batches = (64, 256, 1024) if has_gpu() else (16,)
    print("| base | " + " | ".join(f"batch {size}" for size in batches) + " | two threads | loop by hand |")
    print("| --- |" + " ---: |" * (len(batches) + 2))
    for name, size in (("MobileNetV2", 160), ("ResNet50", 224), ("VGG16", 224)):
        made = _model_file(name, size)
        cells = []
        for batch in batches:
            engine = JaxEngine(made, os.cpu_count() or 1, batch, half=has_gpu(), gpu=has_gpu())
            pixels = pixels_of(batch * (8 if has_gpu() else 1), size)
            cells.append(best_rate(partial(_predicted, engine, pixels)))
            if batch == batches[len(batches) // 2]:
                both = best_rate(partial(_by_two_threads, engine, pixels))
                by_hand = best_rate(partial(_loop_by_hand, engine, pixels, batch))
        print(f"| {name} at {size} | " + " | ".join(f"{rate:,.0f}" for rate in (*cells, both, by_hand)) + " |", flush=True)


def _predicted(engine: Any, pixels: np.ndarray) -> int:
    return len(engine.predict(pixels).features)


def _by_two_threads(engine: Any, pixels: np.ndarray) -> int:
    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(partial(_predicted, engine), [pixels] * 4))


def _loop_by_hand(engine: Any, pixels: np.ndarray, batch: int) -> int:
    """The same compiled step, each batch copied, computed and copied back before the next."""
    for start in range(0, len(pixels), batch):
        [np.asarray(one) for one in engine._step(pixels[start : start + batch])]
    return len(pixels)


def _model_file(name: str, size: int) -> Any:
    """A base with random weights, or the bundle's, as the engine loads it."""
    from tlbatch.model.bundle import load_bundle

    if name == "MobileNetV2":
        return load_bundle(str(ROOT / "bundle"))
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    from tlbatch.model.bases import BASES, build_network, with_preprocessing
    from tlbatch.schema import PixelRules

    inputs, features = with_preprocessing(BASES[name], build_network(BASES[name], size, "random"), size)
    folder = Path(tempfile.mkdtemp())
    keras.Model(inputs, {"features": features}).save(folder / "model.keras")
    return SimpleNamespace(folder=folder, size=(size, size), pixel_rules=PixelRules())


def torch_loop(_: argparse.Namespace) -> None:
    """PyTorch's MobileNetV2 in float16, channels last, with pixels copied in and scores out: images a second."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = torch.float16 if device.type == "cuda" else torch.float32
    network = _mobilenet().eval().to(device, kind, memory_format=torch.channels_last)
    for batch in (64, 256, 1024) if has_gpu() else (16,):
        pixels = torch.from_numpy(pixels_of(batch, SIZE)).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)

        def once(pixels: Any = pixels) -> int:
            with torch.inference_mode():
                for _ in range(8 if has_gpu() else 1):
                    network(pixels.to(device).to(kind) / 127.5 - 1).float().cpu()
            return len(pixels) * (8 if has_gpu() else 1)

        print(f"- batch {batch}: {best_rate(once):,.0f}", flush=True)


def _mobilenet() -> Any:
    """MobileNetV2 (Sandler et al., 2018, table 2) with random weights; torchvision, which has it, may not be here."""
    from torch import nn

    def convolution(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> Any:
        layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(outputs))

    class Residual(nn.Module):  # type: ignore[misc]
        def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
            super().__init__()
            wide = inputs * expansion
            expand = [convolution(inputs, wide), nn.ReLU6()] if expansion > 1 else []
            steps = [*expand, convolution(wide, wide, 3, stride, wide), nn.ReLU6(), convolution(wide, outputs)]
            self._steps, self._adds = nn.Sequential(*steps), stride == 1 and inputs == outputs

        def forward(self, pixels: Any) -> Any:
            found = self._steps(pixels)
            return pixels + found if self._adds else found

    layers, inputs = [convolution(3, 32, 3, 2), nn.ReLU6()], 32
    for expansion, outputs, repeated, stride in _BOTTLENECKS:
        for number in range(repeated):
            layers.append(Residual(inputs, outputs, 1 if number else stride, expansion))
            inputs = outputs
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)]
    return nn.Sequential(*layers, convolution(inputs, 1280), nn.ReLU6(), *head)


def decode_alone(_: argparse.Namespace) -> None:
    """Decoding alone, one process a core: photographs a second."""
    cores = os.cpu_count() or 1
    for count in sorted({1, max(1, cores // 4), max(1, cores // 2), cores}):
        with ProcessPoolExecutor(count) as pool:
            list(pool.map(_decode_for, [0.3] * count))
            rate = sum(pool.map(_decode_for, [2.0] * count))
        print(f"- {count} cores: {rate:,.0f}", flush=True)


def _decode_for(seconds: float) -> float:
    """Photographs a second of one process."""
    from tlbatch.images.decode import decode
    from tlbatch.schema import NEW_RULES

    photos = [path.read_bytes() for path in sorted((ROOT / "photos").glob("*.jpg"))]
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        decode(photos[done % len(photos)], (SIZE, SIZE), rules=NEW_RULES)
        done += 1
    return done / (time.perf_counter() - began)


def store_of(count: int) -> str:
    """A folder of `count` photographs, as hard links."""
    folder = Path(tempfile.gettempdir(), f"tlbatch-gpu-store-{count}")
    photos = sorted((ROOT / "photos").glob("*.jpg"))
    if not folder.exists():
        folder.mkdir()
        originals = [shutil.copy(path, folder.parent / f"{folder.name}-{path.name}") for path in photos]
        for number in range(count):
            os.link(originals[number % len(photos)], folder / f"{number:06d}.jpg")
    return str(folder)


GPU = {"num_gpus": 1.0} if has_gpu() else {"num_gpus": 0.0, "engine": "jax", "plan": "split"}


def classified(count: int, **settings: Any) -> dict[str, Any]:
    """The report of one run into a new folder, in this process, with its whole seconds as `wall`."""
    import tlbatch

    given = {"images": store_of(count), "bundle": str(ROOT / "bundle"), "output": tempfile.mkdtemp(), **GPU, **settings}
    began = time.monotonic()
    report = tlbatch.classify(**given)
    return {**report, "wall": time.monotonic() - began}


def run_alone(count: int, settings: dict[str, Any]) -> dict[str, Any]:
    """`classified` in a process of its own."""
    code = f"import json, gpu; print(json.dumps(gpu.classified({count}, **{settings!r}), default=str))"
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parent
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def end_to_end(options: argparse.Namespace) -> None:
    """`classify` through Ray with the split plan, whole commands and the rate between two sizes."""
    small, large = options.images
    with watched_gpu() as used:
        reports = [run_alone(count, {}) for count in (small, large)]
    steady = (large - small) / (reports[1]["wall"] - reports[0]["wall"])
    walls = " and ".join(f"{count:,} in {one['wall']:.1f} s" for count, one in zip((small, large), reports, strict=True))
    print(f"- one actor: {walls}; {steady:,.0f} images/s between them; {reports[1]['predicted']:,} predicted; {used()}")
    print(f"- {reports[1]['engine']}; {json.dumps(reports[1].get('bottleneck'))}", flush=True)
    with watched_gpu() as used:
        halves = run_alone(large, {"num_gpus": 0.5} if has_gpu() else {"concurrency": 2})
    print(f"- two actors with half of the GPU each: {large:,} in {halves['wall']:.1f} s; {used()}")


@contextmanager
def watched_gpu() -> Iterator[Callable[[], str]]:
    """Look at the GPU's utilization five times a second."""
    seen: list[int] = []
    stop = threading.Event()

    def look() -> None:
        query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        while has_gpu() and not stop.wait(0.2):
            seen.append(int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield (
            lambda: f"GPU busy {np.mean([one for one in seen if one] or [0]):.0f} % while in use, {max(seen or [0])} % at most"
        )
    finally:
        stop.set()
        thread.join()


def what_binds(options: argparse.Namespace) -> None:
    """The same run without the model (decoding and transport), and without decoding (transport and model)."""
    for kind in ("model", "decoding"):
        code = f"import gpu; gpu.bound({kind!r}, {options.images[1]})"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


def bound(without: str, images: int) -> None:
    """Print the seconds of a run with one of the two actors replaced."""
    from tlbatch.execution import sizing
    from tlbatch.execution.actors import DecodingActor, PredictingActor
    from tlbatch.images.decode import Pixels
    from tlbatch.model.batches import Outputs

    class WithoutModel(PredictingActor):
        def __init__(self, job: Any, *, after_a_death: bool = False) -> None:
            super().__init__(job, after_a_death=after_a_death)
            engine = self._predictor._engine
            length, labels = engine.predict(np.zeros((1, SIZE, SIZE, 3), np.uint8)).features.shape[1], 2
            nothing = Outputs(np.zeros((self._predictor.at_once, length), np.float32), None)
            scores = np.full((self._predictor.at_once, labels), 0.5, np.float32)
            vars(engine)["predict"] = lambda pixels: Outputs(nothing.features[: len(pixels)], scores[: len(pixels)])

    class WithoutDecoding(DecodingActor):
        def __init__(self, job: Any, *, after_a_death: bool = False) -> None:
            super().__init__(job, after_a_death=after_a_death)
            pixels = Pixels(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8), 500, 375)
            vars(self._decoder)["_decode"] = lambda _: pixels

    replaced = {"model": ("PredictingActor", WithoutModel), "decoding": ("DecodingActor", WithoutDecoding)}
    setattr(sizing, *replaced[without])
    print(f"- without {without}: {images:,} in {classified(images)['wall']:.1f} s", flush=True)


def killed(options: argparse.Namespace) -> None:
    """SIGKILL of the predicting actor in the middle of a run, and the same files afterwards."""
    whole, broken = Path(tempfile.mkdtemp(), "whole"), Path(tempfile.mkdtemp(), "broken")
    settings = {"run_id": "one", "rows_per_task": max(8, options.images[0] // 40)}
    run_alone(options.images[0], {**settings, "output": str(whole)})
    kills: list[int] = []
    os.environ["TLBATCH_KILLED"] = str(broken)
    killer = threading.Thread(target=_kill_predictor, args=(broken, kills))
    killer.start()
    again = run_alone(options.images[0], {**settings, "output": str(broken)})
    killer.join()
    tables = [sorted((out / "runs" / "one" / "predictions").rglob("*.parquet")) for out in (whole, broken)]
    same = [one.read_bytes() for one in tables[0]] == [one.read_bytes() for one in tables[1]]
    print(
        f"- {len(kills)} actor killed with parts staged; {again['predicted']:,} predicted; files byte for byte the same: {same}"
    )
    assert kills
    assert tables[0]


def _kill_predictor(output: Path, kills: list[int]) -> None:
    """Kill the actor of this run that has JAX loaded, as soon as a part is staged."""
    end = time.monotonic() + 120
    while not any(output.glob("runs/one/staged/*.n*.p*")):
        if time.monotonic() > end:
            return
        time.sleep(0.05)
    of_this_run = f"TLBATCH_KILLED={output}".encode()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if of_this_run in maps.with_name("environ").read_bytes() and "jaxlib" in maps.read_text():
                os.kill(int(maps.parent.name), signal.SIGKILL)
                kills.append(int(maps.parent.name))
                return
        except OSError:
            continue


def agreement(_: argparse.Namespace) -> None:
    """Labels of this machine's run against the table that OpenVINO made on a CPU."""
    import tlbatch

    output = tempfile.mkdtemp()
    tlbatch.classify(images=str(ROOT / "photos"), bundle=str(ROOT / "bundle"), output=output, **GPU)
    ours, theirs = (tlbatch.read_predictions(str(one)).set_index("key").sort_index() for one in (output, ROOT / "on-cpu"))
    differ = int((ours["label"] != theirs["label"]).sum())
    print(
        f"- {differ} of {len(theirs)} labels differ; scores apart at most {np.abs(ours['score'] - theirs['score']).max():.1e}"
    )


def ray_recipe(options: argparse.Namespace) -> None:
    """Ray's documented recipe with the same Keras model on JAX."""
    count = options.images[1]
    store_of(count)
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", f"import gpu; gpu.recipe({count})"], check=True, cwd=Path(__file__).parent)
    print(f"- {count:,} in {time.monotonic() - began:.1f} s")


def recipe(count: int) -> None:
    """`read_images`, an actor that calls `predict`, `write_parquet`."""
    import ray.data

    from tlbatch.execution.local_ray import start_local_ray

    class Predictor:
        def __init__(self) -> None:
            os.environ["KERAS_BACKEND"] = "jax"
            import keras

            self._model = keras.saving.load_model(ROOT / "bundle" / "model.keras", compile=False)

        def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            scores = self._model.predict(batch["image"], batch_size=256, verbose=0)["scores"]
            return {"key": batch["path"], "label": scores.argmax(1), "score": scores.max(1)}

    start_local_ray()  # tlbatch's, which starts sooner than `ray.init`
    images = ray.data.read_images(store_of(count), size=(SIZE, SIZE), mode="RGB", include_paths=True)
    actors = ray.data.ActorPoolStrategy(size=1)
    predicted = images.map_batches(Predictor, batch_size=256, compute=actors, num_gpus=1 if has_gpu() else None)
    predicted.write_parquet(tempfile.mkdtemp())


STEPS: dict[str, Callable[[argparse.Namespace], None]] = {
    "machine": machine,
    "probes": probes,
    "agreement": agreement,
    "end-to-end": end_to_end,
    "recipe": ray_recipe,
    "decode": decode_alone,
    "killed": killed,
    "binds": what_binds,
    "torch": torch_loop,
    "model": model,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Pack, or run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("pack").add_argument("archive", type=Path)
    running = actions.add_parser("run")
    running.add_argument("--out", default="results")
    running.add_argument("--seconds", type=float, default=480)
    running.add_argument("steps", nargs="*", metavar="STEP", help=", ".join(STEPS))
    step = actions.add_parser("step")
    step.add_argument("step")
    for one in (running, step):
        one.add_argument("--images", type=int, nargs=2, default=(20_000, 60_000))
    options = parser.parse_args(arguments)
    if options.action == "pack":
        pack(options.archive)
    elif options.action == "run":
        run_steps(options)
    else:
        STEPS[options.step](options)


if __name__ == "__main__":
    main()
