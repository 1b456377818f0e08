"""Three bases go the whole way: train, classify, extract, rescore, with weights from the files that Keras downloads."""

import keras
import pytest
from support.pictures import write_store
from support.weights import save_notop

import tlbatch
from tlbatch.model.bases import BASES, build_network
from tlbatch.model.bundle import load_bundle

pytestmark = pytest.mark.usefixtures("ray_here")


def by_layer(weight):
    return f"{weight.path.split('/')[-2]}/{weight.name}:0"


def as_vgg(weight):
    """The VGG16 file of Keras calls its weights block1_conv1_W_1:0."""
    return f"{weight.path.split('/')[-2]}_{'W' if weight.name == 'kernel' else 'b'}_1:0"


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("base", "name_of", "length"), [("MobileNetV2", by_layer, 3392), ("ResNet50", by_layer, 6656), ("VGG16", as_vgg, 2048)]
)
def test_a_base_goes_through_all_verbs(base, name_of, length, tmp_path):
    """A seeded random base in a `_notop.h5` file: what is seen is that all ways lead to the same table."""
    keras.utils.set_random_seed(3)
    weights = tmp_path / f"{base.lower()}_weights_tf_dim_ordering_tf_kernels_notop.h5"
    save_notop(build_network(BASES[base], 64, "random"), weights, name_of)
    store = write_store(tmp_path / "store", 6)
    network = {"base": base, "size": 64, "weights": str(weights)}
    trained = tlbatch.train(images=str(store), bundle=str(tmp_path / "bundle"), epochs=3, **network)
    classified = tlbatch.classify(images=str(store), bundle=trained["bundle"], output=str(tmp_path / "table"))
    settings = {"output": str(tmp_path / "features"), "features_dtype": "float32"}
    extracted = tlbatch.extract(images=str(store), bundle=trained["bundle"], **settings)
    rescored = tlbatch.rescore(features=extracted["output"], bundle=trained["bundle"], output=str(tmp_path / "again"))
    assert classified["predicted"] == extracted["predicted"] == rescored["predicted"] == 18
    assert load_bundle(trained["bundle"]).features_length == length
    first, second = (tlbatch.read_predictions(str(tmp_path / name)) for name in ("table", "again"))
    assert (first["label"] == second["label"]).all()
    assert (first["score"] == second["score"]).all(), "to the bit"
