"""The facts of a bundle -> `card.html`, its model card: how the model was made, from what, and how accurate it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tlbatch.model.head import is_unbalanced
from tlbatch.report.held_out import learning_in_words
from tlbatch.report.html import render


class _Table(NamedTuple):
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]


def make_model_card(
    title: str, training: Mapping[str, Any], metrics: Mapping[str, Any] | None, doubted: Sequence[Mapping[str, Any]] = ()
) -> bytes:
    """The model card as HTML.

    Args:
        title: the bundle in a few words.
        training: how the model was made, name -> value; `calibration_error` and `abstaining` become sentences.
        metrics: result of `measure` or `measure_many` on the test part; None if the model was not measured here.
        doubted: result of `doubted_labels`.
    """
    told = (dict, list, type(None))
    settings = [[name, value] for name, value in training.items() if not isinstance(value, told) and name != "last_layer"]
    made = _Table("How the model was made", [], settings)
    if metrics is None:
        sentences, measured = ["The accuracy of this model has not been measured here."], []
    else:
        accuracy = f"{metrics['accuracy']:.1%}"
        sentences = [f"Accuracy on {metrics['images']} test images that were not used in training: {accuracy}."]
        if "balanced_accuracy" in metrics:
            balanced = f"Balanced accuracy, the mean recall of the classes: {metrics['balanced_accuracy']:.1%}."
            unbalanced = is_unbalanced(one["images"] for one in metrics["by_class"].values())
            sentences = [balanced, *sentences] if unbalanced else [*sentences, balanced]
        measured = [*_metrics_tables(metrics), *_held_out_tables(training, doubted)]
    return render(
        "card.html",
        title,
        sentences=[*sentences, *_held_out_sentences(training), *_calibration_sentences(training)],
        tables=[*measured, made],
    )


def _metrics_tables(metrics: Mapping[str, Any]) -> list[_Table]:
    labels = list(metrics["labels"])
    by_class = [
        [
            label,
            *(f"{metrics['by_class'][label][name]:.3f}" for name in ("precision", "recall", "f1")),
            metrics["by_class"][label]["images"],
        ]
        for label in labels
    ]
    confusion = [[label, *row] for label, row in zip(labels, metrics["confusion"], strict=False)]
    tables = [_Table("Classes, on the test images", ["", "precision", "recall", "F1", "images"], by_class)]
    if confusion:
        tables.append(_Table("Confusion matrix (rows: true labels, columns: predicted labels)", ["", *labels], confusion))
    return tables


def _held_out_sentences(training: Mapping[str, Any]) -> list[str]:
    """The accuracy on images that did not train the layer which scored them."""
    if "held_out" not in training:
        return []
    found = training["held_out"]
    low, high = found["interval"]
    learning = training.get("learning")
    return [
        f"Accuracy on {found['images']} held-out images, each scored by a layer that was not trained on it: "
        f"{found['accuracy']:.1%}; the 95 % interval is {low:.1%} to {high:.1%}.",
        *([learning_in_words(learning)] if learning else []),
        *(
            [f"With the last layer's features alone (--features-of last): {training['last_layer']:.1%} of them."]
            if "last_layer" in training
            else []
        ),
    ]


def _held_out_tables(training: Mapping[str, Any], doubted: Sequence[Mapping[str, Any]]) -> list[_Table]:
    """The classes that are confused most, and the labels that are doubted most."""
    tables = []
    held_out = training.get("held_out", {})
    if held_out.get("confused"):
        rows = [
            [one["label"], one["predicted"], one["images"], f"{1 - held_out['recall'][one['label']]:.1%}"]
            for one in held_out["confused"]
        ]
        head = ["label", "predicted", "images", "of the label, not found"]
        tables.append(_Table("Confused most, on the held-out images", head, rows))
    if doubted:
        rows = [
            [one["key"], one["label"], f"{one['label_score']:.3f}", one["suggested"], f"{one['score']:.3f}"] for one in doubted
        ]
        head = ["image", "label", "its score", "more likely", "its score"]
        tables.append(_Table("Labels to look at first: heads that did not see the image doubt them", head, rows))
    if "quantized" in training:
        tables.append(_quantized_table(training["quantized"]))
    if "tried" in training:
        rows = [
            [one["base"], one["size"], f"{one['accuracy']:.1%}", f"{one['images_per_second']:,.0f}", f"{one['megabytes']:,.0f}"]
            for one in training["tried"]
        ]
        tables.append(_Table("Bases that were tried", ["", "pixels", "held-out accuracy", "images/s", "MB"], rows))
    return tables


def _quantized_table(found: Mapping[str, Any]) -> _Table:
    """Float32 and int8 side by side."""
    rows = []
    for name in ("float32", "int8"):
        one, error = found[name], found[name]["calibration_error"]
        told = [f"{one['accuracy']:.1%}", "" if error is None else f"{error:.3f}", f"{one['images_per_second']:,.0f}"]
        rows.append([f"{name} *" if (name == "int8") == found["kept"] else name, *told, f"{one['megabytes']:,.0f}"])
    caption = f"The base in float32 and in int8, on the same {found['images']:,} held-out images; * the one of this bundle"
    return _Table(caption, ["", "held-out accuracy", "calibration error", "images/s", "MB"], rows)


def _calibration_sentences(training: Mapping[str, Any]) -> list[str]:
    """The calibration error, and the precision gained by abstaining."""
    sentences = []
    if "calibration_error" in training:
        error = training["calibration_error"]
        sentences.append(
            f"Expected calibration error on the test images: {error['before']:.3f}, and {error['after']:.3f} after the "
            f"head's logits were divided by the temperature {training['temperature']:.3f}, which was fitted on the "
            "held-out images."
        )
    if "abstaining" in training:
        target, test = training["abstaining"]["wanted"], training["abstaining"]["test"]
        sentences.append(
            f"The model abstains below a score of {test['threshold']:.3f}, to reach a precision of {target:.0%}. On the test "
            f"images {test['precision']:.1%} of {test['answered']} answers are correct, with "
            f"{test['images'] - test['answered']} abstentions."
        )
    return sentences
