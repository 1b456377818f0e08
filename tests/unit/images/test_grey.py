"""Grey stays grey until after the resize, and its pixels are those that it would have as RGB."""

import imagecodecs
import numpy as np
import pytest
from PIL import Image
from support import deep
from support.pictures import encoded, noisy

import tlbatch.images.decode as stage
from tlbatch.images.decode import decode
from tlbatch.images.resize import resized
from tlbatch.schema import NEW_RULES

GREY = noisy((120, 120, 120), 5, (130, 90)).convert("L")
VALUES = np.asarray(GREY)
TURNED = Image.Exif()
TURNED[0x0112] = 6
FILES = {
    "JPEG": encoded(GREY, "JPEG"),
    "a large JPEG": encoded(GREY.resize((1300, 900)), "JPEG"),
    "a turned JPEG": encoded(GREY, "JPEG", exif=TURNED),
    "a JPEG with a profile": encoded(GREY, "JPEG", icc_profile=deep.profile(((0, 0),) * 3, 1.0, b"GRAY")),
    "PNG": encoded(GREY, "PNG"),
    "PNG of 1 bit": encoded(GREY.convert("1"), "PNG"),
    "PNG of 16 bits": deep.png((VALUES.astype(np.uint16) * 257)[..., None]),
    "TIFF": encoded(GREY, "TIFF"),
    "TIFF of 12 bits": deep.tiff(VALUES.astype(np.uint64)[..., None] * 4095 // 255, 12, 1),
    "BMP": encoded(GREY, "BMP"),
    "PPM": encoded(GREY, "PPM"),
    "JPEG 2000": encoded(GREY, "JPEG2000"),
    "JPEG XL": imagecodecs.jpegxl_encode(VALUES, lossless=True),
}


@pytest.mark.parametrize("interpolation", ["bilinear_cykooz", "bilinear", "nearest", "bicubic", "lanczos"])
@pytest.mark.parametrize("file", FILES)
def test_grey_has_the_pixels_of_rgb(file, interpolation, monkeypatch):
    modes = []

    def of_rgb(image: Image.Image, *words) -> Image.Image:
        modes.append(image.mode)
        return resized(image.convert("RGB"), *words)

    for fit in ("stretch", "crop", "pad", "crop_exact"):
        rules = NEW_RULES._replace(interpolation=interpolation, resize=fit)
        found = decode(FILES[file], (48, 64), rules=rules)
        with monkeypatch.context() as patch:
            patch.setattr(stage, "resized", of_rgb)
            wanted = decode(FILES[file], (48, 64), rules=rules)
        assert found.array.shape == (48, 64, 3)
        assert np.array_equal(found.array, wanted.array), fit
    assert modes == ["L"] * 4


def test_an_animation_may_begin_with_a_grey_part():
    data = bytearray(encoded(GREY, "GIF"))
    wide, high = GREY.width + 30, GREY.height + 10
    data[6:10] = wide.to_bytes(2, "little") + high.to_bytes(2, "little")  # of its canvas
    for background, around in (("white", 255), ("hidden", 0)):
        found = decode(bytes(data), (high, wide), rules=NEW_RULES._replace(background=background)).array
        assert np.array_equal(found[: GREY.height, : GREY.width], np.asarray(GREY.convert("RGB")))
        assert (found[GREY.height :] == around).all()
        assert (found[:, GREY.width :] == around).all()


def test_transparent_grey_lies_over_the_background():
    image = Image.merge("LA", (GREY, Image.new("L", GREY.size, 0)))
    assert (decode(encoded(image, "PNG"), (48, 64), rules=NEW_RULES).array == 255).all()
    assert (decode(encoded(GREY.point(lambda _: 7), "PNG", transparency=7), (48, 64), rules=NEW_RULES).array == 255).all()
