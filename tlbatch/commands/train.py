"""Labelled images, or their stored features -> a bundle with a trained head."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from tlbatch import schema
from tlbatch.commands.fitting import WORK, Made, from_features, from_images, measure_scores
from tlbatch.commands.quantizing import quantize_made
from tlbatch.commands.try_bases import candidates, choose_base
from tlbatch.config import TrainConfig
from tlbatch.errors import LeaseHeldError
from tlbatch.model import bundle as bundles
from tlbatch.model.bases import find_base
from tlbatch.model.bundle import require_bundle_place
from tlbatch.model.frozen import Trained, save_bundle
from tlbatch.model.head import Calibration, HeadTraining, calibrate, scores_of
from tlbatch.model.quantize import require_nncf
from tlbatch.output.lease import Lease
from tlbatch.output.progress import Watcher
from tlbatch.report.held_out import doubted_labels, held_out_facts, learning_facts
from tlbatch.report.model_card import make_model_card
from tlbatch.storage.local import LocalLocation
from tlbatch.storage.location import Location
from tlbatch.storage.resolve import resolve


def train(config: TrainConfig, watch: Watcher | None = None) -> dict[str, Any]:
    """Train a head on a frozen base and save both as a bundle.

    Args:
        config: the images or their features, their labels, the base and the training settings.
        watch: called every few seconds with the counts of images whose features are extracted.

    Returns:
        `bundle` (its URL), `digest`, `base`, `labels`, `images` per part, `failed` labelled images, `accuracy` and `metrics` on
        the test part, `calibration`, `head` (convex or sgd), `class_weight`, `held_out` (of `held_out_facts`: the accuracy on
        images that did not train the layer which scored them), `learning` (of `learning_facts`; None if it was not measured),
        `doubted` (of `doubted_labels`), `epochs` (None for a convex head), `images_read`, `unlabelled` (images outside shards
        without a label; None for features), `skipped_by_kind` (what else the store has), `tried` (what was measured of each of
        `try_bases`), `left_out` (those for which no time was left), `quantized` (with `quantize`, the fields of `Compared`),
        `seconds`.

    Raises:
        UsageError: base, weights, labels, images or features cannot be used; nothing was written.
        LeaseHeldError: another training into the same bundle is at work.
        UnfinishedError: the command was interrupted; the same command starts again from the beginning.
    """
    began = time.monotonic()
    find_base(config.base)
    location = resolve(config.bundle, config.storage_options)
    require_bundle_place(location)
    how = HeadTraining(
        config.way,
        config.epochs,
        config.patience,
        learning_rate=config.learning_rate,
        seed=config.seed,
        class_weight=config.class_weight,
    )
    if config.quantize != "none":
        require_nncf()
    tries = candidates(config)  # what is misspelled is told before a base runs
    with _alone(location):
        return _train(config, how, tries, location, watch, began)


def _train(
    config: TrainConfig,
    how: HeadTraining,
    tries: Sequence[TrainConfig],
    location: Location,
    watch: Watcher | None,
    began: float,
) -> dict[str, Any]:
    """As `train`, once nobody else trains into the bundle."""
    made, tried, left_out = _made(config, how, tries, location, watch)
    made, compared = (made, None) if config.quantize == "none" else quantize_made(config, made, location, watch)
    features, test, head = made.features, made.split.parts["test"], made.fitted.head
    calibration = calibrate(head, made.fitted.held_out, test, config.precision)
    metrics = measure_scores(scores_of(head, test), test.classes, features.labels, calibration.label_thresholds)
    training, doubted = _training_facts(made, calibration), _doubted(made)
    if tried:
        training["tried"] = tried
    if compared:
        training["quantized"] = compared._asdict()
    base = made.frozen.base
    classes = f"{', '.join(features.labels[:4])}{' …' if len(features.labels) > 4 else ''}"
    title = f"{classes}: {base.name} at {schema.in_words(made.frozen.size)} pixels"
    extra = {bundles.CARD: make_model_card(title, training, metrics, doubted), bundles.SPLIT: made.split.file}
    trained = Trained(head, features.labels, metrics, training, *_thresholds(calibration))
    saved = save_bundle(location, made.frozen, trained, features.probes, extra)
    return {
        "bundle": saved.location.url,
        "digest": saved.digest,
        "base": base.name,
        "labels": list(features.labels),
        "images": training["images"],
        "failed": features.failed,
        "images_read": features.images_read,
        "unlabelled": made.unlabelled,
        "skipped_by_kind": dict(made.skipped_by_kind),
        "accuracy": metrics["accuracy"],
        "metrics": metrics,
        "calibration": dict(calibration.facts),
        "head": made.fitted.how.head,
        "class_weight": made.fitted.how.class_weight,
        "held_out": training["held_out"],
        "learning": training["learning"],
        "doubted": doubted,
        "epochs": training.get("epochs"),
        "tried": tried,
        "left_out": left_out,
        "quantized": training.get("quantized"),
        "seconds": round(time.monotonic() - began, 3),
    }


def _made(
    config: TrainConfig, how: HeadTraining, tries: Sequence[TrainConfig], location: Location, watch: Watcher | None
) -> tuple[Made, list[dict[str, Any]], list[str]]:
    """The trained head, what was measured of each base that was tried, and the bases that were left out."""
    if config.features:
        return from_features(config, how, watch), [], []
    if not tries:
        return from_images(config, how, location, watch), [], []
    choice = choose_base(config, tries, lambda one: from_images(one, how, location, watch))
    return choice.made, [one._asdict() for one in choice.tried], choice.left_out


def _training_facts(made: Made, calibration: Calibration) -> dict[str, Any]:
    """What the bundle records of the training."""
    return {
        **made.fitted.how.facts,
        "seed": made.fitted.how.seed,
        "images": {name: len(part.classes) for name, part in made.split.parts.items()},
        "failed": made.features.failed,
        "held_out": held_out_facts(measure_scores(*made.fitted.held_out, made.features.labels, calibration.label_thresholds)),
        "learning": learning_facts(made.fitted.curve),
        **made.fitted.facts,
        **calibration.facts,
    }


@contextlib.contextmanager
def _alone(location: Location) -> Iterator[None]:
    """The right to train into this bundle. A training that fails leaves no folder behind.

    Raises:
        LeaseHeldError: another training has it.
    """
    work = location.join(WORK)
    made = []
    if isinstance(work, LocalLocation):  # a bucket has no folders
        made = [work.path, *(folder for folder in work.path.parents if not folder.exists())]
    try:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(Lease(work, time.strftime("training-%Y%m%dT%H%M%SZ", time.gmtime())))
            except LeaseHeldError as error:
                raise LeaseHeldError(f"{location.url}: {str(error).replace('this output', 'this bundle')}") from None
            yield
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def _thresholds(calibration: Calibration) -> tuple[float | None, tuple[float, ...] | None]:
    return calibration.abstain_threshold, calibration.label_thresholds


def _doubted(made: Made) -> list[dict[str, Any]]:
    """The labels that the layers of the other folds doubt most; none where images have several labels."""
    scores, classes = made.fitted.held_out
    if classes.ndim == 2:
        return []
    names = [*made.split.names["train"], *made.split.names["validation"]]
    return doubted_labels(scores, classes, made.features.labels, [names[row] for row in made.fitted.rows])
