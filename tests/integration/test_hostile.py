"""What strangers upload costs its own row and nothing else: odd images, alone and in one run; limits, just above themselves."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageFile, PngImagePlugin
from support.command import PEAK
from support.hostile import FORMATS, MAX_PIXELS, corpus, png_with_text, saved, tiled_tiff
from support.pictures import COLORS, encoded, noisy

import tlbatch
from tlbatch.errors import Failure
from tlbatch.images.decode import Pixels, decode, prepare_process
from tlbatch.schema import NEW_RULES

ODD = corpus()


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd.name)
def test_each_becomes_what_it_must(odd):
    prepare_process()
    found = decode(odd.data, (96, 96), max_pixels=MAX_PIXELS, rules=NEW_RULES)
    if odd.expected:
        assert isinstance(found, Failure), "half an image was decoded"
        assert found.kind in odd.expected
        assert found.message
    else:
        assert isinstance(found, Pixels), found


@pytest.mark.parametrize("kind", [*FORMATS, "tile"])
def test_a_picture_over_the_limit_is_refused_before_its_pixels_take_memory(kind, tmp_path):
    """A camera's twelve million pixels, whose decoding takes 36 MB and more, in a process of its own with a lower limit."""
    whole = tiled_tiff(4000) if kind == "tile" else saved(Image.new("RGB", (4000, 3000), (9, 90, 200)), kind)
    (tmp_path / "large").write_bytes(whole)
    code = (
        "import json, sys, time\n" + PEAK + "from tlbatch.images.decode import Pixels, decode, prepare_process\n"
        "prepare_process()\n"
        "data = open(sys.argv[1], 'rb').read()\n"
        "decode(b'GIF89a', (160, 160))\n"
        "before = peak()\n"
        "began = time.process_time()\n"
        "refused = decode(data, (160, 160), max_pixels=1_000_000)\n"
        "took, more = time.process_time() - began, peak() - before\n"
        "whole = decode(data, (160, 160), max_pixels=20_000_000)\n"
        "print(json.dumps([str(refused.kind), took, more, isinstance(whole, Pixels), peak() - before]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "large"], capture_output=True, text=True, check=True, timeout=60
    )
    refused, seconds, kilobytes, decoded, decoding = json.loads(done.stdout)
    assert (refused, decoded) == ("too_large", True)
    assert seconds < 0.1
    assert kilobytes < 8 * 1024
    assert kilobytes < decoding or kind == "JPEG", "a JPEG is decoded at a part of its size"
    assert done.stderr == ""


@pytest.mark.parametrize("chunk", [b"zTXt", b"iCCP"])
def test_a_text_or_profile_over_pillows_limit_is_not_unpacked(monkeypatch, chunk):
    """The limit is Pillow's own, and tlbatch leaves it where it is."""
    prepare_process()
    assert PngImagePlugin.MAX_TEXT_CHUNK == ImageFile.SAFEBLOCK == 1 << 20
    assert isinstance(decode(png_with_text(5_000, chunk), (96, 96)), Pixels)
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 1_000)
    safely = PngImagePlugin._safe_zlib_decompress
    unpacked = []
    monkeypatch.setattr(PngImagePlugin, "_safe_zlib_decompress", lambda data: (unpacked.append(safely(data)), unpacked[-1])[1])
    assert isinstance(decode(png_with_text(5_000, chunk), (96, 96)), Pixels), "it is decoded without them"
    assert not unpacked
    assert isinstance(decode(png_with_text(500, chunk), (96, 96)), Pixels)
    assert [len(text) for text in unpacked] == [500]


@pytest.fixture(scope="module")
def classified(bundle_url, tmp_path_factory, ray_here) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """One run over all of them with a good image behind each; and a run over the good ones alone."""
    folder = tmp_path_factory.mktemp("hostile")
    for number, odd in enumerate(ODD):
        for store in ("mixed", "good"):
            (folder / store).mkdir(exist_ok=True)
            (folder / store / f"{number:03d}-good").write_bytes(encoded(noisy(COLORS["red"], number)))
        (folder / "mixed" / f"{number:03d}-{odd.name}").write_bytes(odd.data)
    settings = {"bundle": bundle_url, "include": "*", "max_failed_ratio": 1.0, "max_pixels": MAX_PIXELS}
    outputs = {}
    for store in ("mixed", "good"):
        outputs[store] = str(folder / f"out-{store}")
        tlbatch.classify(images=str(folder / store), output=outputs[store], **settings)
        assert tlbatch.verify(outputs[store])["ok"]
    tables = [tlbatch.read_predictions(outputs[store]) for store in ("mixed", "good")]
    return tables[0], tlbatch.read_errors(outputs["mixed"]), tables[1]


def test_in_one_run_each_has_its_row(classified):
    mixed, errors, _ = classified
    failed = dict(zip(errors["key"], errors["kind"], strict=True))
    predicted = set(mixed["key"])
    wrong = []
    for number, odd in enumerate(ODD):
        key = f"{number:03d}-{odd.name}"
        if (failed.get(key) not in odd.expected) if odd.expected else (key not in predicted):
            wrong.append((key, failed.get(key), odd.expected))
    assert wrong == []
    assert len(mixed) + len(errors) == 2 * len(ODD)


def test_the_good_ones_between_them_are_as_if_they_were_alone(classified):
    mixed, _, good = classified
    beside = mixed[mixed["key"].str.endswith("-good")].reset_index(drop=True)
    columns = ["key", "label", "score", "width", "height"]
    pd.testing.assert_frame_equal(beside[columns], good[columns])
    assert all(np.array_equal(*pair) for pair in zip(beside["top_scores"], good["top_scores"], strict=True))


def test_a_decoder_says_nothing_to_the_user(tmp_path):
    """Neither on stdout nor on stderr, also where libtiff and libjpeg print from C."""
    for number, odd in enumerate(ODD):
        (tmp_path / f"{number:03d}").write_bytes(odd.data)
    code = (
        "import sys, pathlib\n"
        "from tlbatch.images.decode import decode, prepare_process\n"
        "prepare_process()\n"
        "for path in sorted(pathlib.Path(sys.argv[1]).iterdir()): decode(path.read_bytes(), (96, 96))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True, timeout=120)
    assert (done.stdout, done.stderr) == ("", "")
