"""Features and true labels -> a trained head with calibrated scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from tlbatch.errors import ConfigError
from tlbatch.model.calibration import (
    at_threshold,
    calibration_error,
    fit_temperature,
    tempered,
    threshold_for,
    thresholds_by_f1,
)
from tlbatch.model.convex_head import CurvePoint, Dense, Tell, fit_convex
from tlbatch.model.own_keras import with_own_keras

if TYPE_CHECKING:
    import keras

DROPOUT = 0.2
#: Most numbers (images x features) of a convex fit, which holds them three times, if the head is not chosen.
_CONVEX_UP_TO = 300_000_000
#: How many times as many images as the rarest class the commonest one has in an unbalanced set.
_UNBALANCED = 10


@dataclass(frozen=True)
class HeadTraining:
    """How a head is trained: by `fit_convex`, or by Adam (sgd), whose settings are the next four; auto looks at the size.

    Adam ends after `epochs` epochs, or when validation has not improved for `patience` epochs. With the class weights `auto`,
    classes weigh the same if the set is unbalanced.
    """

    head: Literal["auto", "convex", "sgd"] = "convex"
    epochs: int = 100
    patience: int = 10
    batch_size: int = 32
    learning_rate: float = 1e-3
    seed: int = 0
    class_weight: Literal["auto", "none", "balanced"] = "auto"

    @property
    def facts(self) -> dict[str, Any]:
        """The settings that had an effect."""
        return asdict(self) if self.head == "sgd" else {"head": self.head, "class_weight": self.class_weight}


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


class Scored(NamedTuple):
    """Scores (n, C) of images, and their classes as in `DataSplit`."""

    scores: np.ndarray
    classes: np.ndarray


#: Features and classes, as in `DataSplit` -> (n,) the fold of each image in cross-validation.
Fold = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class FittedHead:
    """A trained head.

    Attributes:
        head: the head.
        how: how it was trained; nothing is `auto`.
        held_out: scores of images by a layer that they did not train.
        rows: (n,) which images these are, of those of train and then of validation.
        facts: what the bundle records.
        curve: numbers of images and the accuracy of layers fitted on so many; empty if it was not measured.
    """

    head: keras.Model
    how: HeadTraining
    held_out: Scored
    rows: np.ndarray
    facts: Mapping[str, Any]
    curve: Sequence[CurvePoint] = ()


def fit_head(
    train: DataSplit,
    validation: DataSplit,
    fold: Fold,
    classes: int,
    how: HeadTraining,
    tell: Tell | None = None,
    last: int | None = None,
) -> FittedHead:
    """Fit a head to labelled features.

    Args:
        train: images to train on.
        validation: images on which Adam's early stopping looks. A convex head trains on them too.
        fold: called for a convex head, with the images of both parts.
        classes: C.
        how: the settings.
        tell: called with the numbers of finished and of all problems.
        last: how many features are of the last layer, if there are others: `facts` then has `last_layer`, the held-out accuracy
            of a convex head on these alone, if the learning curve is measured.
    """
    how = replace(how, class_weight=_class_weights(train.classes, how.class_weight))
    if how.head == "auto":
        how = replace(how, head="convex" if train.features.size + validation.features.size <= _CONVEX_UP_TO else "sgd")
    if how.head == "sgd":
        return _fit_by_adam(train, validation, classes, how)
    values = np.concatenate([train.features, validation.features])
    known = np.concatenate([train.classes, validation.classes])
    folds, weights = fold(values, known), _image_weights(known, how)
    fit = fit_convex(values, known, folds, classes, weights, tell, curve=True)
    head = _head_of(fit.layer, "sigmoid" if known.ndim == 2 else "softmax")
    facts: dict[str, Any] = {"strengths": list(fit.strengths), "held_out_losses": list(fit.losses)}
    if last and fit.curve:
        alone = fit_convex(values[:, -last:], known, folds, classes, weights)
        facts["last_layer"] = float((alone.held_out.argmax(axis=1) == known).mean())
    return FittedHead(head, how, Scored(fit.held_out, known[fit.rows]), fit.rows, facts, fit.curve)


def _fit_by_adam(train: DataSplit, validation: DataSplit, classes: int, how: HeadTraining) -> FittedHead:
    head, history = train_head(train, validation, classes, how)
    best = history["val_accuracy"][int(np.argmin(history["val_loss"]))]
    facts = {"epochs": len(history["loss"]), "validation_accuracy": best, "history": history}
    rows = len(train.classes) + np.arange(len(validation.classes))
    return FittedHead(head, how, Scored(scores_of(head, validation), validation.classes), rows, facts)


def is_unbalanced(images: Iterable[int]) -> bool:
    """Whether the commonest class has ten times as many images as the rarest one that has any."""
    counts = [count for count in images if count]
    return bool(counts) and max(counts) >= _UNBALANCED * min(counts)


def _class_weights(classes: np.ndarray, wanted: Literal["auto", "none", "balanced"]) -> Literal["none", "balanced"]:
    if wanted != "auto":
        return wanted
    return "balanced" if classes.ndim == 1 and is_unbalanced(np.bincount(classes).tolist()) else "none"


def _image_weights(classes: np.ndarray, how: HeadTraining) -> np.ndarray:
    """(n,) how much each image counts."""
    if how.class_weight != "balanced":
        return np.ones(len(classes))
    weights = _class_weight(classes)
    return np.array([weights[number] for number in classes.tolist()])


@with_own_keras
def _head_of(layer: Dense, activation: str) -> keras.Model:
    length, classes = layer.weights.shape
    head = build_head(length, classes, activation)
    head.get_layer("scores").set_weights(list(layer))
    return head


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


def calibrate(head: keras.Model, held_out: Scored, test: DataSplit, precision: float | None) -> Calibration:
    """Fit temperature and thresholds on held-out scores, apply the temperature to the head, measure on the test part.

    Args:
        head: changed in place: the weights of its last layer are divided by the temperature.
        held_out: of images that did not train the layer which scored them.
        test: images that are used for measurements only.
        precision: the wanted share of correct answers among the answered images; None to answer every image.

    Raises:
        ConfigError: no threshold reaches the precision.
    """
    if held_out.classes.ndim == 2:
        return Calibration(None, thresholds_by_f1(*held_out), {})
    before = calibration_error(scores_of(head, test), test.classes)
    temperature = fit_temperature(*held_out)
    _divide(head, temperature)
    scores = tempered(held_out.scores, temperature)
    facts: dict[str, Any] = {
        "temperature": temperature,
        "calibration_error": {"before": before, "after": calibration_error(scores_of(head, test), test.classes)},
    }
    if precision is None:
        return Calibration(None, None, facts)
    chosen = threshold_for(scores, held_out.classes, precision)
    if chosen is None:
        raise ConfigError(f"precision: no score threshold reaches {precision:.0%} on the held-out images; choose a lower one.")
    tested = at_threshold(scores_of(head, test), test.classes, chosen.threshold)
    facts["abstaining"] = {"wanted": precision, "held_out": chosen._asdict(), "test": tested._asdict()}
    return Calibration(chosen.threshold, None, facts)


def scores_of(head: keras.Model, part: DataSplit) -> np.ndarray:
    """(n, C) scores of one part of the images."""
    return np.asarray(head(part.features, training=False))


def _divide(head: keras.Model, temperature: float) -> None:
    last = head.get_layer("scores")
    last.set_weights([weight / np.float32(temperature) for weight in last.get_weights()])
