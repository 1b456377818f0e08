"""Every base scales its pixels as Keras does, and takes its weights from every layout Keras has written."""

import inspect

import h5py
import keras
import numpy as np
import pytest
from support.documented import BASES_TABLE
from support.weights import save_notop

from tlbatch.errors import ConfigError, WeightsError
from tlbatch.model.bases import BASES, build_network, find_base, weights_digest

SMALL = 32
MOBILENET = BASES["MobileNetV2"]


def test_the_table_holds_every_base_of_keras():
    builders = {name for name, item in vars(keras.applications).items() if inspect.isfunction(item)}
    assert builders == set(BASES)


def test_the_documentation_lists_every_base():
    assert set(BASES_TABLE) == set(BASES)


def test_an_unknown_base_is_a_sentence_with_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'MobileNetV2'"):
        find_base("MobilNetV2")


def test_a_size_that_cannot_be_is_a_sentence():
    with pytest.raises(ConfigError, match="size: InceptionV3 cannot be built for 40x40"):
        build_network(BASES["InceptionV3"], 40, "random")


@pytest.fixture(scope="module")
def network():
    return build_network(MOBILENET, SMALL, "random")


@pytest.fixture(scope="module")
def stacked(network):
    """The base inside a classifier, as people save theirs."""
    pixels = keras.Input((SMALL, SMALL, 3))
    maps = network(pixels, training=False)
    scores = keras.layers.Dense(3, name="scores")(keras.layers.GlobalAveragePooling2D()(maps))
    return keras.Model(pixels, scores)


def test_random_weights_are_random_and_frozen(network):
    assert weights_digest(network) != weights_digest(build_network(MOBILENET, SMALL, "random"))
    assert not network.trainable_weights


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5")
@pytest.mark.parametrize("layout", ["flat.weights.h5", "nested.weights.h5", "nested.keras", "nested.h5"])
def test_weights_come_back_from_every_layout(network, stacked, tmp_path, layout):
    file = tmp_path / layout
    model = network if layout.startswith("flat") else stacked
    model.save_weights(file) if layout.endswith(".weights.h5") else model.save(file)
    loaded = build_network(MOBILENET, SMALL, file.read_bytes())
    assert weights_digest(loaded) == weights_digest(network)


def test_weights_come_back_from_the_files_keras_downloads(network, tmp_path):
    """`*_notop.h5`: legacy layout, layers by name at the root, with the `:0` of TensorFlow 1."""
    file = tmp_path / "notop.h5"
    save_notop(network, file, lambda weight: f"{weight.path.split('/')[-2]}/{weight.name}:0")
    assert weights_digest(build_network(MOBILENET, SMALL, file.read_bytes())) == weights_digest(network)


def test_weights_with_names_of_another_time_are_taken_in_order(tmp_path):
    """The VGG16 file of Keras calls its weights block1_conv1_W_1:0."""
    vgg = build_network(BASES["VGG16"], SMALL, "random")
    file = tmp_path / "vgg16_notop.h5"
    save_notop(vgg, file, lambda weight: f"{weight.path.split('/')[-2]}_{'W' if weight.name == 'kernel' else 'b'}_1:0")
    assert weights_digest(build_network(BASES["VGG16"], SMALL, file.read_bytes())) == weights_digest(vgg)


def test_the_demo_weights_fit(weights):
    with open(weights, "rb") as file:
        loaded = build_network(MOBILENET, SMALL, file.read())
    with h5py.File(weights) as file:
        kernel = np.asarray(file["model_weights/mobilenetv2_1.00_160/Conv1/kernel"])
    assert np.array_equal(loaded.get_layer("Conv1").get_weights()[0], kernel)


@pytest.mark.parametrize("data", [b"no weights at all", b"PK\x03\x04 no archive", b"\x89HDF\r\n\x1a\n no h5"])
def test_what_is_no_weights_file_is_a_sentence(data):
    with pytest.raises(WeightsError, match="weights: the file is not a Keras weights file"):
        build_network(MOBILENET, SMALL, data)


@pytest.mark.parametrize("layout", ["other.weights.h5", "other.h5"])
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5")
def test_the_weights_of_another_network_are_refused(tmp_path, layout):
    other = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
    other.save_weights(tmp_path / layout) if layout.endswith(".weights.h5") else other.save(tmp_path / layout)
    with pytest.raises(WeightsError, match="weights: "):
        build_network(MOBILENET, SMALL, (tmp_path / layout).read_bytes())


def test_a_download_that_cannot_be_had_names_the_file_option(monkeypatch):
    def unreachable(*_args, **_options):
        raise Exception("URL fetch failure on https://example.invalid: None -- Name or service not known")

    monkeypatch.setattr("keras.src.applications.mobilenet_v2.file_utils.get_file", unreachable)
    with pytest.raises(WeightsError, match=r"cannot download the ImageNet weights of MobileNetV2.*--weights FILE"):
        build_network(MOBILENET, 224, "imagenet")


def test_external_links_in_a_weights_file_are_not_followed(tmp_path):
    second = tmp_path / "second.h5"
    with h5py.File(second, "w") as file:
        file["Conv1/kernel"] = np.zeros(3)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["Conv1"] = h5py.ExternalLink(str(second), "Conv1")
    with pytest.raises(WeightsError, match="file has nothing"):
        build_network(MOBILENET, SMALL, (tmp_path / "other.h5").read_bytes())
