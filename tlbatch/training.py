"""Labelled images -> a bundle: features of the frozen base through the pipeline, a head trained on them, both stacked.

Because the base is frozen, an image's features are the same in every epoch. They are computed once, by the same actors that
classify later; training the head on them is the same mathematics as `model.fit` on the stacked model.
"""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from tlbatch import decode, ledger, pipeline, schema
from tlbatch.config import ExtractConfig, Resources, RunConfig, TrainConfig
from tlbatch.decode import Pixels
from tlbatch.errors import BundleError, LabelsError, OutputError, WeightsError
from tlbatch.labels import Labels, labels_from_folders, read_labels
from tlbatch.lease import require_free
from tlbatch.listing import Listing
from tlbatch.model import bundle as bundles
from tlbatch.model.bases import Base, find_base
from tlbatch.model.bundle import Frozen, Trained, freeze, save_bundle
from tlbatch.model.head import HeadTraining, Part, train_head
from tlbatch.report.card import make_card
from tlbatch.report.evaluate import measure
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


def train(config: TrainConfig, watch: pipeline.Watcher | None = None) -> dict[str, Any]:
    """Train a head on a frozen base and save both as a bundle.

    Args:
        config: the images, their labels, the base and how to train.
        watch: called every few seconds with the counts of images whose features are known.

    Returns:
        `bundle` (its URL), `digest`, `base`, `labels`, `images` in each part, `failed` labelled images, `accuracy` and
        `metrics` on the test part, `epochs`, `seconds`.

    Raises:
        UsageError: base, weights, labels or images cannot be used; nothing was written.
        UnfinishedError: it was interrupted; the same command starts it anew.
    """
    began = time.monotonic()
    base = find_base(config.base)
    size = config.size or base.size
    place = resolve(config.bundle, config.storage_options)
    _require_bundle_place(place)
    weights = _read_weights(config)
    labelled = _find_labelled(config)
    how = HeadTraining(config.epochs, config.patience, learning_rate=config.learning_rate, seed=config.seed)
    # Ray must start and end in this thread, and takes seconds for either; Keras works beside it.
    with ThreadPoolExecutor(1, thread_name_prefix="tlbatch-keras") as keras_thread:
        building = keras_thread.submit(freeze, base, size, _told(config.weights), weights)
        with ray_session(config.address) as start_ray:
            start_ray()
            frozen = building.result()
            features = _extract(config, frozen, labelled, place, watch)
            parts, split = _split(features, config)
            fitting = keras_thread.submit(train_head, parts["train"], parts["validation"], len(features.labels), how)
        head, history = fitting.result()
    metrics = _measure(head, parts["test"], features.labels)
    training = {
        **asdict(how),
        "images": {name: len(part.classes) for name, part in parts.items()},
        "failed": features.failed,
        "epochs": len(history["loss"]),
        "validation_accuracy": history["val_accuracy"][int(np.argmin(history["val_loss"]))],
        "history": history,
    }
    title = f"{', '.join(features.labels[:4])}{' …' if len(features.labels) > 4 else ''}: {base.name} at {size} pixels"
    extra = {bundles.CARD: make_card(title, training, metrics), bundles.SPLIT: split}
    trained = Trained(head, features.labels, metrics, training)
    saved = save_bundle(place, frozen, trained, features.probes, extra)
    return {
        "bundle": saved.place.url,
        "digest": saved.digest,
        "base": base.name,
        "labels": list(features.labels),
        "images": training["images"],
        "failed": features.failed,
        "accuracy": metrics["accuracy"],
        "metrics": metrics,
        "epochs": training["epochs"],
        "seconds": round(time.monotonic() - began, 3),
    }


def extract(config: ExtractConfig, watch: pipeline.Watcher | None = None) -> dict[str, Any]:
    """Write the features of every image of a store, of a bundle's base or of a base that is named.

    A named base is saved as a bundle without a head in the output's folder `base`, where all workers reach it and a second
    command finds it.

    Returns:
        The run's report, as `pipeline.run` gives it.
    """
    settings = {name: getattr(config, name) for name in RunConfig.model_fields}
    if config.bundle:
        return pipeline.run(RunConfig(**settings), watch)
    output = resolve(config.output, config.storage_options)
    ledger.require_output(output, resolve(config.images).url)
    require_free(output)
    place = output.join(schema.BASE)
    base = find_base(config.base)
    size = config.size or base.size
    listing = None
    if not place.join(bundles.BUNDLE).exists():
        weights = _read_weights(config)
        listing = pipeline.list_images(config, output)
        frozen = freeze(base, size, _told(config.weights), weights)
        save_bundle(place, frozen, None, _probe_pixels(config, size, listing.manifest))
    _require_same_base(bundles.load_bundle(place.url, config.storage_options), base, size, _told(config.weights))
    return pipeline.run(RunConfig(**{**settings, "bundle": place.url}), watch, listing)


def _told(weights: str) -> str:
    """Where weights came from as the bundle tells it: without the query of a URL, which may be a signature."""
    return weights.split("?", maxsplit=1)[0] if "://" in weights else weights


def _require_same_base(bundle: bundles.Bundle, base: Base, size: int, weights: str) -> None:
    facts = bundle.facts["base"]
    was, asked = (facts["name"], bundle.size[0], facts["weights"]), (base.name, size, weights)
    if was != asked:
        raise OutputError(
            f"The output belongs to another base: it was begun with {was[0]} at {was[1]} pixels, weights {was[2]}, and "
            f"{asked[0]} at {asked[1]} pixels, weights {asked[2]}, is asked for; choose another --output."
        )


def _require_bundle_place(place: Place) -> None:
    strange = [name for name in place.names() if name not in bundles.NAMES and not name.startswith(".")]
    if strange:
        raise BundleError(f"{place.url} holds more than a bundle ({strange[0]}, …); choose another folder for --bundle.")


def _read_weights(config: TrainConfig | ExtractConfig) -> str | bytes:
    if config.weights in ("imagenet", "random"):
        return config.weights
    if not config.weights.endswith((".h5", ".keras")):
        raise WeightsError(f"weights: {config.weights!r} is neither imagenet nor random nor a .h5, .weights.h5 or .keras file.")
    place = resolve(config.weights, config.storage_options)
    try:
        return place.read()
    except (FileNotFoundError, IsADirectoryError):
        raise WeightsError(f"weights: there is no file {place.url}.") from None
    except PermissionError as error:
        raise WeightsError(f"weights: {place.url} may not be read: {error}.") from None


@dataclass(frozen=True)
class _Labelled:
    """What is read of a store, and the labels of its images by key."""

    listing: Listing
    label_of: Mapping[str, str]
    split_of: Mapping[str, str] | None


def _find_labelled(config: TrainConfig) -> _Labelled:
    """Join the store's listing with the labels.

    Raises:
        LabelsError: nothing fits together, or a class has too few images to be split.
    """
    store = resolve(config.images, config.storage_options)
    listing = pipeline.list_images(config, resolve(config.bundle, config.storage_options))
    if config.labels is None and IMAGE not in listing.manifest["format"].to_pylist():
        raise LabelsError(f"labels: {store.url} holds its images in shards, which have no class folders; give --labels.")
    if config.labels is None:
        labels = labels_from_folders(listing.manifest["key"].to_pylist(), store.url)
    else:
        labels = read_labels(resolve(config.labels, config.storage_options))
    label_of = dict(labels.pairs)
    is_shard = pa.compute.not_equal(listing.manifest["format"], IMAGE)
    if pa.compute.any(is_shard).as_py():
        # Whose images a shard holds is known once it is read, so all of it is read.
        if labels.column != "key":
            raise LabelsError(f"The labels file {labels.source} names uris; images in shards are told apart by their key.")
        return _Labelled(listing, label_of, _parts_of(labels, label_of))
    chosen = listing.manifest.filter(pa.compute.is_in(listing.manifest[labels.column], pa.array(label_of, pa.string())))
    if not chosen.num_rows:
        raise LabelsError(
            f"No label of {labels.source} belongs to an image of {store.url}: its first {labels.column} is "
            f"{labels.pairs[0][0]!r}, the store's {listing.manifest[labels.column][0].as_py()!r}."
        )
    if chosen.num_rows < len(label_of):
        log.warning("%d labels belong to no image of %s", len(label_of) - chosen.num_rows, store.url)
    names = chosen[labels.column].to_pylist()
    by_key = {key: label_of[name] for key, name in zip(chosen["key"].to_pylist(), names, strict=True)}
    _require_enough(Counter(by_key.values()), labels)
    parts = _parts_of(labels, set(names))
    split_of = parts and {key: parts[name] for key, name in zip(by_key, names, strict=True)}
    return _Labelled(replace(listing, manifest=chosen), by_key, split_of)


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


def _require_enough(images: Counter[str], labels: Labels) -> None:
    if len(images) < 2:
        raise LabelsError(
            f"There is only the class {next(iter(images))!r} in {labels.source}; a head tells at least two apart."
        )
    label, fewest = min(images.items(), key=lambda item: (item[1], item[0]))
    if fewest < _FEWEST:
        raise LabelsError(
            f"The class {label!r} has {fewest} image{'s' if fewest > 1 else ''}; give it at least {_FEWEST}: one to train on, "
            "one to end training, one to measure on."
        )


@dataclass(frozen=True)
class _Features:
    """Features (n, F) and class numbers of the images that could be read, in manifest order."""

    keys: tuple[str, ...]
    values: np.ndarray
    classes: np.ndarray
    labels: tuple[str, ...]
    split_of: Mapping[str, str] | None
    failed: int
    probes: np.ndarray


def _extract(
    config: TrainConfig, frozen: Frozen, labelled: _Labelled, place: Place, watch: pipeline.Watcher | None
) -> _Features:
    """Run the base once over the labelled images, as actors on the cluster, in a folder inside the bundle's place."""
    with _work_folder(place) as work:
        probes = _probe_pixels(config, frozen.size, labelled.listing.manifest)
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
            predictions=False,
            features=True,
            features_dtype="float32",
        )
        report = pipeline.run(run, watch, labelled.listing)
        table = read_run_table(output.join(schema.RUNS, report["run_id"]), "features", ["key", "features"])
        _report_failed(output, labelled, config)
    table = table.filter(pa.compute.is_in(table["key"], pa.array(labelled.label_of, pa.string())))
    if not table.num_rows:
        raise LabelsError(f"No label belongs to an image of {config.images} that can be read.")
    keys = table["key"].to_pylist()
    names = [labelled.label_of[key] for key in keys]
    images = Counter(names)
    _require_enough(
        Counter({label: images[label] for label in labelled.label_of.values()}), Labels("key", (), None, config.images)
    )
    labels = tuple(sorted(images))
    number = {label: index for index, label in enumerate(labels)}
    values = table["features"].combine_chunks().flatten().to_numpy().reshape(len(keys), -1)
    classes = np.array([number[name] for name in names], np.int64)
    return _Features(tuple(keys), values, classes, labels, labelled.split_of, report["failed"], probes)


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


def _probe_pixels(config: TrainConfig | ExtractConfig, size: int, manifest: pa.Table) -> np.ndarray:
    """A few labelled images as pixels, for the bundle's self-test; noise stands in where none of them can be read."""
    chosen: list[np.ndarray] = []
    manifest = manifest.filter(pa.compute.equal(manifest["format"], IMAGE))
    places = np.unique(np.linspace(0, manifest.num_rows - 1, min(16, manifest.num_rows)).astype(int))
    for row in manifest.take(places).to_pylist():
        with contextlib.suppress(OSError):
            data = resolve(row["uri"], config.storage_options).read()
            pixels = decode.decode(data, (size, size), max_pixels=config.max_pixels)
            if isinstance(pixels, Pixels):
                chosen.append(pixels.array)
    noise = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
    return np.stack([*chosen, *noise])


def _split(features: _Features, config: TrainConfig) -> tuple[dict[str, Part], bytes]:
    """Stratified parts, and the CSV that records which image is in which.

    Each class is shuffled and cut by itself, so that the smallest of three images still has one in each part; scikit-learn's
    stratified split refuses a test part smaller than the number of classes.
    """
    if features.split_of is not None:
        part_of = np.array([SPLITS.index(features.split_of[key]) for key in features.keys])
    else:
        part_of = split_classes(features.classes, config.validation, config.test, config.seed)
    parts = {
        name: Part(features.values[part_of == number], features.classes[part_of == number])
        for number, name in enumerate(SPLITS)
    }
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["key", "label", "split"])
    for key, label, number in zip(features.keys, features.classes, part_of, strict=True):
        writer.writerow([key, features.labels[label], SPLITS[number]])
    return parts, buffer.getvalue().encode()


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


def _measure(head: keras.Model, test: Part, labels: Sequence[str]) -> dict[str, Any]:
    best = np.asarray(head(test.features, training=False)).argmax(axis=1)
    return measure([labels[number] for number in test.classes], [labels[number] for number in best], labels)
