"""A Keras classifier that was trained elsewhere -> base and head, which together give the same scores.

The head consists of the layers after the last features: dense and similar layers, which take vectors. If the graph does not
show such layers, the scores themselves are the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tlbatch.errors import WeightsError
from tlbatch.model import bases
from tlbatch.model.bases import Scaling, scaled
from tlbatch.model.float32 import in_float32, precision
from tlbatch.model.foreign import (
    NOT_A_CLASSIFIER,
    OF_BYTES,
    Imported,
    as_trained,
    choose_output,
    enlarges,
    head_of,
    kind_of,
    probe_pixels,
    require_channels,
    require_same,
    shrinks,
)
from tlbatch.model.frozen import frozen_keras
from tlbatch.model.own_keras import with_own_keras
from tlbatch.schema import PixelRules, Size

if TYPE_CHECKING:
    import keras

#: The largest difference between the scores of base and head and those of the model.
_TOLERANCE = 1e-5
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

#: Layers and operations that arrange or combine numbers.
_ARRANGES = frozenset(
    [
        *("Identity", "Dropout", "Flatten", "Reshape", "Permute", "Squeeze", "Rescaling", "GetItem"),
        *("Average", "Add", "Subtract", "Multiply", "Divide", "TrueDivide", "Concatenate", "Mean", "Stack"),
        *("AveragePooling2D", "GlobalAveragePooling1D", "GlobalAveragePooling2D"),
    ]
)


class KerasClassifier:
    """A Keras model as a `ForeignModel`.

    Args:
        model: takes images (batch, height, width, 3 or 1) and gives (batch, classes) probabilities or logits.
        output: the name of the output that classifies, if there are several.

    Raises:
        WeightsError: its inputs or outputs are of another kind.
        ConfigError: it has several outputs and none is named, or none of that name.
    """

    def __init__(self, model: keras.Model, output: str | None = None) -> None:
        if output or len(model.outputs) > 1:
            model = _with_one_output(model, output)
        if len(model.inputs) != 1 or len(model.inputs[0].shape) != 4 or len(model.outputs[0].shape) != 2:
            raise WeightsError(NOT_A_CLASSIFIER)
        _, height, width, channels = model.inputs[0].shape
        self.channels, self.size = require_channels(channels), (height, width)
        self.precision, self.takes = precision(model), str(model.inputs[0].dtype)
        self._original = model
        self._model = model if self.precision == "float32" else in_float32(model)

    @with_own_keras
    def scaling_layer(self) -> str | None:
        """As `ForeignModel` says."""
        return _scaling_layer(self._model)[0]

    @with_own_keras
    def spread(self, numbers: np.ndarray) -> float | None:
        """As `ForeignModel` says."""
        found = _first_normalization(self._model)
        if found is None:
            return None
        network, layer = found
        variances = np.asarray(layer.moving_variance)
        try:
            values = np.asarray(_model(network.inputs[0], layer.input)(numbers, training=False))
        except (AttributeError, ValueError):  # it takes its numbers at several places, or not from the image alone
            return None
        given = values.reshape(-1, values.shape[-1]).var(axis=0)
        known = (variances > 0) & (given > 0)
        untrained = bool(np.all(variances == 1))
        return None if untrained or not known.any() else float(np.median(np.abs(np.log(given[known] / variances[known]))))

    @with_own_keras
    def split(self, name: str, scaling: Scaling, size: Size, labels: Sequence[str], rules: PixelRules) -> Imported:
        """As `ForeignModel` says."""
        model = self._model
        probes = probe_pixels(size, rules.dtype)
        outputs = np.asarray(model(as_trained(scaling, probes, self.channels), training=False))
        features, layers = _features_of(model)
        network = _as_network(model, features)
        pixels, inputs = scaled(scaling, size, self.channels, rules.dtype)
        extractor = _model(pixels, {"features": network(inputs, training=False)})
        kind = kind_of(_last_activation(model), outputs, sigmoid=_shows_sigmoid(model.outputs[0]))
        head, multi_label = head_of(features.shape[-1], layers, outputs.shape[1], kind, labels)
        frozen = frozen_keras(bases.Base(model.name, size[0], scaling), size, rules, name, network, extractor)
        scores = np.asarray(head(extractor(probes, training=False)["features"], training=False))
        require_same(scores, outputs, kind, labels, _TOLERANCE)
        return Imported(frozen, head, multi_label, bool(layers), kind)

    @with_own_keras
    def outputs(self, numbers: np.ndarray) -> np.ndarray:
        """As `ForeignModel` says."""
        return np.asarray(self._original(numbers, training=False), np.float32)

    @with_own_keras
    def off_float32(self, numbers: np.ndarray) -> float:
        """As `ForeignModel` says."""
        if self._model is self._original:
            return 0.0
        one, two = (np.asarray(each(numbers, training=False), np.float32) for each in (self._original, self._model))
        return float(np.abs(one - two).max())


@with_own_keras
def _with_one_output(model: keras.Model, wanted: str | None) -> keras.Model:
    names = [str(name) for name in model.output_names]
    chosen = choose_output(names, wanted)
    inputs = model.inputs[0] if len(model.inputs) == 1 else model.inputs
    return _model(inputs, model.outputs[names.index(chosen)], model.name)


def _first_normalization(model: Any) -> tuple[Any, Any] | None:
    """The first batch normalization, and the innermost model that contains it."""
    for layer in model.layers:
        found = _first_normalization(layer) if getattr(layer, "layers", None) else None
        if found is not None:
            return found
        if type(layer).__name__ == "BatchNormalization":
            return model, layer
    return None


def _scaling_layer(model: Any) -> tuple[str | None, bool]:
    """The layer that scales, and whether the search has ended."""
    for layer in getattr(model, "operations", model.layers):
        if getattr(layer, "layers", None):
            found, ended = _scaling_layer(layer)
            if ended:
                return found, True
        elif _enlarges(layer):
            return None, True
        elif _shrinks(layer):
            return str(layer.name), True
        elif layer.__class__.__name__ != "Normalization" and getattr(layer, "weights", None):
            return None, True
    return None, False


def _enlarges(layer: Any) -> bool:
    kind = type(layer).__name__
    if kind == "Rescaling":
        return bool(np.max(np.abs(layer.scale)) >= OF_BYTES)
    return hasattr(layer, "_inbound_nodes") and enlarges(kind, _constants(layer))


def _shrinks(layer: Any) -> bool:
    kind = type(layer).__name__
    if kind == "Rescaling":
        return bool(np.max(np.abs(layer.scale)) <= 1 / OF_BYTES or np.max(np.abs(layer.offset)) >= OF_BYTES)
    if kind == "Normalization":
        return bool(np.max(np.abs(np.asarray(layer.mean))) >= OF_BYTES)
    return hasattr(layer, "_inbound_nodes") and shrinks(kind, _constants(layer))


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


def _last_activation(model: keras.Model) -> str | None:
    last = model.outputs[0]._keras_history.operation
    while True:
        if getattr(last, "layers", None):
            last = last.layers[-1]
        elif type(last).__name__ == "Activation" and _activation_of(last) == "linear":  # mixed precision ends in one
            last = last._inbound_nodes[-1].input_tensors[0]._keras_history.operation
        else:
            return "softmax" if type(last).__name__ == "Softmax" else _activation_of(last)


def _activation_of(layer: Any) -> str | None:
    name = getattr(getattr(layer, "activation", None), "__name__", None)
    return None if name is None else str(name)


def _shows_sigmoid(tensor: Any) -> bool:
    """Whether a tensor is what a sigmoid gives, or a mean, a sum or another arrangement of that."""
    history = tensor._keras_history
    layer = history.operation
    if getattr(layer, "layers", None):
        return _shows_sigmoid(layer.outputs[history.tensor_index])
    kind = type(layer).__name__
    if kind in ("Sigmoid", "HardSigmoid") or _activation_of(layer) in ("sigmoid", "hard_sigmoid"):
        return True
    carries = kind in _ARRANGES or (kind == "Activation" and _activation_of(layer) == "linear")
    return carries and any(map(_shows_sigmoid, layer._inbound_nodes[history.node_index].input_tensors))
