"""Labelled images, or their stored features -> a bundle: a head trained on the features of a frozen base, both stacked.

Because the base is frozen, an image's features are the same in every epoch. They are computed once, by the same actors that
classify later, or looked up in a run that has written them; training the head on them is the same mathematics as `model.fit`
on the stacked model.
"""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from tlbatch import pipeline, schema
from tlbatch.config import Resources, RunConfig, TrainConfig
from tlbatch.errors import LabelsError
from tlbatch.execution import Watcher
from tlbatch.extraction import freeze_named, probe_pixels, read_weights
from tlbatch.features import FeatureTable, find_features, look_up, matrix
from tlbatch.labels import NO_LABEL, Labels, labels_from_folders, read_all_labels
from tlbatch.listing import Listing
from tlbatch.model import bundle as bundles
from tlbatch.model.bases import find_base
from tlbatch.model.bundle import Frozen, Trained, load_bundle, require_bundle_place, save_bundle, thaw
from tlbatch.model.head import HeadTraining, Part, Reading, make_honest, scores_of, train_head
from tlbatch.report.card import make_card
from tlbatch.report.evaluate import measure, measure_many
from tlbatch.report.table import read_errors, read_run_table
from tlbatch.session import ray_session
from tlbatch.shards import IMAGE
from tlbatch.storage import Place, resolve

if TYPE_CHECKING:
    import keras

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
#: Of each class one image at least is trained on, one ends training and one is measured on.
_FEWEST = len(SPLITS)
_MOST_WARNINGS = 5
_WORK = ".training"


def train(config: TrainConfig, watch: Watcher | None = None) -> dict[str, Any]:
    """Train a head on a frozen base and save both as a bundle.

    Args:
        config: the images or their features, their labels, the base and how to train.
        watch: called every few seconds with the counts of images whose features are known.

    Returns:
        `bundle` (its URL), `digest`, `base`, `labels`, `images` in each part, `failed` labelled images, `accuracy` and
        `metrics` on the test part, `calibration`, `epochs`, `images_read`, `seconds`.

    Raises:
        UsageError: base, weights, labels, images or features cannot be used; nothing was written.
        UnfinishedError: it was interrupted; the same command starts it anew.
    """
    began = time.monotonic()
    find_base(config.base)
    place = resolve(config.bundle, config.storage_options)
    require_bundle_place(place)
    how = HeadTraining(
        config.epochs,
        config.patience,
        learning_rate=config.learning_rate,
        seed=config.seed,
        class_weight=config.class_weight,
    )
    made = _from_features(config, how) if config.features else _from_images(config, how, place, watch)
    features, parts = made.features, made.parts
    reading = make_honest(made.head, parts["validation"], parts["test"], config.precision)
    metrics = _measure(made.head, parts["test"], features.labels, reading)
    training = {
        **asdict(how),
        "images": {name: len(part.classes) for name, part in parts.items()},
        "failed": features.failed,
        "epochs": len(made.history["loss"]),
        "validation_accuracy": made.history["val_accuracy"][int(np.argmin(made.history["val_loss"]))],
        **reading.facts,
        "history": made.history,
    }
    base = made.frozen.base
    title = (
        f"{', '.join(features.labels[:4])}{' …' if len(features.labels) > 4 else ''}: {base.name} at {made.frozen.size} pixels"
    )
    extra = {bundles.CARD: make_card(title, training, metrics), bundles.SPLIT: made.split}
    trained = Trained(made.head, features.labels, metrics, training, reading.abstain_threshold, reading.label_thresholds)
    saved = save_bundle(place, made.frozen, trained, features.probes, extra)
    return {
        "bundle": saved.place.url,
        "digest": saved.digest,
        "base": base.name,
        "labels": list(features.labels),
        "images": training["images"],
        "failed": features.failed,
        "images_read": features.images_read,
        "accuracy": metrics["accuracy"],
        "metrics": metrics,
        "calibration": dict(reading.facts),
        "epochs": training["epochs"],
        "seconds": round(time.monotonic() - began, 3),
    }


@dataclass(frozen=True)
class _Made:
    """A base, the features it gave, how they were split, and the head trained on them."""

    frozen: Frozen
    features: _Features
    parts: Mapping[str, Part]
    split: bytes
    head: keras.Model
    history: Mapping[str, Sequence[float]]


def _from_images(config: TrainConfig, how: HeadTraining, place: Place, watch: Watcher | None) -> _Made:
    """Run the base over the labelled images and train on what it gives.

    Ray must start and end in this thread, and takes seconds for either; Keras works beside it.
    """
    weights = read_weights(config)
    labelled = _find_labelled(config, watch)
    with ThreadPoolExecutor(1, thread_name_prefix="tlbatch-keras") as keras_thread:
        building = keras_thread.submit(freeze_named, config, weights)
        with ray_session(config.address) as start_ray:
            start_ray()
            frozen = building.result()
            features = _extract(config, frozen, labelled, place, watch)
            parts, split = _split(features, config)
            fitting = keras_thread.submit(train_head, parts["train"], parts["validation"], len(features.labels), how)
        return _Made(frozen, features, parts, split, *fitting.result())


def _from_features(config: TrainConfig, how: HeadTraining) -> _Made:
    """Look up the features of the labelled images and train on them. Nothing is distributed: a head is small."""
    source = find_features(config.features or "", config.storage_options)
    frozen, base = _base_of(config, source)
    features = _looked_up(config, source, base)
    parts, split = _split(features, config)
    return _Made(frozen, features, parts, split, *train_head(parts["train"], parts["validation"], len(features.labels), how))


def _base_of(config: TrainConfig, source: FeatureTable) -> tuple[Frozen, bundles.Bundle]:
    """The base that gave the features: the one the run worked with. One that the configuration names must be the same."""
    if config.model_fields_set & {"base", "size", "weights"}:
        named = freeze_named(config, read_weights(config))
        source.require_base(named.digest, f"{named.base.name} at {named.size} pixels with weights {named.weights}")
    bundle = load_bundle(source.newest.facts["bundle_url"], config.storage_options)
    source.require_base(bundle.base_digest, f"the bundle {bundle.place.url}")
    return thaw(bundle), bundle


@dataclass(frozen=True)
class _Labelled:
    """What is read of a store, and the labels of its images by key."""

    listing: Listing
    labels_of: Mapping[str, tuple[str, ...]]
    split_of: Mapping[str, str] | None


def _labels_by_name(config: TrainConfig, keys: Sequence[str], where: str) -> tuple[Labels, dict[str, tuple[str, ...]]]:
    """The labels, and those of each name; from files, or from the folders of the keys."""
    if not config.labels:
        labels = labels_from_folders(list(keys), where)
    else:
        places = [resolve(url, config.storage_options) for url in config.labels]
        labels = read_all_labels(places, many=config.multi_label)
    found: dict[str, tuple[str, ...]] = {}
    for name, label in dict.fromkeys(labels.pairs):
        found[name] = (*found.get(name, ()), *(() if config.multi_label and label == NO_LABEL else (label,)))
    return labels, found


def _find_labelled(config: TrainConfig, watch: Watcher | None) -> _Labelled:
    """Join the store's listing with the labels.

    Raises:
        LabelsError: nothing fits together, or a class has too few images to be split.
    """
    store = resolve(config.images, config.storage_options)
    listing = pipeline.list_images(config, resolve(config.bundle, config.storage_options), watch)
    if not config.labels and IMAGE not in listing.manifest["format"].to_pylist():
        raise LabelsError(f"labels: {store.url} holds its images in shards, which have no class folders; give --labels.")
    labels, labels_of = _labels_by_name(config, listing.manifest["key"].to_pylist(), store.url)
    is_shard = pa.compute.not_equal(listing.manifest["format"], IMAGE)
    if pa.compute.any(is_shard).as_py():
        # Whose images a shard holds is known once it is read, so all of it is read.
        if labels.column != "key":
            raise LabelsError(f"The labels file {labels.source} names uris; images in shards are told apart by their key.")
        return _Labelled(listing, labels_of, _parts_of(labels, labels_of))
    chosen = listing.manifest.filter(pa.compute.is_in(listing.manifest[labels.column], pa.array(labels_of, pa.string())))
    _require_some(chosen, labels, store.url, listing.manifest)
    if chosen.num_rows < len(labels_of):
        log.warning("%d labels belong to no image of %s", len(labels_of) - chosen.num_rows, store.url)
    names = chosen[labels.column].to_pylist()
    by_key = {key: labels_of[name] for key, name in zip(chosen["key"].to_pylist(), names, strict=True)}
    _require_enough(by_key.values(), labels.source, many=config.multi_label)
    parts = _parts_of(labels, set(names))
    split_of = parts and {key: parts[name] for key, name in zip(by_key, names, strict=True)}
    return _Labelled(replace(listing, manifest=chosen), by_key, split_of)


def _require_some(chosen: pa.Table, labels: Labels, where: str, there: pa.Table) -> None:
    if not chosen.num_rows:
        raise LabelsError(
            f"No label of {labels.source} belongs to an image of {where}: its first {labels.column} is "
            f"{labels.pairs[0][0]!r}, the store's {there[labels.column][0].as_py()!r}."
        )


def _parts_of(labels: Labels, there: Collection[str]) -> dict[str, str] | None:
    """Name -> part, where the labels file has a column split: its author knows what must not be trained on.

    Args:
        labels: of the file.
        there: the names that the store has, as far as that is known.
    """
    if labels.splits is None:
        return None
    by_name = {name: part or "train" for (name, _), part in zip(labels.pairs, labels.splits, strict=True)}
    strange = sorted(set(by_name.values()) - set(SPLITS))
    if strange:
        raise LabelsError(f"The labels file {labels.source} has the split {strange[0]!r}; write train, validation or test.")
    missing = sorted(set(SPLITS) - {by_name[name] for name in there})
    if missing:
        raise LabelsError(f"The labels file {labels.source} has a column split and no image of {missing[0]!r} in the store.")
    return by_name


def _require_enough(labels: Iterable[tuple[str, ...]], source: str, *, many: bool, wanted: Collection[str] = ()) -> None:
    """Raises LabelsError where a class has too few images; `wanted` are classes that must be there though no image is."""
    images = Counter(label for those in labels for label in those)
    images.update(dict.fromkeys(wanted, 0))
    if len(images) < (1 if many else 2):
        raise LabelsError(f"There is only the class {next(iter(images), '')!r} in {source}; a head tells at least two apart.")
    label, fewest = min(images.items(), key=lambda item: (item[1], item[0]))
    if fewest < _FEWEST:
        raise LabelsError(
            f"The class {label!r} has {fewest} image{'' if fewest == 1 else 's'}; give it at least {_FEWEST}: one to train on, "
            "one to end training, one to measure on."
        )


@dataclass(frozen=True)
class _Features:
    """Features (n, F) and classes (as in `Part`) of the images that have some, in manifest order."""

    keys: tuple[str, ...]
    values: np.ndarray
    classes: np.ndarray
    labels: tuple[str, ...]
    split_of: Mapping[str, str] | None
    failed: int
    images_read: int
    probes: np.ndarray


def _assembled(
    config: TrainConfig, table: pa.Table, labelled: _Labelled, *, failed: int, images_read: int, probes: np.ndarray
) -> _Features:
    """Features as Arrow has them, and labels by key, as what a head is trained on."""
    if not table.num_rows:
        raise LabelsError(f"No label belongs to an image of {config.images or config.features} that can be read.")
    keys = table["key"].to_pylist()
    given = [labelled.labels_of[key] for key in keys]
    everything = {label for those in labelled.labels_of.values() for label in those}
    _require_enough(given, config.images or str(config.features), many=config.multi_label, wanted=everything)
    labels = tuple(sorted(everything))
    number = {label: index for index, label in enumerate(labels)}
    if config.multi_label:
        classes = np.zeros((len(keys), len(labels)), np.float32)
        for row, those in enumerate(given):
            classes[row, [number[label] for label in those]] = 1
    else:
        classes = np.array([number[label] for (label,) in given], np.int64)
    values = matrix(table["features"]).astype(np.float32)
    return _Features(tuple(keys), values, classes, labels, labelled.split_of, failed, images_read, probes)


def _extract(config: TrainConfig, frozen: Frozen, labelled: _Labelled, place: Place, watch: Watcher | None) -> _Features:
    """Run the base once over the labelled images, as actors on the cluster, in a folder inside the bundle's place."""
    with _work_folder(place) as work:
        probes = probe_pixels(config, frozen.size, labelled.listing.manifest)
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
            max_bytes=config.max_bytes,
            max_pixels=config.max_pixels,
            max_side=config.max_side,
            predictions=False,
            features=True,
            features_dtype="float32",
        )
        report = pipeline.run(run, watch, labelled.listing)
        table = read_run_table(output.join(schema.RUNS, report["run_id"]), "features", ["key", "features"])
        _report_failed(output, labelled, config)
    table = table.filter(pa.compute.is_in(table["key"], pa.array(labelled.labels_of, pa.string())))
    read = report["listed"]
    return _assembled(config, table, labelled, failed=report["failed"], images_read=read, probes=probes)


def _looked_up(config: TrainConfig, source: FeatureTable, base: bundles.Bundle) -> _Features:
    """The stored features of the labelled images."""
    manifest, where = source.manifest, source.newest.place.url
    labels, labels_of = _labels_by_name(config, manifest["key"].to_pylist() if not config.labels else (), where)
    table = look_up(source, labels.column, pa.array(labels_of, pa.string()))
    _require_some(table, labels, where, manifest)
    names = table[labels.column].to_pylist()
    missing = len(labels_of) - len(set(names))
    if missing:
        log.warning("%d labelled images have no features in %s", missing, where)
    by_key = {key: labels_of[name] for key, name in zip(table["key"].to_pylist(), names, strict=True)}
    everything = {label for those in labels_of.values() for label in those}
    _require_enough(by_key.values(), labels.source, many=config.multi_label, wanted=everything)
    parts = _parts_of(labels, set(names))
    split_of = parts and {key: parts[name] for key, name in zip(by_key, names, strict=True)}
    listing = Listing(manifest, 0, 0.0)
    labelled = _Labelled(listing, by_key, split_of)
    return _assembled(config, table, labelled, failed=missing, images_read=0, probes=base.probes()["pixels"])


@contextlib.contextmanager
def _work_folder(place: Place) -> Iterator[Place]:
    """A folder that all workers reach, gone afterwards; with nothing else written, the bundle's folder goes with it."""
    work = place.join(_WORK)
    work.delete()
    try:
        yield work
    finally:
        work.delete()
        if not place.names():
            place.delete()


def _report_failed(output: Place, labelled: _Labelled, config: TrainConfig) -> None:
    errors = read_errors(output.url, storage_options=config.storage_options)
    for row in errors.head(_MOST_WARNINGS).itertuples():
        log.warning("%s cannot be trained on: %s, %s", row.key, row.kind, row.message)
    if len(errors) > _MOST_WARNINGS:
        log.warning("%d more labelled images cannot be trained on", len(errors) - _MOST_WARNINGS)
    if len(errors) == labelled.listing.manifest.num_rows:
        raise LabelsError(f"None of the labelled images of {config.images} can be read; the first: {errors['message'][0]}.")


def _split(features: _Features, config: TrainConfig) -> tuple[dict[str, Part], bytes]:
    """Stratified parts, and the CSV that records which image is in which.

    Each class is shuffled and cut by itself, so that the smallest of three images still has one in each part; scikit-learn's
    stratified split refuses a test part smaller than the number of classes.
    """
    if features.split_of is not None:
        part_of = np.array([SPLITS.index(features.split_of[key]) for key in features.keys])
    else:
        part_of = split_classes(_strata(features.classes), config.validation, config.test, config.seed)
    parts = {
        name: Part(features.values[part_of == number], features.classes[part_of == number])
        for number, name in enumerate(SPLITS)
    }
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["key", "label", "split"])
    for key, labels, number in zip(features.keys, _names(features.classes, features.labels), part_of, strict=True):
        for label in labels or (NO_LABEL,):
            writer.writerow([key, label, SPLITS[number]])
    return parts, buffer.getvalue().encode()


def _names(classes: np.ndarray, labels: Sequence[str]) -> list[tuple[str, ...]]:
    """The labels of each image."""
    if classes.ndim == 1:
        return [(labels[number],) for number in classes]
    return [tuple(labels[int(number)] for number in np.flatnonzero(row)) for row in classes]


def _strata(classes: np.ndarray) -> np.ndarray:
    """(n,) groups to cut by: an image's class; of several labels the rarest, small groups and images without one together."""
    if classes.ndim == 1:
        return classes
    rarity = np.argsort(classes.sum(axis=0), kind="stable")
    first = np.argmax(classes[:, rarity], axis=1)
    strata = np.where(classes.any(axis=1), rarity[first], -1)
    numbers, counts = np.unique(strata, return_counts=True)
    return np.where(np.isin(strata, numbers[counts < _FEWEST]), -1, strata)


def split_classes(classes: np.ndarray, validation: float, test: float, seed: int) -> np.ndarray:
    """(n,) part numbers, in the order of `SPLITS`, for (n,) class numbers of at least three images each."""
    random = np.random.default_rng(seed)
    part_of = np.zeros(len(classes), np.int64)
    for label in np.unique(classes):
        members = random.permutation(np.flatnonzero(classes == label))
        for_test = min(max(1, round(test * len(members))), len(members) - 2)
        for_validation = min(max(1, round(validation * len(members))), len(members) - for_test - 1)
        part_of[members[:for_test]] = SPLITS.index("test")
        part_of[members[for_test : for_test + for_validation]] = SPLITS.index("validation")
    return part_of


def _measure(head: keras.Model, test: Part, labels: Sequence[str], reading: Reading) -> dict[str, Any]:
    scores, truth = scores_of(head, test), _names(test.classes, labels)
    if reading.label_thresholds is not None:
        given = (scores >= np.asarray(reading.label_thresholds, np.float32)).astype(np.float32)
        return measure_many(truth, _names(given, labels), labels)
    best = [labels[number] for number in scores.argmax(axis=1)]
    return measure([label for (label,) in truth], best, labels)
