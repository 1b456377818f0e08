"""Samples of any depth become the picture they show, or a reason."""

import io
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image, PngImagePlugin
from support import deep
from support.pictures import encoded, noisy

from tlbatch.errors import ErrorKind, Failure
from tlbatch.images.decode import Pixels, decode, prepare_process
from tlbatch.schema import PixelRules

SIZE = (60, 80)


@pytest.fixture(autouse=True)
def as_in_a_worker():
    prepare_process()


@pytest.fixture
def rgb() -> np.ndarray:
    """(60, 80, 3) uint8: every picture here shows it, in the size that is asked for, so that nothing is resized."""
    return np.asarray(noisy((150, 110, 60), 1, (80, 60)))


@pytest.fixture
def grey(rgb) -> np.ndarray:
    values = np.asarray(Image.fromarray(rgb).convert("L"))[..., None].copy()
    values[0, 0], values[0, 1] = 0, 255  # whatever the depth, black and white occur
    return values


def scaled(samples: np.ndarray, bits: int) -> np.ndarray:
    return samples.astype(np.uint64) * (2**bits - 1) // 255


def pixels(data: bytes, **rules) -> Pixels:
    found = decode(data, SIZE, rules=PixelRules(**rules))
    assert isinstance(found, Pixels), found
    return found


def shows(data: bytes, expected: np.ndarray, bits: int = 8, **rules) -> Pixels:
    """The picture is the expected one, but for what is lost by storing it in fewer bits."""
    found = pixels(data, **rules)
    lost = 255 / (2 ** min(bits, 8) - 1)
    assert np.abs(found.array.astype(int) - expected).max() <= lost + 1
    return found


def refused(data: bytes, *words: str) -> None:
    found = decode(data, SIZE)
    assert isinstance(found, Failure), found
    assert found.kind is ErrorKind.UNSUPPORTED, found
    assert all(word in found.message for word in words), found.message


@pytest.mark.parametrize("bits", [3, 5, 6, 7, 10, 12, 14, 16, 24, 32])
@pytest.mark.parametrize("photometric", [0, 1])
def test_grey_tiffs_of_any_depth(grey, bits, photometric):
    samples = scaled(grey, bits)
    stored = 2**bits - 1 - samples if photometric == 0 else samples
    found = shows(deep.tiff(stored, bits, photometric), grey, bits)
    assert found.white_level == (2**bits - 1 if bits > 8 else None)


@pytest.mark.parametrize("bits", [4, 5, 7, 10, 12, 14, 16, 24, 32])
@pytest.mark.parametrize("planes", [False, True])
def test_colour_tiffs_of_any_depth(rgb, bits, planes):
    shows(deep.tiff(scaled(rgb, bits), bits, 2, planes=planes), rgb, bits)


@pytest.mark.parametrize(("bits", "white"), [(8, 255), (10, 1023), (12, 4095), (16, 65_535)])
def test_the_range_that_16_bits_use_is_found(grey, rgb, bits, white):
    """As cameras of inspection lines store their 10 and 12 bits."""
    for data, expected in (
        (deep.tiff(scaled(grey, bits), 16, 1), grey),
        (deep.tiff(scaled(rgb, bits), 16, 2), rgb),
        (deep.png(scaled(grey, bits)), grey),
        (imagecodecs.jpegxl_encode(scaled(grey, bits)[..., 0].astype(np.uint16), lossless=True), grey),
    ):
        assert shows(data, expected).white_level == white


def test_jpeg_2000_of_any_depth(grey, rgb):
    dark = scaled(grey // 20, 12).astype(np.uint16)[..., 0]
    said = imagecodecs.jpeg2k_encode(dark, level=0, reversible=True, bitspersample=12)
    assert shows(said, grey // 20).white_level == 4095
    for expected, samples in ((grey, grey[..., 0]), (rgb, rgb)):
        for bits, white in ((12, 4095), (16, 65_535)):
            data = imagecodecs.jpeg2k_encode(scaled(samples, bits).astype(np.uint16), level=0, reversible=True)
            assert shows(data, expected).white_level == white, (bits, samples.ndim)


def test_a_lossy_format_may_leave_the_range_a_little():
    """Over twelve bits of sixteen in a smooth picture with sharp edges, which lossy coding makes overshoot."""
    steps = np.where(np.indices((300, 400)).sum(axis=0) // 60 % 2, 4095, 200).astype(np.uint16)
    for data in (imagecodecs.jpegxl_encode(steps, distance=1.0), imagecodecs.jpeg2k_encode(steps, level=60)):
        assert pixels(data).white_level == 4095


def test_a_jpeg_xl_says_its_depth(grey):
    dark = scaled(grey // 20, 12).astype(np.uint16)[..., 0]
    said = imagecodecs.jpegxl_encode(dark, lossless=True, bitspersample=12)
    assert shows(said, grey // 20).white_level == 4095
    floats = imagecodecs.jpegxl_encode((grey[..., 0] / 255).astype(np.float32), distance=0.5)
    assert pixels(floats).white_level == 1


def test_the_full_16_bits_give_their_high_byte(rgb):
    samples = np.random.default_rng(0).integers(0, 65_536, (60, 80, 3)).astype(np.uint16)
    for data in (deep.png(samples), deep.tiff(samples, 16, 2)):
        assert np.array_equal(pixels(data).array, samples >> 8)


def test_what_a_file_says_of_its_range_comes_first(grey):
    dark = grey // 8  # which uses 5 bits of its 12
    found = shows(deep.tiff(scaled(dark, 12), 12, 1), dark)
    assert found.white_level == 4095
    assert shows(deep.tiff(scaled(dark, 12), 16, 1, t281=4095), dark).white_level == 4095
    assert shows(deep.png(scaled(dark, 12), (b"sBIT", b"\x0c")), dark).white_level == 4095


@pytest.mark.parametrize("kind", ["P2", "P3", "P5", "P6"])
def test_a_ppm_of_16_bits_does_not_say_what_is_white(grey, rgb, kind):
    """OpenCV writes 65,535 whatever the samples are."""
    expected = grey if kind in ("P2", "P5") else rgb

    def file(samples: np.ndarray, white: int = 65_535) -> bytes:
        plain = " ".join(map(str, samples.ravel().tolist())).replace(" ", "\n", 9).encode()
        body = plain if kind in ("P2", "P3") else samples.astype(">u2").tobytes()
        return f"{kind}\n# made by a camera\n80 60\n{white}\n".encode() + body

    assert shows(file(scaled(expected, 12)), expected).white_level == 4095
    assert shows(file(scaled(expected, 14)), expected, white_level=16_383).white_level == 16_383
    dark = expected // 20
    shows(file(scaled(dark, 12), 4095), dark)
    whole = file(scaled(expected, 16))
    with Image.open(io.BytesIO(whole)) as image:
        seen = np.asarray(image) if kind in ("P3", "P6") else np.asarray(image)[..., None] >> 8
    assert np.array_equal(pixels(whole).array, np.broadcast_to(seen, (60, 80, 3)))


def test_a_file_that_says_16_bits_means_it(grey):
    dark = scaled(grey // 20, 16)
    assert shows(deep.png(dark, (b"sBIT", b"\x10")), grey // 20).white_level == 65_535
    assert shows(deep.tiff(dark, 16, 1, t281=65_535), grey // 20).white_level == 65_535
    occurs = int(dark.max())  # some writers put the greatest value that occurs
    assert pixels(deep.tiff(dark, 16, 1, t281=occurs)).white_level == pixels(deep.tiff(dark, 16, 1)).white_level
    both = np.dstack([scaled(grey, 12), np.full_like(grey, 255).astype(np.uint64) * 257])
    assert shows(deep.png(both, (b"sBIT", b"\x0c\x10")), grey).white_level == 4095, "of gray, and not of alpha"


def test_a_png_scaled_to_16_bits_as_its_specification_wants_is_not_scaled_again(grey):
    dark = scaled(grey // 20, 12).astype(np.uint16)  # no sample above 4095 after it is scaled
    replicated = dark << 4 | dark >> 8
    for samples in (replicated, dark << 4):
        assert samples.max() <= 4095
        found = pixels(deep.png(samples, (b"sBIT", b"\x0c")))
        assert found.white_level == 65_535
        assert np.array_equal(found.array[..., :1], samples >> 8)


def test_a_setting_says_the_range_that_no_file_says(grey):
    fourteen = deep.tiff(scaled(grey, 14), 16, 1)
    assert pixels(fourteen).white_level == 65_535
    assert shows(fourteen, grey, white_level=16_383).white_level == 16_383
    signed = deep.tiff(grey.astype(np.int64) // 2, 8, 1, t339=2)
    refused(signed, "signed", "white_level")
    shows(signed, grey, 7, white_level=127)
    shows(deep.png(scaled(grey, 12)), grey, white_level=4095)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8"])
def test_floats_between_0_and_1(grey, rgb, dtype):
    bits = np.dtype(dtype).itemsize * 8
    assert shows(deep.tiff((grey / 255).astype(dtype), bits, 1, t339=3), grey).white_level == 1
    shows(deep.tiff((rgb / 255).astype(dtype), bits, 2, t339=3), rgb)
    degrees = deep.tiff((grey / 10).astype(dtype), bits, 1, t339=3)
    refused(degrees, "from 0 to 25.5", "white_level")
    shows(degrees, grey, white_level=25.5)


def test_floats_that_are_not_numbers_are_unsupported(grey):
    holes = (grey / 255).astype("<f4")
    holes[3, 3] = np.nan
    refused(deep.tiff(holes, 32, 1, t339=3), "not finite")
    found = decode(deep.tiff(holes, 32, 1, t339=3), SIZE, rules=PixelRules(white_level=1))
    assert isinstance(found, Failure)


def test_alpha_beside_a_white_level(grey):
    opaque = np.dstack([grey / 10, np.ones_like(grey)]).astype("<f4")
    shows(deep.tiff(opaque, 32, 1, t339=3, t338=2), grey, white_level=25.5)
    signed = np.dstack([grey.astype(np.int64) * 16, np.full_like(grey, 1).astype(np.int64) * 32_767])
    shows(deep.tiff(signed, 16, 1, t339=2, t338=2), grey, white_level=4080)


def test_alpha_is_drawn_over_white_at_any_depth(rgb):
    alpha = np.full((60, 80, 1), 255, np.uint8)
    alpha[:, :40] = 0
    over = np.where(alpha == 0, 255, rgb)
    both = np.dstack([rgb, alpha])
    shows(deep.png(scaled(both, 16)), over)
    shows(deep.tiff(scaled(both, 16), 16, 2, t338=2), over)
    shows(deep.tiff(scaled(np.dstack([rgb * (alpha > 0), alpha]), 16), 16, 2, t338=1), over)
    shows(imagecodecs.jpegxl_encode(both, lossless=True), over)
    gray = rgb[..., :1] * (alpha > 0)
    shows(deep.tiff(np.dstack([gray, alpha]), 8, 1, t338=1), np.where(alpha == 0, 255, rgb[..., :1]))
    cmyk = np.dstack([255 - rgb, np.zeros_like(alpha), alpha])
    shows(deep.tiff(cmyk, 8, 5, t338=2), over)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("bands", [1, 3])
def test_a_hidden_colour_is_drawn_white(bits, bands):
    """PNG's tRNS names one colour that is transparent."""
    hidden, other = np.full((60, 80, bands), 9000, np.uint16), 40_000
    hidden[:, 40:] = other
    if bits == 16:
        data = deep.png(hidden, (b"tRNS", struct.pack(f">{bands}H", *[9000] * bands)))
    else:
        image = Image.fromarray((hidden[..., 0] >> 8).astype(np.uint8)).convert("RGB" if bands == 3 else "L")
        data = encoded(image, "PNG", transparency=(9000 >> 8,) * 3 if bands == 3 else 9000 >> 8)
    found = pixels(data).array
    assert (found[:, :40] == 255).all()
    assert (found[:, 40:] == other >> 8).all()


@pytest.mark.parametrize("bits", [2, 4])
def test_a_hidden_shade_of_few_bits_is_drawn_white(bits):
    """A gray PNG of 2 or 4 bits, whose transparent shade is given in its own bits."""
    shade, other = 1, 2**bits - 1
    row = np.array([shade] * 40 + [other] * 40, np.uint64)
    places = np.arange(bits - 1, -1, -1, dtype=np.uint64)
    packed = b"\0" + np.packbits((row[:, None] >> places & np.uint64(1)).astype(np.uint8).ravel()).tobytes()
    head = struct.pack(">IIBBBBB", 80, 60, bits, 0, 0, 0, 0)
    parts = ((b"IHDR", head), (b"tRNS", struct.pack(">H", shade)), (b"IDAT", zlib.compress(packed * 60)), (b"IEND", b""))
    found = pixels(b"\x89PNG\r\n\x1a\n" + b"".join(deep.png_chunk(*part) for part in parts)).array
    assert (found == 255).all()


def test_palettes_of_16_bits(grey):
    colours = np.arange(65_536, dtype=np.uint16)
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer, scaled(grey[..., 0], 16).astype(np.uint16), photometric="palette", colormap=np.stack([colours] * 3)
    )
    shows(buffer.getvalue(), grey)


@pytest.mark.parametrize("kind", [{"bigtiff": True}, {"byteorder": ">"}, {"tile": (32, 32)}, {"compression": "zlib"}])
@pytest.mark.parametrize("kind_more", [{}, {"predictor": True, "compression": "lzw"}])
def test_tiffs_in_any_layout(rgb, kind, kind_more):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, scaled(rgb, 16).astype(np.uint16), photometric="rgb", **(kind | kind_more))
    shows(buffer.getvalue(), rgb)
    cut = buffer.getvalue()[:-2_000]
    found = decode(cut, SIZE)
    assert isinstance(found, Failure)
    assert found.kind in (ErrorKind.TRUNCATED, ErrorKind.DECODE_FAILED)


def test_bands_beyond_those_with_a_colour(rgb, grey):
    near = np.full((60, 80, 2), 7, np.uint8)
    shows(deep.tiff(np.dstack([rgb, near]), 8, 2), rgb)
    refused(deep.tiff(np.dstack([grey, near, near]), 8, 1), "5 bands")


@pytest.mark.parametrize(
    ("number", "name"), [(34712, "JPEG 2000"), (50002, "JPEG XL"), (34887, "LERC"), (34925 + 9_000, "43925")]
)
def test_packings_of_tiffs_that_are_not_undone_are_named(rgb, number, name):
    refused(deep.tiff(rgb, 8, 2, compression=number), name, "TIFF")


def test_the_main_page_of_a_tiff_is_not_its_thumbnail(rgb):
    for deep_too in (False, True):
        samples = scaled(rgb, 16).astype(np.uint16) if deep_too else rgb
        buffer = io.BytesIO()
        with tifffile.TiffWriter(buffer) as writer:
            writer.write(samples[::4, ::4], photometric="rgb", subfiletype=1)
            writer.write(samples, photometric="rgb")
        found = shows(buffer.getvalue(), rgb)
        assert (found.width, found.height) == (80, 60)


def test_an_uncompressed_ycbcr_with_fewer_samples_of_colour_is_named(rgb):
    refused(deep.tiff(rgb, 8, 6), "YCbCr")


def test_a_cameras_raw_file_is_not_its_thumbnail(rgb):
    refused(deep.tiff(rgb, 8, 2, t50706=1), "raw")
    refused(b"II*\0\x10\0\0\0CR\x02\0" + bytes(100), "raw")


@pytest.mark.parametrize(
    ("bits", "parts"), [(16, (5, 6, 5, 0)), (16, (4, 4, 4, 4)), (16, (5, 5, 5, 1)), (32, (8, 8, 8, 0)), (32, (10, 10, 10, 0))]
)
def test_bmps_with_any_masks(rgb, bits, parts):
    value, masks, shift = np.zeros(rgb.shape[:2], np.uint32), [], 0
    for band, depth in zip((0, 1, 2, 3), parts, strict=True):
        mask = (2**depth - 1) << shift
        source = rgb[..., band] if band < 3 else np.full(rgb.shape[:2], 255)
        value |= (scaled(source, depth).astype(np.uint32) if depth else 0) << shift
        masks.append(mask)
        shift += depth
    shows(deep.bmp(value, bits, tuple(masks)), rgb, min(parts[:3]))


@pytest.mark.parametrize(
    ("header", "bits", "compression", "name"),
    [
        (40, 0, 4, "JPEG inside"),
        (108, 0, 5, "PNG inside"),
        (40, 32, 11, "CMYK colours"),
        (64, 24, 4, "24-bit run lengths"),
        (124, 64, 0, "64 bits a pixel"),
    ],
)
def test_kinds_of_bmp_that_are_not_decoded_are_named(header, bits, compression, name):
    head = struct.pack("<IiiHHIIiiII", header, 8, 8, 1, bits, compression, 512, 0, 0, 0, 0).ljust(header, b"\0")
    refused(struct.pack("<2sIHHI", b"BM", 14 + header + 512, 0, 0, 14 + header) + head + bytes(512), name)


def test_an_alpha_mask_that_is_not_used(rgb):
    value = sum(rgb[..., band].astype(np.uint32) << shift for band, shift in ((0, 16), (1, 8), (2, 0)))
    shows(deep.bmp(value, 32, (0xFF0000, 0xFF00, 0xFF, 0xFF000000)), rgb)


def test_12_bit_lossless_and_newer_jpegs_are_named(rgb):
    deep_jpeg = imagecodecs.jpeg8_encode(scaled(rgb, 12).astype(np.uint16), bitspersample=12)
    refused(deep_jpeg, "JPEG of 12 bits")
    shows(imagecodecs.jpeg8_encode(rgb, lossless=True), rgb)
    refused(imagecodecs.ljpeg_encode(scaled(rgb[..., 0], 12).astype(np.uint16), bitspersample=12), "lossless JPEG of 12 bits")
    refused(imagecodecs.jpegls_encode(rgb), "JPEG-LS")


def test_text_that_a_decoder_refuses_does_not_cost_the_picture(rgb, monkeypatch):
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 1_000)
    whole = encoded(Image.fromarray(rgb), "PNG")
    head, rest = whole[:33], whole[33:]
    wrong = deep.png_chunk(b"tEXt", b"Comment\0of a camera", checksum=7)
    long = deep.png_chunk(b"tEXt", b"Comment\0" + b"a" * 4_000)
    time = deep.png_chunk(b"tIME", bytes(7), checksum=7)
    for text in (wrong, long, time):
        shows(head + text + rest, rgb)
    hurt = bytearray(head + wrong + rest)
    hurt[-40] ^= 255  # and a wrong byte among the pixels is still an error
    assert isinstance(decode(bytes(hurt), SIZE), Failure)


def test_a_frame_that_does_not_cover_its_gif_lies_on_white():
    def gif(left, top, width, height, index):
        palette = bytes([255, 0, 0, 0, 0, 255])
        body = b"GIF89a" + struct.pack("<HHBBB", 80, 60, 0x80, 0, 0) + palette
        pixels = deep.gif_pixels(bytes([index] * (width * height)))
        return body + b"," + struct.pack("<HHHHB", left, top, width, height, 0) + pixels + b";"

    found = pixels(gif(40, 0, 40, 60, 1)).array
    assert (found[:, :39] == 255).all()
    assert (found[:, 41:] == (0, 0, 255)).all()


def test_samples_that_would_need_much_memory_are_refused_before_they_are_decoded(rgb):
    doubles = deep.tiff((rgb / 255).astype("<f8"), 64, 2, t339=3)
    found = decode(doubles, SIZE, max_pixels=60 * 80)  # as many pixels as there are, at 24 bytes each
    assert isinstance(found, Failure)
    assert (found.kind, "samples exceed 8 times" in found.message) == (ErrorKind.TOO_LARGE, True)
    assert isinstance(decode(doubles, SIZE, max_pixels=3 * 60 * 80), Pixels)
