"""A classifier that was trained elsewhere, of Keras or ONNX: its pixels as numbers, its outputs as scores, its head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from tlbatch.errors import ConfigError, LabelsError, WeightsError
from tlbatch.model import bases
from tlbatch.model.bases import Scaling
from tlbatch.model.frozen import Frozen
from tlbatch.schema import PixelRules, Size, in_words

if TYPE_CHECKING:
    import keras

#: What is said of a model that takes or gives something else.
NOT_A_CLASSIFIER = "The model cannot be imported: it must take one image and give one vector of scores."


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


class ForeignModel(Protocol):
    """A model as it came.

    Attributes:
        precision: what it computes in.
        takes: the type of its input.
        channels: of its images.
        size: height and width of its images; None where it takes any.
    """

    precision: str
    takes: str
    channels: int
    size: tuple[int | None, int | None]

    def scaling_layer(self) -> str | None:
        """The layer or operator that brings pixels from 0 to 255 to a smaller range, before the first one with weights.

        None if there is none. Those that map a smaller range to another one, such as [0,1] to [-1,1], do not count.
        """

    def spread(self, numbers: np.ndarray) -> float | None:
        """How much the numbers that its first normalization takes vary, compared with those of its training.

        The logarithm of the ratio of variances, whatever its sign, for the median channel. None if it has no normalization that
        was trained.
        """

    def split(self, name: str, scaling: Scaling, size: Size, labels: Sequence[str], rules: PixelRules) -> Imported:
        """Split it into base and head, which together give its scores, and put its preprocessing in front of the base.

        Args:
            name: the source of the model.
            scaling: how its pixels were scaled in training.
            size: height and width of its input, in pixels.
            labels: its classes in the order of its outputs. For a single output they are two; the second is the positive one.
            rules: how image files become its pixels.

        Raises:
            WeightsError: base and head do not give its scores.
            LabelsError: there are more or fewer labels than classes.
        """

    def outputs(self, numbers: np.ndarray) -> np.ndarray:
        """(n, C) outputs for (n, height, width, channels) numbers in the range of its training."""

    def off_float32(self, numbers: np.ndarray) -> float:
        """The largest difference between its outputs and those of the same network in float32."""


def size_of(model: ForeignModel, size: Size | None, scaling: Scaling) -> Size:
    """Height and width of the images that a model takes.

    Raises:
        ConfigError: the size is missing, or is not the model's size; or its one channel cannot be scaled so.
    """
    height, width = model.size
    if model.channels == 1 and scaling in ("caffe", "torch"):
        raise ConfigError("scale: the model takes images of one channel, and caffe and torch scale three.")
    if not size:
        if height is None or width is None:
            raise ConfigError("size: the model takes images of any size; give the size it was trained at with --size.")
        return height, width
    wanted = (height or size[0], width or size[1])
    if wanted != size:
        raise ConfigError(f"size: the model takes only images of {in_words(wanted)} pixels; found {in_words(size)}.")
    return wanted


def choose_output(names: Sequence[str], wanted: str | None) -> str:
    """The output that classifies; raises ConfigError if there are several and none is named, or none of that name."""
    if wanted is None and len(names) == 1:
        return names[0]
    known = ", ".join(names)
    if wanted is None:
        raise ConfigError(f"model_output: the model has the outputs {known}; say which one classifies.")
    if wanted not in names:
        raise ConfigError(f"model_output: the model has no output {wanted!r}; it has {known}.")
    return wanted


def require_channels(channels: int | None) -> int:
    """The number of channels; raises WeightsError unless it is 1 or 3."""
    if channels not in (1, 3):
        raise WeightsError(f"The model takes images with {channels} channels; only RGB and one channel can be imported.")
    return channels


def require_same(scores: np.ndarray, outputs: np.ndarray, kind: str, labels: Sequence[str], tolerance: float) -> None:
    """Raises WeightsError unless the scores of base and head are those of the model."""
    distance = float(np.abs(scores - as_scores(outputs, kind, len(labels))).max())
    if not distance <= tolerance:
        raise WeightsError(f"The model cannot be split into base and head: the scores then differ by {distance:.2g}.")


def kind_of(activation: str | None, outputs: np.ndarray, *, sigmoid: bool) -> str:
    """softmax, sigmoid or logits: from the last activation or, if that is not conclusive, from the model's outputs.

    Args:
        activation: the last one, if the model ends in it: `softmax`, `sigmoid`, `linear` or another; None if it does not.
        outputs: (n, C) of some images.
        sigmoid: whether the outputs are means, sums or other arrangements of what a sigmoid gives. Small logits look the same.
    """
    if activation in ("softmax", "sigmoid"):
        return str(activation)
    if activation == "linear":
        return "logits"
    if outputs.min() < 0 or outputs.max() > 1:
        return "logits"
    if outputs.shape[1] > 1 and np.allclose(outputs.sum(axis=1), 1, atol=1e-3):
        return "softmax"
    return "sigmoid" if sigmoid else "logits"


#: Numbers from which a constant, or a mean of a normalization, means pixels from 0 to 255 and not from 0 to 1.
OF_BYTES = 20.0


def enlarges(operation: str, constants: Sequence[np.ndarray]) -> bool:
    """Whether an arithmetic operation brings pixels from a smaller range to that of bytes."""
    sizes = [np.abs(one) for one in constants if one.size]
    if operation in ("TrueDivide", "Divide", "Div"):
        return any(0 < float(one.max()) <= 1 / OF_BYTES for one in sizes)
    return operation in ("Multiply", "Mul") and any(float(one.max()) >= OF_BYTES for one in sizes)


def shrinks(operation: str, constants: Sequence[np.ndarray]) -> bool:
    """Whether an arithmetic operation divides by, or subtracts, numbers of the size of bytes."""
    largest = [float(np.abs(one).max()) for one in constants if one.size]
    if operation in ("TrueDivide", "Divide", "Div", "Subtract", "Sub", "Add"):
        return any(one >= OF_BYTES for one in largest)
    return operation in ("Multiply", "Mul") and any(0 < one <= 1 / OF_BYTES for one in largest)


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


def head_of(length: int, layers: Sequence[Any], units: int, kind: str, labels: Sequence[str]) -> tuple[keras.Model, bool]:
    """Features (batch, length) -> scores (batch, C), and whether the scores are independent of each other.

    Args:
        length: of a feature vector.
        layers: Keras layers from the features to the outputs, first to last.
        units: how many outputs there are.
        kind: what they are.
        labels: the classes.

    Raises:
        LabelsError: there are more or fewer labels than outputs.
    """
    import keras

    if units != len(labels) and not (units == 1 and len(labels) == 2):
        raise LabelsError(f"The model gives {units} scores per image, but there are {len(labels)} labels.")
    start = keras.Input((length,), name="features")
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
