"""A Keras classifier that was trained elsewhere -> base and head, which together give the same scores.

The head consists of the layers after the last features: dense and similar layers, which take vectors. If the graph does not
show such layers, the scores themselves are the features.
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
from tlbatch.model.own_keras import with_own_keras
from tlbatch.schema import PixelRules, Size, in_words

if TYPE_CHECKING:
    import keras

#: The largest difference between the scores of the bundle and those of the imported model.
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
    """A model in two parts.

    Attributes:
        frozen: the base.
        head: the head.
        multi_label: whether an image may have several labels.
        split: whether the graph showed where the head begins.
        kind: what the model's outputs are: `softmax`, `sigmoid` or `logits`.
    """

    frozen: Frozen
    head: keras.Model
    multi_label: bool
    split: bool
    kind: str


@with_own_keras
def split_base_and_head(
    model: keras.Model, name: str, scaling: Scaling, size: Size | None, labels: Sequence[str], rules: PixelRules
) -> Imported:
    """Split a classifier into base and head, and put its preprocessing in front of the base.

    Args:
        model: takes images (batch, height, width, 3 or 1) and gives (batch, classes) probabilities or logits.
        name: the source of the model.
        scaling: how its pixels were scaled in training.
        size: height and width of its input in pixels, needed if the model takes images of any size.
        labels: its classes in the order of its outputs. For a single output they are two, and the second is the positive class.
        rules: how image files become its pixels.

    Raises:
        WeightsError: its inputs or outputs are of another kind, or base and head do not give its scores.
        LabelsError: there are more or fewer labels than classes.
        ConfigError: the size is missing, or is not the model's size; or its one channel cannot be scaled so.
    """
    shape, channels = _input_of(model, size, scaling)
    probes = probe_pixels(shape, rules.dtype)
    outputs = np.asarray(model(as_trained(scaling, probes, channels), training=False))
    features, layers = _features_of(model)
    network = _as_network(model, features)
    pixels, inputs = scaled(scaling, shape, channels, rules.dtype)
    extractor = _model(pixels, {"features": network(inputs, training=False)})
    kind = _kind(model, outputs)
    head, multi_label = _head(features, layers, outputs.shape[1], kind, labels)
    base = bases.Base(model.name, shape[0], scaling)
    frozen = Frozen(base, shape, rules, name, network, extractor, export_openvino(extractor))
    scores = np.asarray(head(extractor(probes, training=False)["features"], training=False))
    distance = float(np.abs(scores - as_scores(outputs, kind, len(labels))).max())
    if not distance <= TOLERANCE:
        raise WeightsError(f"The model {name} cannot be split into base and head: the scores then differ by {distance:.2g}.")
    return Imported(frozen, head, multi_label, bool(layers), kind)


@with_own_keras
def apart(model: keras.Model, other: keras.Model, scaling: Scaling, probes: np.ndarray) -> float:
    """The largest difference between the outputs of two models on some pixels."""
    channels = model.inputs[0].shape[-1]
    values = as_trained(scaling, probes, channels)
    one, two = (np.asarray(each(values, training=False), np.float32) for each in (model, other))
    return float(np.abs(one - two).max())


#: Numbers from which a constant, or a mean of a normalization, means pixels from 0 to 255 and not from 0 to 1.
_OF_BYTES = 20.0


@with_own_keras
def scaling_layer(model: keras.Model) -> str | None:
    """The name of the layer that brings pixels from 0 to 255 to a smaller range, before the first layer with weights.

    None if there is none. Layers that map a smaller range to another one, such as [0,1] to [-1,1], do not count.
    """
    found, _ = _scaling_layer(model)
    return found


def _scaling_layer(model: Any) -> tuple[str | None, bool]:
    """As `scaling_layer`, and whether the search has ended."""
    for layer in getattr(model, "operations", model.layers):
        if getattr(layer, "layers", None):
            found, ended = _scaling_layer(layer)
            if ended:
                return found, True
        elif _shrinks(layer):
            return str(layer.name), True
        elif layer.__class__.__name__ != "Normalization" and getattr(layer, "weights", None):
            return None, True
    return None, False


def _shrinks(layer: Any) -> bool:
    """Whether a layer or an arithmetic operation divides by, or subtracts, numbers of the size of bytes."""
    kind = type(layer).__name__
    if kind == "Rescaling":
        return bool(np.max(np.abs(layer.scale)) <= 1 / _OF_BYTES or np.max(np.abs(layer.offset)) >= _OF_BYTES)
    if kind == "Normalization":
        return bool(np.max(np.abs(np.asarray(layer.mean))) >= _OF_BYTES)
    constants = [float(np.abs(one).max()) for one in _constants(layer)] if hasattr(layer, "_inbound_nodes") else []
    if kind in ("TrueDivide", "Divide", "Subtract", "Add"):
        return any(one >= _OF_BYTES for one in constants)
    return kind == "Multiply" and any(0 < one <= 1 / _OF_BYTES for one in constants)


def _constants(operation: Any) -> list[Any]:
    """The numbers and arrays among the arguments of an operation of a graph."""
    import keras

    given = [one for node in operation._inbound_nodes for one in keras.tree.flatten(node.arguments.args)]
    numbers = [np.asarray(one) for one in given if one is not None and not isinstance(one, keras.KerasTensor)]
    return [one for one in numbers if one.dtype.kind in "iuf" and one.size]


@with_own_keras
def plain_model(bundle_model: keras.Model) -> keras.Model:
    """The model of a bundle as a plain Keras model: pixels -> scores."""
    return _model(bundle_model.input, bundle_model.output["scores"])


def probe_pixels(size: Size, dtype: str = "uint8") -> np.ndarray:
    """(8, height, width, 3) pixels from 0 to 255: smooth patterns and noise, from dark to bright."""
    random = np.random.default_rng(0)
    coarse = random.uniform(0, 255, (8, 5, 5, 3))
    (top, down), (left, right) = (_between(length) for length in size)
    rows = coarse[:, top] * (1 - down)[None, :, :, None] + coarse[:, top + 1] * down[None, :, :, None]
    smooth = rows[:, :, left] * (1 - right)[None, None] + rows[:, :, left + 1] * right[None, None]
    noise = random.normal(0, np.linspace(0, 60, 8)[:, None, None, None], smooth.shape)
    bounded: np.ndarray = np.clip(smooth + noise, 0, 255)
    return bounded.astype(dtype)


def _between(length: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of `length` places among five points: the point before it, and how far it is from there (length, 1)."""
    places = np.linspace(0, 4, length)
    before = np.minimum(places.astype(int), 3)
    return before, (places - before)[:, None]


def _input_of(model: keras.Model, size: Size | None, scaling: Scaling) -> tuple[Size, int]:
    """Height and width, and the number of channels, of the images that a model takes."""
    if len(model.inputs) != 1 or len(model.outputs) != 1 or len(model.inputs[0].shape) != 4 or len(model.outputs[0].shape) != 2:
        raise WeightsError("The model cannot be imported: it must take one image and give one vector of scores.")
    _, height, width, channels = model.inputs[0].shape
    if channels not in (1, 3):
        raise WeightsError(f"The model takes images with {channels} channels; only RGB and one channel can be imported.")
    if channels == 1 and scaling in ("caffe", "torch"):
        raise ConfigError("scale: the model takes images of one channel, and caffe and torch scale three.")
    if not size and None in (height, width):
        raise ConfigError("size: the model takes images of any size; give the size it was trained at with --size.")
    wanted = (height or size[0], width or size[1]) if size else (height, width)
    if size and wanted != size:
        raise ConfigError(f"size: the model takes only images of {in_words(wanted)} pixels; found {in_words(size)}.")
    return wanted, channels


def _features_of(model: keras.Model) -> tuple[Any, list[Any]]:
    """The vector that the head takes, and the layers of the head, first to last."""
    tensor = model.outputs[0]
    layers: list[Any] = []
    while True:
        history = tensor._keras_history
        layer = history.operation
        # `layer.input` of a nested model is its own input, not the tensor that it takes in this graph.
        before = layer._inbound_nodes[history.node_index].input_tensors
        if len(before) != 1 or not _is_head_layer(layer) or len(before[0].shape) != 2:
            return tensor, layers
        layers.insert(0, layer)
        tensor = before[0]


def _is_head_layer(layer: Any) -> bool:
    inner = getattr(layer, "layers", None)
    if inner is not None:
        return all(_is_head_layer(one) or type(one).__name__ == "InputLayer" for one in inner)
    return type(layer).__name__ in _HEAD_LAYERS


def _as_network(model: keras.Model, features: Any) -> keras.Model:
    network = _model(model.inputs[0], features, "base")
    network.trainable = False
    return network


def _model(inputs: Any, outputs: Any, name: str | None = None) -> keras.Model:
    import keras

    return keras.Model(inputs, outputs, name=name)


def _head(features: Any, layers: Sequence[Any], units: int, kind: str, labels: Sequence[str]) -> tuple[keras.Model, bool]:
    """Features (batch, F) -> scores (batch, C), and whether the scores are independent of each other."""
    import keras

    if units != len(labels) and not (units == 1 and len(labels) == 2):
        raise LabelsError(f"The model gives {units} scores per image, but there are {len(labels)} labels.")
    start = keras.Input((features.shape[-1],), name="features")
    tensor = start
    for layer in layers:
        tensor = layer(tensor, training=False) if _takes_training(layer) else layer(tensor)
    if not layers:
        tensor = keras.layers.Identity()(tensor)
    if units == 1:
        positive = tensor if kind == "sigmoid" else keras.layers.Activation("sigmoid")(tensor)
        scores = keras.layers.Concatenate(name="scores")([keras.layers.Rescaling(-1.0, offset=1.0)(positive), positive])
        return keras.Model(start, scores, name="head"), False
    if kind == "logits":
        tensor = keras.layers.Softmax(name="scores")(tensor)
    return keras.Model(start, tensor, name="head"), kind == "sigmoid"


def _takes_training(layer: Any) -> bool:
    return type(layer).__name__ in ("Dropout", "BatchNormalization", "GaussianDropout", "GaussianNoise", "AlphaDropout")


def _kind(model: keras.Model, outputs: np.ndarray) -> str:
    """softmax, sigmoid or logits: from the last layer or, if that is not conclusive, from the model's outputs."""
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
    if outputs.min() < 0 or outputs.max() > 1:
        return "logits"
    return "softmax" if outputs.shape[1] > 1 and np.allclose(outputs.sum(axis=1), 1, atol=1e-3) else "sigmoid"


def as_scores(outputs: np.ndarray, kind: str, classes: int) -> np.ndarray:
    """The model's outputs as probabilities of the classes, by plain arithmetic."""
    logits = kind == "logits"
    if outputs.shape[1] == 1 and classes == 2:
        positive = 1 / (1 + np.exp(-outputs)) if logits else outputs
        return np.concatenate([1 - positive, positive], axis=1)
    if not logits:
        return outputs
    powers = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    scores: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
    return scores


def as_trained(scaling: Scaling, pixels: np.ndarray, channels: int = 3) -> np.ndarray:
    """RGB pixels as a model took them in training, by plain arithmetic, to check the layers that will do it."""
    if channels == 1:
        summed = (pixels @ np.array(bases.GREY_PARTS, np.float64))[..., None] / 65536
        pixels = np.floor(summed + 0.5) if pixels.dtype == np.uint8 else summed
    return numbers(scaling, pixels)


def numbers(scaling: Scaling, pixels: np.ndarray) -> np.ndarray:
    """Pixels from 0 to 255 as float32 numbers, scaled as in training."""
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
