"""The model alone, without files and without decoding, for three bases.

    .venv/bin/python benchmarks/models.py [engines] [half] [--images 256] [--rounds 3]

`engines`: tlbatch's engine for CPUs against `model.predict`, on bundles trained on photographs. `half`: the step of the engine
for GPUs, compiled by XLA in half precision, against float32 without a compiler, and how many labels stay the same. `half` is
plain Keras: it runs on TensorFlow and, with KERAS_BACKEND=jax, on JAX; on a GPU if the backend has one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

BASES = {"MobileNetV2": 160, "ResNet50": 224, "VGG16": 224}
CLASSES = 100


def main() -> None:
    """Run what is asked for; all of it by default."""
    sections = {"engines": engines, "half": half}
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(sections))
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for name in options.sections or sections:
        print(f"\n## {name}\n", flush=True)
        sections[name](options.images, options.batch, options.rounds)


def engines(images: int, batch: int, rounds: int) -> None:
    """Images a second through the engine that `auto` takes on a CPU, and through `model.predict`."""
    import keras
    from photographs import train

    from tlbatch.model.bundle import load_bundle
    from tlbatch.model.engines import load_engine

    print("| base | `model.predict`, images/s | engine, images/s | times | scores apart | same label |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, size in BASES.items():
        with tempfile.TemporaryDirectory() as folder:
            weights = () if name == "MobileNetV2" else ("random",)
            bundle = load_bundle(train(Path(folder), name, size, *weights))
            model = keras.saving.load_model(bundle.folder / "model.keras", compile=False)
            engine = load_engine(bundle, threads=os.cpu_count() or 1)
            pixels = np.random.default_rng(0).integers(0, 256, (images, size, size, 3), np.uint8)
            ways = [partial(model.predict, pixels, batch, verbose=0), partial(engine.predict, pixels)]
            (slow, given), (fast, ours) = in_turn(ways, rounds)
        given, ours = given["scores"], ours.scores
        told = f"{images / slow:.1f} | {images / fast:.1f} | {slow / fast:.2f} | {np.abs(given - ours).max():.0e}"
        print(f"| {name} at {size} | {told} | {same(given, ours)} |", flush=True)


def half(images: int, batch: int, rounds: int) -> None:
    """Images a second of the same network: float32 as Keras calls it, and float16 compiled by XLA."""
    import keras

    from tlbatch.model.bases import BASES as KNOWN
    from tlbatch.model.bases import build_network, with_preprocessing
    from tlbatch.model.head import build_head
    from tlbatch.model.precision import to_half_precision

    print(f"Keras on {keras.backend.backend()}, {devices()}\n")
    print("| base | float32, images/s | compiled float16, images/s | times | same label |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, size in BASES.items():
        keras.utils.set_random_seed(0)
        network = build_network(KNOWN[name], size, "random")
        inputs, features = with_preprocessing(KNOWN[name], network, size)
        model = keras.Model(inputs, build_head(features.shape[-1], CLASSES)(features))
        batches = np.random.default_rng(0).integers(0, 256, (images // batch, batch, size, size, 3), np.uint8)
        ((plain, scores),) = in_turn([partial(through, partial(model, training=False), batches)], rounds)
        to_half_precision(model)
        ((fast, halved),) = in_turn([partial(through, compiled(model), batches)], rounds)
        told = f"{batch * len(batches) / plain:.0f} | {batch * len(batches) / fast:.0f} | {plain / fast:.2f}"
        print(f"| {name} at {size} | {told} | {same(scores, halved)} |", flush=True)


def in_turn(ways: list[Callable[[], Any]], rounds: int) -> list[tuple[float, Any]]:
    """Median seconds of each way, and what it gives: each once to warm up, then all in turn."""
    given = [way() for way in ways]
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for way, times in zip(ways, seconds, strict=True):
            began = time.perf_counter()
            way()
            times.append(time.perf_counter() - began)
    return [(statistics.median(times), one) for times, one in zip(seconds, given, strict=True)]


def through(step: Callable[[np.ndarray], Any], batches: np.ndarray) -> np.ndarray:
    """Scores (n, C) of all batches, back on the host."""
    import keras

    return np.concatenate([keras.ops.convert_to_numpy(step(batch)) for batch in batches])


def compiled(model: object) -> Callable[[np.ndarray], object]:
    """The model's call through XLA, whatever the backend."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        weights = (
            [variable.value for variable in model.trainable_variables],
            [variable.value for variable in model.non_trainable_variables],
        )
        step = jax.jit(lambda trainable, rest, pixels: model.stateless_call(trainable, rest, pixels, training=False)[0])
        return lambda pixels: step(*weights, pixels)
    import tensorflow as tf

    return tf.function(lambda pixels: model(pixels, training=False), jit_compile=True)


def devices() -> str:
    """What the backend computes on."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        return ", ".join(device.device_kind for device in jax.devices())
    import tensorflow as tf

    found = tf.config.list_physical_devices("GPU")
    return ", ".join(tf.config.experimental.get_device_details(device)["device_name"] for device in found) or "CPU"


def same(scores: np.ndarray, others: np.ndarray) -> str:
    """Share of images with the same best label."""
    return f"{(scores.argmax(1) == others.argmax(1)).mean():.1%}"


if __name__ == "__main__":
    main()
