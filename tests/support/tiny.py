"""A bundle that is small, fast and exact: one 1x1 convolution at 32 pixels, and heads with weights that are powers of two.

Every feature and every score is a sum that float32 holds without rounding, so that all engines on all processors give the same
bytes. It takes no Ray to make it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tlbatch.model.bases import Base, with_preprocessing
from tlbatch.model.bundle import Bundle
from tlbatch.model.frozen import Frozen, Trained, frozen_keras, save_bundle
from tlbatch.model.head import build_head
from tlbatch.schema import PixelRules
from tlbatch.storage.resolve import resolve

SIZE = 32
LABELS = ("blue", "green", "red")
#: Red, green, blue -> eight features, in parts of 256.
_FILTERS = np.array(
    [[1, 0, 0, 1, 0, 1, 1, -1], [0, 1, 0, 1, 1, 0, -1, 0], [0, 0, 1, 0, 1, 1, 0, 1]],
    np.float32,
)
#: Features -> scores of blue, green and red, in parts of 8.
HEAD_A = np.array([[-1, -1, 4], [-1, 4, -1], [4, -1, -1], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, -1, 1], [1, 0, -1]], np.float32)
HEAD_B = np.array([[-1, -1, 2], [-1, 2, -1], [2, -1, -1], [0, 1, 1], [1, 1, 0], [1, 0, 1], [0, -2, 1], [1, 0, -2]], np.float32)


def tiny_base() -> Frozen:
    """The frozen base."""
    import keras

    pixels = keras.Input((SIZE, SIZE, 3))
    network = keras.Model(pixels, keras.layers.Conv2D(8, 1, activation="relu", use_bias=False)(pixels), name="tiny")
    network.set_weights([_FILTERS.reshape(1, 1, 3, 8) / 256])
    network.trainable = False
    base = Base("Tiny", SIZE, "inside")
    inputs, features = with_preprocessing(base, network, SIZE)
    extractor = keras.Model(inputs, {"features": features})
    return frozen_keras(base, (SIZE, SIZE), PixelRules(), "made by hand", network, extractor)


def tiny_bundle(folder: Path | str, head: np.ndarray = HEAD_A, frozen: Frozen | None = None) -> Bundle:
    """A bundle of the three colors; bundles of one `frozen` base have the same base digest."""
    frozen = frozen or tiny_base()
    trained = Trained(_head(head), LABELS, {}, {})
    pixels = np.stack([np.full((SIZE, SIZE, 3), color, np.uint8) for color in ((200, 40, 40), (40, 200, 40), (8, 16, 240))])
    return save_bundle(resolve(str(folder)), frozen, trained, pixels)


def _head(kernel: np.ndarray, labels: Sequence[str] = LABELS) -> object:
    head = build_head(kernel.shape[0], len(labels), "relu")
    head.set_weights([kernel / 8, np.zeros(len(labels), np.float32)])
    return head
