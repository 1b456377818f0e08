"""Scores and true labels -> calibration error, temperature and score thresholds; pure functions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_BINS = 15
_LEAST = 1e-12


def fit_temperature(scores: np.ndarray, classes: np.ndarray) -> float:
    """The temperature at which softmax scores fit the true classes best, by log loss.

    Dividing the logits by it changes no predicted label (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017).
    If a few images are all predicted correctly, the best fit would be scores of one. So the target of the true class is
    (n + 1) / (n + 2) instead of one (Platt, "Probabilistic Outputs for Support Vector Machines", 1999), and the other classes
    share the rest. Whether the best class is right is a question with two answers, however many classes there are.

    Args:
        scores: (n, C) softmax scores of images that the head was not trained on.
        classes: (n,) their true class numbers.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    logits = _logits(scores)
    count, of = scores.shape
    targets = np.full(scores.shape, 1 / (count + 2) / max(of - 1, 1))
    targets[np.arange(count), classes] = (count + 1) / (count + 2)

    def loss(log_temperature: float) -> float:
        return -float((targets * log_softmax(logits / np.exp(log_temperature), axis=1)).sum())

    found = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20.0)), method="bounded")
    return float(np.exp(found.x))


def tempered(scores: np.ndarray, temperature: float) -> np.ndarray:
    """(n, C) softmax scores whose logits are divided by a temperature."""
    from scipy.special import softmax

    return np.asarray(softmax(_logits(scores) / temperature, axis=1), np.float32)


def _logits(scores: np.ndarray) -> np.ndarray:
    """Numbers whose softmax gives the scores, in float64."""
    return np.asarray(np.log(np.maximum(scores.astype(np.float64), _LEAST)))


def calibration_error(scores: np.ndarray, classes: np.ndarray) -> float:
    """Expected calibration error of the best class: |accuracy - mean score| in 15 bins of equal width, weighted by size.

    Args:
        scores: (n, C) scores.
        classes: (n,) true class numbers.
    """
    best = scores.max(axis=1)
    right = scores.argmax(axis=1) == classes
    which = np.minimum((best * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(which, weights=right, minlength=_BINS) - np.bincount(which, weights=best, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(best))


class Abstaining(NamedTuple):
    """A threshold on the best score: `answered` of all `images` reach it, and their share of correct answers is `precision`."""

    threshold: float
    precision: float
    answered: int
    images: int


def at_threshold(scores: np.ndarray, classes: np.ndarray, threshold: float) -> Abstaining:
    """The effect of a threshold on scored images."""
    best = scores.max(axis=1)
    answered = best >= np.float32(threshold)
    right = scores.argmax(axis=1)[answered] == classes[answered]
    return Abstaining(threshold, float(right.mean()) if len(right) else 0.0, int(answered.sum()), len(best))


def threshold_for(scores: np.ndarray, classes: np.ndarray, precision: float) -> Abstaining | None:
    """The lowest threshold whose answers reach a precision; None if no threshold does.

    Args:
        scores: (n, C) scores of images that the head was not trained on.
        classes: (n,) true class numbers.
        precision: the wanted share of correct answers.
    """
    best = scores.max(axis=1)
    right = (scores.argmax(axis=1) == classes)[np.argsort(-best, kind="stable")]
    enough = np.flatnonzero(np.cumsum(right) / np.arange(1, len(right) + 1) >= precision)
    if not len(enough):
        return None
    return at_threshold(scores, classes, _just_below(best, np.sort(best)[::-1][enough[-1]]))


def _just_below(scores: np.ndarray, score: float) -> float:
    """Halfway to the next lower score, so that other last digits, such as those from float16 features, make no difference."""
    lower = scores[scores < score]
    return float((score + lower.max()) / 2 if len(lower) else score)


def thresholds_by_f1(scores: np.ndarray, labels: np.ndarray) -> tuple[float, ...]:
    """For each class of a multi-label head the threshold with the best F1; 0.5 if all images have the label, or none has it.

    Args:
        scores: (n, C) sigmoid scores of images that the head was not trained on.
        labels: (n, C) 1 where an image has the label.
    """
    from sklearn.metrics import precision_recall_curve

    found = []
    for number in range(scores.shape[1]):
        if not 0 < labels[:, number].sum() < len(labels):
            found.append(0.5)
            continue
        precision, recall, thresholds = precision_recall_curve(labels[:, number], scores[:, number])
        f1 = 2 * precision * recall / np.maximum(precision + recall, _LEAST)
        found.append(_just_below(scores[:, number], thresholds[int(np.argmax(f1[:-1]))]))
    return tuple(found)
