"""A picture in 8 bits a band -> the same picture at a model's input size, as the model's training brought it there."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

from tlbatch.images.convolution import resized_bilinear
from tlbatch.schema import PixelRules

#: Interpolation -> Pillow's filter, which averages over all pixels when it makes a picture smaller (antialiasing).
_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bilinear_cykooz": Image.Resampling.BILINEAR,  # where it does not take the picture, or a part of it between pixels
    "bilinear_pillow": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
#: The largest picture to which `center_crop` resizes one as a whole; the ends of a longer one are cut off before.
_MOST_PIXELS = 1 << 26
#: What `pad` adds. In CMYK, 0 would be white.
_BLACK = {"CMYK": (0, 0, 0, 255)}


def needs_all_pixels(rules: PixelRules) -> bool:
    """Whether a picture must be decoded at its full size: a reduced one is a mean of pixels, like an antialiased one."""
    return rules.interpolation not in ("bilinear", "bilinear_cykooz") or rules.jpeg == "fast"


def resized(image: Image.Image, size: tuple[int, int], rules: PixelRules) -> Image.Image:
    """The picture at Pillow's (width, height).

    `crop` and `pad` keep the aspect ratio as `image_dataset_from_directory` of Keras does with `crop_to_aspect_ratio` and
    `pad_to_aspect_ratio`; `crop_exact` does as `ImageOps.fit` of Pillow, `center_crop` as `Resize` and
    `CenterCrop` of torchvision, `central_crop` as the function of TensorFlow. `bilinear_no_antialias`, which older bundles
    have, is bilinear interpolation as TensorFlow's, rounded down.
    """
    if rules.resize == "pad":
        inner, place = _fitting(image.size, size)
        canvas = Image.new(image.mode, size, _BLACK.get(image.mode, 0))
        canvas.paste(_interpolated(image, inner, rules), place)
        return canvas
    if rules.resize == "crop_exact":
        return ImageOps.fit(image, size, _FILTERS[rules.interpolation])
    if rules.resize == "center_crop":
        return _center_cropped(image, size, rules)
    return _interpolated(_cropped(image, size, rules), size, rules)


def _cropped(image: Image.Image, size: tuple[int, int], rules: PixelRules) -> Image.Image:
    """The part that is stretched."""
    if rules.resize == "crop":
        return image.crop(_middle(image.size, size))
    if rules.resize == "central_crop":
        left, top = (int((side - side * 0.875) / 2) for side in image.size)
        return image.crop((left, top, image.width - left, image.height - top))
    return image


def _center_cropped(image: Image.Image, size: tuple[int, int], rules: PixelRules) -> Image.Image:
    shorter, wanted = min(image.size), rules.shorter_side or min(size)
    longest = shorter * max(2, _MOST_PIXELS // wanted**2)
    if max(image.size) > longest:
        image = image.crop(_middle(image.size, (min(image.width, longest), min(image.height, longest))))
    inner = [wanted if side == shorter else int(wanted * side / shorter) for side in image.size]
    left, top = (round((side - target) / 2) for side, target in zip(inner, size, strict=True))
    return _interpolated(image, (inner[0], inner[1]), rules).crop((left, top, left + size[0], top + size[1]))


def _interpolated(image: Image.Image, size: tuple[int, int], rules: PixelRules) -> Image.Image:
    if rules.interpolation == "bilinear_cykooz":
        return resized_bilinear(image, size)
    if rules.interpolation == "bilinear_no_antialias":
        return image.transform(size, Image.Transform.EXTENT, (0, 0, *image.size), Image.Resampling.BILINEAR)
    return image.resize(size, _FILTERS[rules.interpolation])


def resized_as_tensorflow(image: Image.Image, size: tuple[int, int], rules: PixelRules) -> np.ndarray:
    """(height, width, 3) float32: an RGB picture brought to Pillow's (width, height) as `tf.image.resize` does it.

    It takes the four pixels around each point and does not round; a label in a hundred changes with rounding alone.
    """
    middle = 0.0 if rules.interpolation == "bilinear_tensorflow1" else 0.5
    if rules.resize == "pad":
        inner, (left, top) = _fitting(image.size, size)
        canvas = np.zeros((size[1], size[0], 3), np.float32)
        canvas[top : top + inner[1], left : left + inner[0]] = _between_pixels(image, inner, middle)
        return canvas
    return _between_pixels(_cropped(image, size, rules), size, middle)


def _between_pixels(image: Image.Image, size: tuple[int, int], middle: float) -> np.ndarray:
    """Interpolated between pixels whose numbers are those of their middles, or of their upper left corners."""
    values = np.asarray(image)  # float32 only after there are fewer rows and columns
    for axis, side in ((1, size[0]), (0, size[1])):
        length = values.shape[axis]
        places = np.maximum((np.arange(side, dtype=np.float32) + middle) * np.float32(length / side) - middle, 0)
        before = np.minimum(places.astype(np.int64), length - 1)
        share = np.expand_dims(places - before, (0, 2) if axis else (1, 2)).astype(np.float32)
        rows = before, np.minimum(before + 1, length - 1)
        low, high = (values.take(one, axis).astype(np.float32, copy=False) for one in rows)
        values = low + (high - low) * share
    return values


def _middle(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int, int, int]:
    """The largest centered box of the target's aspect ratio, rounded down; at least a pixel wide and high."""
    width = max(1, min(size[0], int(size[1] * target[0] / target[1])))
    height = max(1, min(size[1], int(size[0] * target[1] / target[0])))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return left, top, left + width, top + height


def _fitting(size: tuple[int, int], target: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The largest size in the picture's aspect ratio that fits into the target, and its place there, as in TensorFlow."""
    whole = np.array(size, np.float32)
    exact = whole / (whole / np.array(target, np.float32)).max()
    width, height = np.maximum(exact.astype(int), 1).tolist()
    left, top = np.maximum((target - exact) / 2, 0).astype(int).tolist()
    return (width, height), (left, top)
