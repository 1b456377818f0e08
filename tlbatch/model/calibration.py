"""Scores and the truth -> how honest the scores are, and what makes them so; pure."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_BINS = 15
_LEAST = 1e-12


def fit_temperature(scores: np.ndarray, classes: np.ndarray) -> float:
    """The temperature that makes softmax scores fit the truth best, by log loss.

    Dividing the logits by it changes no label (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017). A few
    images that are all told right would ask for scores of one, so each counts as right with probability (n + 1) / (n + C) and
    no more (Platt, "Probabilistic Outputs for Support Vector Machines", 1999).

    Args:
        scores: (n, C) softmax scores of images the head was not trained on.
        classes: (n,) their true class numbers.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    logits = np.log(np.maximum(scores.astype(np.float64), _LEAST))
    count, of = scores.shape
    targets = np.full(scores.shape, 1 / (count + of))
    targets[np.arange(count), classes] = (count + 1) / (count + of)

    def loss(log_temperature: float) -> float:
        return -float((targets * log_softmax(logits / np.exp(log_temperature), axis=1)).sum())

    found = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20.0)), method="bounded")
    return float(np.exp(found.x))


def calibration_error(scores: np.ndarray, classes: np.ndarray) -> float:
    """Expected calibration error of the best class: |accuracy - mean score| in 15 bins of equal width, weighted by images.

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
    """A threshold on the best score: `precision` of the images at or above it, `answered` of all `images`."""

    threshold: float
    precision: float
    answered: int
    images: int


def at_threshold(scores: np.ndarray, classes: np.ndarray, threshold: float) -> Abstaining:
    """What a threshold does to scored images."""
    best = scores.max(axis=1)
    answered = best >= np.float32(threshold)
    right = scores.argmax(axis=1)[answered] == classes[answered]
    return Abstaining(threshold, float(right.mean()) if len(right) else 0.0, int(answered.sum()), len(best))


def threshold_for(scores: np.ndarray, classes: np.ndarray, precision: float) -> Abstaining | None:
    """The lowest threshold at which so many of the answers are right; None where no threshold does it.

    Args:
        scores: (n, C) scores of images the head was not trained on.
        classes: (n,) true class numbers.
        precision: the wanted share of right answers.
    """
    best = scores.max(axis=1)
    right = (scores.argmax(axis=1) == classes)[np.argsort(-best, kind="stable")]
    enough = np.flatnonzero(np.cumsum(right) / np.arange(1, len(right) + 1) >= precision)
    if not len(enough):
        return None
    return at_threshold(scores, classes, _just_below(best, np.sort(best)[::-1][enough[-1]]))


def _just_below(scores: np.ndarray, score: float) -> float:
    """Half way to the next lower score, so that other last digits, such as those of float16 features, change nothing."""
    lower = scores[scores < score]
    return float((score + lower.max()) / 2 if len(lower) else score)


def thresholds_by_f1(scores: np.ndarray, truth: np.ndarray) -> tuple[float, ...]:
    """For each class of a head with many labels an image, the threshold with the best F1; 0.5 where nothing tells.

    Args:
        scores: (n, C) sigmoid scores of images the head was not trained on.
        truth: (n, C) 1 where an image has the label.
    """
    from sklearn.metrics import precision_recall_curve

    found = []
    for number in range(scores.shape[1]):
        if not 0 < truth[:, number].sum() < len(truth):
            found.append(0.5)
            continue
        precision, recall, thresholds = precision_recall_curve(truth[:, number], scores[:, number])
        f1 = 2 * precision * recall / np.maximum(precision + recall, _LEAST)
        found.append(_just_below(scores[:, number], thresholds[int(np.argmax(f1[:-1]))]))
    return tuple(found)
