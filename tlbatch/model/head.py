"""Features and true labels -> a trained head with calibrated scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tlbatch.errors import ConfigError
from tlbatch.model.calibration import at_threshold, calibration_error, fit_temperature, threshold_for, thresholds_by_f1
from tlbatch.model.own_keras import with_own_keras

if TYPE_CHECKING:
    import keras

DROPOUT = 0.2


@dataclass(frozen=True)
class HeadTraining:
    """How a head is trained: for `epochs` epochs, or until validation has not improved for `patience` epochs."""

    epochs: int = 100
    patience: int = 10
    batch_size: int = 32
    learning_rate: float = 1e-3
    seed: int = 0
    class_weight: str = "none"


@dataclass(frozen=True)
class DataSplit:
    """One part of the labelled images: features (n, F) float32, and their classes.

    `classes` is (n,) class numbers; if an image may have several labels, it is (n, C) with 1 for each label of the image.
    """

    features: np.ndarray
    classes: np.ndarray


def build_head(features_length: int, classes: int, activation: str = "softmax") -> keras.Model:
    """Dropout and a dense layer: features (batch, F) -> scores (batch, classes)."""
    import keras

    features = keras.Input((features_length,), name="features")
    kept = keras.layers.Dropout(DROPOUT)(features)
    scores = keras.layers.Dense(classes, activation=activation, name="scores")(kept)
    return keras.Model(features, scores, name="head")


@with_own_keras
def train_head(
    train: DataSplit, validation: DataSplit, classes: int, how: HeadTraining
) -> tuple[keras.Model, dict[str, list[float]]]:
    """Train a head on features with Adam and cross-entropy.

    Returns:
        The head with the weights of its best epoch by validation loss, and the losses and accuracies of each epoch.
    """
    import keras

    many = train.classes.ndim == 2
    keras.utils.set_random_seed(how.seed)
    head = build_head(train.features.shape[1], classes, "sigmoid" if many else "softmax")
    head.compile(
        optimizer=keras.optimizers.Adam(how.learning_rate),
        loss="binary_crossentropy" if many else "sparse_categorical_crossentropy",
        metrics=["binary_accuracy" if many else "accuracy"],
    )
    stop = keras.callbacks.EarlyStopping(monitor="val_loss", patience=how.patience, restore_best_weights=True)
    history = head.fit(
        train.features,
        train.classes,
        validation_data=(validation.features, validation.classes),
        epochs=how.epochs,
        batch_size=how.batch_size,
        class_weight=_class_weight(train.classes) if how.class_weight == "balanced" else None,
        callbacks=[stop],
        verbose=0,
    )
    names = {name: name.replace("binary_", "") for name in history.history}
    return head, {names[name]: [float(value) for value in values] for name, values in history.history.items()}


def _class_weight(classes: np.ndarray) -> dict[int, float]:
    """Weights by which rare classes count as much as common ones: n / (C * images of the class)."""
    from sklearn.utils.class_weight import compute_class_weight

    if classes.ndim == 2:
        raise ConfigError("class_weight: images with several labels cannot be weighted by class; set it to none.")
    present = np.unique(classes)
    return dict(zip(present.tolist(), compute_class_weight("balanced", classes=present, y=classes).tolist(), strict=True))


@dataclass(frozen=True)
class Calibration:
    """How a head's scores are read: with one threshold for abstaining, or with one per label; `facts` are the measurements."""

    abstain_threshold: float | None
    label_thresholds: tuple[float, ...] | None
    facts: Mapping[str, Any]


def calibrate(head: keras.Model, validation: DataSplit, test: DataSplit, precision: float | None) -> Calibration:
    """Fit temperature and thresholds on the validation part, apply the temperature to the head, measure on the test part.

    Args:
        head: changed in place: the weights of its last layer are divided by the temperature.
        validation: the images that decided when training ended.
        test: images that are used for measurements only.
        precision: the wanted share of correct answers among the answered images; None to answer every image.

    Raises:
        ConfigError: no threshold reaches the precision.
    """
    if validation.classes.ndim == 2:
        return Calibration(None, thresholds_by_f1(scores_of(head, validation), validation.classes), {})
    before = calibration_error(scores_of(head, test), test.classes)
    temperature = fit_temperature(scores_of(head, validation), validation.classes)
    _divide(head, temperature)
    scores = scores_of(head, validation)
    facts: dict[str, Any] = {
        "temperature": temperature,
        "calibration_error": {"before": before, "after": calibration_error(scores_of(head, test), test.classes)},
    }
    if precision is None:
        return Calibration(None, None, facts)
    chosen = threshold_for(scores, validation.classes, precision)
    if chosen is None:
        raise ConfigError(
            f"precision: no score threshold reaches {precision:.0%} on the validation images; choose a lower one."
        )
    tested = at_threshold(scores_of(head, test), test.classes, chosen.threshold)
    facts["abstaining"] = {"wanted": precision, "validation": chosen._asdict(), "test": tested._asdict()}
    return Calibration(chosen.threshold, None, facts)


def scores_of(head: keras.Model, part: DataSplit) -> np.ndarray:
    """(n, C) scores of one part of the images."""
    return np.asarray(head(part.features, training=False))


def _divide(head: keras.Model, temperature: float) -> None:
    last = head.get_layer("scores")
    last.set_weights([weight / np.float32(temperature) for weight in last.get_weights()])
