"""A Keras model in half precision, or quantised to int8 -> the same network in float32, which tlbatch computes in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tlbatch.errors import WeightsError
from tlbatch.model.own_keras import with_own_keras

if TYPE_CHECKING:
    import keras

#: Names of dtypes and policies that compute in 16 bits.
_HALF = frozenset(("float16", "bfloat16", "mixed_float16", "mixed_bfloat16"))
_QUANTIZED = ("QuantizedDTypePolicy", "Int4DTypePolicy")


def precision(model: keras.Model) -> str:
    """What a model computes in: `float32`, the name of a policy of 16 bits, or `int8`.

    Raises:
        WeightsError: it is quantised in another way.
    """
    found = {_precision(layer) for layer in leaves(model)} - {"float32"}
    if found - _HALF - {"int8"}:
        raise WeightsError(f"The model is quantised as {min(found - _HALF - {'int8'})}; only int8 can be imported.")
    return "int8" if "int8" in found else min(found, default="float32")


@with_own_keras
def in_float32(model: keras.Model) -> keras.Model:
    """The same network in float32, with the same numbers; weights of int8 are multiplied out.

    Raises:
        WeightsError: a quantised layer is of a kind that is not known.
    """
    import keras

    plain = keras.saving.deserialize_keras_object(_as_float32(keras.saving.serialize_keras_object(model)))
    for layer, other in zip(leaves(model), leaves(plain), strict=True):
        other.set_weights(_numbers(layer))
    return plain


def leaves(model: Any) -> Iterator[Any]:
    """Every layer that contains no others, in the order of the model."""
    for layer in model.layers:
        if getattr(layer, "layers", None):
            yield from leaves(layer)
        else:
            yield layer


def _precision(layer: Any) -> str:
    mode = getattr(layer, "quantization_mode", None)
    if mode:
        return str(mode)
    policy = str(getattr(getattr(layer, "dtype_policy", None), "name", "float32"))
    return policy if policy in _HALF else "float32"


def _as_float32(config: Any) -> Any:
    """A configuration whose layers all have the policy float32."""
    if isinstance(config, list | tuple):
        return [_as_float32(one) for one in config]
    if not isinstance(config, Mapping):
        return config
    made = {name: _as_float32(value) for name, value in config.items() if name not in ("compile_config", "quantization_config")}
    return {**made, "dtype": "float32"} if _is_other(made.get("dtype")) else made


def _is_other(dtype: Any) -> bool:
    if not isinstance(dtype, Mapping):
        return dtype in _HALF
    return dtype.get("class_name") in _QUANTIZED or dtype.get("config", {}).get("name") in _HALF


def _numbers(layer: Any) -> list[np.ndarray]:
    """The weights of a layer in float32, in the order in which a layer that is not quantised has them."""
    if getattr(layer, "quantization_mode", None) is None:
        return [np.asarray(one, np.float32) for one in layer.get_weights()]
    if type(layer).__name__ != "Dense":
        raise WeightsError(f"The model has a quantised layer of the kind {type(layer).__name__}; only Dense can be imported.")
    kernel = np.asarray(layer._kernel, np.float32) / np.asarray(layer.kernel_scale, np.float32)
    return [kernel, np.asarray(layer.bias, np.float32)] if layer.use_bias else [kernel]
