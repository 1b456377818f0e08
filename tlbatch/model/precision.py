"""A Keras model in half precision, whatever the backend: the base computes in float16, pooling and head in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import keras


def to_half_precision(model: keras.Model) -> None:
    """Let the base of a bundle's model compute in float16; weights, scaling of pixels, features and scores stay float32.

    On GPUs, float16 convolutions run on tensor cores and add up in float32. The model is changed in place.
    """
    import keras

    policy = keras.DTypePolicy("mixed_float16")
    for base in model.layers:
        if isinstance(base, keras.Model) and base.name != "head":
            for layer in _flat(base):
                layer.dtype_policy = policy


def _flat(model: keras.Model) -> list[keras.layers.Layer]:
    import keras

    return [one for layer in model.layers for one in (_flat(layer) if isinstance(layer, keras.Model) else [layer])]
