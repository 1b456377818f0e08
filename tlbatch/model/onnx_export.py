"""A bundle -> an ONNX file from pixels to scores, which ONNX Runtime gives as the bundle does."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tlbatch.errors import ConfigError, WeightsError
from tlbatch.model.bundle import HEAD, MODEL, ONNX, Bundle
from tlbatch.model.float32 import leaves
from tlbatch.model.keras_import import plain_model
from tlbatch.model.onnx_files import import_onnx, outputs_of_onnx, read_onnx, with_erf, with_own_domain
from tlbatch.model.own_keras import with_own_keras
from tlbatch.model.safe_load import load_safely
from tlbatch.stdio import import_quietly

if TYPE_CHECKING:
    import keras
    import onnx

#: The version of ONNX's operators that Keras models are written in; of those that tf2onnx writes the newest.
_OPSET = 18
#: The largest difference between scores of ONNX Runtime and the bundle's probes.
_MOST_OFF = 1e-4


def export_onnx(bundle: Bundle) -> bytes:
    """The whole model of a bundle as an ONNX file: `pixels` (batch, height, width, 3) from 0 to 255 -> `scores` (batch, C).

    Raises:
        WeightsError: ONNX cannot express a layer, or ONNX Runtime gives other scores.
        ConfigError: a package is not installed.
    """
    import_onnx()
    probes, plain = bundle.probes(), None if bundle.has(ONNX) else plain_model(load_safely(bundle.folder / MODEL))
    model = _joined(bundle) if plain is None else _converted(plain, "pixels")
    source = bytes(model.SerializeToString())
    (scores,) = outputs_of_onnx(source, probes["pixels"], ["scores"])
    # The probes of a base in int8 are its own; what is exported is in float32.
    expected = _scores_in_float32(bundle, plain, probes["pixels"]) if bundle.quantized else probes["scores"]
    distance = float(np.abs(scores - expected).max())
    if not distance <= _MOST_OFF:
        raise WeightsError(f"The bundle {bundle.location.url} gives other scores as ONNX: off by {distance:.2g}.")
    return source


@with_own_keras
def _scores_in_float32(bundle: Bundle, plain: keras.Model | None, pixels: np.ndarray) -> np.ndarray:
    if plain is not None:
        return np.asarray(plain(pixels, training=False))
    (features,) = outputs_of_onnx((bundle.folder / ONNX).read_bytes(), pixels, ["features"])
    return np.asarray(load_safely(bundle.folder / HEAD)(features, training=False))


def _joined(bundle: Bundle) -> onnx.ModelProto:
    """The base as it came, and the head."""
    onnx = import_onnx()
    from onnx.version_converter import convert_version

    base = read_onnx((bundle.folder / ONNX).read_bytes(), "of the bundle")
    head = _converted(load_safely(bundle.folder / HEAD), "features")
    opset = max(_OPSET, *(one.version for one in base.opset_import))
    base, head = (_at_version(one, opset, convert_version) for one in (base, head))
    head = onnx.compose.add_prefix(head, "head/")
    base.ir_version = head.ir_version = max(base.ir_version, head.ir_version)
    joined = onnx.compose.merge_models(base, head, io_map=[("features", "head/features")], outputs=["head/scores"])
    return _renamed(joined, "head/scores", "scores")


def _at_version(model: onnx.ModelProto, opset: int, convert: Any) -> onnx.ModelProto:
    model = with_own_domain(model)
    return model if model.opset_import[0].version == opset else convert(model, opset)


@with_own_keras
def _converted(model: keras.Model, taken: str) -> onnx.ModelProto:
    """A Keras model as ONNX, whose input gets a name and whose output is `scores`."""
    import keras

    onnx = import_onnx()
    try:
        import_quietly("tf2onnx")
    except ImportError:
        raise ConfigError("To export to ONNX, install tlbatch[onnx].") from None
    plain = keras.models.clone_model(model, clone_function=_convertible, recursive=True)
    for layer, other in zip(leaves(model), leaves(plain), strict=True):
        if type(layer) is type(other):
            other.set_weights(layer.get_weights())
    signature = [keras.InputSpec(shape=(None, *model.input.shape[1:]), dtype=model.input.dtype, name=taken)]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of Keras 3.15 about NumPy
        path = Path(folder, "model.onnx")
        plain.export(str(path), format="onnx", verbose=False, input_signature=signature, opset_version=_OPSET)
        made = with_erf(onnx.load(path))
    made = _renamed(made, made.graph.input[0].name, taken)
    return _renamed(made, made.graph.output[0].name, "scores")


def _convertible(layer: Any) -> Any:
    """A new layer like another one; for a normalization by known numbers one that multiplies and adds.

    Keras's export makes inputs of the network of the known numbers.
    """
    import keras

    if type(layer).__name__ != "Normalization":
        return layer.__class__.from_config(layer.get_config())
    deviation = np.maximum(np.sqrt(np.asarray(layer.variance)).reshape(-1), keras.config.epsilon())
    mean = np.asarray(layer.mean).reshape(-1)
    return keras.layers.Rescaling((1 / deviation).tolist(), offset=(-mean / deviation).tolist(), name=layer.name)


def _renamed(model: onnx.ModelProto, name: str, wanted: str) -> onnx.ModelProto:
    """The model, in which a tensor has another name."""
    for one in [*model.graph.input, *model.graph.output]:
        one.name = wanted if one.name == name else one.name
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [wanted if one == name else one for one in names]
    return model
