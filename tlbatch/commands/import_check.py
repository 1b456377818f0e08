"""Labels of a bundle beside those of the model's own pipeline, on a folder of images, before anything is classified."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tlbatch.config import ImportConfig
from tlbatch.errors import BundleError, ConfigError
from tlbatch.images.decode import Pixels, decode
from tlbatch.images.label_files import read_labels
from tlbatch.model.bundle import Bundle
from tlbatch.model.engines import load_engine
from tlbatch.model.own_pipeline import images_in
from tlbatch.storage.resolve import resolve

#: The smallest share of images whose labels must be equal; one image may always differ. Differences that are named.
_FEWEST_EQUAL, _NAMED = 0.99, 20


def check_bundle(config: ImportConfig, bundle: Bundle, own: Mapping[str, str]) -> dict[str, Any]:
    """Compare a bundle's labels with those that are expected.

    Args:
        config: the folder of images.
        bundle: the bundle, not yet where it belongs.
        own: file name below the folder -> label of the model's own pipeline.

    Returns:
        `images`, the number compared; `equal`, the share with the same label; `different`, the images that differ with the
        `expected` and the `found` label.

    Raises:
        BundleError: too many labels differ.
        ConfigError: no image can be compared.
    """
    folder = Path(str(config.check))
    images = {key: path for key, path in images_in(folder).items() if key in own}
    found = _labels(bundle, images.values())
    told = [(key, own[key], label) for key, label in zip(images, found, strict=True) if label is not None]
    if not told:
        raise ConfigError(f"check: {folder} has no image that can be compared.")
    different = [{"key": key, "expected": one, "found": other} for key, one, other in told if one != other]
    equal = 1 - len(different) / len(told)
    if len(different) > 1 and equal < _FEWEST_EQUAL:
        first = different[0]
        raise BundleError(
            f"Of {len(told):,} images in {folder}, {len(different):,} get another label than by the model's own pipeline, such "
            f"as {first['key']} ({first['found']!r} instead of {first['expected']!r}); nothing was written. Say how its "
            "training resized and scaled: --trained-with, --resize, --fit, --scale."
        )
    return {"images": len(told), "equal": equal, "different": different[:_NAMED]}


def expected_labels(config: ImportConfig) -> dict[str, str]:
    """File name below the checked folder -> label, out of the file that says what is expected."""
    keys = images_in(Path(str(config.check)))
    labels = read_labels([resolve(str(config.expected), config.storage_options)]).of_images([(key, key) for key in keys])
    return {key: names[0] for (_, key), names in labels.labels.items()}


def _labels(bundle: Bundle, paths: Iterable[Path]) -> list[str | None]:
    """The bundle's label of each image; None if it cannot be decoded."""
    engine = load_engine(bundle, "openvino")
    found: list[str | None] = []
    for path in paths:
        pixels = decode(path.read_bytes(), bundle.size, rules=bundle.pixel_rules)
        scores = engine.predict(pixels.array[None]).scores if isinstance(pixels, Pixels) else None
        found.append(None if scores is None else bundle.labels[int(np.argmax(scores[0]))])
    return found
