"""Scores of held-out images -> how accurate a head is, what it confuses, which labels it doubts, and what more labels give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

#: Pairs of classes, and images, that are named.
_CONFUSED, _DOUBTED = 10, 20
#: Fewest points of a learning curve from which a trend is read, and the most times as many labels that it is followed to.
_POINTS, _FURTHEST = 3, 10
_POINT = 0.01


def held_out_facts(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What is recorded of a measurement of held-out images.

    Args:
        metrics: the result of `measure` or `measure_many`.

    Returns:
        `images`, `accuracy`, its 95 % `interval` (Wilson), `balanced_accuracy` unless images have several labels, `recall` of
        each class, and `confused`: the pairs of classes that are confused most, as `label`, `predicted` and `images`.
    """
    from scipy.stats import binomtest

    right = round(metrics["accuracy"] * metrics["images"])
    interval = binomtest(right, metrics["images"]).proportion_ci(method="wilson")
    known = {name: metrics[name] for name in ("images", "accuracy", "balanced_accuracy") if name in metrics}
    recall = {label: facts["recall"] for label, facts in metrics["by_class"].items() if facts["images"]}
    return {**known, "interval": [*map(float, interval)], "recall": recall, "confused": _confused(metrics)}


def _confused(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    matrix = np.array(metrics["confusion"], np.int64)
    if not matrix.size:
        return []
    np.fill_diagonal(matrix, 0)
    order = np.argsort(-matrix, axis=None, kind="stable")[:_CONFUSED]
    rows, columns = np.unravel_index(order, matrix.shape)
    labels = metrics["labels"]
    return [
        {"label": labels[row], "predicted": labels[column], "images": int(matrix[row, column])}
        for row, column in zip(rows, columns, strict=True)
        if matrix[row, column]
    ]


def doubted_labels(
    scores: np.ndarray, classes: np.ndarray, labels: Sequence[str], names: Sequence[tuple[str, str]]
) -> list[dict[str, Any]]:
    """The images whose given label is least likely to layers that were fitted without them: there, errors of labelling are.

    Args:
        scores: (n, C) held-out scores.
        classes: (n,) the classes that the labels say.
        labels: the C classes.
        names: uri and key of the n images.

    Returns:
        Up to 20 images, the most doubted first: `uri`, `key`, `label`, `label_score`, `suggested` and `score`.
    """
    given = scores[np.arange(len(classes)), classes]
    found = []
    for row in np.argsort(given - scores.max(axis=1), kind="stable")[:_DOUBTED]:
        best = int(scores[row].argmax())
        if best != classes[row]:
            uri, key = names[row]
            label, suggested = labels[int(classes[row])], labels[best]
            scored = {"label_score": float(given[row]), "suggested": suggested, "score": float(scores[row, best])}
            found.append({"uri": uri, "key": key, "label": label, **scored})
    return found


def learning_facts(points: Sequence[tuple[int, float]]) -> dict[str, Any] | None:
    """A learning curve, and where it leads: errors fall about as a power of the number of labels.

    Args:
        points: numbers of images and the accuracy of layers fitted on so many, the most last.

    Returns:
        `points`; `twice`, the accuracy to be expected of twice as many labels; `one_point`, how many times as many labels one
        point of accuracy more takes, None if more than ten times or if less than a point is missing. None if there are too
        few points.
    """
    if len(points) < _POINTS:
        return None
    images, accuracies = np.array(points, np.float64).T
    errors = np.maximum(1 - accuracies, 0.5 / images)
    slope = min(float(np.polyfit(np.log(images), np.log(errors), 1)[0]), 0.0)
    last = float(1 - accuracies[-1])
    wanted = last - _POINT
    powers = np.log(wanted / last) / slope if slope and wanted > 0 else np.inf  # of e
    return {
        "points": [[int(count), float(accuracy)] for count, accuracy in points],
        "twice": 1 - last * 2**slope,
        "one_point": float(np.exp(powers)) if powers <= np.log(_FURTHEST) else None,
    }


def learning_in_words(facts: Mapping[str, Any]) -> str:
    """The curve of `learning_facts`, and whether more labels would help."""
    *counts, count = [f"{images:,}" for images, _ in facts["points"]]
    *values, value = [f"{accuracy:.1%}" for _, accuracy in facts["points"]]
    curve = f"Heads fitted on {', '.join(counts)} and {count} images are right on {', '.join(values)} and {value} of others."
    told = f"{curve} If this goes on, twice as many labels give about {facts['twice']:.1%}"
    if 1 - facts["points"][-1][1] <= _POINT:
        return f"{told}."
    times = f"about {facts['one_point']:.1f}" if facts["one_point"] else f"over {_FURTHEST}"
    return f"{told}; one point more takes {times} times as many."


def quantized_in_words(found: Mapping[str, Any]) -> str:
    """What int8 costs in held-out accuracy and gives in speed, and whether the bundle has it; of the fields of `Compared`."""
    before, after = found["float32"], found["int8"]
    measured = (
        f"{after['accuracy']:.1%} of {found['images']:,} held-out images right instead of {before['accuracy']:.1%}, "
        f"{after['images_per_second'] / before['images_per_second']:.1f} times the images a second of the model alone"
    )
    return f"Base in int8: {measured}" if found["kept"] else f"Base in float32, because in int8: {measured}"


def check_in_words(check: Mapping[str, Any] | None, quantized: Mapping[str, Any] | None) -> str:
    """How an imported bundle was checked, and what it has of int8; of what `import` gives."""
    if check is None:
        return "tlbatch cannot see whether the training did the same, and if it did not, many labels change; --check tells."
    told = f"Checked on {check['images']:,} images: {check['equal']:.1%} have the model's own label."
    if quantized is None:
        return told
    measured = f"in int8 {quantized['equal']:.1%} have it, at {quantized['times']:.1f} times the speed of the model alone"
    return f"{told} The base is in {'int8' if quantized['kept'] else 'float32'}: {measured}."


def held_out_in_words(held_out: Mapping[str, Any], head: str) -> str:
    """The accuracy on the images that did not train the layer which scored them, with its interval."""
    low, high = held_out["interval"]
    where = "In cross-validation" if head == "convex" else "On the images of early stopping"
    return f"{where} {held_out['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}) on {held_out['images']:,} images"
