"""A listing or stored features, and labels -> features and classes, split into train, validation and test."""

from __future__ import annotations

import csv
import io
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from tlbatch.commands.list_images import list_images
from tlbatch.config import TrainConfig
from tlbatch.errors import LabelsError
from tlbatch.images.labels import NO_LABEL, Labels, labels_from_folders, read_all_labels
from tlbatch.images.listing import Listing
from tlbatch.model.head import DataSplit
from tlbatch.output.features import matrix
from tlbatch.output.progress import Watcher
from tlbatch.schema import IMAGE
from tlbatch.storage.resolve import resolve

if TYPE_CHECKING:
    pass

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
#: Of each class one image at least is trained on, one ends training and one is measured on.
_FEWEST = len(SPLITS)


@dataclass(frozen=True)
class LabelledImages:
    """What is read of a store, and the labels of its images by key."""

    listing: Listing
    labels_of: Mapping[str, tuple[str, ...]]
    split_of: Mapping[str, str] | None


def labels_by_name(config: TrainConfig, keys: Sequence[str], where: str) -> tuple[Labels, dict[str, tuple[str, ...]]]:
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


def find_labelled(config: TrainConfig, watch: Watcher | None) -> LabelledImages:
    """Join the store's listing with the labels.

    Raises:
        LabelsError: nothing fits together, or a class has too few images to be split.
    """
    store = resolve(config.images, config.storage_options)
    listing = list_images(config, resolve(config.bundle, config.storage_options), watch)
    if not config.labels and IMAGE not in listing.manifest["format"].to_pylist():
        raise LabelsError(f"labels: {store.url} holds its images in shards, which have no class folders; give --labels.")
    labels, labels_of = labels_by_name(config, listing.manifest["key"].to_pylist(), store.url)
    is_shard = pa.compute.not_equal(listing.manifest["format"], IMAGE)
    if pa.compute.any(is_shard).as_py():
        # Whose images a shard holds is known once it is read, so all of it is read.
        if labels.column != "key":
            raise LabelsError(f"The labels file {labels.source} names uris; images in shards are told apart by their key.")
        return LabelledImages(listing, labels_of, parts_of(labels, labels_of))
    chosen = listing.manifest.filter(pa.compute.is_in(listing.manifest[labels.column], pa.array(labels_of, pa.string())))
    require_some(chosen, labels, store.url, listing.manifest)
    if chosen.num_rows < len(labels_of):
        log.warning("%d labels belong to no image of %s", len(labels_of) - chosen.num_rows, store.url)
    names = chosen[labels.column].to_pylist()
    by_key = {key: labels_of[name] for key, name in zip(chosen["key"].to_pylist(), names, strict=True)}
    require_enough(by_key.values(), labels.source, many=config.multi_label)
    parts = parts_of(labels, set(names))
    split_of = parts and {key: parts[name] for key, name in zip(by_key, names, strict=True)}
    return LabelledImages(replace(listing, manifest=chosen), by_key, split_of)


def require_some(chosen: pa.Table, labels: Labels, where: str, there: pa.Table) -> None:
    """Raises LabelsError if no label belongs to an image."""
    if not chosen.num_rows:
        raise LabelsError(
            f"No label of {labels.source} belongs to an image of {where}: its first {labels.column} is "
            f"{labels.pairs[0][0]!r}, the store's {there[labels.column][0].as_py()!r}."
        )


def parts_of(labels: Labels, there: Collection[str]) -> dict[str, str] | None:
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


def require_enough(labels: Iterable[tuple[str, ...]], source: str, *, many: bool, wanted: Collection[str] = ()) -> None:
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
class TrainingSet:
    """Features (n, F) and classes (as in `Part`) of the images that have some, in manifest order."""

    keys: tuple[str, ...]
    values: np.ndarray
    classes: np.ndarray
    labels: tuple[str, ...]
    split_of: Mapping[str, str] | None
    failed: int
    images_read: int
    probes: np.ndarray


def assemble(
    config: TrainConfig, table: pa.Table, labelled: LabelledImages, *, failed: int, images_read: int, probes: np.ndarray
) -> TrainingSet:
    """Features as Arrow has them, and labels by key, as what a head is trained on."""
    if not table.num_rows:
        raise LabelsError(f"No label belongs to an image of {config.images or config.features} that can be read.")
    keys = table["key"].to_pylist()
    given = [labelled.labels_of[key] for key in keys]
    everything = {label for those in labelled.labels_of.values() for label in those}
    require_enough(given, config.images or str(config.features), many=config.multi_label, wanted=everything)
    labels = tuple(sorted(everything))
    number = {label: index for index, label in enumerate(labels)}
    if config.multi_label:
        classes = np.zeros((len(keys), len(labels)), np.float32)
        for row, those in enumerate(given):
            classes[row, [number[label] for label in those]] = 1
    else:
        classes = np.array([number[label] for (label,) in given], np.int64)
    values = matrix(table["features"]).astype(np.float32)
    return TrainingSet(tuple(keys), values, classes, labels, labelled.split_of, failed, images_read, probes)


def split_set(features: TrainingSet, config: TrainConfig) -> tuple[dict[str, DataSplit], bytes]:
    """Stratified parts, and the CSV that records which image is in which.

    Each class is shuffled and cut by itself, so that the smallest of three images still has one in each part; scikit-learn's
    stratified split refuses a test part smaller than the number of classes.
    """
    if features.split_of is not None:
        part_of = np.array([SPLITS.index(features.split_of[key]) for key in features.keys])
    else:
        part_of = split_classes(_strata(features.classes), config.validation, config.test, config.seed)
    parts = {
        name: DataSplit(features.values[part_of == number], features.classes[part_of == number])
        for number, name in enumerate(SPLITS)
    }
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["key", "label", "split"])
    for key, labels, number in zip(features.keys, label_names(features.classes, features.labels), part_of, strict=True):
        for label in labels or (NO_LABEL,):
            writer.writerow([key, label, SPLITS[number]])
    return parts, buffer.getvalue().encode()


def label_names(classes: np.ndarray, labels: Sequence[str]) -> list[tuple[str, ...]]:
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
