"""A float32 Keras model -> the same model with its base in half precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import keras


def to_half_precision(model: keras.Model) -> None:
    """Let the base of a bundle's model compute in float16; weights, pixel scaling, features and scores stay float32.

    On GPUs, float16 convolutions run on tensor cores and accumulate in float32. The model is changed in place.
    """
    import keras

    policy = keras.DTypePolicy("mixed_float16")
    for base in model.layers:
        if isinstance(base, keras.Model) and base.name != "head":
            for layer in _flat_layers(base):
                layer.dtype_policy = policy


def _flat_layers(model: keras.Model) -> list[keras.layers.Layer]:
    import keras

    nested = ((_flat_layers(layer) if isinstance(layer, keras.Model) else [layer]) for layer in model.layers)
    return [layer for layers in nested for layer in layers]
