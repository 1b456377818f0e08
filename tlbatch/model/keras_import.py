"""A Keras classifier that was trained elsewhere -> base and head, which together give the same scores.

The head is what stands behind the last features: dense layers and their like on vectors. Where the graph does not show it,
the scores themselves are the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tlbatch.errors import ConfigError, LabelsError, WeightsError
from tlbatch.model import bases
from tlbatch.model.bases import Scaling, scaled
from tlbatch.model.bundle import Frozen
from tlbatch.model.openvino import export_openvino

if TYPE_CHECKING:
    import keras

#: How far the scores of the bundle may be from those of the model it was made of.
TOLERANCE = 1e-5
_HEAD_LAYERS = [
    "Dense",
    "Dropout",
    "Activation",
    "Softmax",
    "ReLU",
    "LeakyReLU",
    "PReLU",
    "ELU",
    "BatchNormalization",
    "LayerNormalization",
    "ActivityRegularization",
    "GaussianDropout",
    "GaussianNoise",
    "AlphaDropout",
    "UnitNormalization",
    "Identity",
]


class Imported(NamedTuple):
    """A base, the head on it, whether an image may have several labels, and whether the graph showed where the head begins."""

    frozen: Frozen
    head: keras.Model
    multi_label: bool
    split: bool


def split_base_and_head(model: keras.Model, name: str, scaling: Scaling, size: int | None, labels: Sequence[str]) -> Imported:
    """Split a classifier and put its preprocessing before it.

    Args:
        model: takes images (batch, height, width, 3), gives (batch, classes) probabilities or logits.
        name: where it came from.
        scaling: what its pixels were scaled to in training.
        size: height and width, where the model takes any.
        labels: its classes in the order of its outputs; two for a single output, the second one its positive class.

    Raises:
        WeightsError: it takes or gives something else, or does not give its own scores any more.
        LabelsError: it has another number of classes.
    """
    side = _side(model, size)
    probes = probe_pixels(side)
    given = np.asarray(model(_as_trained(scaling, probes), training=False))
    features, layers = _features_of(model)
    network = _as_network(model, features)
    pixels, ready = scaled(scaling, side)
    extractor = _model(pixels, {"features": network(ready, training=False)})
    kind = _kind(model, given)
    head, multi_label = _head(features, layers, given.shape[1], kind, labels)
    frozen = Frozen(bases.Base(model.name, side, scaling), side, name, network, extractor, export_openvino(extractor))
    now = np.asarray(head(extractor(probes, training=False)["features"], training=False))
    distance = float(np.abs(now - _as_scores(given, kind, len(labels))).max())
    if not distance <= TOLERANCE:
        raise WeightsError(f"The model {name} cannot be taken apart: its scores are off by {distance:.2g} afterwards.")
    return Imported(frozen, head, multi_label, bool(layers))


def plain_model(bundle_model: keras.Model) -> keras.Model:
    """The model of a bundle as anybody's: uint8 pixels -> scores."""
    return _model(bundle_model.input, bundle_model.output["scores"])


def probe_pixels(size: int) -> np.ndarray:
    """(8, size, size, 3) uint8: smooth patterns and noise, from dark to bright."""
    random = np.random.default_rng(0)
    coarse = random.uniform(0, 255, (8, 5, 5, 3))
    places = np.linspace(0, 4, size)
    low = np.minimum(places.astype(int), 3)
    share = (places - low)[:, None]
    rows = coarse[:, low] * (1 - share)[None, :, :, None] + coarse[:, low + 1] * share[None, :, :, None]
    smooth = rows[:, :, low] * (1 - share)[None, None] + rows[:, :, low + 1] * share[None, None]
    noise = random.normal(0, np.linspace(0, 60, 8)[:, None, None, None], smooth.shape)
    bounded: np.ndarray = np.clip(smooth + noise, 0, 255)
    return bounded.astype(np.uint8)


def _side(model: keras.Model, size: int | None) -> int:
    if len(model.inputs) != 1 or len(model.outputs) != 1 or len(model.inputs[0].shape) != 4 or len(model.outputs[0].shape) != 2:
        raise WeightsError("The model takes or gives something else than one image and one vector of scores.")
    _, height, width, channels = model.inputs[0].shape
    if channels != 3:
        raise WeightsError(f"The model takes images of {channels} channels; only RGB can be imported.")
    if height != width:
        raise WeightsError(f"The model takes images of {height}x{width} pixels; only square ones can be imported.")
    if size and height and size != height:
        raise ConfigError(f"size: the model takes images of {height}x{height} pixels and no others; found {size}.")
    if not (height or size):
        raise ConfigError("size: the model takes images of any size; say with --size which it was trained at.")
    return int(height or size or 0)


def _features_of(model: keras.Model) -> tuple[Any, list[Any]]:
    """The last vector that is not the head's, and the layers of the head behind it, first to last."""
    tensor = model.outputs[0]
    layers: list[Any] = []
    while True:
        history = tensor._keras_history
        layer = history.operation
        # Of a model within the model `layer.input` is its own input and not what it is given here.
        before = layer._inbound_nodes[history.node_index].input_tensors
        if len(before) != 1 or not _is_of_a_head(layer) or len(before[0].shape) != 2:
            return tensor, layers
        layers.insert(0, layer)
        tensor = before[0]


def _is_of_a_head(layer: Any) -> bool:
    inner = getattr(layer, "layers", None)
    if inner is not None:
        return all(_is_of_a_head(one) or type(one).__name__ == "InputLayer" for one in inner)
    return type(layer).__name__ in _HEAD_LAYERS


def _as_network(model: keras.Model, features: Any) -> keras.Model:
    network = _model(model.inputs[0], features, "base")
    network.trainable = False
    return network


def _model(inputs: Any, outputs: Any, name: str | None = None) -> keras.Model:
    import keras

    return keras.Model(inputs, outputs, name=name)


def _head(features: Any, layers: Sequence[Any], units: int, kind: str, labels: Sequence[str]) -> tuple[keras.Model, bool]:
    """Features (batch, F) -> scores (batch, C), and whether each score stands for itself."""
    import keras

    if units != len(labels) and not (units == 1 and len(labels) == 2):
        raise LabelsError(f"The model gives {units} scores an image, and there are {len(labels)} labels.")
    start = keras.Input((features.shape[-1],), name="features")
    now = start
    for layer in layers:
        now = layer(now, training=False) if _takes_training(layer) else layer(now)
    if not layers:
        now = keras.layers.Identity()(now)
    if units == 1:
        positive = now if kind == "sigmoid" else keras.layers.Activation("sigmoid")(now)
        scores = keras.layers.Concatenate(name="scores")([keras.layers.Rescaling(-1.0, offset=1.0)(positive), positive])
        return keras.Model(start, scores, name="head"), False
    if kind == "logits":
        now = keras.layers.Softmax(name="scores")(now)
    return keras.Model(start, now, name="head"), kind == "sigmoid"


def _takes_training(layer: Any) -> bool:
    return type(layer).__name__ in ("Dropout", "BatchNormalization", "GaussianDropout", "GaussianNoise", "AlphaDropout")


def _kind(model: keras.Model, given: np.ndarray) -> str:
    """softmax, sigmoid or logits: by the last layer, and where that does not tell, by the numbers the model gives."""
    last = model.outputs[0]._keras_history.operation
    while getattr(last, "layers", None):
        last = last.layers[-1]
    activation = getattr(getattr(last, "activation", None), "__name__", None)
    if type(last).__name__ == "Softmax":
        activation = "softmax"
    if activation in ("softmax", "sigmoid"):
        return str(activation)
    if activation == "linear":
        return "logits"
    if given.min() < 0 or given.max() > 1:
        return "logits"
    return "softmax" if given.shape[1] > 1 and np.allclose(given.sum(axis=1), 1, atol=1e-3) else "sigmoid"


def _as_scores(given: np.ndarray, kind: str, classes: int) -> np.ndarray:
    """What the model gave, as probabilities of the classes, by plain arithmetic."""
    logits = kind == "logits"
    if given.shape[1] == 1 and classes == 2:
        positive = 1 / (1 + np.exp(-given)) if logits else given
        return np.concatenate([1 - positive, positive], axis=1)
    if not logits:
        return given
    powers = np.exp(given - given.max(axis=1, keepdims=True))
    scores: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
    return scores


def _as_trained(scaling: Scaling, pixels: np.ndarray) -> np.ndarray:
    """Pixels scaled as the model saw them in training, by plain arithmetic and not by the layers that will do it."""
    values = pixels.astype(np.float32)
    if scaling == "tf":
        return values / 127.5 - 1
    if scaling == "unit":
        return values / 255
    if scaling == "torch":
        return (values / 255 - np.array(bases.TORCH_MEAN, np.float32)) / np.array(bases.TORCH_STD, np.float32)
    if scaling == "caffe":
        flipped: np.ndarray = values[..., ::-1] - np.array(bases.CAFFE_MEAN_BGR, np.float32)
        return flipped
    return values
