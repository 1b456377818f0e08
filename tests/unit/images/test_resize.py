"""Pictures at a model's size as Keras's loaders make them, pixel by pixel."""

import io

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps
from support.pictures import encoded, noisy

from tlbatch.images import resize
from tlbatch.images.decode import decode
from tlbatch.schema import PixelRules

SHAPES = [(120, 90), (90, 120), (33, 200), (20, 17), (96, 96)]
SIDE = 48
original = Image.Image.resize


def pixels(data: bytes, **rules: object) -> np.ndarray:
    return decode(data, (SIDE, SIDE), rules=PixelRules("auto", "ignored", **rules)).array


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_bilinear_without_antialias_is_that_of_keras(shape, fit, kind, tmp_path):
    """`image_dataset_from_directory`, whose pixels are not rounded."""
    import keras

    (tmp_path / f"a.{kind.lower()}").write_bytes(data := encoded(noisy((90, 140, 60), 3, shape), kind))
    how = {"crop_to_aspect_ratio": fit == "crop", "pad_to_aspect_ratio": fit == "pad"}
    found = keras.utils.image_dataset_from_directory(
        tmp_path, labels=None, image_size=(SIDE, SIDE), shuffle=False, verbose=False, **how
    )
    wanted = np.concatenate([batch.numpy() for batch in found])[0]
    found = pixels(data, resize=fit, interpolation="bilinear_tensorflow", jpeg="fast")
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() <= 1e-3
    older = pixels(data, resize=fit, interpolation="bilinear_no_antialias", jpeg="fast")
    assert np.abs(older - wanted).max() <= 1.01


def transparent(kind: str) -> Image.Image:
    """A picture with colours under its transparent parts."""
    image = noisy((90, 140, 60), 3, (SIDE, SIDE))
    if kind == "palette":
        return image.quantize(16)
    image.putalpha(Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE), np.uint8)))
    return image.convert(kind)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # of Pillow, in Keras's loader
@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette"])
def test_hidden_colours_are_those_of_keras_loaders(kind, tmp_path):
    import keras
    import tensorflow as tf

    more = {"transparency": bytes(range(0, 256, 16))} if kind == "palette" else {}
    (tmp_path / "a.png").write_bytes(data := encoded(transparent(kind), "PNG", **more))
    over = Image.open(io.BytesIO(data))
    assert over.has_transparency_data
    over = over.convert("RGBA")
    hidden = pixels(data, background="hidden")
    assert np.array_equal(hidden, np.asarray(keras.utils.load_img(tmp_path / "a.png")))
    assert np.array_equal(hidden, tf.io.decode_image(data, channels=3).numpy())
    for background in ("white", "black"):
        wanted = Image.alpha_composite(Image.new("RGBA", over.size, background), over).convert("RGB")
        assert np.array_equal(pixels(data, background=background), np.asarray(wanted))


@pytest.mark.parametrize(
    ("premultiplied", "shown"), [(False, {"hidden": 200, "black": 100}), (True, {"hidden": 100, "black": 100})]
)
def test_the_background_of_deep_samples(premultiplied, shown):
    """A TIFF of 16 bits a band; premultiplied colours hide nothing."""
    samples = np.full((SIDE, SIDE, 4), 257 * (100 if premultiplied else 200), np.uint16)
    samples[..., 3] = 257 * 128
    file = io.BytesIO()
    tifffile.imwrite(file, samples, photometric="rgb", extrasamples=["assocalpha" if premultiplied else "unassalpha"])
    for background, value in {**shown, "white": 100 + 127}.items():
        assert np.abs(pixels(file.getvalue(), background=background).astype(int) - value).max() <= 1, background


@pytest.mark.parametrize("shape", SHAPES)
def test_padding_keeps_the_way_of_tensorflow_1(shape):
    import tensorflow as tf

    image = noisy((90, 140, 60), 3, shape)
    scale = SIDE / max(image.size)
    exact = [side * scale for side in np.asarray(image).shape[:2]]
    inner = tuple(max(1, int(side)) for side in exact)
    wanted = tf.compat.v1.image.resize_bilinear(np.asarray(image, np.float32)[None], inner).numpy()[0]
    found = pixels(encoded(image, "PNG"), resize="pad", interpolation="bilinear_tensorflow1")
    top, left = (int((SIDE - side) / 2) for side in exact)
    assert np.abs(found[top : top + inner[0], left : left + inner[1]] - wanted).max() <= 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_an_exact_crop_is_that_of_pillow(shape):
    image = noisy((90, 140, 60), 3, shape)
    wanted = ImageOps.fit(image, (SIDE, SIDE), Image.Resampling.LANCZOS)
    found = pixels(encoded(image, "PNG"), resize="crop_exact", interpolation="lanczos")
    assert np.array_equal(found, np.asarray(wanted))


@pytest.mark.parametrize("how", [{}, {"progressive": True}, {"quality": 30, "subsampling": 2}, {"subsampling": 1}, {"L": True}])
def test_the_fast_transform_is_that_of_tensorflow(how):
    """Also of pictures that are gray, progressive, or have coarse colours."""
    import tensorflow as tf

    how = dict(how)
    image = noisy((90, 140, 60), 3, (123, 77)).convert("L" if how.pop("L", False) else "RGB")
    data = encoded(image, **how)
    wanted = tf.io.decode_image(data, channels=3).numpy()
    rules = PixelRules("auto", "ignored", jpeg="fast")
    assert np.array_equal(decode(data, (77, 123), rules=rules).array, wanted)
    assert not np.array_equal(decode(data, (77, 123), rules=rules._replace(jpeg="accurate")).array, wanted)


def test_what_the_fast_decoder_does_not_take_is_decoded_by_the_other(monkeypatch):
    """Rare kinds of JPEG, damaged ones, and other formats. (A decoder that is never asked cannot end the process.)"""
    import simplejpeg

    asked = []
    real = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda data, *rest, **how: asked.append(data) or real(data, *rest, **how))
    rules = PixelRules("auto", "ignored", jpeg="fast")
    common = encoded(noisy((90, 140, 60), 3))
    at = common.index(b"\xff\xc0")
    arithmetic = common[:at] + b"\xff\xc9" + common[at + 2 :]
    cmyk = encoded(noisy((90, 140, 60), 3).convert("CMYK"))
    png = encoded(noisy((90, 140, 60), 3), "PNG")
    for data in (arithmetic, cmyk, png, common[: len(common) // 2]):
        plain, fast = (decode(data, (32, 32), rules=one) for one in (rules._replace(jpeg="accurate"), rules))
        assert type(plain) is type(fast)
    assert asked == [common[: len(common) // 2]], "it raises an error, and Pillow says which one"


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


@pytest.mark.parametrize("shape", [*SHAPES, (300, 31), (31, 300), (1200, 900)])
@pytest.mark.parametrize(("name", "method"), [("bilinear_pillow", 2), ("bicubic", 3)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_centre_crop_is_that_of_torchvision(shape, name, method, kind):
    """Its own words, in Pillow: the shorter side to so many pixels, the longer one rounded down, the middle rounded to even."""
    data = encoded(noisy((90, 140, 60), 3, shape), kind)
    image, short = Image.open(io.BytesIO(data)), 57
    width, height = image.size
    inner = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    left, top = (round((side - SIDE) / 2.0) for side in inner)
    wanted = image.resize(inner, method).crop((left, top, left + SIDE, top + SIDE))
    assert np.array_equal(pixels(data, resize="center_crop", interpolation=name, shorter_side=short), np.asarray(wanted))


@pytest.mark.parametrize("shape", [(900, 10), (10, 900)])
def test_a_very_long_picture_is_cut_before_its_shorter_side_is_enlarged(shape, monkeypatch):
    """The same picture within a level: the middle of the cut one may lie a fraction of a pixel elsewhere."""
    data = encoded(Image.radial_gradient("L").resize(shape).convert("RGB"), "PNG")
    how = {"resize": "center_crop", "interpolation": "bilinear_pillow", "shorter_side": 57}
    whole, seen = pixels(data, **how), []
    monkeypatch.setattr(resize, "_MOST_PIXELS", 4 * 57**2)
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *rest: seen.append(size) or original(self, size, *rest))
    cut = pixels(data, **how)
    assert np.abs(cut.astype(int) - whole).max() <= 2
    assert max(seen[0]) == 4 * 57


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_tf_slims_central_crop_and_interpolation_from_corners(shape, kind):
    import tensorflow as tf

    data = encoded(noisy((90, 140, 60), 3, shape), kind)
    cut = tf.image.central_crop(tf.io.decode_image(data, 3, expand_animations=False), 0.875)
    wanted = tf.compat.v1.image.resize_bilinear(cut[None], (SIDE, SIDE)).numpy()[0]
    found = pixels(data, resize="central_crop", interpolation="bilinear_tensorflow1", jpeg="fast")
    assert np.abs(found - wanted).max() <= 1e-3
