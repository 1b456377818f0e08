"""Formats of telephones and browsers, and the colours of their profiles."""

import io
import struct

import imagecodecs
import numpy as np
import pytest
from PIL import Image, ImageCms
from support import deep
from support.pictures import encoded, noisy

from tlbatch.errors import ErrorKind, Failure
from tlbatch.images import colour, jxl, pictures
from tlbatch.images.decode import Pixels, decode, prepare_process
from tlbatch.schema import UNRECORDED_RULES

SIZE = (90, 120)


@pytest.fixture(autouse=True)
def as_in_a_worker():
    prepare_process()


@pytest.fixture
def scene() -> Image.Image:
    """A smooth picture with a bright left upper corner, so that a turned one shows."""
    rows, columns = np.mgrid[0:180, 0:240]
    red, green = 255 - columns, np.clip(255 - rows - columns / 4, 0, 255)
    return Image.fromarray(np.stack([red, green, np.full_like(red, 90)], axis=2).astype(np.uint8))


def difference(data: bytes, scene: Image.Image, **given) -> float:
    found = decode(data, SIZE, **given)
    assert isinstance(found, Pixels), found
    expected = np.asarray(scene.resize((SIZE[1], SIZE[0]), Image.Resampling.BILINEAR)).astype(int)
    return float(np.abs(found.array - expected).mean())


def heic(image: Image.Image, **options: object) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "options"),
    [("AVIF", {}), ("JPEG2000", {}), ("JPEG2000", {"no_jp2": True}), ("JPEG2000", {"num_resolutions": 1}), ("PPM", {})],
)
def test_formats_that_pillow_reads(scene, kind, options):
    assert difference(encoded(scene, kind, **options), scene) < 3


def test_jpeg_xl_and_heic(scene):
    assert difference(imagecodecs.jpegxl_encode(np.asarray(scene)), scene) < 3
    assert difference(imagecodecs.jpegxl_encode(np.asarray(scene.convert("L"))), scene.convert("L").convert("RGB")) < 3
    assert difference(heic(scene), scene) < 3


def test_without_its_package_heic_is_named(scene, monkeypatch):
    data = heic(scene)
    monkeypatch.setattr(pictures, "_EXTRA_FORMATS", [])
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    found = decode(data, SIZE)
    assert isinstance(found, Failure)
    assert found.kind is ErrorKind.UNSUPPORTED
    assert "tlbatch[formats]" in found.message


@pytest.mark.parametrize("kind", ["AVIF", "HEIC", "JPEG", "PNG", "TIFF", "WEBP"])
def test_every_format_is_upright(scene, kind):
    """The picture is stored lying on its side, and a tag says how it is turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = scene.transpose(Image.Transpose.ROTATE_90)
    data = heic(lying, exif=exif.tobytes()) if kind == "HEIC" else encoded(lying, kind, exif=exif.tobytes())
    assert difference(data, scene) < 4
    found = decode(data, SIZE)
    assert (found.width, found.height) == scene.size


@pytest.mark.parametrize("size", [(1, 1), (256, 256), (640, 480), (4000, 10), (1920, 1080), (33, 77)])
def test_the_size_of_a_jpeg_xl_is_known_before_it_is_decoded(size):
    for options in ({}, {"lossless": True}, {"usecontainer": True}):
        data = imagecodecs.jpegxl_encode(np.zeros((size[1], size[0], 3), np.uint8), **options)
        assert jxl.read_header(data)[:2] == size
        found = decode(data, SIZE, max_pixels=size[0] * size[1] - 1)
        assert isinstance(found, Failure)
        assert found.kind is ErrorKind.TOO_LARGE


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000", "PPM", "JXL", "HEIC"])
def test_half_an_image_is_an_error(kind):
    whole = noisy((120, 90, 60), 3, (200, 150))
    if kind == "JXL":
        data = imagecodecs.jpegxl_encode(np.asarray(whole))
    else:
        data = heic(whole) if kind == "HEIC" else encoded(whole, kind)
    for share in (0.1, 0.5, 0.9):
        found = decode(data[: int(len(data) * share)], SIZE)
        assert isinstance(found, Failure), (share, found)
        assert found.kind in (ErrorKind.TRUNCATED, ErrorKind.DECODE_FAILED), found


def test_a_large_jpeg_2000_is_decoded_small(monkeypatch):
    data = encoded(noisy((120, 90, 60), 3, (1600, 1200)), "JPEG2000")
    sizes = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda image, *given: (sizes.append(image.size), resize(image, *given))[1])
    decode(data, SIZE)
    assert sizes == [(400, 300)]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
def test_a_colour_profile_is_converted(scene, kind):
    """The numbers of a picture in a wide colour space show the same colours."""
    srgb = ImageCms.createProfile("sRGB")
    wide = ImageCms.ImageCmsProfile(io.BytesIO(deep.WIDE))
    stored = ImageCms.profileToProfile(scene, srgb, wide)
    data = encoded(stored, kind, icc_profile=deep.WIDE, **({"quality": 95} if kind in ("JPEG", "WEBP", "AVIF") else {}))
    assert difference(data, scene) < 3
    assert difference(data, scene, rules=UNRECORDED_RULES) > 10
    assert difference(encoded(scene, "PNG", icc_profile=deep.WIDE[:200]), scene) < 1  # a damaged profile is ignored


def test_a_profile_of_srgb_leaves_the_numbers_alone(scene):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert difference(encoded(scene, "PNG", icc_profile=profile), scene) == 0


def test_a_profile_of_grey(scene):
    grey = scene.convert("L")
    dark = deep.profile((), 1.0, b"GRAY")  # linear light, which sRGB shows much brighter
    found = decode(encoded(grey, "PNG", icc_profile=dark), SIZE)
    plain = decode(encoded(grey, "PNG"), SIZE)
    assert found.array.mean() > plain.array.mean() + 20
    assert (found.array.max(axis=2) - found.array.min(axis=2)).max() <= 1


def test_a_profile_of_another_colour_space_is_ignored(scene):
    assert difference(encoded(scene, "PNG", icc_profile=deep.profile((), 1.0, b"GRAY")), scene) == 0
    cmyk = encoded(scene.convert("CMYK"), "TIFF", icc_profile=deep.WIDE)
    assert difference(cmyk, scene) < 2


def test_a_profile_over_the_limit_is_ignored(scene, monkeypatch):
    data = encoded(scene, "PNG", icc_profile=deep.WIDE)
    assert difference(data, scene) > 5
    monkeypatch.setattr(colour, "_MAX_PROFILE_BYTES", len(deep.WIDE) - 1)
    assert difference(data, scene) == 0


def test_a_jpeg_xl_in_parts_and_one_with_further_channels():
    data = imagecodecs.jpegxl_encode(np.zeros((300, 200, 3), np.uint8))
    parts = [
        struct.pack(">I4sI", 12 + len(part), b"jxlp", number) + part for number, part in enumerate((b"", data[:5], data[5:]))
    ]
    file_type = struct.pack(">I4s", 20, b"ftyp") + b"jxl \0\0\0\0jxl "
    split = jxl.CONTAINER + file_type + b"".join(parts)
    assert jxl.read_header(split)[:2] == (200, 300)
    found = decode(split, SIZE, max_pixels=59_999)
    assert isinstance(found, Failure)
    assert found.kind is ErrorKind.TOO_LARGE
    with pytest.raises(EOFError):
        jxl.read_header(jxl.CONTAINER + file_type + parts[0])


def test_a_photograph_of_several_pictures(scene):
    assert difference(encoded(scene, "MPO", quality=95, save_all=True, append_images=[scene.rotate(180)]), scene) < 3


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("compression", [None, "tga_rle"])
def test_a_tga_is_named_though_it_has_no_magic_number(scene, mode, compression):
    data = encoded(scene.convert(mode), "TGA", compression=compression)
    for one in (data, data.removesuffix(data[-26:]), data[:3000]):
        found = decode(one, SIZE)
        assert isinstance(found, Failure)
        assert (found.kind, found.message) == (ErrorKind.UNSUPPORTED, "TGA is not supported")


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (imagecodecs.jpegxr_encode(np.zeros((8, 8, 3), np.uint8)), "JPEG XR"),
        (imagecodecs.qoi_encode(np.zeros((8, 8, 3), np.uint8)), "QOI"),
        (imagecodecs.rgbe_encode(np.zeros((8, 8, 3), np.float32)), "Radiance HDR"),
        (b"SIMPLE  =                    T".ljust(2880), "FITS"),
        (b"P7\nWIDTH 1\nHEIGHT 1\nDEPTH 3\nMAXVAL 255\nTUPLTYPE RGB\nENDHDR\n\0\0\0", "PAM"),
    ],
)
def test_formats_that_are_not_decoded_are_named(data, name):
    found = decode(data, SIZE)
    assert isinstance(found, Failure)
    assert (found.kind, found.message) == (ErrorKind.UNSUPPORTED, f"{name} is not supported")
