"""Labels, and a listing or stored features -> features and classes, split into train, validation and test."""

from __future__ import annotations

import csv
import io
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tlbatch.commands.list_images import list_images, store_of
from tlbatch.commands.splits import (
    FEWEST,
    SPLITS,
    complete_parts,
    enough_pictures,
    find_copies,
    find_near_copies,
    separate_copies,
    split_pictures,
    tell_of_near_copies,
)
from tlbatch.config import TrainConfig
from tlbatch.errors import LabelsError
from tlbatch.images.inventory import Inventory
from tlbatch.images.label_files import read_labels
from tlbatch.images.labels import (
    NO_LABEL,
    WITHDRAWN,
    ImageName,
    Labelled,
    Labels,
    in_short,
    labels_from_folders,
    names_of,
    warn_of_spelling,
)
from tlbatch.images.listing import Listing
from tlbatch.images.names import is_litter
from tlbatch.model.head import DataSplit
from tlbatch.output.features import matrix
from tlbatch.output.progress import Watcher
from tlbatch.schema import IMAGE, is_loose
from tlbatch.storage.location import Location
from tlbatch.storage.resolve import resolve

log = logging.getLogger(__name__)

#: With fewer images of a class, the 95 % interval of its recall is wider than 50 points.
_MEASURABLE = 10


@dataclass(frozen=True)
class LabelledStore:
    """The images and shards to read, and the labels of the images.

    Attributes:
        listing: the labelled images, and the shards that may contain some.
        labels: the labels.
        unlabelled: the number of images outside shards that have no label.
    """

    listing: Listing
    labels: Labels
    unlabelled: int


def read_labels_of(
    config: TrainConfig, names: Callable[[], Sequence[ImageName]], where: str, keys: pa.ChunkedArray | None
) -> Labels:
    """Read the labels files, or take the labels from the folders in the keys.

    Args:
        config: its `labels` are the files; if it has none, the folders are used.
        names: returns the images of the store, for labels from folders.
        where: the store, for messages.
        keys: of all images of the store; None if they are not known, because it has shards.
    """
    if not config.labels:
        return labels_from_folders(names(), where)
    files = [resolve(url, config.storage_options) for url in config.labels]
    labels = read_labels(files, many=config.multi_label, columns=config.labels_columns)
    return labels if keys is None else labels.fitted_to(keys)


def find_labelled(config: TrainConfig, watch: Watcher | None) -> LabelledStore:
    """Join the listing of the store with the labels.

    Raises:
        LabelsError: no label belongs to an image, a name fits several images, or a class has too few images to be split.
    """
    store = store_of(config)
    listing = list_images(config, resolve(config.bundle, config.storage_options), watch)
    alone = is_loose(listing.manifest)
    loose, shards = listing.manifest.filter(alone), listing.manifest.filter(pc.invert(alone))
    if not config.labels and IMAGE not in loose["format"].to_pylist():
        raise LabelsError(f"labels: {store.url} contains shards, which have no class folders; give --labels.")
    labels = read_labels_of(config, lambda: names_of(loose), store.url, None if shards.num_rows else loose["key"])
    # A shard beside class folders, such as the archive they were taken from, has no label. For labels from a file the listing
    # does not show which images a shard contains.
    shards = labels.shards(shards) if config.labels else shards.slice(0, 0)
    labelled = labels.of_images(names_of(labels.named(loose)))
    if not shards.num_rows:
        require_some(labelled, labels, store.url, listing.manifest)
        require_enough(labelled.labels.values(), labels.source, many=config.multi_label, wanted=labelled.classes)
        require_parts(labelled, labels)
    if labels.class_depth and config.max_images is None:
        _tell_of_unused(store, listing.manifest, labels)
    wanted = pa.array({*shards["uri"].to_pylist(), *(uri for uri, _ in labelled.labels)}, pa.string())
    chosen = replace(listing, manifest=listing.manifest.filter(pc.is_in(listing.manifest["uri"], wanted)))
    return LabelledStore(chosen, labels, loose.num_rows - len(labelled.labels))


def _tell_of_unused(store: Location | Inventory, manifest: pa.Table, labels: Labels) -> None:
    """Log what lies beside the class folders, and the folders without an image."""
    beside = manifest.num_rows - len(labels.rows)
    if beside:
        log.warning("%d images or shards of %s lie in no class folder and are left out", beside, store.url)
    if isinstance(store, Inventory):
        return  # it has objects only
    used = {tuple(str(row.key).split("/")[: labels.class_depth]) for row in labels.rows}
    for above in sorted({folders[:-1] for folders in used}):
        folder = store.join(*above)
        empty = [name for name in folder.folders() if (*above, name) not in used and not is_litter(name)]
        if empty:
            log.warning("%d folders of %s have no image and do not become classes: %s", len(empty), folder.url, in_short(empty))


def require_some(labelled: Labelled, labels: Labels, where: str, manifest: pa.Table) -> None:
    """Raise LabelsError if no label belongs to an image."""
    if not labelled.labels:
        column = "uri" if labels.rows[0].key is None else "key"
        raise LabelsError(
            f"No label of {labels.source} belongs to an image of {where}: the first {column} is "
            f"{getattr(labels.rows[0], column)!r} in the labels and {manifest[column][0].as_py()!r} in the store."
        )


def require_parts(labelled: Labelled, labels: Labels) -> None:
    """Raise LabelsError if a part is unknown; if a labels file gives no image to one part, or folders none to train."""
    if labelled.splits is None:
        return
    parts = {labelled.splits.get(name, SPLITS[0]) for name in labelled.labels}
    unknown = sorted({*labelled.splits.values()} - set(SPLITS))
    if unknown:
        raise LabelsError(f"The labels file {labels.source} has the split {unknown[0]!r}; write train, validation or test.")
    missing = sorted(set(SPLITS) - parts)
    if labels.class_depth and SPLITS[0] in missing:
        raise LabelsError(f"The folders of {labels.source} are parts of a data set, and none of them is for training.")
    if missing and not labels.class_depth:
        raise LabelsError(f"The labels file {labels.source} has a column split and no image of {missing[0]!r} in the store.")


def tell_of_labels(labelled: Labelled, labels: Labels, where: str) -> None:
    """Log what a reader of the labels files would not expect."""
    warn_of_spelling([label for names in labelled.labels.values() for label in names], labels.source)
    for count, sentence in (
        (len(labelled.missing), "%d labels belong to no image of %s and are left out"),
        (len(labelled.withdrawn), "%d images are left out of %s, because their labels are withdrawn"),
        (
            labelled.unanswered,
            f"%d images of %s have a row with an empty label, which changes nothing; {WITHDRAWN!r} takes a label back",
        ),
        (labelled.moved, "%d images of %s are in another part (split) than an earlier labels file says"),
    ):
        if count:
            log.warning(sentence, count, where)


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
        names: uri and key of n images.
        values: (n, F) features.
        classes: (n,) class numbers; with several labels per image (n, C), 1 where an image has a label.
        labels: the C classes.
        split_of: image -> part; None if the labels do not give the parts.
        failed: labelled images without features.
        images_read: images that were read.
        probes: pixels for the bundle's self-test.
        by_uri: whether a key does not tell an image from the others that were read, or no label names one by its key alone.
    """

    names: tuple[ImageName, ...]
    values: np.ndarray
    classes: np.ndarray
    labels: tuple[str, ...]
    split_of: Mapping[ImageName, str] | None
    failed: int
    images_read: int
    probes: np.ndarray
    by_uri: bool = False


def assemble(config: TrainConfig, table: pa.Table, labelled: Labelled, *, images_read: int, probes: np.ndarray) -> TrainingSet:
    """Join an Arrow table of uri, key and features with the labels; images without a label are left out."""
    by_uri = labelled.by_uri or pc.count_distinct(table["key"]).as_py() < table.num_rows
    table = table.filter(pa.array([name in labelled.labels for name in names_of(table)], pa.bool_()))
    if not table.num_rows:
        raise LabelsError(f"No label belongs to an image of {config.images or config.features} that can be read.")
    names = names_of(table)
    given = [labelled.labels[name] for name in names]
    require_enough(given, config.images or str(config.features), many=config.multi_label, wanted=labelled.classes)
    labels = tuple(sorted(labelled.classes))
    number = {label: index for index, label in enumerate(labels)}
    if config.multi_label:
        classes = np.zeros((len(names), len(labels)), np.float32)
        for row, of_image in enumerate(given):
            classes[row, [number[label] for label in of_image]] = 1
    else:
        classes = np.array([number[label] for (label,) in given], np.int64)
    values = matrix(table["features"]).astype(np.float32)
    failed = len(labelled.labels) - len(names)
    return TrainingSet(tuple(names), values, classes, labels, labelled.splits, failed, images_read, probes, by_uri)


class SplitSet(NamedTuple):
    """The parts of a training set: features and classes, the names of their images, and a CSV file with the part of each."""

    parts: Mapping[str, DataSplit]
    names: Mapping[str, Sequence[ImageName]]
    file: bytes

    def with_features(self, features: TrainingSet) -> SplitSet:
        """The same images in the same parts, with the features of another base."""
        row_of = {name: row for row, name in enumerate(features.names)}
        rows = {part: [row_of[name] for name in names] for part, names in self.names.items()}
        parts = {part: DataSplit(features.values[places], features.classes[places]) for part, places in rows.items()}
        return self._replace(parts=parts)


def split_set(features: TrainingSet, config: TrainConfig) -> SplitSet:
    """Split stratified by class, unless the labels give the parts. Copies and near-copies of one picture are in one part.

    If the labels give the parts, near-copies stay where they are, which is logged; copies do not.

    Each class is shuffled and split separately, so that a class of three images has one image in each part. scikit-learn's
    stratified split is not used, because it refuses a test part smaller than the number of classes.
    """
    shares = (config.validation, config.test, config.seed)
    if features.split_of is not None:
        given = np.array([SPLITS.index(features.split_of.get(name, SPLITS[0])) for name in features.names])
        keys = [key for _, key in features.names]
        copies, near = find_copies(features.values), find_near_copies(features.values)
        drawn_by = near if enough_pictures(features.classes, near, FEWEST) else copies
        part_of = separate_copies(complete_parts(given, features.classes, drawn_by, *shares), copies, keys)
        tell_of_near_copies(part_of, near, keys)
    else:
        part_of = split_pictures(features.classes, features.values, *shares)
    rows = {name: np.flatnonzero(part_of == number) for number, name in enumerate(SPLITS)}
    parts = {name: DataSplit(features.values[places], features.classes[places]) for name, places in rows.items()}
    _tell_of_missing(part_of, features)
    _tell_of_scarce(features)
    names = {name: [features.names[place] for place in places] for name, places in rows.items()}
    return SplitSet(parts, names, _split_file(features, part_of))


def _tell_of_scarce(features: TrainingSet) -> None:
    """Log the classes with too few images for their recall to be known."""
    images = Counter(label for labels in label_names(features.classes, features.labels) for label in labels)
    scarce = [f"{label} ({images[label]})" for label in features.labels if images[label] < _MEASURABLE]
    if scarce:
        log.warning(
            "%d classes have fewer than %d images, too few to measure how often the head finds them: %s",
            *(len(scarce), _MEASURABLE, in_short(scarce)),
        )


def _tell_of_missing(part_of: np.ndarray, features: TrainingSet) -> None:
    """Log the classes that have no image in one of the parts."""
    given = label_names(features.classes, features.labels)
    for number, part in enumerate(SPLITS):
        found = {label for labels, place in zip(given, part_of, strict=True) if place == number for label in labels}
        missing = [label for label in features.labels if label not in found]
        if missing:
            log.warning("%d classes have no image in the part %s: %s", len(missing), part, in_short(missing))


def _split_file(features: TrainingSet, part_of: np.ndarray) -> bytes:
    """A labels file with the part of each image. It names images by key, and also by uri if keys may repeat."""
    by_uri = features.by_uri
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*(["uri"] if by_uri else []), "key", "label", "split"])
    rows = zip(features.names, label_names(features.classes, features.labels), part_of, strict=True)
    for name, labels, number in rows:
        for label in labels or (NO_LABEL,):
            writer.writerow([*name[not by_uri :], label, SPLITS[number]])
    return buffer.getvalue().encode()


def label_names(classes: np.ndarray, labels: Sequence[str]) -> list[tuple[str, ...]]:
    """The labels of each image."""
    if classes.ndim == 1:
        return [(labels[number],) for number in classes]
    return [tuple(labels[int(number)] for number in np.flatnonzero(row)) for row in classes]
