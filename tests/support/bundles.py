"""A bundle of a real base, trained in this process: the mathematics of `train` without its run on Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tlbatch.images.decode import decode
from tlbatch.model.bases import BASES
from tlbatch.model.bundle import Trained, freeze, save_bundle
from tlbatch.model.head import DataSplit, HeadTraining, train_head
from tlbatch.storage.resolve import resolve


def real_bundle(store: Path, weights: str, folder: Path, size: int = 96) -> str:
    """MobileNetV2 with a head for the classes of a store, one folder each."""
    paths = sorted(store.rglob("*.jpg"))
    labels = sorted({path.parent.name for path in paths})
    pixels = np.stack([decode(path.read_bytes(), (size, size)).array for path in paths])
    frozen = freeze(BASES["MobileNetV2"], size, weights, Path(weights).read_bytes())
    features = np.asarray(frozen.extractor(pixels, training=False)["features"])
    classes = np.array([labels.index(path.parent.name) for path in paths])
    validation = np.arange(len(paths)) % 5 == 0
    train, rest = (DataSplit(features[mask], classes[mask]) for mask in (~validation, validation))
    head, _ = train_head(train, rest, len(labels), HeadTraining(epochs=8, learning_rate=0.02))
    return save_bundle(resolve(str(folder)), frozen, Trained(head, tuple(labels), {}, {}), pixels).location.url
