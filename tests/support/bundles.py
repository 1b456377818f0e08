"""Bundles of a real base, made in this process without Ray; a head is fitted in one step, which takes no seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression

from tlbatch.images.decode import decode
from tlbatch.model.bases import BASES
from tlbatch.model.bundle import load_bundle
from tlbatch.model.engines import load_engine
from tlbatch.model.frozen import Frozen, Trained, freeze, frozen_base_of, save_bundle
from tlbatch.model.head import build_head
from tlbatch.schema import NEW_RULES
from tlbatch.storage.resolve import resolve


def real_bundle(store: Path, weights: str, folder: Path, size: int = 96) -> str:
    """MobileNetV2 with a head for the classes of a store, one folder each."""
    frozen = freeze(BASES["MobileNetV2"], size, NEW_RULES, weights, Path(weights).read_bytes())
    pixels = _pixels(store, size)
    features = np.asarray(frozen.source(pixels, training=False)["features"])
    return _saved(frozen, features, [path.parent.name for path in _paths(store)], pixels, folder, strength=0.01)


def another_head(bundle_url: str, store: Path, folder: Path, label_of: Callable[[str], str], strength: float = 0.01) -> str:
    """The same base with a head for other labels, or a weaker or stronger one; `label_of` is given the name of a class."""
    bundle = load_bundle(bundle_url)
    pixels = _pixels(store, bundle.size[0])
    features = load_engine(bundle).predict(pixels).features
    labels = [label_of(path.parent.name) for path in _paths(store)]
    return _saved(frozen_base_of(bundle), features, labels, pixels, folder, strength)


def _paths(store: Path) -> list[Path]:
    return sorted(store.rglob("*.jpg"))


def _pixels(store: Path, size: int) -> np.ndarray:
    return np.stack([decode(path.read_bytes(), (size, size), rules=NEW_RULES).array for path in _paths(store)])


def _saved(frozen: Frozen, features: np.ndarray, labels: list[str], pixels: np.ndarray, folder: Path, strength: float) -> str:
    """A softmax regression as the head; of two classes it gives the logit of the second alone, the first one's is then 0."""
    fitted = LogisticRegression(C=strength).fit(features, labels)
    weights, biases = fitted.coef_.T, fitted.intercept_
    if len(fitted.classes_) == 2:
        weights, biases = np.hstack([0 * weights, weights]), np.array([0.0, biases[0]])
    head = build_head(features.shape[1], len(fitted.classes_))
    head.get_layer("scores").set_weights([weights, biases])
    return save_bundle(resolve(str(folder)), frozen, Trained(head, tuple(fitted.classes_), {}, {}), pixels).location.url
