"""The same bytes with and without cykooz_resizer, in every mode and size, and nearly those of Pillow."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.pictures import encoded, noisy

from tlbatch.images import convolution, resize
from tlbatch.images.convolution import fastest, in_numpy, resized_bilinear
from tlbatch.images.decode import decode
from tlbatch.schema import NEW_RULES

MODES = {"L": 1, "RGB": 3, "CMYK": 4}
#: Old and new (width, height): equal sides, one pixel, enlarged, odd ratios, longer than a picture may be.
SIZES = [
    ((500, 333), (160, 160)),
    ((333, 500), (224, 160)),
    ((160, 160), (160, 160)),
    ((160, 90), (160, 45)),
    ((90, 160), (45, 160)),
    ((1, 1), (1, 1)),
    ((1, 1), (7, 5)),
    ((2, 3), (160, 160)),
    ((1, 65_535), (3, 7)),
    ((65_535, 1), (7, 3)),
    ((65_535, 2), (1, 1)),
    ((4096, 3), (4095, 2)),
    ((4000, 3000), (160, 160)),
    ((640, 480), (639, 481)),
    ((31, 17), (1024, 768)),
]


@pytest.fixture(scope="module")
def in_rust() -> convolution.Pass:
    pytest.importorskip("cykooz_resizer", reason="there is no build of it for this machine")
    return convolution._in_rust()


def picture(mode: str, size: tuple[int, int], kind: str, seed: int = 0) -> Image.Image:
    """Noise of all values, of black and white alone, or white."""
    random = np.random.default_rng(seed)
    shape = (size[1], size[0], MODES[mode])
    values = random.integers(0, 256, shape, np.uint8)
    values = {"noise": values, "extremes": values // 128 * 255, "white": np.full_like(values, 255)}[kind]
    return Image.frombytes(mode, size, values.tobytes())


def both_passes(one_pass: convolution.Pass, image: Image.Image, size: tuple[int, int]) -> bytes:
    for step in ((size[0], image.height), size):
        image = image if image.size == step else one_pass(image, step)
    return image.tobytes()


@pytest.mark.parametrize("kind", ["noise", "extremes", "white"])
@pytest.mark.parametrize("mode", MODES)
def test_numpy_gives_the_bytes_of_the_package(mode, kind, in_rust):
    for old, new in SIZES:
        image = picture(mode, old, kind)
        assert both_passes(in_numpy, image, new) == both_passes(in_rust, image, new), (old, new)


@pytest.mark.parametrize("mode", MODES)
def test_numpy_gives_the_bytes_of_the_package_in_sizes_drawn_at_random(mode, in_rust):
    random = np.random.default_rng(1)
    for seed in range(60):
        old, new = (tuple(np.exp(random.uniform(0, np.log(1000), 2)).astype(int).tolist()) for _ in range(2))
        image = picture(mode, old, "noise", seed)
        assert both_passes(in_numpy, image, new) == both_passes(in_rust, image, new), (seed, old, new)


def test_all_instruction_sets_give_the_same_bytes(in_rust):
    from cykooz_resizer import CpuExtensions, FilterType, ResizeAlg, ResizeOptions, Resizer

    sets = [one for one in CpuExtensions if one is not CpuExtensions.neon]
    options, resizer = ResizeOptions(resize_alg=ResizeAlg.convolution(FilterType.bilinear)), Resizer()
    best = list(CpuExtensions).index(resizer.cpu_extensions)
    for mode in MODES:
        image = picture(mode, (501, 67), "noise")
        for size in ((160, 67), (501, 19)):
            for extensions in sets[: best + 1]:
                resizer.cpu_extensions = extensions
                found = Image.new(mode, size)
                resizer.resize_pil(image, found, options)
                assert found.tobytes() == in_numpy(image, size).tobytes(), (mode, size, extensions)


def test_where_there_are_builds_the_package_is_used_and_elsewhere_numpy(in_rust, monkeypatch):
    fastest.cache_clear()
    assert fastest() is not in_numpy
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cykooz_resizer", None)
        fastest.cache_clear()
        assert fastest() is in_numpy
    for broken in (lambda image, size: image, lambda image, size: image.resize(size, Image.Resampling.BILINEAR)):
        monkeypatch.setattr(convolution, "_in_rust", lambda broken=broken: broken)
        fastest.cache_clear()
        assert fastest() is in_numpy, "it does not give the right bytes"
    fastest.cache_clear()


def test_the_probe_has_the_digest_of_numpy():
    assert convolution._digest_of_probe(in_numpy) == convolution._RIGHT


def test_photographs_are_nearly_those_of_pillow(photos):
    apart = []
    for path in sorted(photos.glob("*.JPEG"))[::4]:
        with Image.open(path) as file:
            image = file.convert("RGB")
        found, wanted = resized_bilinear(image, (160, 160)), image.resize((160, 160), Image.Resampling.BILINEAR)
        apart.append(np.abs(np.asarray(found).astype(int) - np.asarray(wanted)))
    assert np.max(apart) <= 2
    assert 0 < np.mean(apart) < 0.05


@pytest.mark.parametrize("mode", ["1", "P", "LA", "La", "RGBA", "RGBa", "I", "I;16", "F", "YCbCr", "LAB", "HSV"])
def test_other_modes_are_pillows(mode):
    length = len(Image.new(mode, (40, 30)).tobytes())
    image = Image.frombytes(mode, (40, 30), (bytes(range(240)) * 20)[:length])
    wanted = image.resize((16, 12), Image.Resampling.BILINEAR)
    found = resized_bilinear(image, (16, 12))
    assert (found.mode, found.tobytes()) == (wanted.mode, wanted.tobytes())


def test_a_picture_is_not_changed():
    image = noisy((90, 140, 60), 0)
    before = image.tobytes()
    resized_bilinear(image, (48, 48))
    assert image.tobytes() == before


def test_it_starts_no_threads_and_threads_resize_alike(in_rust):
    def resized(seed: int) -> bytes:
        return resized_bilinear(noisy((90, 140, 60), seed, (800, 600)), (160, 160)).tobytes()

    tasks = Path("/proc/self/task")
    before = len(list(tasks.iterdir())) if tasks.is_dir() else threading.active_count()
    alone = [resized(seed) for seed in range(8)]
    after = len(list(tasks.iterdir())) if tasks.is_dir() else threading.active_count()
    assert after == before
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(resized, list(range(8)) * 4)) == alone * 4


@pytest.mark.parametrize("fit", ["stretch", "crop", "crop_exact", "pad", "center_crop", "central_crop"])
def test_every_way_to_fit_is_nearly_that_of_pillow(fit, monkeypatch):
    asked = []
    monkeypatch.setattr(resize, "resized_bilinear", lambda *words: (asked.append(words), resized_bilinear(*words))[1])
    data = encoded(noisy((90, 140, 60), 3, (200, 120)), "PNG")
    rules = NEW_RULES._replace(resize=fit, shorter_side=57 if fit == "center_crop" else None)
    found = decode(data, (48, 48), rules=rules).array.astype(int)
    wanted = decode(data, (48, 48), rules=rules._replace(interpolation="bilinear")).array
    assert np.abs(found - wanted).max() <= 2
    assert len(asked) == (fit != "crop_exact"), "Pillow cuts between pixels"


def test_a_jpeg_is_decoded_at_a_reduced_scale_as_before(photos):
    data = sorted(photos.glob("*.JPEG"))[0].read_bytes()
    wanted = decode(data, (48, 48)).array.astype(int)
    assert np.abs(decode(data, (48, 48), rules=NEW_RULES).array - wanted).max() <= 2
