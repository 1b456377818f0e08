"""Any picture becomes uint8 RGB of one size; anything else becomes a reason."""

import io
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from support.pictures import encoded, noisy

from tlbatch.errors import ErrorKind, Failure
from tlbatch.images.decode import Pixels, decode, prepare_process
from tlbatch.schema import UNRECORDED_RULES

SIZE = (40, 60)  # height, width: not square, so that a mix-up shows
RED = (220, 30, 20)


@pytest.fixture(autouse=True)
def as_in_a_worker():
    """Warnings are errors here; a worker does not show those of its decoders."""
    prepare_process()


def flat(mode: str, color) -> Image.Image:
    return Image.new(mode, (120, 80), color)


def kind_of(data: bytes, **limits) -> ErrorKind:
    found = decode(data, SIZE, **limits)
    assert isinstance(found, Failure), found
    assert found.stage == "decode"
    assert found.message
    return found.kind


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_every_format(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    found = decode(encoded(flat("RGB", RED), kind, **options), SIZE)
    assert isinstance(found, Pixels)
    assert (found.array.shape, found.array.dtype) == ((40, 60, 3), np.uint8)
    assert (found.width, found.height) == (120, 80)
    assert np.abs(found.array.astype(int) - RED).max() <= 3


@pytest.mark.parametrize(
    ("mode", "color", "kind", "expected"),
    [
        ("L", 128, "PNG", (128, 128, 128)),
        ("1", 1, "PNG", (255, 255, 255)),
        ("P", 0, "GIF", (0, 0, 0)),
        ("LA", (100, 255), "PNG", (100, 100, 100)),
        ("RGBA", (*RED, 255), "PNG", RED),
        ("RGBA", (*RED, 0), "PNG", (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), "WEBP", (204, 204, 204)),
        ("CMYK", (0, 255, 255, 0), "TIFF", (255, 0, 0)),
        ("I;16", 0x8040, "PNG", (0x80, 0x80, 0x80)),
        ("I;16", 0x8040, "TIFF", (0x80, 0x80, 0x80)),
    ],
)
def test_every_mode_becomes_rgb(mode, color, kind, expected):
    options = {"lossless": True} if kind == "WEBP" else {}
    found = decode(encoded(flat(mode, color), kind, **options), SIZE)
    assert isinstance(found, Pixels), found
    assert np.abs(found.array.astype(int) - expected).max() <= 2


def test_a_cmyk_jpeg_of_a_printer_is_not_inverted():
    found = decode(encoded(flat("CMYK", (0, 0, 0, 0)), "JPEG"), SIZE)
    assert found.array.min() > 250


def test_of_an_animation_the_first_frame_is_taken():
    frames = [flat("RGB", color) for color in (RED, (0, 0, 255))]
    for kind in ("GIF", "WEBP", "TIFF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(decode(data, SIZE).array.astype(int) - RED).max() <= 12, kind


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(orientation):
    """Every orientation of one scene decodes to the scene: red on the left, green above it on the right."""
    scene = Image.new("RGB", (160, 80), (0, 0, 200))
    scene.paste((200, 0, 0), (0, 0, 60, 80))
    scene.paste((0, 200, 0), (60, 0, 160, 30))
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = scene if orientation == 1 else scene.transpose(Image.Transpose(turn[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(encoded(stored, "PNG", exif=exif), SIZE)
    assert (found.width, found.height) == (160, 80)
    expected = decode(encoded(scene, "PNG"), SIZE)
    assert np.abs(found.array.astype(int) - expected.array).mean() < 1


def test_a_large_jpeg_is_decoded_small_and_never_below_twice_the_target(photos, monkeypatch):
    path = sorted(photos.glob("*.JPEG"))[0]
    loaded = []
    load = JpegImageFile.load
    monkeypatch.setattr(JpegImageFile, "load", lambda image: (load(image), loaded.append(image.size))[0])
    decode(path.read_bytes(), SIZE)
    with Image.open(path) as full:
        assert full.size[0] > loaded[0][0] >= 2 * SIZE[1]
    assert loaded[0][1] >= 2 * SIZE[0]


def test_every_photograph_decodes_to_what_pillow_makes_of_it(photos):
    for path in sorted(photos.glob("*.JPEG")):
        found = decode(path.read_bytes(), (160, 160), rules=UNRECORDED_RULES)
        assert isinstance(found, Pixels), path.name
        with Image.open(path) as image:
            exact = np.asarray(image.convert("RGB").resize((160, 160), Image.Resampling.BILINEAR)).astype(int)
            assert (found.width, found.height) == image.size
        assert np.abs(found.array - exact).mean() < 2, path.name


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", ErrorKind.EMPTY),
        (b"<!doctype html><html>", ErrorKind.NOT_AN_IMAGE),
        (b"just some text", ErrorKind.NOT_AN_IMAGE),
        (b"\0" * 100, ErrorKind.NOT_AN_IMAGE),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", ErrorKind.UNSUPPORTED),
        (b"%PDF-1.7 ...", ErrorKind.UNSUPPORTED),
        (b"\xff\xd8\xff\xe0", ErrorKind.TRUNCATED),
        (b"\x89PNG\r\n\x1a\n", ErrorKind.TRUNCATED),
        (b"RIFF\x10\0\0\0WEBP", ErrorKind.TRUNCATED),
        (b"RIFF\x10\0\0\0AVI LIST", ErrorKind.UNSUPPORTED),
        (b"RIFF\x10\0\0\0WAVEfmt ", ErrorKind.NOT_AN_IMAGE),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41", ErrorKind.UNSUPPORTED),
        (b"\0\0\0\x14ftypqt  \0\0\2\0qt  ", ErrorKind.UNSUPPORTED),
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf", ErrorKind.TRUNCATED),
        (b"\x1aE\xdf\xa3\x01\0\0\0", ErrorKind.UNSUPPORTED),
        (b"BMW and others, a text of some length", ErrorKind.NOT_AN_IMAGE),
        (b"BM\x36\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0", ErrorKind.TRUNCATED),
    ],
)
def test_what_is_no_image_says_so(data, kind):
    assert kind_of(data) is kind


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_half_an_image_is_an_error_and_never_half_a_prediction(kind, share):
    data = encoded(noisy(RED, 1, (200, 150)), kind)
    assert kind_of(data[: int(len(data) * share)]) in (ErrorKind.TRUNCATED, ErrorKind.DECODE_FAILED)


@pytest.mark.parametrize("at", [60, 3000, -200])
def test_a_png_with_a_wrong_byte_is_an_error_though_its_exif_is_looked_for(at):
    """Looking for the EXIF of a PNG loads it: an error there was once ignored, and half a picture was predicted."""
    data = bytearray(encoded(noisy(RED, 1, (200, 150)), "PNG"))
    data[at] ^= 255
    assert kind_of(bytes(data)) in (ErrorKind.TRUNCATED, ErrorKind.DECODE_FAILED)


def test_a_torn_exif_block_does_not_spoil_its_picture():
    data = bytearray(encoded(flat("RGB", RED), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 40))
    assert isinstance(decode(bytes(data), SIZE), Pixels)


def test_what_is_over_a_limit_is_refused_from_its_header():
    png = encoded(flat("RGB", RED), "PNG")
    head = png[: png.index(b"IDAT") + 4]  # and not one pixel
    assert kind_of(head, max_pixels=9_599) is ErrorKind.TOO_LARGE
    assert kind_of(head, max_pixels=9_600) is not ErrorKind.TOO_LARGE
    assert kind_of(png, max_pixels=9_599) is ErrorKind.TOO_LARGE
    assert isinstance(decode(png, SIZE, max_pixels=9_600), Pixels)
    assert kind_of(png, max_side=119) is ErrorKind.TOO_LARGE
    assert isinstance(decode(png, SIZE, max_side=120), Pixels)


def test_numbers_without_a_range_are_unsupported():
    for mode in ("F", "I"):
        assert kind_of(encoded(Image.new(mode, (8, 8), 7), "TIFF")) is ErrorKind.UNSUPPORTED


def test_threads_decode_alike(photos):
    data = [path.read_bytes() for path in sorted(photos.glob("*.JPEG"))[:40]]
    alone = [decode(one, (64, 64)).array for one in data]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda one: decode(one, (64, 64)).array, data * 3))
    assert all(np.array_equal(one, alone[number % 40]) for number, one in enumerate(together))


def test_random_damage_raises_nothing(photos):
    """Bytes of a real photograph, flipped at random: pixels or a failure, never an exception."""
    random = np.random.default_rng(0)
    data = np.frombuffer(encoded(noisy(RED, 3)), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(300):
            hurt = data.copy()
            hurt[random.integers(0, len(data), random.integers(1, 30))] = random.integers(0, 256)
            assert isinstance(decode(hurt.tobytes(), SIZE), Pixels | Failure)


def test_the_result_owns_its_pixels():
    found = decode(encoded(flat("RGB", RED)), SIZE)
    assert found.array.flags.c_contiguous
    io.BytesIO(found.array.tobytes())
