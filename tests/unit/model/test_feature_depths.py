"""Which layers a network's features come from, and what the features are."""

import keras
import numpy as np
import pytest

from tlbatch.model.bases import BASES, build_network, with_preprocessing
from tlbatch.model.depths import at_depths, depths_of

SIZE = 64


@pytest.fixture(scope="module")
def network():
    return build_network(BASES["MobileNetV2"], SIZE, "random")


def test_the_layers_of_mobilenet_are_those_before_each_halving_and_between(network):
    assert depths_of(network) == (
        "block_6_expand_relu",
        "block_10_expand_relu",
        "block_13_expand_relu",
        "block_16_depthwise_relu",
        "out_relu",
    )


def test_features_are_the_averages_of_each_layers_map(network):
    names = depths_of(network)
    deep = at_depths(network, names)
    pixels, features = with_preprocessing(BASES["MobileNetV2"], deep, SIZE)
    images = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
    found = np.asarray(keras.Model(pixels, features)(images))
    assert found.shape == (2, 192 + 384 + 576 + 960 + 1280)
    maps = keras.Model(network.input, [network.get_layer(name).output for name in names])(images / 127.5 - 1)
    assert found == pytest.approx(np.concatenate([np.asarray(one).mean(axis=(1, 2)) for one in maps], axis=1), abs=1e-5)
    assert not deep.trainable_weights


def test_a_network_whose_output_joins_branches_gives_joined_maps():
    assert depths_of(build_network(BASES["InceptionV3"], 160, "random")) == ("mixed2", "mixed5", "mixed7", "mixed9", "mixed10")


def test_a_small_input_leaves_fewer_maps_and_a_short_network_its_output():
    assert depths_of(build_network(BASES["MobileNetV2"], 32, "random"))[-2:] == ("block_13_expand_relu", "out_relu")
    pixels = keras.Input((8, 8, 3))
    assert depths_of(keras.Model(pixels, keras.layers.Conv2D(4, 3, name="only")(pixels))) == ("only",)
