"""Measure the model alone, without files and decoding, for three bases.

    .venv/bin/python benchmarks/models.py [engines] [depths] [half] [--images 256] [--rounds 3]

`engines`: tlbatch's CPU engine compared with `model.predict`, on bundles trained on photographs. `half`: the computation of the
GPU engine, compiled by XLA in half precision, compared with float32 without a compiler, and how many labels stay the same.
`half` is plain Keras: it runs on TensorFlow or, with KERAS_BACKEND=jax, on JAX, and on a GPU if the backend has one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import keras

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

BASES = {"MobileNetV2": 160, "ResNet50": 224, "VGG16": 224}
#: Arbitrary classes of ten photographs each.
CLASSES = 20


def main() -> None:
    """Run the requested sections; by default all of them."""
    sections = {"engines": engines, "depths": depths, "half": half}
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(sections))
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for name in options.sections or sections:
        sections[name](options.images, options.batch, options.rounds)
        print(flush=True)


def engines(images: int, batch: int, rounds: int) -> None:
    """Measure images a second of the engine that `auto` selects on a CPU, and of `model.predict`."""
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


def depths(images: int, _batch: int, rounds: int) -> None:
    """Measure what features of several depths cost: images a second of the CPU engine with them, and with the last layer."""
    from photographs import train

    from tlbatch.model.bundle import load_bundle
    from tlbatch.model.engines import load_engine

    print("| base | last layer, images/s | depths, images/s | time of depths by time of last layer |")
    print("| --- | ---: | ---: | ---: |")
    for name, size in BASES.items():
        with tempfile.TemporaryDirectory() as folder:
            pixels = np.random.default_rng(0).integers(0, 256, (images, size, size, 3), np.uint8)
            ways = []
            for features_of in ("last", "depths"):
                root = Path(folder, features_of)
                root.mkdir()
                bundle = load_bundle(train(root, name, size, None if name == "MobileNetV2" else "random", features_of))
                ways.append(partial(load_engine(bundle, threads=os.cpu_count() or 1).predict, pixels))
            (last, _), (deep, _) = in_turn(ways, rounds)
        print(f"| {name} at {size} | {images / last:.1f} | {images / deep:.1f} | {deep / last:.3f} |", flush=True)


def half(images: int, batch: int, rounds: int) -> None:
    """Measure images a second of one network: float32 as Keras runs it, float32 and float16 through XLA, in batches.

    Pixels are copied to the device and scores back; `without the copy` the pixels are already on the device. MobileNetV2 has
    the weights of the demo, the others have random weights; each has a head trained on the photographs.
    """
    import keras

    from tlbatch.model.precision import to_half_precision

    images = max(1, images // batch) * batch
    print(f"Keras on {keras.backend.backend()}, {devices()}; {images} images in batches of {batch}\n")
    print("| base | float32 | float32, XLA | float16, XLA | times | without the copy | same label | scores apart |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, size in BASES.items():
        model = classifier(name, size)
        pixels = crops(images, size, seed=1)
        batches = [pixels[start : start + batch] for start in range(0, images, batch)]
        there = [keras.ops.convert_to_tensor(one) for one in batches]
        (plain, scores), (joined, _) = in_turn(
            [partial(through, partial(model, training=False), batches), partial(through, compiled(model), batches)], rounds
        )
        to_half_precision(model)
        step = compiled(model)
        (fast, halved), (computed, _) = in_turn([partial(through, step, batches), partial(through, step, there)], rounds)
        rates = " | ".join(f"{images / seconds:,.0f}" for seconds in (plain, joined, fast))
        told = f"{plain / fast:.2f} | {images / computed:,.0f} | {same(scores, halved)} | {np.abs(scores - halved).max():.0e}"
        print(f"| {name} at {size} | {rates} | {told} |", flush=True)


def classifier(name: str, size: int) -> keras.Model:
    """A frozen base with a head for the arbitrary classes; pixels (n, size, size, 3) -> scores (n, C)."""
    import keras
    from photographs import WEIGHTS

    from tlbatch.model.bases import BASES as KNOWN
    from tlbatch.model.bases import build_network, with_preprocessing
    from tlbatch.model.head import DataSplit, HeadTraining, train_head

    keras.utils.set_random_seed(0)
    network = build_network(KNOWN[name], size, WEIGHTS.read_bytes() if name == "MobileNetV2" else "random")
    inputs, features = with_preprocessing(KNOWN[name], network, size)
    pixels = crops(10 * CLASSES, size, seed=0)
    known = DataSplit(keras.Model(inputs, features).predict(pixels, 64, verbose=0), np.arange(len(pixels)) % CLASSES)
    head, _ = train_head(known, known, CLASSES, HeadTraining())
    return keras.Model(inputs, head(features))


def crops(count: int, size: int, seed: int) -> np.ndarray:
    """`count` different random crops of the photographs, (count, size, size, 3) uint8."""
    from photographs import PHOTOGRAPHS
    from PIL import Image

    random = np.random.default_rng(seed)
    pictures = [Image.open(path).convert("RGB") for path in sorted(PHOTOGRAPHS.glob("*.JPEG"))]
    found = np.empty((count, size, size, 3), np.uint8)
    for number, location in enumerate(found):
        picture = pictures[number % len(pictures)]
        share = random.uniform(0.65, 1.0)
        left, top = random.uniform(0, 1 - share, 2) * picture.size
        box = (left, top, left + share * picture.width, top + share * picture.height)
        location[...] = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR, box=box))
    return found


def in_turn(ways: Sequence[Callable[[], Any]], rounds: int) -> list[tuple[float, Any]]:
    """Median seconds and the result of each way: one warm-up each, then alternating rounds."""
    given = [way() for way in ways]
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for way, times in zip(ways, seconds, strict=True):
            began = time.perf_counter()
            way()
            times.append(time.perf_counter() - began)
    return [(statistics.median(times), one) for times, one in zip(seconds, given, strict=True)]


def through(step: Callable[[Any], Any], batches: Sequence[Any]) -> np.ndarray:
    """Scores (n, C) of all batches, back on the host."""
    import keras

    return np.concatenate([keras.ops.convert_to_numpy(step(batch)) for batch in batches])


def compiled(model: keras.Model) -> Callable[[Any], Any]:
    """The model's call compiled with XLA, on either backend."""
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
    """The devices of the backend."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        return ", ".join(device.device_kind for device in jax.devices())
    import tensorflow as tf

    found = tf.config.list_physical_devices("GPU")
    return ", ".join(tf.config.experimental.get_device_details(device)["device_name"] for device in found) or "CPU"


def same(scores: np.ndarray, others: np.ndarray) -> str:
    """The share of images with the same best label."""
    return f"{(scores.argmax(1) == others.argmax(1)).mean():.1%}"


if __name__ == "__main__":
    main()
