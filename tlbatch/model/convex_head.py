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

#: Strengths of the penalty, from the strongest. The path is left when a weaker one makes the held-out loss worse; then the
#: strengths between the best one and its neighbours are tried.
STRENGTHS: Sequence[float] = tuple(10.0**power for power in range(5, -3, -1))
_BETWEEN = (10**0.5, 10**-0.5)
#: A weaker penalty must lower the loss at least to this share, and the path is left when it raises the loss to that one.
_BETTER, _WORSE = 0.999, 1.001
#: Shares of the images for the learning curve, and about how many it is measured on.
_CURVE_SHARES = (1 / 8, 1 / 4, 1 / 2)
_CURVE_IMAGES = 1000
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


class CurvePoint(NamedTuple):
    """Layers fitted on about so many images, and their accuracy on the images of the fold that they were not fitted on."""

    images: int
    accuracy: float


@dataclass(frozen=True)
class ConvexFit:
    """A fitted layer, and what cross-validation found.

    Attributes:
        layer: fitted on all images with the chosen strengths.
        held_out: (m, C) scores of images by layers that were fitted without them.
        rows: (m,) the images that these scores belong to: all, or those of one fold.
        strengths: the chosen strength of the penalty: one, or one per label if an image may have several.
        losses: the mean held-out log loss of each strength on the path, the strongest first.
        curve: the accuracy by the number of images, the most last; empty if it was not measured.
    """

    layer: Dense
    held_out: np.ndarray
    rows: np.ndarray
    strengths: tuple[float, ...]
    losses: tuple[float, ...]
    curve: tuple[CurvePoint, ...] = ()


def fit_convex(
    features: np.ndarray,
    classes: np.ndarray,
    folds: np.ndarray,
    count: int,
    weights: np.ndarray,
    tell: Tell | None = None,
    *,
    curve: bool = False,
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
        curve: also measure the accuracy of layers that are fitted on fewer images. With several labels per image, or too many
            images for five folds, it is not measured.
    """
    wanted = (classes if classes.ndim == 2 else np.eye(count, dtype=np.float32)[classes]).astype(np.float32)
    problem = _Problem(_Columns(features), wanted, weights.astype(np.float32), several=classes.ndim == 2)
    numbers = np.unique(folds)
    if features.size * count >= _ONE_FOLD_FROM:
        numbers = numbers[:1]
    rows = np.flatnonzero(np.isin(folds, numbers))
    progress = _Progress(tell, len(numbers) * (len(STRENGTHS) * (1 + curve * len(_CURVE_SHARES)) + len(_BETWEEN)) + 1)
    parts = [_Fold(problem, folds != number, folds == number, folds == number) for number in numbers]
    path = _follow_path(problem, parts, progress, between=_BETWEEN)
    layer = problem.solve(path.strengths, np.ones(len(features), bool), path.states[0])
    wanted_curve = curve and not problem.several and len(numbers) > 1
    points = _learning_curve(problem, features, path, folds, progress) if wanted_curve else ()
    progress.end()
    single = path.strengths if problem.several else path.strengths[:1]
    held_out = path.held_out[rows]
    return ConvexFit(problem.layer(layer), held_out, rows, tuple(float(one) for one in single), tuple(path.losses), points)


class _Progress:
    """Counts finished problems for `tell`."""

    def __init__(self, tell: Tell | None, most: int) -> None:
        self._tell, self._most, self._done = tell, most, 0

    def step(self) -> None:
        """One more problem is solved."""
        self._done += 1
        if self._tell is not None:
            self._tell(self._done, self._most)

    def end(self) -> None:
        """The last problem is solved."""
        if self._tell is not None:
            self._tell(self._done + 1, self._done + 1)


@dataclass
class _Path:
    """The best strength and loss of each label, what layers of that strength say of images that they did not see, and these."""

    strengths: np.ndarray
    best: np.ndarray
    held_out: np.ndarray
    states: list[np.ndarray]
    losses: list[float]


class _Fold(NamedTuple):
    """A problem, which of its images a layer is fitted and measured on, and which of all images these are; all masks."""

    problem: _Problem
    used: np.ndarray
    out: np.ndarray
    places: np.ndarray


def _follow_path(problem: _Problem, folds: Sequence[_Fold], progress: _Progress, between: Sequence[float] = ()) -> _Path:
    """Solve each fold at weaker and weaker strengths, each from the solution before; keep the best strength of each label.

    Args:
        problem: all images.
        folds: the parts.
        progress: told of each solved problem.
        between: factors of the best strength that are tried in the end.
    """
    labels = problem.wanted.shape[1]
    nothing = [np.zeros(fold.problem.length) for fold in folds]
    path = _Path(np.zeros(labels), np.full(labels, np.inf), np.zeros(problem.wanted.shape, np.float32), nothing, [])
    states = nothing
    for strength in STRENGTHS:
        states, losses = _try(problem, folds, np.full(labels, strength), states, path, progress)
        path.losses.append(float(losses.mean()))
        if (losses > _WORSE * path.best).all():
            break
    chosen, starts = path.strengths, path.states
    for factor in between:
        _try(problem, folds, chosen * factor, starts, path, progress)
    return path


def _try(
    problem: _Problem,
    folds: Sequence[_Fold],
    strengths: np.ndarray,
    starts: Sequence[np.ndarray],
    path: _Path,
    progress: _Progress,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Solve each fold, and put what is better into the path.

    Returns:
        The solutions, and the held-out loss of each label.
    """
    measured = np.any([fold.places for fold in folds], axis=0)
    scores, states = np.zeros_like(path.held_out), []
    for fold, start in zip(folds, starts, strict=True):
        states.append(fold.problem.solve(strengths, fold.used, start))
        scores[fold.places] = fold.problem.scores(states[-1], fold.out)
        progress.step()
    found = problem.losses(scores[measured], measured)
    better = found < path.best * _BETTER
    path.best, path.strengths = np.where(better, found, path.best), np.where(better, strengths, path.strengths)
    path.held_out[:, better] = scores[:, better]
    # Weights and biases end with the label.
    path.states = [np.where(np.resize(better, len(new)), new, old) for new, old in zip(states, path.states, strict=True)]
    return states, found


def _learning_curve(
    problem: _Problem, features: np.ndarray, path: _Path, folds: np.ndarray, progress: _Progress
) -> tuple[CurvePoint, ...]:
    """The accuracy by the number of images that the layers are fitted on, on all images or on the folds with enough of them."""
    numbers, classes = np.unique(folds), problem.wanted.argmax(axis=1)
    numbers = numbers[: int(np.ceil(_CURVE_IMAGES / len(folds) * len(numbers)))]
    measured, places, points = np.isin(folds, numbers), _places_in_turn(classes), []
    for share in (*_CURVE_SHARES, 1):
        used = [(folds != number) & (places < share) for number in numbers]
        if any(len(np.unique(classes[one])) < problem.wanted.shape[1] for one in used):
            continue
        found = path
        if share < 1:
            parts = [problem.without_others(features, one, folds == number) for one, number in zip(used, numbers, strict=True)]
            found = _follow_path(problem, parts, progress)
        right = found.held_out[measured].argmax(axis=1) == classes[measured]
        points.append(CurvePoint(round(np.mean([one.sum() for one in used])), float(right.mean())))
    return tuple(points)


def _places_in_turn(classes: np.ndarray) -> np.ndarray:
    """(n,) from 0 to 1: the place of each image in a shuffled order of its class."""
    random, places = np.random.default_rng(0), np.zeros(len(classes))
    for label in np.unique(classes):
        members = random.permutation(np.flatnonzero(classes == label))
        places[members] = np.arange(len(members)) / len(members)
    return places


class _Columns:
    """Standardised features, rotated to their principal components: no more columns than images, and none that repeats others.

    The penalty is the same in every rotation, and a solution is a combination of the images, so nothing is lost.

    Args:
        features: (n, F) of the images that layers are fitted on.
        others: (m, F) of images that follow them in `values`, and have no part in the standardising.
    """

    def __init__(self, features: np.ndarray, others: np.ndarray | None = None) -> None:
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
        if others is not None:
            self.values = np.concatenate([self.values, ((others - self._mean) * self._scale @ self._back).astype(np.float32)])

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

    def without_others(self, features: np.ndarray, used: np.ndarray, out: np.ndarray) -> _Fold:
        """The fold of the images in two masks, with columns that know only those that are used."""
        rows = np.concatenate([np.flatnonzero(used), np.flatnonzero(out)])
        problem = _Problem(
            _Columns(features[used], features[out]), self.wanted[rows], self._weights[rows], several=self.several
        )
        is_used = np.arange(len(rows)) < used.sum()
        return _Fold(problem, is_used, ~is_used, out)

    def solve(self, strengths: np.ndarray, used: np.ndarray, start: np.ndarray) -> np.ndarray:
        """The minimum over the images of a mask, from a start near it."""
        from scipy.optimize import minimize

        values, wanted, weights = self._columns.values[used], self.wanted[used], self._weights[used][:, None]
        total = float(weights.sum())
        penalty = np.concatenate([np.tile(strengths, self._shape[0]), np.full(self._shape[1], _BIAS_STRENGTH)])
        # In principal components the curvature is nearly diagonal. Divided by its root, all directions are about as steep.
        squares = np.concatenate([np.repeat(self._columns.squares, self._shape[1]), np.full(self._shape[1], total)])
        scale = 1 / np.sqrt(_CURVATURE * squares + penalty)

        def objective(scaled: np.ndarray) -> tuple[float, np.ndarray]:
            flat = scaled * scale
            loss, slope = self._loss_and_slope(self._logits(flat, values), wanted, weights)
            gradient = np.concatenate([(values.T @ slope).ravel(), slope.sum(axis=0)]).astype(np.float64)
            shrink = penalty * flat
            return (loss + 0.5 * float(shrink @ flat)) / total, (gradient + shrink) * scale / total

        found = minimize(objective, start / scale, jac=True, method="L-BFGS-B", options=_OPTIONS)
        return np.asarray(found.x * scale)

    def _logits(self, flat: np.ndarray, values: np.ndarray) -> np.ndarray:
        labels = self._shape[1]
        flat = flat.astype(np.float32)
        return np.asarray(values @ flat[:-labels].reshape(self._shape) + flat[-labels:])

    def _loss_and_slope(self, logits: np.ndarray, wanted: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
        """The summed loss of (n, C) logits, and its derivative by each of them."""
        from scipy.special import expit, logsumexp

        if self.several:
            each = np.logaddexp(0, logits) - wanted * logits
            return float((weights * each).sum(dtype=np.float64)), weights * (expit(logits) - wanted)
        log_scores = logits - logsumexp(logits, axis=1, keepdims=True)
        loss = -float((weights * wanted * log_scores).sum(dtype=np.float64))
        return loss, weights * (np.exp(log_scores) - wanted)

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
