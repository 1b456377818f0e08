"""Pictures at a model's size as Keras's loaders make them, pixel by pixel."""

import io

import numpy as np
import pytest
from PIL import Image
from support.pictures import encoded, noisy

from tlbatch.images.decode import decode
from tlbatch.schema import PixelRules

SHAPES = [(120, 90), (90, 120), (33, 200), (20, 17), (96, 96)]
SIDE = 48


def pixels(data: bytes, **rules: str) -> np.ndarray:
    return decode(data, (SIDE, SIDE), rules=PixelRules("auto", "ignored", **rules)).array


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
def test_bilinear_without_antialias_is_that_of_keras(shape, fit, tmp_path):
    """`image_dataset_from_directory`, in one level of 255: it rounds later than Pillow. (Its JPEG decoder is another one.)"""
    import keras

    (tmp_path / "a.png").write_bytes(data := encoded(noisy((90, 140, 60), 3, shape), "PNG"))
    how = {"crop_to_aspect_ratio": fit == "crop", "pad_to_aspect_ratio": fit == "pad"}
    found = keras.utils.image_dataset_from_directory(
        tmp_path, labels=None, image_size=(SIDE, SIDE), shuffle=False, verbose=False, **how
    )
    wanted = np.concatenate([batch.numpy() for batch in found])[0]
    assert np.abs(pixels(data, resize=fit, interpolation="bilinear_no_antialias") - wanted).max() <= 1.01


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("interpolation", ["nearest", "bicubic", "lanczos", "bilinear"])
def test_the_filters_are_those_of_load_img(shape, interpolation):
    import keras

    data = encoded(noisy((90, 140, 60), 3, shape), "PNG")
    wanted = keras.utils.load_img(io.BytesIO(data), target_size=(SIDE, SIDE), interpolation=interpolation)
    assert np.array_equal(pixels(data, interpolation=interpolation), np.asarray(wanted))


def test_a_large_jpeg_is_decoded_whole_for_other_filters_than_our_own():
    """A reduced scale is a mean of pixels, and nearest takes one of them."""
    data = encoded(noisy((90, 140, 60), 3, (960, 960)))
    wanted = Image.open(io.BytesIO(data)).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    assert np.array_equal(pixels(data, interpolation="nearest"), np.asarray(wanted))
    assert not np.array_equal(pixels(data), np.asarray(wanted))


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_a_sideways_picture_is_fitted_as_it_stands(fit):
    upright = noisy((90, 140, 60), 3, (60, 120))
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 270 degrees
    assert np.array_equal(
        pixels(encoded(turned, "PNG", exif=exif), resize=fit, interpolation="nearest"),
        pixels(encoded(upright, "PNG"), resize=fit, interpolation="nearest"),
    )


def test_padding_is_black_whatever_the_kind_of_picture():
    for mode in ("L", "RGB", "CMYK", "P"):
        data = encoded(noisy((200, 200, 200), 3, (40, 80)).convert(mode), "TIFF")
        corner = pixels(data, resize="pad", interpolation="nearest")[SIDE // 2, 0]
        assert corner.max() <= 1, mode
