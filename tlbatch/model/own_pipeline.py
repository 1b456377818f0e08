"""Folder of images -> scores of a model, through Keras's own loaders: what a bundle of the model is compared with."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tlbatch.errors import ConfigError, line_of
from tlbatch.model.bases import Scaling
from tlbatch.model.foreign import ForeignModel, as_scores, numbers
from tlbatch.model.own_keras import import_keras, with_own_keras
from tlbatch.schema import PixelRules, Size

#: What Keras's loaders take.
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png")
_BATCH = 32


@with_own_keras
def own_scores(
    model: ForeignModel, folder: Path, size: Size, scaling: Scaling, rules: PixelRules, kind: str, classes: int
) -> tuple[list[Path], np.ndarray]:
    """The images of a folder, at any depth, and the model's scores (n, classes) of them.

    Args:
        model: the model as it came.
        folder: the images; other files are left out.
        size: height and width of its input.
        scaling: how its pixels were scaled in training.
        rules: how its training resized.
        kind: what its outputs are: `softmax`, `sigmoid` or `logits`.
        classes: the number of its classes.

    Raises:
        ConfigError: Keras has no loader of this kind, or cannot read an image, or decodes JPEGs otherwise than the rules say.
    """
    grey = model.channels == 1
    load, transform = _by_image, "accurate"
    if rules.resize == "center_crop" or rules.interpolation == "bilinear_pillow":
        load = _by_pillow
    elif rules.interpolation == "bilinear_tensorflow1" or rules.resize == "central_crop":
        load, transform = _by_slim, "fast"
    elif rules.interpolation == "bilinear_tensorflow":
        load, transform = _by_dataset, "fast"
    elif rules.jpeg == "fast" and rules.interpolation != "nearest":
        load, transform = _by_tensorflow, "fast"
    if rules.jpeg != transform:
        raise ConfigError(f"check: this loader decodes JPEGs with the {transform} transform; give --expected FILE.csv.")
    try:
        paths, pixels = load(folder, size, rules, "grayscale" if grey else "rgb")
    except Exception as error:  # TensorFlow and Pillow raise errors of many kinds
        raise ConfigError(f"check: Keras cannot load the images of {folder}: {line_of(error)}.") from None
    outputs = [model.outputs(numbers(scaling, pixels[start : start + _BATCH])) for start in range(0, len(pixels), _BATCH)]
    return paths, as_scores(np.concatenate(outputs), kind, classes)


def _by_dataset(folder: Path, size: Size, rules: PixelRules, colours: str) -> tuple[list[Path], np.ndarray]:
    """As `image_dataset_from_directory` loads them: float32 pixels (n, height, width, channels)."""
    ways = {"crop_to_aspect_ratio": rules.resize == "crop", "pad_to_aspect_ratio": rules.resize == "pad"}
    found = import_keras().utils.image_dataset_from_directory(
        folder, labels=None, color_mode=colours, image_size=size, batch_size=_BATCH, shuffle=False, verbose=False, **ways
    )
    return [Path(path) for path in found.file_paths], np.concatenate([np.asarray(batch) for batch in found])


def _by_image(folder: Path, size: Size, rules: PixelRules, colours: str) -> tuple[list[Path], np.ndarray]:
    """As `load_img` loads them."""
    if rules.resize == "pad":
        raise ConfigError("Keras pads only in the way of --resize keras")
    if rules.resize == "crop_exact":
        raise ConfigError("Keras has no loader that cuts at fractions of a pixel; give --expected FILE.csv")
    load = import_keras().utils.load_img
    how = {"interpolation": rules.interpolation, "keep_aspect_ratio": rules.resize == "crop", "color_mode": colours}
    paths = list(images_in(folder).values())
    pixels = [np.asarray(load(path, target_size=size, **how), np.float32) for path in paths]
    return paths, np.stack([one if one.ndim == 3 else one[..., None] for one in pixels])


def _by_tensorflow(folder: Path, size: Size, rules: PixelRules, colours: str) -> tuple[list[Path], np.ndarray]:
    """As `tf.image.resize` with antialiasing loads them."""
    import tensorflow as tf

    if rules.resize != "stretch":
        raise ConfigError("TensorFlow crops and pads only in the way of --resize keras")
    method = {"bilinear": "bilinear", "bicubic": "bicubic", "lanczos": "lanczos3"}[rules.interpolation]
    paths, channels = list(images_in(folder).values()), 1 if colours == "grayscale" else 3
    decoded = (tf.io.decode_image(path.read_bytes(), channels, expand_animations=False) for path in paths)
    return paths, np.stack([tf.image.resize(one, size, method, antialias=True).numpy() for one in decoded])


def _by_pillow(folder: Path, size: Size, rules: PixelRules, colours: str) -> tuple[list[Path], np.ndarray]:
    """As torchvision's `Resize` and `CenterCrop` load Pillow's images."""
    load = import_keras().utils.load_img  # gives pictures of Pillow
    if rules.resize not in ("stretch", "center_crop"):
        raise ConfigError("torchvision has no such way of cropping; give --expected FILE.csv")
    method = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}[rules.interpolation.split("_")[0]]
    paths, pixels = list(images_in(folder).values()), []
    for path in paths:
        image, wanted = load(path, color_mode=colours), size[::-1]
        if rules.resize == "center_crop" and rules.shorter_side:
            short, long = sorted(image.size)
            longer = int(rules.shorter_side * long / short)
            wanted = (rules.shorter_side, longer) if image.width <= image.height else (longer, rules.shorter_side)
        array = np.asarray(image.resize(wanted, method), np.float32).reshape(wanted[1], wanted[0], -1)
        top, left = (round((side - cut) / 2) for side, cut in zip(array.shape[:2], size, strict=True))
        pixels.append(array[top : top + size[0], left : left + size[1]])
    return paths, np.stack(pixels)


def _by_slim(folder: Path, size: Size, rules: PixelRules, colours: str) -> tuple[list[Path], np.ndarray]:
    """As `preprocess_for_eval` of tf-slim's Inception loads them."""
    import tensorflow as tf

    if rules.resize != "central_crop" or rules.interpolation != "bilinear_tensorflow1" or rules.jpeg != "fast":
        raise ConfigError("tf-slim resizes in no such way; give --expected FILE.csv")
    paths, channels = list(images_in(folder).values()), 1 if colours == "grayscale" else 3
    decoded = (tf.io.decode_image(path.read_bytes(), channels, expand_animations=False) for path in paths)
    cut = (tf.image.central_crop(one, 0.875)[None] for one in decoded)
    return paths, np.concatenate([tf.compat.v1.image.resize_bilinear(one, size).numpy() for one in cut])


def images_in(folder: Path) -> dict[str, Path]:
    """The images below a folder that Keras's loaders take, by their names below it, sorted."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in paths}
