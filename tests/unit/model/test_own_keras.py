"""A Keras that is set up for other work serves tlbatch, and is afterwards as it was."""

import keras
import numpy as np
import pytest
from support.tiny import HEAD_A, tiny_base, tiny_bundle

from tlbatch.errors import ConfigError
from tlbatch.model import own_keras
from tlbatch.model.bases import BASES, build_network
from tlbatch.model.frozen import frozen_base_of
from tlbatch.model.head import DataSplit, HeadTraining, train_head
from tlbatch.model.own_keras import import_keras, with_own_keras
from tlbatch.model.safe_load import load_safely


@pytest.fixture
def set_up_for_other_work():
    """Half precision, channels first, and some named layers."""
    keras.config.set_floatx("float16")
    keras.config.set_image_data_format("channels_first")
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_image_data_format("channels_last")
    keras.config.set_dtype_policy("float32")


def settings() -> tuple[str, str, str]:
    return keras.config.floatx(), keras.config.image_data_format(), keras.config.dtype_policy().name


tiny_in_own_keras = with_own_keras(tiny_base)


def test_settings_and_layer_names_survive(set_up_for_other_work, tmp_path):
    before = settings()
    first = int(keras.layers.Dense(1).name.rsplit("_", 1)[-1].replace("dense", "0"))
    frozen = tiny_in_own_keras()
    bundle = with_own_keras(tiny_bundle)(tmp_path / "bundle", HEAD_A, frozen)
    again = frozen_base_of(bundle)
    part = DataSplit(np.eye(8, dtype=np.float32), np.arange(8) % 2)
    head, _ = train_head(part, part, 2, HeadTraining(1, 1))
    assert settings() == before == ("float16", "channels_first", "mixed_float16")
    assert keras.layers.Dense(1).name == f"dense_{first + 1}", "the counter of the user's thread goes on"
    assert again.digest == frozen.digest
    assert head.dtype_policy.name == load_safely(bundle.folder / "model.keras").dtype_policy.name == "float32"


def test_a_network_has_the_same_weights_and_names_whatever_was_built_before(set_up_for_other_work):
    networks = [build_network(BASES["MobileNetV2"], 32, "random") for _ in range(2)]
    assert len({tuple(layer.name for layer in network.layers) for network in networks}) == 1
    assert networks[0].output_shape == (None, 1, 1, 1280), "channels last"
    assert {weight.dtype for weight in networks[0].weights} == {"float32"}


def test_a_keras_on_another_backend_is_a_sentence(monkeypatch):
    with pytest.raises(ConfigError, match="already runs on tensorflow in this process, and tlbatch needs jax"):
        import_keras("jax")
    monkeypatch.setattr(keras.config, "backend", lambda: "torch")
    with pytest.raises(ConfigError, match=r"already runs on torch .* needs tensorflow.* set KERAS_BACKEND=tensorflow"):
        tiny_in_own_keras()
    monkeypatch.setattr(own_keras, "_chosen", {"torch"})
    assert import_keras() is keras
