"""Compare tlbatch with its peers, and with the limit of the machine, in one run.

    .venv/bin/python benchmarks/compare.py [SECTION …] [--images 10000] [--rounds 3] [--before COMMIT]

`peers` alternates between the programs of `peers.py` and tlbatch over N photographs and half of them: with the base in float32,
in int8, and with the code of another commit. It measures the whole command over N, and the steady rate, which is the difference
between the two sizes. In each round it also measures the combined limit of model and decoder, in float32 and in int8. `bound`
measures only that limit. `first` is the time to the first written prediction. `large` is 12-megapixel JPEGs, decoded at a
reduced scale and at full size. `growth` is memory and bytes through Ray's object store for 1,000 to 5N photographs, and with
the plan for GPUs. The peers run in `.venv-peers`, which is made from `peers.txt`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from photographs import PHOTOGRAPHS, repeated, train
from PIL import Image

ROOT = Path(__file__).parent.parent
HERE, PEERS = sys.executable, ROOT / ".venv-peers" / "bin" / "python"
SCRIPT = Path(__file__).with_name("peers.py")
WAYS = {
    "Ray's recipe": (PEERS, SCRIPT, "ray_recipe"),
    "Daft, Keras": (PEERS, SCRIPT, "daft_keras"),
    "Daft, the same engine": (PEERS, SCRIPT, "daft_openvino"),
    "`tf.data` loop": (PEERS, SCRIPT, "tf_data"),
    "loop by hand, same engine and decoder": (HERE, SCRIPT, "by_hand"),
    "tlbatch": (HERE, "-m", "tlbatch", "classify"),
}
BEFORE, INT8 = "tlbatch before", "tlbatch, int8"
WATCHED = (HERE, __file__, "--watched")
LARGE, LARGE_SIZE = 3_000, (4000, 3000)


def main() -> None:
    """Run the requested sections; by default all of them."""
    if sys.argv[1:2] == ["--watched"]:
        print(json.dumps(watched(*sys.argv[2:])))
        return
    sections = {section.__name__: section for section in (peers, bound, first, large, growth)}
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(sections))
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--before", metavar="COMMIT", help="a commit whose tlbatch is among the peers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = train(Path(folder))
        for name in options.sections or sections:
            if name == "peers":
                peers(Path(folder), bundle, options.images, options.rounds, options.before)
            else:
                sections[name](Path(folder), bundle, options.images, options.rounds)
            print(flush=True)


def peers(root: Path, bundle: str, images: int, rounds: int, before: str | None = None) -> None:
    """Measure every program, whole and steady, and the limit of model and decoder right before tlbatch's turn."""
    if not PEERS.exists():
        subprocess.run([HERE, "-m", "venv", ROOT / ".venv-peers"], check=True)
        subprocess.run([PEERS, "-m", "pip", "install", "--quiet", "-r", SCRIPT.with_suffix(".txt")], check=True)
    stores = [repeated(root, images // 2), repeated(root, images)]
    (root / "int8").mkdir()
    # Of two arbitrary classes the accuracy says nothing, so any loss is allowed.
    int8 = train(root / "int8", "MobileNetV2", 160, None, "last", "--quantize", "int8", "--quantize-loss", "100")
    ways = {name: (way, bundle) for name, way in WAYS.items()} | {INT8: (WAYS["tlbatch"], int8)}
    if before:
        ways[BEFORE] = build_of(before, root / "before")
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    bounds: dict[str, list[float]] = {"tlbatch": [], INT8: []}
    for number in range(rounds):
        for name, (way, model) in ways.items():
            if name in bounds:
                bounds[name].append(alone(model, rounds)[2])
            less, more = (seconds(over(way, store, model, root / f"out-{number}-{name}-{store.name}")) for store in stores)
            took[name].append((less, more))
            print(f"round {number + 1}, {name}: {less:.1f} s, {more:.1f} s", file=sys.stderr, flush=True)
    tell_of_peers(images, took, bounds)


def build_of(commit: str, folder: Path) -> tuple[tuple[object, ...], str]:
    """The command of another commit's tlbatch, and a bundle that it trained."""
    folder.mkdir()
    packed = subprocess.run(["git", "archive", commit, "tlbatch"], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    subprocess.run(["tar", "-x"], cwd=folder, check=True, input=packed)
    return ("env", f"PYTHONPATH={folder}", *WAYS["tlbatch"]), train(folder, env={"PYTHONPATH": str(folder)})


def tell_of_peers(images: int, took: dict[str, list[tuple[float, float]]], bounds: dict[str, list[float]]) -> None:
    """Print median rates and median ratios of tlbatch's rate to theirs, then every measurement."""
    whole = {name: [images / more for _, more in pairs] for name, pairs in took.items()}
    steady = {name: [images / 2 / (more - less) for less, more in pairs] for name, pairs in took.items()}
    print("| way | whole command, images/s | times | steady, images/s | times |\n| --- | ---: | ---: | ---: | ---: |")
    for name in took:
        cells = [f"{median(rates[name]):.0f} | {ratio(rates['tlbatch'], rates[name]):.2f}" for rates in (whole, steady)]
        print(f"| {name} | {' | '.join(cells)} |")
    print()
    for name, limits in bounds.items():
        share = 100 * ratio(steady[name], limits)
        each = ", ".join(f"{100 * ours / most:.0f}" for ours, most in zip(steady[name], limits, strict=True))
        print(f"Steady, {name} does {share:.0f} % of what model and decoder can do together ({each} % in the rounds).")
    rounds = [f"round {n + 1}" for n in range(len(took["tlbatch"]))]
    print(f"\n| seconds for {images // 2:,} / {images:,} | {' | '.join(rounds)} |\n| --- |{' ---: |' * len(rounds)}")
    for name, pairs in took.items():
        print(f"| {name} | {' | '.join(f'{less:.1f} / {more:.1f}' for less, more in pairs)} |")
    for name, limits in bounds.items():
        print(f"| model and decoder of {name} together, images/s | {' | '.join(f'{rate:.0f}' for rate in limits)} |")


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median of the rounds' ratios, so that changes of a shared machine between rounds cancel out."""
    return median([one / other for one, other in zip(ours, theirs, strict=True)])


def bound(_root: Path, bundle: str, _images: int, rounds: int) -> None:
    """Print the rates of model and decoder alone, and the limit of both together."""
    model, decoder, both = alone(bundle, rounds)
    print(f"The model alone does {model:.0f} images a second, the decoder alone {decoder:.0f}, both at the most {both:.0f}.")


def alone(bundle: str, rounds: int) -> tuple[float, float, float]:
    """Images a second of the model, of the decoder (each on all CPUs), and of both together: 1 / (1/model + 1/decoder)."""
    from tlbatch.images.decode import Pixels, decode
    from tlbatch.model.bundle import load_bundle
    from tlbatch.model.engines import load_engine

    cpus = os.cpu_count() or 1
    photos = [path.read_bytes() for path in sorted(PHOTOGRAPHS.glob("*.JPEG"))] * 5
    loaded = load_bundle(bundle)
    engine = load_engine(loaded, "openvino", threads=cpus)
    way = partial(decode, size=loaded.size, rules=loaded.pixel_rules)
    with ThreadPoolExecutor(cpus) as pool:
        decoded = pool.map(way, photos)
        pixels = np.stack([one.array for one in decoded if isinstance(one, Pixels)])
        decoding = [rate(len(photos), lambda: list(pool.map(way, photos))) for _ in range(rounds)]
    model = median([rate(len(pixels), lambda: engine.predict(pixels)) for _ in range(rounds)])
    decoder = median(decoding)
    return model, decoder, 1 / (1 / model + 1 / decoder)


def first(root: Path, bundle: str, _images: int, rounds: int) -> None:
    """Measure the seconds from the command to the first file with predictions of 16 images; compare with bare Ray Data."""
    store = repeated(root, 16)
    ways = {"tlbatch": (WAYS["tlbatch"], "part*"), "Ray Data and the engine": ((HERE, SCRIPT, "ray_engine"), "*.parquet")}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, (way, written) in ways.items():
            output = root / f"first-{number}-{name}"
            found[name].append(seconds(over(way, store, bundle, output), until=partial(any_file, output, written)))
    print("| way | s to the first prediction | tlbatch's, times |\n| --- | ---: | ---: |")
    for name, times in found.items():
        print(f"| {name} | {median(times):.1f} | {ratio(found['tlbatch'], times):.2f} |")


def large(root: Path, bundle: str, _images: int, rounds: int) -> None:
    """Measure the command on 12-megapixel JPEGs, unchanged and with the decoder forced to full size."""
    store = root / "large"
    store.mkdir()
    for number, path in enumerate(sorted(PHOTOGRAPHS.glob("*.JPEG"))[:LARGE]):
        buffer = io.BytesIO()
        Image.open(path).convert("RGB").resize(LARGE_SIZE, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        for copy in range(LARGE // 200):
            (store / f"{number:04d}-{copy}.jpg").write_bytes(buffer.getvalue())
    found: dict[str, list[float]] = {"reduced": [], "full": []}
    for number in range(rounds):
        for decoding, times in found.items():
            times.append(seconds([*WATCHED, store, bundle, root / f"large-{number}-{decoding}", decoding]))
    count = len(list(store.iterdir()))
    reduced, full = (median(times) for times in found.values())
    print(f"{count} JPEGs of 12 megapixels: {reduced:.1f} s; decoded at full size {full:.1f} s: {full / reduced:.2f} times")


def growth(root: Path, bundle: str, images: int, _rounds: int) -> None:
    """Measure seconds, memory and object store bytes as the store grows, and with the plan for GPUs, which sends pixels."""
    print("| images | plan | s | peak memory of all processes, MiB | object store, bytes an image | spilled |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    grown = []
    for count, plan in ((1_000, "fused"), (images, "fused"), (5 * images, "fused"), (images, "split")):
        told = words(*WATCHED, repeated(root, count), bundle, root / f"growth-{count}-{plan}", "reduced", plan)
        facts = json.loads(subprocess.run(told, check=True, stdout=subprocess.PIPE).stdout)
        peak, sent = facts["peak"] / 2**20, facts["created_bytes"] / count
        spilled = facts["spilled_bytes"]
        print(f"| {count:,} | {plan} | {facts['seconds']:.1f} | {peak:,.0f} | {sent:,.0f} | {spilled} |", flush=True)
        grown.append((facts["seconds"], peak))
    (before, less), (after, more) = grown[1:3]
    steady = 4 * images / (after - before)
    print(f"\nFrom {images:,} to {5 * images:,}: {steady:.0f} images a second, {more - less:.0f} MiB more.")
    pixels = 160 * 160 * 3
    print(f"An image's resized pixels are {pixels:,} bytes: the split plan sends {sent / pixels:.3f} times that.")


def rate(count: int, work: Callable[[], object]) -> float:
    """Pieces of work a second."""
    began = time.perf_counter()
    work()
    return count / (time.perf_counter() - began)


def words(*command: object) -> list[str]:
    """A command as the operating system takes it."""
    return [str(word) for word in command]


def over(way: tuple[object, ...], store: Path, bundle: str, output: Path) -> list[object]:
    """A way's command over a store."""
    if way[-1] == "classify":
        return [*way, "--images", store, "--bundle", bundle, "--output", output]
    return [*way, store, bundle, output]


def any_file(folder: Path, pattern: str) -> bool:
    """Whether a file of that name is anywhere in the folder."""
    return any(folder.rglob(pattern))


def seconds(command: list[object], until: Callable[[], bool] | None = None) -> float:
    """How long a command takes, or takes until something is there."""
    began = time.perf_counter()
    process = subprocess.Popen(words(*command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while until and not until() and process.poll() is None:
        time.sleep(0.02)
    there = time.perf_counter() - began
    if process.wait():
        sys.exit(f"failed: {' '.join(words(*command))}")
    return there if until else time.perf_counter() - began


def watched(images: str, bundle: str, output: str, decoding: str = "reduced", plan: str = "auto") -> dict[str, float]:
    """What the command costs in this process: seconds, peak memory of all processes, bytes through Ray's object store."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    import tlbatch
    from tlbatch.execution.local_ray import start_local_ray
    from tlbatch.execution.session import ray_session

    with ray_session() as start, Peak() as peak:
        if decoding == "full":
            start_local_ray(runtime_env={"worker_process_setup_hook": decode_at_full_size})
        began = time.perf_counter()
        tlbatch.classify(images=images, bundle=bundle, output=output, plan=plan)
        took = time.perf_counter() - began
        start()
        stored = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address)).store_stats
    return {
        "seconds": took,
        "peak": peak.bytes,
        "created_bytes": stored.cumulative_created_bytes,
        "spilled_bytes": stored.spilled_bytes_total,
    }


def decode_at_full_size() -> None:
    """Set the margin in a worker so high that no JPEG is decoded at a reduced scale."""
    from tlbatch.images import pictures

    pictures._DRAFT_MARGIN = 1_000_000


class Peak:
    """The peak memory of this process and all its children together; each page counts once."""

    def __enter__(self) -> Peak:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        me = psutil.Process()
        while not self._stop.wait(1.0):
            held = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    held += process.memory_full_info().uss
                except psutil.NoSuchProcess:
                    continue
            self.bytes = max(self.bytes, held)


if __name__ == "__main__":
    main()
