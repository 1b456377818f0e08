"""Bytes -> a picture of 8 bits a band in its own size, by Pillow, or by another reader what Pillow does not read rightly."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from tlbatch.images import bmp, colour, jxl, png, ppm, recognise, tiff
from tlbatch.images.levels import to_8_bits, white_of
from tlbatch.images.recognise import TooLargeError, UnsupportedError
from tlbatch.schema import PixelRules, Size

#: The formats that Pillow decodes, by Pillow's names. Their plugins are imported here because Pillow does not load plugins by
#: itself when it is called with a list of formats.
FORMATS = tuple(
    plugin.format
    for plugin in (
        JpegImagePlugin.JpegImageFile,
        PngImagePlugin.PngImageFile,
        WebPImagePlugin.WebPImageFile,
        BmpImagePlugin.BmpImageFile,
        GifImagePlugin.GifImageFile,
        TiffImagePlugin.TiffImageFile,
        AvifImagePlugin.AvifImageFile,
        Jpeg2KImagePlugin.Jpeg2KImageFile,
        PpmImagePlugin.PpmImageFile,
    )
)

#: A JPEG that is decoded at a reduced scale may have this many times `max_pixels`; the photographs of telephones do.
_MOST_REDUCED = 8

#: A JPEG is decoded at this many times the target size or more. Same top-1 as with full-size decoding, for MobileNetV2 at
#: 160 and 992 photographs and crops of photographs: 95.2 % at 1, 99.8 % at 1.5, 99.9 % at 2 (benchmarks/choices.py).
_DRAFT_MARGIN = 2

_EXIF_ORIENTATION = 0x0112
#: Left, upper, right and lower edge.
Box = tuple[int, int, int, int]

#: The EXIF orientations whose stored width is the height of the upright image.
SIDEWAYS = (5, 6, 7, 8)


class Limits(NamedTuple):
    """The most pixels that are decoded of an image, and its longest side."""

    max_pixels: int
    max_side: int

    def require(self, size: tuple[int, int] | None, *, decoded: int | None = None) -> None:
        """Raises TooLargeError if a (width, height), or the number of pixels that are decoded of it, is too large."""
        if size is None:
            return
        width, height = size
        if not width * height:
            raise ValueError(f"{width}x{height} pixels are not an image")
        if (width * height if decoded is None else decoded) > self.max_pixels:
            raise TooLargeError(f"{width}x{height} pixels exceed max_pixels={self.max_pixels}")
        if max(width, height) > self.max_side:
            raise TooLargeError(f"{width}x{height} pixels exceed max_side={self.max_side}")


class Picture(NamedTuple):
    """An image in 8 bits a band, before it is resized; `size` is (width, height) as stored, before it is turned upright.

    Grey stays grey (L), and CMYK stays CMYK if its profile says how to read it; everything else is RGB.
    """

    image: Image.Image
    size: tuple[int, int]
    orientation: int = 1
    profile: bytes | None = None
    white_level: float | None = None


def read_picture(data: bytes, size: Size | None, limits: Limits, rules: PixelRules) -> Picture:
    """Decode with Pillow, or with another reader what Pillow does not read, or not rightly; at full size if `size` is None."""
    if data.startswith((jxl.CODESTREAM, jxl.CONTAINER)):
        return _from_jxl(data, limits, rules)
    if recognise.is_heic(data):
        _register_heic()
    try:
        return _with_pillow(data, size, limits, rules)
    except (TooLargeError, UnsupportedError, MemoryError):
        raise
    except Exception as error:
        other = _other_reader(data, size, limits, rules, error)
        if other is None:
            raise
    return other()


def _other_reader(
    data: bytes, size: Size | None, limits: Limits, rules: PixelRules, error: Exception
) -> Callable[[], Picture] | None:
    """A second way to read an image that Pillow refused with an error; None if there is none."""
    if isinstance(error, UnidentifiedImageError) and recognise.is_tiff(data) and recognise.unsupported(data) is None:
        return lambda: _from_tiff(data, limits, rules)
    if data.startswith(b"BM") and bmp.handles(data):
        return lambda: _from_bmp(data, limits, rules)
    if data.startswith(png.SIGNATURE):
        plain = png.simpler(data)
        return None if plain is None else lambda: read_picture(plain, size, limits, rules)
    # A lossless JPEG has no reduced scales; a JPEG 2000 may have fewer of them than are usual.
    if size is not None and (recognise.is_jpeg_2000(data) or recognise.jpeg_frame(data) == ("lossless JPEG", 8)):
        return lambda: _with_pillow(data, None, limits, rules)
    return None


def _with_pillow(data: bytes, size: Size | None, limits: Limits, rules: PixelRules) -> Picture:
    """Decode with Pillow; a JPEG at a reduced scale, unless `size` is None."""
    with Image.open(io.BytesIO(data), formats=[*FORMATS, *_EXTRA_FORMATS]) as image:
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            _seek_main_page(image)
            if _needs_tifffile(image, data):
                return _from_tiff(data, limits, rules)
        original = image.size
        is_jpeg = image.format in ("JPEG", "MPO")  # MPO: several JPEGs in one file, written by phones
        if not is_jpeg:
            limits.require(original)
            _require_small_tiles(image, limits)
        frame: Box | None = image.tile[0][1] if image.format == "GIF" and image.tile else None
        if not is_jpeg:
            if isinstance(image, Jpeg2KImagePlugin.Jpeg2KImageFile):
                if recognise.jpeg_2000_bits(data) > 8:
                    return _from_deep_jpeg_2000(data, rules)
                if size is not None:
                    _reduce(image, size)
            image.load()  # reading a PNG's EXIF would load it too, and `_orientation` would ignore the error
        orientation = _orientation(image)
        if is_jpeg:
            _draft(image, size, orientation, limits)
        profile = colour.fitting(image.info.get("icc_profile"), image.mode, rules)
        fast = _with_fast_transform(data) if is_jpeg and rules.jpeg == "fast" and image.mode in ("L", "RGB") else None
        flat, white = (fast, None) if fast is not None else _to_8_bits_a_band(image, data, profile, rules)
        if frame is not None and frame != (0, 0, *original):
            flat = _on_canvas(flat, frame, rules)
        return Picture(flat, original, orientation, profile, white)


def _with_fast_transform(data: bytes) -> Image.Image | None:
    """A JPEG decoded as TensorFlow does by default, which Pillow cannot; None if it is damaged or of a rare kind."""
    import simplejpeg

    if not recognise.is_common_jpeg(data):  # the decoder is not safe with others
        return None
    try:
        return Image.fromarray(simplejpeg.decode_jpeg(data, "RGB", fastdct=True, fastupsample=False))
    except ValueError:
        return None


#: Formats of packages that are installed with the extra `formats`.
_EXTRA_FORMATS: list[str] = []


def _register_heic() -> None:
    """Let Pillow read HEIC; raises UnsupportedError if the package for it is not installed."""
    if "HEIF" in _EXTRA_FORMATS:
        return
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise UnsupportedError(_HOW_TO_READ_HEIC) from None
    register_heif_opener(thumbnails=False)
    _EXTRA_FORMATS.append("HEIF")


_HOW_TO_READ_HEIC = 'HEIC is read with an additional package: pip install "tlbatch[formats]"'


def _draft(image: Image.Image, size: Size | None, orientation: int, limits: Limits) -> None:
    """Let a JPEG be decoded at a reduced scale; raises TooLargeError if what is then decoded is too large."""
    original = image.size
    if size is not None:
        target = stored_size(size, orientation)
        image.draft("RGB", (_DRAFT_MARGIN * target[0], _DRAFT_MARGIN * target[1]))
    width, height = image.size
    if "progressive" in image.info:  # all coefficients of the whole image are held
        limits.require(original)
    else:
        limits.require(original, decoded=max(width * height, original[0] * original[1] // _MOST_REDUCED))


def _reduce(image: Jpeg2KImagePlugin.Jpeg2KImageFile, size: Size) -> None:
    """Let a JPEG 2000 be decoded without its finest levels, at `_DRAFT_MARGIN` times the longer side of `size` or more."""
    shorter, wanted = min(image.size), _DRAFT_MARGIN * max(size)
    levels = 0
    while shorter >> (levels + 1) >= wanted and levels < 5:  # files have five levels, unless their writer was told otherwise
        levels += 1
    if levels:
        image.reduce = levels


def _seek_main_page(image: TiffImagePlugin.TiffImageFile) -> None:
    """Go to the first page of a TIFF that is neither a smaller copy of another page nor a mask."""
    if not tiff.is_secondary(image.tag_v2):
        return
    for number in range(1, min(image.n_frames, tiff.MOST_PAGES)):
        image.seek(number)
        if not tiff.is_secondary(image.tag_v2):
            return
    image.seek(0)


def _needs_tifffile(image: TiffImagePlugin.TiffImageFile, data: bytes) -> bool:
    """Whether Pillow would not read the samples of this TIFF as they are meant.

    Raises:
        UnsupportedError: a kind that tifffile does not read either.
    """
    tags = image.tag_v2
    tiff.require_known(tags)
    if tiff.may_be_raw(tags):
        tiff.require_no_raw(data)
    depth = tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
    kinds = tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))
    deep = max(depth if isinstance(depth, tuple) else (depth,)) > 8
    planes_with_alpha = tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2 and "A" in image.mode.upper()
    unsigned = set(kinds if isinstance(kinds, tuple) else (kinds,)) == {1}
    return deep or image.mode == "La" or planes_with_alpha or not unsigned


def _require_small_tiles(image: Image.Image, limits: Limits) -> None:
    """Raises TooLargeError for a tile of a TIFF for which libtiff would allocate more memory than the image needs."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    width, height = (tags.get(tag, 0) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH))
    if int(np.max(width)) * int(np.max(height)) > limits.max_pixels:
        raise TooLargeError(f"a TIFF tile exceeds max_pixels={limits.max_pixels}")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation; 1 (upright) if there is none or the EXIF block is damaged."""
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # the EXIF parser may raise anything on damaged bytes
        return 1


def stored_size(size: Size, orientation: int) -> tuple[int, int]:
    """Pillow's (width, height) of an image that has `size` once it is upright."""
    return size if orientation in SIDEWAYS else (size[1], size[0])


def _to_8_bits_a_band(
    image: Image.Image, data: bytes, profile: bytes | None, rules: PixelRules
) -> tuple[Image.Image, float | None]:
    """An image of any Pillow mode as RGB, as grey, or as CMYK if its profile says how to read that; and its white level."""
    image.load()
    if image.format == "PNG":
        depth = png.bit_depth(data)
        if depth == 16:
            return _deep_png(data, rules)
        hidden = image.info.get("transparency")
        if image.mode == "L" and isinstance(hidden, int) and depth in (2, 4):
            image.info["transparency"] = hidden * 255 // (2**depth - 1)  # Pillow has scaled the samples and not this one
    if image.format == "PPM" and (samples := ppm.samples_of_16_bits(data)) is not None:
        white = white_of(samples, None, rules.white_level)
        if white != 65_535:  # otherwise what Pillow has made of it stays as it is
            return _from_samples(samples, white, rules)
    if (image.mode == "RGB" and "transparency" not in image.info) or (image.mode == "CMYK" and profile is not None):
        return image, None
    if image.mode.startswith("I") or image.mode == "F":
        # Of these formats (PPM, HEIC) Pillow scales whole numbers to 16 bits, by what the file says of its depth.
        samples = np.asarray(image) if image.mode == "F" else np.asarray(image).astype(np.uint16)
        return _from_samples(samples, None if image.mode == "F" else 65_535, rules)
    unused_alpha = image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0)
    if image.has_transparency_data and not unused_alpha:
        return _opaque(image.convert("RGBA"), rules), None
    wanted = "L" if image.mode in ("1", "L") else "RGB"
    return image if image.mode == wanted else image.convert(wanted), None


def _deep_png(data: bytes, rules: PixelRules) -> tuple[Image.Image, float]:
    """A PNG of 16 bits a band, of which Pillow gives all bits for gray alone; a transparent colour becomes an alpha channel."""
    import imagecodecs

    samples = imagecodecs.png_decode(data)
    colours = samples if samples.ndim == 2 else samples[..., : 3 if samples.shape[2] >= 3 else 1]
    return _from_samples(samples, png.declared_white(colours, png.significant_bits(data)), rules)


def _from_deep_jpeg_2000(data: bytes, rules: PixelRules) -> Picture:
    """A JPEG 2000 of more than 8 bits, at its full size: at a reduced one its samples would leave their range."""
    import imagecodecs

    bits = recognise.jpeg_2000_bits(data)
    flat, white = _from_samples(imagecodecs.jpeg2k_decode(data), 2**bits - 1 if bits < 16 else None, rules, lossy=True)
    return Picture(flat, flat.size, white_level=white)


def _from_samples(
    samples: np.ndarray, declared: float | None, rules: PixelRules, *, lossy: bool = False
) -> tuple[Image.Image, float]:
    """Samples (height, width) or (height, width, 1 to 4), with or without alpha -> grey or RGB, and their white level."""
    samples = samples if samples.ndim == 3 else samples[..., None]
    bands = 3 if samples.shape[2] >= 3 else 1
    colours, alpha = samples[..., :bands], samples[..., bands] if samples.shape[2] > bands else None
    white = white_of(colours, declared, rules.white_level, lossy=lossy)
    return _flat(to_8_bits(colours, white), _alpha(alpha, white), rules), white


def _alpha(alpha: np.ndarray | None, white: float) -> np.ndarray | None:
    """An alpha channel in 8 bits. Its greatest value is 1 for floats, that of the colours, or else that of its type."""
    if alpha is None:
        return None
    if alpha.dtype.kind == "f":
        return to_8_bits(alpha, 1.0)
    as_colours = alpha.dtype.kind == "u" and float(alpha.max(initial=0)) <= white
    return to_8_bits(alpha, white if as_colours else float(np.iinfo(alpha.dtype).max))


def _flat(colours: np.ndarray, alpha: np.ndarray | None, rules: PixelRules, *, premultiplied: bool = False) -> Image.Image:
    """(height, width, 1 or 3) uint8 colours, over the background: as RGB, or as grey if nothing is transparent."""
    if alpha is None:
        return Image.fromarray(colours if colours.shape[2] == 3 else colours[..., 0])
    rgb = np.broadcast_to(colours, (*colours.shape[:2], 3))
    if premultiplied:  # over black; no colours are hidden
        shown = (255 - alpha[..., None]) * (rules.background == "white")
        return Image.fromarray(np.minimum(rgb.astype(np.uint16) + shown, 255).astype(np.uint8))
    return _opaque(Image.fromarray(np.dstack([rgb, alpha])), rules)


def _opaque(image: Image.Image, rules: PixelRules) -> Image.Image:
    """An RGBA image over the background, or its hidden colours."""
    if rules.background == "hidden":
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, rules.background)
    return Image.alpha_composite(ground, image).convert("RGB")


def _on_canvas(image: Image.Image, frame: Box, rules: PixelRules) -> Image.Image:
    """A grey or RGB image, with the background outside a box; black if it says `hidden`: nothing is hidden there."""
    canvas = Image.new(image.mode, image.size, "white" if rules.background == "white" else "black")
    canvas.paste(image.crop(frame), (frame[0], frame[1]))
    return canvas


def _from_jxl(data: bytes, limits: Limits, rules: PixelRules) -> Picture:
    """A JPEG XL, which its decoder turns upright."""
    header = jxl.read_header(data)
    limits.require((header.width, header.height))
    import imagecodecs

    samples = imagecodecs.jpegxl_decode(data, index=0, numthreads=1)
    if sorted(samples.shape[:2]) != sorted((header.width, header.height)):  # channels first
        raise UnsupportedError("a JPEG XL with further channels than gray or RGB and alpha is not supported")
    if samples.dtype == np.uint8:
        flat, _ = _from_samples(samples, 255, rules)
        return Picture(flat, flat.size)
    declared = None if header.bits in (None, 16) else 1.0 if header.is_float else float(2 ** (header.bits or 0) - 1)
    flat, white = _from_samples(samples, declared, rules, lossy=True)
    return Picture(flat, flat.size, white_level=white)


def _from_bmp(data: bytes, limits: Limits, rules: PixelRules) -> Picture:
    limits.require(bmp.size_of(data))
    image = bmp.read(data)
    return Picture(_opaque(image, rules) if image.mode == "RGBA" else image, image.size)


def _from_tiff(data: bytes, limits: Limits, rules: PixelRules) -> Picture:
    page = tiff.read(data, limits.max_pixels, limits.require)
    height, width = page.colours.shape[:2]
    white = white_of(page.colours, page.white, rules.white_level)
    colours = to_8_bits(page.colours, white)
    alpha = _alpha(page.alpha, white)
    deep = None if page.full <= 255 and page.colours.dtype.kind == "u" else white
    profile = colour.fitting(page.profile, {1: "L", 3: "RGB", 4: "CMYK"}[page.colours.shape[2]], rules)
    if colours.shape[2] == 4:
        if alpha is not None and not page.premultiplied and rules.background != "hidden":  # less alpha is less ink
            colours = (colours.astype(np.uint16) * alpha[..., None] // 255).astype(np.uint8)
        flat = Image.fromarray(colours, "CMYK")
        flat = flat if profile is not None else flat.convert("RGB")
    else:
        flat = _flat(255 - colours if page.inverted else colours, alpha, rules, premultiplied=page.premultiplied)
    return Picture(flat, (width, height), page.orientation, profile, deep)
