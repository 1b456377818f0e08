"""Features and class numbers -> a trained head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import keras

DROPOUT = 0.2


@dataclass(frozen=True)
class HeadTraining:
    """How a head is trained. `epochs` is the most; training ends when `patience` epochs brought validation no further."""

    epochs: int = 100
    patience: int = 10
    batch_size: int = 32
    learning_rate: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class Part:
    """One part of the labelled images: features (n, F) float32 and class numbers (n,)."""

    features: np.ndarray
    classes: np.ndarray


def build_head(features_length: int, classes: int) -> keras.Model:
    """Dropout and a softmax: features (batch, F) -> scores (batch, classes)."""
    import keras

    features = keras.Input((features_length,), name="features")
    kept = keras.layers.Dropout(DROPOUT)(features)
    scores = keras.layers.Dense(classes, activation="softmax", name="scores")(kept)
    return keras.Model(features, scores, name="head")


def train_head(train: Part, validation: Part, classes: int, how: HeadTraining) -> tuple[keras.Model, dict[str, list[float]]]:
    """Train a head on features with Adam and sparse categorical cross-entropy.

    Returns:
        The head at its best epoch by validation loss, and each epoch's losses and accuracies.
    """
    import keras

    keras.utils.set_random_seed(how.seed)
    head = build_head(train.features.shape[1], classes)
    head.compile(
        optimizer=keras.optimizers.Adam(how.learning_rate),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    stop = keras.callbacks.EarlyStopping(monitor="val_loss", patience=how.patience, restore_best_weights=True)
    history = head.fit(
        train.features,
        train.classes,
        validation_data=(validation.features, validation.classes),
        epochs=how.epochs,
        batch_size=how.batch_size,
        callbacks=[stop],
        verbose=0,
    )
    return head, {name: [float(value) for value in values] for name, values in history.history.items()}
