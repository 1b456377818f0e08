"""A bundle of a real base, made in this process without Ray; its head is fitted in one step, which takes no seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression

from tlbatch.images.decode import decode
from tlbatch.model.bases import BASES
from tlbatch.model.bundle import Trained, freeze, save_bundle
from tlbatch.model.head import build_head
from tlbatch.storage.resolve import resolve


def real_bundle(store: Path, weights: str, folder: Path, size: int = 96) -> str:
    """MobileNetV2 with a head for the classes of a store, one folder each."""
    paths = sorted(store.rglob("*.jpg"))
    labels = sorted({path.parent.name for path in paths})
    pixels = np.stack([decode(path.read_bytes(), (size, size)).array for path in paths])
    frozen = freeze(BASES["MobileNetV2"], size, weights, Path(weights).read_bytes())
    features = np.asarray(frozen.extractor(pixels, training=False)["features"])
    classes = np.array([labels.index(path.parent.name) for path in paths])
    head, fitted = build_head(features.shape[1], len(labels)), LogisticRegression(C=0.01).fit(features, classes)
    head.get_layer("scores").set_weights([fitted.coef_.T, fitted.intercept_])
    return save_bundle(resolve(str(folder)), frozen, Trained(head, tuple(labels), {}, {}), pixels).location.url
