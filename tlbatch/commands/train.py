"""Labelled images, or their stored features -> a bundle with a trained head."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tlbatch import schema
from tlbatch.commands.classify import classify
from tlbatch.commands.extract import freeze_named, probe_pixels, read_weights
from tlbatch.commands.splits import find_near_copies, fold_pictures
from tlbatch.commands.training_set import (
    LabelledStore,
    SplitSet,
    TrainingSet,
    assemble,
    find_labelled,
    label_names,
    read_labels_of,
    require_parts,
    require_some,
    split_set,
    tell_of_labels,
)
from tlbatch.config import Pretrained, Resources, RunConfig, TrainConfig
from tlbatch.errors import InterruptedRunError, LabelsError, LeaseHeldError
from tlbatch.execution.session import ray_session
from tlbatch.images.labels import ImageName, names_of
from tlbatch.model import bundle as bundles
from tlbatch.model.bases import find_base
from tlbatch.model.bundle import Frozen, Trained, frozen_base_of, load_bundle, require_bundle_place, save_bundle
from tlbatch.model.head import Calibration, DataSplit, FittedHead, HeadTraining, calibrate, fit_head, scores_of
from tlbatch.output.features import FeatureTable, find_features, look_up
from tlbatch.output.lease import Lease
from tlbatch.output.progress import Watcher
from tlbatch.output.table import read_errors, read_run_table
from tlbatch.report.evaluate import measure, measure_many
from tlbatch.report.held_out import doubted_labels, held_out_facts, learning_facts
from tlbatch.report.model_card import make_model_card
from tlbatch.storage.local import LocalLocation
from tlbatch.storage.location import Location
from tlbatch.storage.resolve import resolve

log = logging.getLogger(__name__)

_MOST_WARNINGS = 5
_WORK = ".training"
#: Parts into which cross-validation deals the images; each is scored by a layer that was fitted on the others.
_FOLDS = 5


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
        without a label; None for features), `skipped_by_kind` (what else the store has), `seconds`.

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
    with _alone(location):
        return _train(config, how, location, watch, began)


def _train(config: TrainConfig, how: HeadTraining, location: Location, watch: Watcher | None, began: float) -> dict[str, Any]:
    """As `train`, once nobody else trains into the bundle."""
    made = _from_features(config, how, watch) if config.features else _from_images(config, how, location, watch)
    features, test, head = made.features, made.split.parts["test"], made.fitted.head
    calibration = calibrate(head, made.fitted.held_out, test, config.precision)
    metrics = _measure(scores_of(head, test), test.classes, features.labels, calibration)
    training, doubted = _training_facts(made, calibration), _doubted(made)
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
        "seconds": round(time.monotonic() - began, 3),
    }


def _training_facts(made: _Made, calibration: Calibration) -> dict[str, Any]:
    """What the bundle records of the training."""
    return {
        **made.fitted.how.facts,
        "seed": made.fitted.how.seed,
        "images": {name: len(part.classes) for name, part in made.split.parts.items()},
        "failed": made.features.failed,
        "held_out": held_out_facts(_measure(*made.fitted.held_out, made.features.labels, calibration)),
        "learning": learning_facts(made.fitted.curve),
        **made.fitted.facts,
        **calibration.facts,
    }


@dataclass(frozen=True)
class _Made:
    """A base, the features it computed, their split into parts, and the head trained on them."""

    frozen: Frozen
    features: TrainingSet
    split: SplitSet
    fitted: FittedHead
    unlabelled: int | None = None
    skipped_by_kind: Mapping[str, int] = field(default_factory=dict)


def _from_images(config: TrainConfig, how: HeadTraining, location: Location, watch: Watcher | None) -> _Made:
    """Run the base over the labelled images and train a head on the features.

    Ray must start and stop in this thread and takes seconds for each. Keras runs in another thread meanwhile.
    """
    weights = read_weights(config)
    labelled = find_labelled(config, watch)
    with _keras_thread() as keras_thread:
        building = keras_thread.submit(freeze_named, config, weights)
        with ray_session(config.address) as start_ray:
            start_ray()
            frozen = building.result()
            features = _extract(config, frozen, labelled, location, watch)
            split = split_set(features, config)
            fitting = keras_thread.submit(_fit, frozen, features, split.parts, how, watch)
        fitted = fitting.result()
    left_out = labelled.unlabelled, labelled.listing.skipped_by_kind
    return _Made(frozen, features, split, fitted, *left_out)


@contextlib.contextmanager
def _keras_thread() -> Iterator[ThreadPoolExecutor]:
    """A thread for Keras. Ctrl-C does not wait for what it is doing."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="tlbatch-keras")
    wait = True
    try:
        yield pool
    except (KeyboardInterrupt, InterruptedRunError):
        wait = False
        raise
    finally:
        pool.shutdown(wait=wait, cancel_futures=not wait)


def _fit(
    frozen: Frozen, features: TrainingSet, parts: Mapping[str, DataSplit], how: HeadTraining, watch: Watcher | None
) -> FittedHead:
    """Fit the head, and tell of long fits."""
    tell = None if watch is None else lambda done, of: watch({"stage": "fit", "done": done, "of": of})
    last = int(frozen.network.outputs[-1].shape[-1]) if frozen.depths else None
    return fit_head(parts["train"], parts["validation"], _fold, len(features.labels), how, tell, last)


def _fold(features: np.ndarray, classes: np.ndarray) -> np.ndarray:
    return fold_pictures(classes, find_near_copies(features), _FOLDS)


def _from_features(config: TrainConfig, how: HeadTraining, watch: Watcher | None) -> _Made:
    """Look up the features of the labelled images and train a head on them, in this process, because a head is small."""
    source = find_features(config.features or "", config.storage_options)
    frozen, base = _base_of(config, source)
    features = _looked_up(config, source, base)
    split = split_set(features, config)
    return _Made(frozen, features, split, _fit(frozen, features, split.parts, how, watch))


def _base_of(config: TrainConfig, source: FeatureTable) -> tuple[Frozen, bundles.Bundle]:
    """The base of the run that extracted the features. If the configuration names a base, it must be the same one."""
    bundle = load_bundle(source.newest.facts["bundle_url"], config.storage_options)
    given = config.model_fields_set
    if given & set(Pretrained.model_fields):
        named = freeze_named(config, read_weights(config), bundle)
        source.require_base(
            named.digest, f"{named.base.name} at {schema.in_words(named.size)} pixels with weights {named.weights}"
        )
    source.require_base(bundle.base_digest, f"the bundle {bundle.location.url}")
    return frozen_base_of(bundle), bundle


def _extract(
    config: TrainConfig, frozen: Frozen, labelled: LabelledStore, location: Location, watch: Watcher | None
) -> TrainingSet:
    """Run the base over the labelled images, as actors on the cluster, in a work folder inside the bundle's folder."""
    with _work_folder(location) as work:
        probes = probe_pixels(config, frozen, labelled.listing.manifest)
        save_bundle(work.join("base"), frozen, None, probes)
        output = work.join("features")
        settings = {name: getattr(config, name) for name in Resources.model_fields}
        run = RunConfig(
            **settings,
            images=config.images,
            bundle=work.join("base").url,
            output=output.url,
            engine=config.engine,
            image_field=config.image_field,
            exclude=config.exclude,
            max_bytes=config.max_bytes,
            max_pixels=config.max_pixels,
            max_side=config.max_side,
            predictions=False,
            features=True,
            features_dtype="float32",
        )
        report = classify(run, watch, labelled.listing)
        table = read_run_table(output.join(schema.RUNS, report["run_id"]), "features", ["uri", "key", "features"])
        failed = _report_failed(output, labelled, config)
    table = labelled.labels.named(table)
    found = labelled.labels.of_images([*names_of(table), *failed])
    tell_of_labels(found, labelled.labels, config.images)
    require_parts(found, labelled.labels)
    return assemble(config, table, found, images_read=report["listed"], probes=probes)


def _looked_up(config: TrainConfig, source: FeatureTable, base: bundles.Bundle) -> TrainingSet:
    """The stored features of the labelled images."""
    manifest, where = source.manifest, source.newest.location.url
    labels = read_labels_of(config, lambda: names_of(manifest), where)
    table = look_up(source, labels.uris, labels.keys)
    found = labels.of_images([*names_of(table), *names_of(labels.named(source.errors()))])
    require_some(found, labels, where, manifest)
    tell_of_labels(found, labels, where)
    require_parts(found, labels)
    made = assemble(config, table, found, images_read=0, probes=base.probes()["pixels"])
    if made.failed:
        log.warning("%d labelled images have no features in %s and are left out", made.failed, where)
    return made


@contextlib.contextmanager
def _alone(location: Location) -> Iterator[None]:
    """The right to train into this bundle. A training that fails leaves no folder behind.

    Raises:
        LeaseHeldError: another training has it.
    """
    work = location.join(_WORK)
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


@contextlib.contextmanager
def _work_folder(location: Location) -> Iterator[Location]:
    """A folder that all workers can read, emptied before and afterwards but for the lease."""
    work = location.join(_WORK)
    _clear(work)
    try:
        yield work
    finally:
        _clear(work)


def _clear(work: Location) -> None:
    for name in work.names():
        if schema.LEASE not in name:  # its heartbeat writes files beside it
            work.join(name).delete()


def _report_failed(output: Location, labelled: LabelledStore, config: TrainConfig) -> list[ImageName]:
    """Log images that cannot be used for training; returns the name of each."""
    errors = read_errors(output.url, storage_options=config.storage_options)
    for row in errors.head(_MOST_WARNINGS).itertuples():
        log.warning("%s cannot be used for training: %s, %s", row.key, row.kind, row.message)
    if len(errors) > _MOST_WARNINGS:
        log.warning("%d more labelled images cannot be used for training", len(errors) - _MOST_WARNINGS)
    if len(errors) == labelled.listing.manifest.num_rows:
        raise LabelsError(f"No labelled image of {config.images} can be read; the first error: {errors['message'][0]}.")
    return list(zip(errors["uri"], errors["key"], strict=True))


def _thresholds(calibration: Calibration) -> tuple[float | None, tuple[float, ...] | None]:
    return calibration.abstain_threshold, calibration.label_thresholds


def _doubted(made: _Made) -> list[dict[str, Any]]:
    """The labels that the layers of the other folds doubt most; none where images have several labels."""
    scores, classes = made.fitted.held_out
    if classes.ndim == 2:
        return []
    names = [*made.split.names["train"], *made.split.names["validation"]]
    return doubted_labels(scores, classes, made.features.labels, [names[row] for row in made.fitted.rows])


def _measure(scores: np.ndarray, classes: np.ndarray, labels: Sequence[str], calibration: Calibration) -> dict[str, Any]:
    actual = label_names(classes, labels)
    if calibration.label_thresholds is not None:
        predicted = (scores >= np.asarray(calibration.label_thresholds, np.float32)).astype(np.float32)
        return measure_many(actual, label_names(predicted, labels), labels)
    best = [labels[number] for number in scores.argmax(axis=1)]
    return measure([label for (label,) in actual], best, labels)
