"""A picture in 8 bits a band -> the same picture at a model's input size, as the model's training brought it there."""

from __future__ import annotations

from PIL import Image

from tlbatch.schema import PixelRules

#: Interpolation -> Pillow's filter, which averages over all pixels when it makes a picture smaller (antialiasing).
_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
#: What `pad` adds. In CMYK, 0 would be white.
_BLACK = {"CMYK": (0, 0, 0, 255)}


def needs_all_pixels(rules: PixelRules) -> bool:
    """Whether a picture must be decoded at its full size: a reduced one is a mean of pixels, like an antialiased one."""
    return rules.interpolation != "bilinear"


def resized(image: Image.Image, size: tuple[int, int], rules: PixelRules) -> Image.Image:
    """The picture at Pillow's (width, height).

    `crop` and `pad` keep the aspect ratio, as `crop_to_aspect_ratio` and `pad_to_aspect_ratio` of Keras do. Without
    antialiasing, bilinear interpolation takes the four pixels around each point, as `tf.image.resize` does.
    """
    if rules.resize == "pad":
        image = _padded(image, size)
    box = _middle(image.size, size) if rules.resize == "crop" else (0, 0, *image.size)
    if rules.interpolation == "bilinear_no_antialias":
        return image.transform(size, Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)
    return image.resize(size, _FILTERS[rules.interpolation], box)


def _shaped(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The width of the target's aspect ratio at this height, and the height at this width, rounded down as in Keras."""
    width, height = size
    return int(height * target[0] / target[1]), int(width * target[1] / target[0])


def _middle(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int, int, int]:
    """The largest centered box of the target's aspect ratio; at least a pixel wide and high."""
    width, height = (max(1, min(pair)) for pair in zip(size, _shaped(size, target), strict=True))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return left, top, left + width, top + height


def _padded(image: Image.Image, target: tuple[int, int]) -> Image.Image:
    """The picture in the middle of the smallest black canvas of the target's aspect ratio."""
    width, height = (max(pair) for pair in zip(image.size, _shaped(image.size, target), strict=True))
    if (width, height) == image.size:
        return image
    canvas = Image.new(image.mode, (width, height), _BLACK.get(image.mode, 0))
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas
