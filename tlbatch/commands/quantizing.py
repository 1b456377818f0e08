"""A base with its head in float32, and the images it was trained or checked on -> the same in int8, if that is as accurate."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tlbatch.commands.fitting import Made, again
from tlbatch.commands.import_check import Answer, compare_labels
from tlbatch.commands.sample_pixels import draw_by_class, pixels_of_named
from tlbatch.commands.try_bases import Tried, images_per_second, measured
from tlbatch.config import TrainConfig
from tlbatch.errors import ConfigError
from tlbatch.images.decode import Pixels, decode
from tlbatch.model.bundle import Bundle
from tlbatch.model.engines import load_engine
from tlbatch.model.frozen import Frozen, quantized_base
from tlbatch.model.own_pipeline import images_in
from tlbatch.model.quantize import MOST_IMAGES
from tlbatch.output.progress import Watcher
from tlbatch.storage.location import Location

log = logging.getLogger(__name__)


class Compared(NamedTuple):
    """Float32 and int8, measured on the same held-out images.

    Attributes:
        kept: whether the bundle has the base in int8.
        allowed: the points of accuracy that int8 was allowed to cost.
        images: how many held-out images there are.
        calibrated_on: images from which the ranges were taken.
        float32, int8: `accuracy`, `calibration_error` (None with several labels per image), `images_per_second` of the model
            alone on this machine's CPUs, and `megabytes` of the bundle.
    """

    kept: bool
    allowed: float
    images: int
    calibrated_on: int
    float32: dict[str, Any]
    int8: dict[str, Any]


def quantize_made(config: TrainConfig, made: Made, location: Location, watch: Watcher | None) -> tuple[Made, Compared]:
    """Quantise the base, extract its features, train a head on them, and keep both if they are accurate enough.

    Both heads are cross-validated on the same images in the same folds. Of a few images, one more may always be wrong.

    Args:
        config: what was trained, and how much accuracy int8 may cost.
        made: the base and the head in float32, trained on images.
        location: the bundle's folder, in which the features are extracted.
        watch: as for `train`.
    """
    if made.labelled is None:
        raise ValueError("only a base that ran over images can be quantised")
    before = measured(config, made, time.monotonic())
    train, names = made.split.parts["train"], made.split.names["train"]
    chosen = [names[row] for row in draw_by_class(train.classes, MOST_IMAGES, config.seed)]
    pixels = pixels_of_named(config, made.frozen, made.labelled.listing.manifest, chosen)
    other = again(config, made, quantized_base(made.frozen, pixels), made.labelled, location, watch)
    after = measured(config, other, time.monotonic())
    count = len(made.fitted.held_out.classes)
    lost = before.accuracy - after.accuracy
    kept = lost * count <= max(1.0, config.quantize_loss / 100 * count) + 1e-6
    compared = Compared(kept, config.quantize_loss, count, len(pixels), _shown(before), _shown(after))
    if not kept:
        log.warning(
            "quantize: in int8 the held-out accuracy is %.1f points lower (%.1f %% instead of %.1f %%), and %g are allowed; "
            "the base stays in float32",
            *(100 * lost, 100 * after.accuracy, 100 * before.accuracy, config.quantize_loss),
        )
    return other if kept else made, compared


class ComparedImport(NamedTuple):
    """An imported model in int8, on the images that it was checked on.

    Attributes:
        kept: whether the bundle has the base in int8.
        images: how many images were compared.
        equal: the share that has, in int8, the label of the model's own pipeline.
        calibrated_on: images from which the ranges were taken.
        times: the images a second of the model alone on this machine's CPUs, as a multiple of those in float32.
    """

    kept: bool
    images: int
    equal: float
    calibrated_on: int
    times: float


def quantize_imported(
    folder: Path, frozen: Frozen, bundle: Bundle, own: Mapping[str, Answer], save: Callable[..., Bundle]
) -> tuple[Bundle, ComparedImport]:
    """Quantise an imported base, whose head stays, and keep it if the images of a folder keep their labels.

    Args:
        folder: the images, from which the ranges are taken as well.
        frozen: the base in float32.
        bundle: the bundle in float32.
        own: file name below the folder -> answer of the model's own pipeline.
        save: makes a bundle of another base; facts for its card are given by name.

    Returns:
        The bundle in int8, or else the one that was given.

    Raises:
        ConfigError: the model takes batches of one size alone.
    """
    if frozen.batch is not None:
        raise ConfigError(f"quantize: this model takes batches of {frozen.batch} alone; export it with a batch of any size.")
    paths = list(images_in(folder).values())
    chosen = [paths[row] for row in np.unique(np.linspace(0, len(paths) - 1, min(MOST_IMAGES, len(paths))).astype(int))]
    found = (decode(path.read_bytes(), frozen.size, rules=frozen.rules) for path in chosen)
    pixels = np.stack([one.array for one in found if isinstance(one, Pixels)])
    other = save(quantized_base(frozen, pixels), **{"base in int8, ranges from images": len(pixels)})
    checked, threads = compare_labels(folder, other, own), os.cpu_count() or 1
    before, after = (images_per_second(load_engine(one, threads=threads), pixels) for one in (bundle, other))
    compared = ComparedImport(checked.enough, len(checked.told), checked.equal, len(pixels), after / before)
    if not compared.kept:
        log.warning(
            "quantize: in int8 %s of %s images have the label of the model's own pipeline, and 99 %% are needed; the base "
            "stays in float32",
            *(f"{compared.equal:.1%}", f"{compared.images:,}"),
        )
    return other if compared.kept else bundle, compared


def _shown(one: Tried) -> dict[str, Any]:
    return {name: getattr(one, name) for name in ("accuracy", "calibration_error", "images_per_second", "megabytes")}
