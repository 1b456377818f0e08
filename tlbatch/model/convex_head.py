"""Features and true labels -> the dense layer with the lowest regularised log loss.

The problem is convex, so one data set has one answer, which no seed changes: columns are standardised, the loss is
cross-entropy with an L2 penalty on the weights (Hastie, Tibshirani, Friedman, "The Elements of Statistical Learning", 2009,
section 4.4), and L-BFGS minimises it. Cross-validation chooses the strength of the penalty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

#: Strengths of the penalty, from the strongest. The path is left when weaker ones only make the held-out loss worse.
STRENGTHS: Sequence[float] = tuple(10.0 ** (power / 2) for power in range(10, -5, -1))
_WORSE_IN_A_ROW = 2
#: Penalty on the biases. It is too weak to move a class that has images, and keeps finite the bias of one that has none.
_BIAS_STRENGTH = 0.01
#: Operations of one pass over all images (images x features x classes) from which one fold has to stand for all of them.
_ONE_FOLD_FROM = 2e10
_LEAST, _LEAST_SHARE = 1e-12, 1e-10
#: Rows that are in float64 at the same time.
_BLOCK = 4096
#: About how much the loss of one image curves along its logit: p (1 - p).
_CURVATURE = 0.1

#: Called with the number of finished problems, and the number of all of them, which may turn out to be lower.
Tell = Callable[[int, int], None]


class Dense(NamedTuple):
    """A dense layer: weights (F, C) and biases (C,), both float32."""

    weights: np.ndarray
    biases: np.ndarray


@dataclass(frozen=True)
class ConvexFit:
    """A fitted layer, and what cross-validation found.

    Attributes:
        layer: fitted on all images with the chosen strengths.
        held_out: (m, C) scores of images by layers that were fitted without them.
        rows: (m,) the images that these scores belong to: all, or those of one fold.
        strengths: the chosen strength of the penalty: one, or one per label if an image may have several.
        losses: the mean held-out log loss of each strength on the path, the strongest first.
    """

    layer: Dense
    held_out: np.ndarray
    rows: np.ndarray
    strengths: tuple[float, ...]
    losses: tuple[float, ...]


def fit_convex(
    features: np.ndarray, classes: np.ndarray, folds: np.ndarray, count: int, weights: np.ndarray, tell: Tell | None = None
) -> ConvexFit:
    """Fit a layer, with the strength of its penalty chosen by cross-validation.

    Args:
        features: (n, F) float32.
        classes: (n,) class numbers; with several labels per image (n, C), 1 where an image has a label, and one strength per
            label.
        folds: (n,) numbers of the folds, from 0; the copies of a picture are in one fold.
        count: C, the number of classes.
        weights: (n,) how much each image counts.
        tell: called after each problem.
    """
    wanted = (classes if classes.ndim == 2 else np.eye(count, dtype=np.float32)[classes]).astype(np.float32)
    problem = _Problem(_Columns(features), wanted, weights.astype(np.float32), several=classes.ndim == 2)
    numbers = np.unique(folds)
    if features.size * count >= _ONE_FOLD_FROM:
        numbers = numbers[:1]
    rows = np.flatnonzero(np.isin(folds, numbers))
    path = _follow_path(problem, folds, numbers, rows, tell)
    layer = problem.solve(path.strengths, np.ones(len(features), np.float32), path.start)
    total = path.problems + 1
    if tell is not None:
        tell(total, total)
    single = path.strengths if problem.several else path.strengths[:1]
    return ConvexFit(problem.layer(layer), path.held_out, rows, tuple(float(one) for one in single), path.losses)


class _Path(NamedTuple):
    held_out: np.ndarray
    strengths: np.ndarray
    losses: tuple[float, ...]
    start: np.ndarray
    problems: int


def _follow_path(problem: _Problem, folds: np.ndarray, numbers: np.ndarray, rows: np.ndarray, tell: Tell | None) -> _Path:
    """Solve each fold at weaker and weaker strengths, each from the solution before; keep the best strength of each label."""
    labels = problem.wanted.shape[1]
    states = {number: np.zeros(problem.length) for number in numbers}
    best, chosen = np.full(labels, np.inf), np.zeros(labels)
    held_out, start = np.zeros((len(rows), labels), np.float32), np.zeros(problem.length)
    losses: list[float] = []
    worse, done, most = 0, 0, len(STRENGTHS) * len(numbers) + 1
    for strength in STRENGTHS:
        scores = np.zeros((len(rows), labels), np.float32)
        for number in numbers:
            out = folds == number
            states[number] = problem.solve(np.full(labels, strength), (~out).astype(np.float32), states[number])
            scores[out[rows]] = problem.scores(states[number], out)
            done += 1
            if tell is not None:
                tell(done, most)
        found = problem.losses(scores, rows)
        better = found < best
        best[better], chosen[better], held_out[:, better] = found[better], strength, scores[:, better]
        if better.any():
            start, worse = states[numbers[0]], 0
        else:
            worse += 1
        losses.append(float(found.mean()))
        if worse == _WORSE_IN_A_ROW:
            break
    return _Path(held_out, chosen, tuple(losses), start, done)


class _Columns:
    """Standardised features, rotated to their principal components: no more columns than images, and none that repeats others.

    The penalty is the same in every rotation, and a solution is a combination of the images, so nothing is lost.
    """

    def __init__(self, features: np.ndarray) -> None:
        blocks = [slice(start, start + _BLOCK) for start in range(0, len(features), _BLOCK)]
        self._mean = features.mean(axis=0, dtype=np.float64)
        spread = np.sqrt(sum(np.square(features[block] - self._mean).sum(axis=0) for block in blocks) / len(features))
        self._scale = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > _LEAST)
        values = np.concatenate([((features[block] - self._mean) * self._scale).astype(np.float32) for block in blocks])
        wide = len(values) < values.shape[1]
        squares, vectors = np.linalg.eigh(_squares(values.T if wide else values))
        kept = squares > squares.max() * _LEAST_SHARE
        self.squares, vectors = squares[kept], vectors[:, kept]
        if wide:
            self._back, rotated = values.T @ (vectors / np.sqrt(self.squares)), vectors * np.sqrt(self.squares)
        else:
            self._back, rotated = vectors, values @ vectors.astype(np.float32)
        self.values = rotated.astype(np.float32)

    def layer(self, weights: np.ndarray, biases: np.ndarray) -> Dense:
        """The layer of the features as they were."""
        scaled = self._back @ weights * self._scale[:, None]
        return Dense(scaled.astype(np.float32), (biases - self._mean @ scaled).astype(np.float32))


def _squares(rows: np.ndarray) -> np.ndarray:
    """The products of the columns with each other, summed over the rows in float64."""
    total = np.zeros((rows.shape[1],) * 2)
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK].astype(np.float64)
        total += block.T @ block
    return total


class _Problem:
    """Cross-entropy over the images plus the penalty, as a function of a flat vector: weights (d, C), then biases (C,)."""

    def __init__(self, columns: _Columns, wanted: np.ndarray, weights: np.ndarray, *, several: bool) -> None:
        self._columns, self.wanted, self._weights, self.several = columns, wanted, weights, several
        self._shape = (columns.values.shape[1], wanted.shape[1])
        self.length = (self._shape[0] + 1) * self._shape[1]

    def solve(self, strengths: np.ndarray, used: np.ndarray, start: np.ndarray) -> np.ndarray:
        """The minimum over the images with `used` 1, from a start near it."""
        from scipy.optimize import minimize

        weights = (self._weights * used)[:, None]
        total = float(weights.sum())
        penalty = np.concatenate([np.tile(strengths, self._shape[0]), np.full(self._shape[1], _BIAS_STRENGTH)])
        # In principal components the curvature is nearly diagonal. Divided by its root, all directions are about as steep.
        squares = np.concatenate([np.repeat(self._columns.squares, self._shape[1]), np.full(self._shape[1], total)])
        scale = 1 / np.sqrt(_CURVATURE * squares + penalty)

        def objective(scaled: np.ndarray) -> tuple[float, np.ndarray]:
            flat = scaled * scale
            logits = self._logits(flat, self._columns.values)
            loss, slope = self._loss_and_slope(logits, weights)
            gradient = np.concatenate([(self._columns.values.T @ slope).ravel(), slope.sum(axis=0)]).astype(np.float64)
            shrink = penalty * flat
            return (loss + 0.5 * float(shrink @ flat)) / total, (gradient + shrink) * scale / total

        found = minimize(objective, start / scale, jac=True, method="L-BFGS-B", options=_OPTIONS)
        return np.asarray(found.x * scale)

    def _logits(self, flat: np.ndarray, values: np.ndarray) -> np.ndarray:
        labels = self._shape[1]
        flat = flat.astype(np.float32)
        return np.asarray(values @ flat[:-labels].reshape(self._shape) + flat[-labels:])

    def _loss_and_slope(self, logits: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
        """The summed loss of (n, C) logits, and its derivative by each of them."""
        from scipy.special import expit, logsumexp

        if self.several:
            each = np.logaddexp(0, logits) - self.wanted * logits
            return float((weights * each).sum(dtype=np.float64)), weights * (expit(logits) - self.wanted)
        log_scores = logits - logsumexp(logits, axis=1, keepdims=True)
        loss = -float((weights * self.wanted * log_scores).sum(dtype=np.float64))
        return loss, weights * (np.exp(log_scores) - self.wanted)

    def scores(self, flat: np.ndarray, which: np.ndarray) -> np.ndarray:
        """(m, C) scores of some images."""
        from scipy.special import expit, softmax

        logits = self._logits(flat, self._columns.values[which])
        return np.asarray(expit(logits) if self.several else softmax(logits, axis=1), np.float32)

    def losses(self, scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(C,) the mean log loss of each label; of one label per image the same number for all."""
        wanted, weights = self.wanted[rows], self._weights[rows][:, None]
        scores = scores.astype(np.float64)
        each = -(weights * wanted * np.log(np.maximum(scores, _LEAST)))
        if not self.several:
            return np.full(wanted.shape[1], each.sum() / weights.sum())
        each -= weights * (1 - wanted) * np.log(np.maximum(1 - scores, _LEAST))
        return np.asarray(each.sum(axis=0) / weights.sum())

    def layer(self, flat: np.ndarray) -> Dense:
        """The layer for features as they come."""
        labels = self._shape[1]
        return self._columns.layer(flat[:-labels].reshape(self._shape), flat[-labels:])


#: Of L-BFGS. The gradient is that of the mean loss.
_OPTIONS = {"maxiter": 300, "ftol": 1e-8, "gtol": 1e-5, "maxcor": 10}
