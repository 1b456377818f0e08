"""A classifier that was trained elsewhere, in int8: only if the images that the user gives keep its labels."""

from __future__ import annotations

import logging
from pathlib import Path

import keras
import numpy as np
import pytest
from support.pictures import encoded, noisy

import tlbatch
from tlbatch.errors import ConfigError
from tlbatch.model.bundle import load_bundle
from tlbatch.model.engines import load_engine
from tlbatch.model.frozen import frozen_base_of


def labels_file(folder: Path, labels: list[str]) -> str:
    path = folder / "labels.txt"
    path.write_text("\n".join(labels) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def given(trained, store, tmp_path_factory) -> dict[str, str]:
    """The classifier of the three colors as a file of Keras, and pictures to check it on."""
    folder = tmp_path_factory.mktemp("given")
    tlbatch.export_model(bundle=trained["bundle"], model=str(folder / "model.keras"))
    labels = labels_file(folder, trained["labels"])
    return {"model": str(folder / "model.keras"), "labels": labels, "check": str(store), "trained_with": "keras-generator"}


def test_it_is_kept_where_the_labels_are_and_used_like_any_other(given, store, tmp_path, ray_here):
    float32 = tlbatch.import_model(**given, bundle=str(tmp_path / "float32"))
    assert float32["quantized"] is None
    result = tlbatch.import_model(**given, quantize="int8", bundle=str(tmp_path / "int8"))
    found = result["quantized"]
    assert (found["kept"], found["images"], found["calibrated_on"]) == (True, 60, 60)
    assert found["equal"] >= 0.98
    assert found["times"] > 0
    bundle, other = load_bundle(result["bundle"]), load_bundle(float32["bundle"])
    assert bundle.quantized
    assert bundle.base_digest != other.base_digest
    assert frozen_base_of(bundle).digest == bundle.base_digest
    assert "base in int8" in Path(bundle.location.url, "card.html").read_text()
    probes = bundle.probes()
    assert np.array_equal(load_engine(bundle).predict(probes["pixels"]).features, probes["features"])
    run = tlbatch.classify(images=str(store), bundle=result["bundle"], output=str(tmp_path / "out"), report=False)
    assert (run["predicted"], run["failed"]) == (60, 0)
    table = tlbatch.read_predictions(str(tmp_path / "out"))
    assert (table.label == [Path(uri).parent.name for uri in table.uri]).mean() >= 0.95
    plain = tlbatch.export_model(bundle=result["bundle"], model=str(tmp_path / "again.onnx"))["model"]
    assert Path(plain).stat().st_size > 1_000_000


def test_a_model_of_onnx_in_int8(trained, given, tmp_path):
    source = tlbatch.export_model(bundle=trained["bundle"], model=str(tmp_path / "model.onnx"))["model"]
    result = tlbatch.import_model(**{**given, "model": source, "scale": "raw"}, quantize="int8", bundle=str(tmp_path / "int8"))
    assert result["quantized"]["kept"]
    bundle = load_bundle(result["bundle"])
    assert bundle.quantized
    assert frozen_base_of(bundle).digest == bundle.base_digest
    probes = bundle.probes()
    assert np.array_equal(load_engine(bundle).predict(probes["pixels"]).features, probes["features"])
    assert tlbatch.export_model(bundle=result["bundle"], model=str(tmp_path / "again.onnx"))["model"]


def test_it_stays_in_float32_where_labels_change(tmp_path, caplog):
    """A layer whose numbers differ little for their size, which int8 rounds away."""
    keras.utils.set_random_seed(3)
    normal = keras.initializers.RandomNormal
    inputs = keras.Input((48, 48, 3))
    first = keras.layers.Conv2D(16, 3, 4, kernel_initializer=normal(0, 0.3))
    large = keras.layers.Conv2D(64, 3, 2, activation="relu", kernel_initializer=normal(0, 0.1))
    small = keras.layers.Conv2D(64, 1, kernel_initializer=normal(0, 0.1))
    averages = keras.layers.GlobalAveragePooling2D()(small(large(first(keras.layers.Rescaling(1 / 255, -0.5)(inputs)))))
    model = keras.Model(inputs, keras.layers.Dense(20, "softmax", kernel_initializer=normal(0, 0.5))(averages))
    large.set_weights([large.get_weights()[0], np.full(64, 20, np.float32)])
    kernel = small.get_weights()[0]
    small.set_weights([kernel, -20 * kernel.reshape(-1, 64).sum(axis=0)])
    model.save(tmp_path / "model.keras")
    images = tmp_path / "images"
    images.mkdir()
    for number in range(200):
        (images / f"{number:03d}.png").write_bytes(encoded(noisy((128, 128, 128), number, (48, 48)), "PNG"))
    labels = labels_file(tmp_path, [f"class {number}" for number in range(20)])
    asked = {"model": str(tmp_path / "model.keras"), "labels": labels, "trained_with": "keras-generator"}
    with caplog.at_level(logging.WARNING):
        result = tlbatch.import_model(**asked, check=str(images), quantize="int8", bundle=str(tmp_path / "bundle"))
    assert result["check"]["equal"] == 1.0
    assert not result["quantized"]["kept"]
    assert result["quantized"]["equal"] < 0.99
    assert "and 99 % are needed; the base stays in float32" in caplog.text
    assert load_bundle(result["bundle"]).quantized is None


def test_it_needs_images(given, tmp_path):
    asked = {name: value for name, value in given.items() if name != "check"}
    with pytest.raises(ConfigError, match="quantize: give a folder of images like those that it will classify with check"):
        tlbatch.import_model(**asked, quantize="int8", bundle=str(tmp_path / "bundle"))
