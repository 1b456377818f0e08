"""Labels, and a listing or stored features -> features and classes, split into train, validation and test."""

from __future__ import annotations

import csv
import io
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from tlbatch.commands.list_images import list_images
from tlbatch.commands.splits import FEWEST, SPLITS, complete_parts, find_copies, separate_copies, split_pictures
from tlbatch.config import TrainConfig
from tlbatch.errors import LabelsError
from tlbatch.images.labels import NO_LABEL, Labels, labels_from_folders, read_all_labels, with_names_of
from tlbatch.images.listing import Listing
from tlbatch.model.head import DataSplit
from tlbatch.output.features import matrix
from tlbatch.output.progress import Watcher
from tlbatch.schema import ARCHIVED, IMAGE
from tlbatch.storage.resolve import resolve

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledImages:
    """The images or shards to read, and the labels of the images by key.

    Attributes:
        listing: the images or shards.
        labels_of: key -> labels.
        split_of: key -> part; None if the labels do not give the parts.
    """

    listing: Listing
    labels_of: Mapping[str, tuple[str, ...]]
    split_of: Mapping[str, str] | None


def labels_by_name(config: TrainConfig, keys: Sequence[str], where: str) -> tuple[Labels, dict[str, tuple[str, ...]]]:
    """Read the labels files, or take the labels from the folders in the keys.

    Args:
        config: its `labels` are the files; if it has none, the folders are used.
        keys: keys of the store, for labels from folders.
        where: the store, for messages.

    Returns:
        The labels, and the same as name -> labels.
    """
    if not config.labels:
        labels = labels_from_folders(list(keys), where)
    else:
        files = [resolve(url, config.storage_options) for url in config.labels]
        labels = with_names_of(keys, read_all_labels(files, many=config.multi_label))
    found: dict[str, tuple[str, ...]] = {}
    for name, label in dict.fromkeys(labels.pairs):
        found[name] = (*found.get(name, ()), *(() if config.multi_label and label == NO_LABEL else (label,)))
    return labels, found


def find_labelled(config: TrainConfig, watch: Watcher | None) -> LabelledImages:
    """Join the listing of the store with the labels.

    Raises:
        LabelsError: no label belongs to an image, or a class has too few images to be split.
    """
    store = resolve(config.images, config.storage_options)
    listing = list_images(config, resolve(config.bundle, config.storage_options), watch)
    if not config.labels and IMAGE not in listing.manifest["format"].to_pylist():
        raise LabelsError(f"labels: {store.url} contains shards, which have no class folders; give --labels.")
    if not config.labels:  # a shard beside class folders, such as the archive they were taken from, has no label
        loose = pa.compute.is_in(listing.manifest["format"], pa.array([IMAGE, ARCHIVED]))
        listing = replace(listing, manifest=listing.manifest.filter(loose))
    labels, labels_of = labels_by_name(config, listing.manifest["key"].to_pylist(), store.url)
    is_shard = pa.compute.invert(pa.compute.is_in(listing.manifest["format"], pa.array([IMAGE, ARCHIVED])))
    if pa.compute.any(is_shard).as_py():
        # The listing does not show which images a shard contains, so all shards are read.
        if labels.column != "key":
            raise LabelsError(f"The labels file {labels.source} has a column uri; images in shards need a column key.")
        return LabelledImages(listing, labels_of, parts_of(labels, labels_of))
    chosen = listing.manifest.filter(pa.compute.is_in(listing.manifest[labels.column], pa.array(labels_of, pa.string())))
    require_some(chosen, labels, store.url, listing.manifest)
    if chosen.num_rows < len(labels_of):
        log.warning("%d labels belong to no image of %s and are left out", len(labels_of) - chosen.num_rows, store.url)
    names = chosen[labels.column].to_pylist()
    by_key = {key: labels_of[name] for key, name in zip(chosen["key"].to_pylist(), names, strict=True)}
    require_enough(by_key.values(), labels.source, many=config.multi_label)
    parts = parts_of(labels, set(names))
    split_of = parts and {key: parts[name] for key, name in zip(by_key, names, strict=True)}
    return LabelledImages(replace(listing, manifest=chosen), by_key, split_of)


def require_some(chosen: pa.Table, labels: Labels, where: str, manifest: pa.Table) -> None:
    """Raise LabelsError if no label belongs to an image."""
    if not chosen.num_rows:
        raise LabelsError(
            f"No label of {labels.source} belongs to an image of {where}: the first {labels.column} is {labels.pairs[0][0]!r} "
            f"in the labels and {manifest[labels.column][0].as_py()!r} in the store."
        )


def parts_of(labels: Labels, names: Collection[str]) -> dict[str, str] | None:
    """The parts that the labels give: name -> part. None if they give none.

    Args:
        labels: the labels.
        names: the names that the store is known to have.

    Raises:
        LabelsError: a part is unknown, or a labels file gives parts and none of them to one part.
    """
    if labels.splits is None:
        return None
    by_name = {name: part or "train" for (name, _), part in zip(labels.pairs, labels.splits, strict=True)}
    unknown = sorted(set(by_name.values()) - set(SPLITS))
    if unknown:
        raise LabelsError(f"The labels file {labels.source} has the split {unknown[0]!r}; write train, validation or test.")
    missing = sorted(set(SPLITS) - {by_name[name] for name in names})
    if missing and not labels.from_folders:
        raise LabelsError(f"The labels file {labels.source} has a column split and no image of {missing[0]!r} in the store.")
    return by_name


def require_enough(labels: Iterable[tuple[str, ...]], source: str, *, many: bool, wanted: Collection[str] = ()) -> None:
    """Raise LabelsError if there are too few classes, or a class has too few images.

    Args:
        labels: the labels of each image.
        source: where they come from, for messages.
        many: whether an image may have any number of labels.
        wanted: classes that must have images even if none of `labels` names them.
    """
    images = Counter(label for of_image in labels for label in of_image)
    images.update(dict.fromkeys(wanted, 0))
    if len(images) < (1 if many else 2):
        raise LabelsError(f"{source} has only the class {next(iter(images), '')!r}; label images of at least two classes.")
    label, fewest = min(images.items(), key=lambda item: (item[1], item[0]))
    if fewest < FEWEST:
        raise LabelsError(
            f"The class {label!r} has {fewest} image{'' if fewest == 1 else 's'}; label at least {FEWEST}: one each for "
            "training, early stopping and testing."
        )


@dataclass(frozen=True)
class TrainingSet:
    """The labelled images that have features, in the order of the manifest.

    Attributes:
        keys: n keys.
        values: (n, F) features.
        classes: (n,) class numbers; with several labels per image (n, C), 1 where an image has a label.
        labels: the C classes.
        split_of: key -> part; None if the labels do not give the parts.
        failed: labelled images without features.
        images_read: images that were read.
        probes: pixels for the bundle's self-test.
    """

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
    """Join an Arrow table of features with the labels of its keys."""
    if not table.num_rows:
        raise LabelsError(f"No label belongs to an image of {config.images or config.features} that can be read.")
    keys = table["key"].to_pylist()
    given = [labelled.labels_of[key] for key in keys]
    all_labels = {label for of_image in labelled.labels_of.values() for label in of_image}
    require_enough(given, config.images or str(config.features), many=config.multi_label, wanted=all_labels)
    labels = tuple(sorted(all_labels))
    number = {label: index for index, label in enumerate(labels)}
    if config.multi_label:
        classes = np.zeros((len(keys), len(labels)), np.float32)
        for row, of_image in enumerate(given):
            classes[row, [number[label] for label in of_image]] = 1
    else:
        classes = np.array([number[label] for (label,) in given], np.int64)
    values = matrix(table["features"]).astype(np.float32)
    return TrainingSet(tuple(keys), values, classes, labels, labelled.split_of, failed, images_read, probes)


def split_set(features: TrainingSet, config: TrainConfig) -> tuple[dict[str, DataSplit], bytes]:
    """Split stratified by class, unless the labels give the parts. Copies of one picture are in one part.

    Each class is shuffled and split separately, so that a class of three images has one image in each part. scikit-learn's
    stratified split is not used, because it refuses a test part smaller than the number of classes.

    Returns:
        The parts by name, and a CSV file with the part of each image.
    """
    pictures, shares = find_copies(features.values), (config.validation, config.test, config.seed)
    if features.split_of is not None:
        given = np.array([SPLITS.index(features.split_of[key]) for key in features.keys])
        part_of = separate_copies(complete_parts(given, features.classes, *shares), pictures, features.keys)
    else:
        part_of = split_pictures(features.classes, pictures, *shares)
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
