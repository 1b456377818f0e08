"""Bases of `keras.applications`, built: a sample by default, all of them with `make bases`."""

import inspect
import os

import keras
import numpy as np
import pytest
from support.documented import BASES_TABLE, PREPROCESSING

from tlbatch.model import bases
from tlbatch.model.bases import BASES, build_network, weights_digest
from tlbatch.model.depths import at_depths, depths_of

#: One small base of each kind of preprocessing, and of each family with layers of its own; `TLBATCH_BASES=all` is for all.
SAMPLE = ["MobileNetV2", "DenseNet121", "ResNet50", "EfficientNetB0", "ConvNeXtTiny", "MobileNetV3Small", "VGG16"]


@pytest.mark.parametrize("name", BASES if os.environ.get("TLBATCH_BASES") == "all" else SAMPLE)
def test_each_base_is_built_and_scales_as_its_own_preprocess_input(name):
    base, side = BASES[name], 128
    network = build_network(base, side, "random")
    pixels, features = bases.with_preprocessing(base, network, side)
    extractor = keras.Model(pixels, features)
    _, deep = bases.with_preprocessing(base, at_depths(network, depths_of(network)), side)
    assert BASES_TABLE[name] == (base.size, PREPROCESSING[base.scaling], features.shape[-1], deep.shape[-1])
    images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
    given = np.asarray(keras.Model(pixels, extractor.get_layer("scale").output)(images))
    module = inspect.getmodule(getattr(keras.applications, name))
    assert given == pytest.approx(module.preprocess_input(images.astype("float32")), abs=1e-4)


@pytest.mark.parametrize("name", ["ResNet50", "InceptionV3"])
def test_layers_without_names_of_their_own_find_their_weights(name, tmp_path):
    size = 75
    network = build_network(BASES[name], size, "random")
    network.save_weights(tmp_path / "own.weights.h5")
    keras.layers.Conv2D(1, 1)  # moves the counter that names layers
    loaded = build_network(BASES[name], size, (tmp_path / "own.weights.h5").read_bytes())
    assert weights_digest(loaded) == weights_digest(network)
