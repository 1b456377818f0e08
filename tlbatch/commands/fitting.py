"""Labelled images, or their stored features -> a base, the features, their split, and the head that was trained on them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc

from tlbatch import schema
from tlbatch.commands.classify import classify
from tlbatch.commands.extract import freeze_named, probe_pixels, read_weights
from tlbatch.commands.read import read_errors
from tlbatch.commands.splits import enough_pictures, find_copies, find_near_copies, fold_pictures
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
from tlbatch.errors import InterruptedRunError, LabelsError
from tlbatch.execution.session import ray_session
from tlbatch.images.labels import ImageName, names_of
from tlbatch.model import bundle as bundles
from tlbatch.model.bundle import load_bundle
from tlbatch.model.frozen import Frozen, frozen_base_of, save_bundle
from tlbatch.model.head import DataSplit, FittedHead, Fold, HeadTraining, fit_head
from tlbatch.output.features import FeatureTable, find_features, look_up
from tlbatch.output.progress import Watcher
from tlbatch.output.table import read_run_table
from tlbatch.report.evaluate import measure, measure_many
from tlbatch.storage.location import Location

log = logging.getLogger(__name__)

_MOST_WARNINGS = 5
#: Folder inside the bundle's in which features are extracted, and which holds the lease of a training.
WORK = ".training"
#: Parts into which cross-validation deals the images; each is scored by a layer that was fitted on the others.
_FOLDS = 5


@dataclass(frozen=True)
class Made:
    """A base, the features it computed, their split into parts, and the head trained on them.

    Attributes:
        labelled: the listing and the labels; None for features.
    """

    frozen: Frozen
    features: TrainingSet
    split: SplitSet
    fitted: FittedHead
    labelled: LabelledStore | None = None

    @property
    def unlabelled(self) -> int | None:
        """The number of images outside shards without a label; None for features."""
        return None if self.labelled is None else self.labelled.unlabelled

    @property
    def skipped_by_kind(self) -> Mapping[str, int]:
        """What else the store has."""
        return {} if self.labelled is None else self.labelled.listing.skipped_by_kind


def from_images(config: TrainConfig, how: HeadTraining, location: Location, watch: Watcher | None) -> Made:
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
    return Made(frozen, features, split, fitted, labelled)


def again(
    config: TrainConfig, made: Made, frozen: Frozen, labelled: LabelledStore, location: Location, watch: Watcher | None
) -> Made:
    """Run another base over the same labelled images, and train a head as before: same parts, same folds.

    Args:
        config: what was trained.
        made: the result of `from_images`.
        frozen: the other base.
        labelled: the images that were read.
        location: the bundle's folder.
        watch: as for `train`.
    """
    with ray_session(config.address) as start_ray:
        start_ray()
        features = _extract(config, frozen, labelled, location, watch)
    split = made.split.with_features(features)
    fitted = _fit(frozen, features, split.parts, made.fitted.how, watch, _folds_of(made))
    return replace(made, frozen=frozen, features=features, split=split, fitted=fitted)


def _folds_of(made: Made) -> Fold:
    """The folds in which a head was cross-validated, for another base on the same images."""
    parts = made.split.parts["train"], made.split.parts["validation"]
    folds = _fold(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("features", "classes")))
    return lambda _features, _classes: folds


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


def _fold(features: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The fold of each image: near-copies are together, unless a class then has too few pictures to be in every fold."""
    pictures = find_near_copies(features)
    if not enough_pictures(classes, pictures, _FOLDS):
        pictures = find_copies(features)
    return fold_pictures(classes, pictures if enough_pictures(classes, pictures, 2) else np.arange(len(classes)), _FOLDS)


def _fit(
    frozen: Frozen,
    features: TrainingSet,
    parts: Mapping[str, DataSplit],
    how: HeadTraining,
    watch: Watcher | None,
    fold: Fold = _fold,
) -> FittedHead:
    """Fit the head, and tell of long fits."""
    tell = None if watch is None else lambda done, of: watch({"stage": "fit", "done": done, "of": of})
    return fit_head(parts["train"], parts["validation"], fold, len(features.labels), how, tell, frozen.last_length)


def from_features(config: TrainConfig, how: HeadTraining, watch: Watcher | None) -> Made:
    """Look up the features of the labelled images and train a head on them, in this process, because a head is small."""
    source = find_features(config.features or "", config.storage_options)
    frozen, base = _base_of(config, source)
    features = _looked_up(config, source, base)
    split = split_set(features, config)
    return Made(frozen, features, split, _fit(frozen, features, split.parts, how, watch))


def _base_of(config: TrainConfig, source: FeatureTable) -> tuple[Frozen, bundles.Bundle]:
    """The base of the run that extracted the features. If the configuration names a base, it must be the same one."""
    bundle = load_bundle(source.newest.facts["bundle_url"], config.storage_options)
    given = config.model_fields_set
    if given & set(Pretrained.model_fields):
        named = replace(freeze_named(config, read_weights(config), bundle), quantized=bundle.quantized)
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
    keys = manifest["key"] if pc.all(schema.is_loose(manifest)).as_py() else None
    labels = read_labels_of(config, lambda: names_of(manifest), where, keys)
    table = look_up(source, labels.uris, labels.keys)
    found = labels.of_images([*names_of(table), *names_of(labels.named(source.errors()))])
    require_some(found, labels, where, manifest)
    tell_of_labels(found, labels, where)
    require_parts(found, labels)
    made = assemble(config, table, found, images_read=0, probes=base.probes()["pixels"])
    if made.failed:
        log.warning("%d labelled images have no features in %s and are left out", made.failed, where)
    return made


def measure_scores(
    scores: np.ndarray, classes: np.ndarray, labels: Sequence[str], thresholds: Sequence[float] | None
) -> dict[str, Any]:
    """The result of `measure`, or with a threshold for each label that of `measure_many`."""
    actual = label_names(classes, labels)
    if thresholds is not None:
        predicted = (scores >= np.asarray(thresholds, np.float32)).astype(np.float32)
        return measure_many(actual, label_names(predicted, labels), labels)
    best = [labels[number] for number in scores.argmax(axis=1)]
    return measure([label for (label,) in actual], best, labels)


@contextlib.contextmanager
def _work_folder(location: Location) -> Iterator[Location]:
    """A folder that all workers can read, emptied before and afterwards but for the lease."""
    work = location.join(WORK)
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
