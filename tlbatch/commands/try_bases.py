"""Several bases and labelled images -> the base whose features give the most accurate head at a wanted speed."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tlbatch.commands.extract import read_weights
from tlbatch.commands.fitting import Made, measure_scores
from tlbatch.config import TrainConfig
from tlbatch.errors import ConfigError
from tlbatch.model.bases import find_base
from tlbatch.model.calibration import calibration_error, fit_temperature, tempered, thresholds_by_f1
from tlbatch.model.engines import load_engine
from tlbatch.model.frozen import save_bundle
from tlbatch.storage.resolve import resolve

if TYPE_CHECKING:
    from tlbatch.model.engines import Engine

#: NAME, NAME@SIZE, NAME=WEIGHTS or NAME@SIZE=WEIGHTS.
_CANDIDATE = re.compile(r"(?P<base>\w+)(?:@(?P<size>\d+))?(?:=(?P<weights>.+))?")
#: A base's speed is measured for so many seconds, on batches of so many images.
_SECONDS, _BATCH = 2.0, 16
_LEAST_SIZE = 32


class Tried(NamedTuple):
    """What was measured of a base.

    Attributes:
        accuracy: of held-out images; balanced where classes weigh the same, and F1 where images have several labels.
        images_per_second: of the base alone, without reading and decoding.
        chosen: whether it is the base of the bundle.
    """

    base: str
    size: int
    weights: str
    accuracy: float
    calibration_error: float | None
    images_per_second: float
    megabytes: float
    seconds: float
    chosen: bool = False


class Choice(NamedTuple):
    """The base that was chosen, what was measured of each, and the names of those for which no time was left."""

    made: Made
    tried: list[Tried]
    left_out: list[str]


def candidates(config: TrainConfig) -> list[TrainConfig]:
    """One configuration for each of `try_bases`.

    Raises:
        ConfigError: an entry is not written as it should be, or its weights cannot be read.
        BaseError: a base is not known.
    """
    found = []
    for entry in config.try_bases:
        given = _CANDIDATE.fullmatch(entry)
        if given is None:
            raise ConfigError(f"try_bases: write NAME, NAME@SIZE or NAME@SIZE=WEIGHTS; found {_without_weights(entry)!r}.")
        changes: dict[str, Any] = {"base": find_base(given["base"]).name, "try_bases": ()}
        if given["size"]:
            changes["size"] = int(given["size"])
            if changes["size"] < _LEAST_SIZE:
                raise ConfigError(f"try_bases: a size is at least {_LEAST_SIZE}; found {_without_weights(entry)!r}.")
        if given["weights"]:
            changes["weights"] = given["weights"]
        found.append(config.model_copy(update=changes))
        read_weights(found[-1])
    return found


def choose_base(config: TrainConfig, tries: Sequence[TrainConfig], make: Callable[[TrainConfig], Made]) -> Choice:
    """Train a head on the features of each base, and keep the one with the highest held-out accuracy.

    After the first base, no base is begun that would take longer than the rest of the budget, to judge by the one before it.

    Args:
        config: `try_bases`, `min_speed` and `budget`.
        tries: the result of `candidates`.
        make: runs a base over the labelled images and trains a head.

    Raises:
        ConfigError: no base is as fast as is wanted.
    """
    began = time.monotonic()
    best: tuple[float, Made] | None = None
    tried: list[Tried] = []
    for candidate in tries:
        left = config.budget_seconds - (time.monotonic() - began)
        if tried and left < tried[-1].seconds:
            break
        started = time.monotonic()
        made = make(candidate)
        tried.append(measured(candidate, made, started))
        fast = tried[-1].images_per_second >= (config.min_speed or 0)
        if fast and (best is None or tried[-1].accuracy > best[0]):
            best = tried[-1].accuracy, made
            tried = [one._replace(chosen=one is tried[-1]) for one in tried]
    if best is None:
        speeds = ", ".join(f"{one.base} at {one.size} pixels {one.images_per_second:,.0f}" for one in tried)
        raise ConfigError(f"min_speed: no base reaches {config.min_speed:,.0f} images a second here: {speeds}.")
    return Choice(best[1], tried, [_without_weights(entry) for entry in config.try_bases[len(tried) :]])


def _without_weights(entry: str) -> str:
    """An entry without its weights, whose URL may hold a signature."""
    return entry.partition("=")[0]


def measured(config: TrainConfig, made: Made, started: float) -> Tried:
    """What is known of a base and its head: held-out accuracy, and the speed of the base alone on this machine."""
    scores, classes = made.fitted.held_out
    several = classes.ndim == 2
    metrics = measure_scores(scores, classes, made.features.labels, thresholds_by_f1(scores, classes) if several else None)
    balanced = made.fitted.how.class_weight == "balanced"
    accuracy = metrics["micro_f1" if several else "balanced_accuracy" if balanced else "accuracy"]
    error = None if several else calibration_error(tempered(scores, fit_temperature(scores, classes)), classes)
    with tempfile.TemporaryDirectory() as folder:
        saved = save_bundle(resolve(str(Path(folder, "base"))), made.frozen, None, made.features.probes)
        megabytes = sum(file.stat().st_size for file in Path(folder, "base").rglob("*") if file.is_file()) / 1e6
        rate = images_per_second(load_engine(saved, config.engine, threads=os.cpu_count() or 1), made.features.probes)
    base, size = made.frozen.base.name, made.frozen.size[0]
    return Tried(base, size, made.frozen.weights, accuracy, error, rate, megabytes, time.monotonic() - started)


def images_per_second(engine: Engine, pixels: np.ndarray) -> float:
    """The median speed of a base on this machine, without reading and decoding."""
    batch = np.resize(pixels, (_BATCH, *pixels.shape[1:]))
    engine.predict(batch)
    return float(np.median([_BATCH / seconds for seconds in _timed(engine, batch)]))


def _timed(engine: Engine, batch: np.ndarray) -> Iterator[float]:
    began = time.monotonic()
    while time.monotonic() - began < _SECONDS:
        started = time.monotonic()
        engine.predict(batch)
        yield time.monotonic() - started
