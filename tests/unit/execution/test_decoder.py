"""Rows of a block become attempts: each row is read in the thread that suits its own address."""

import contextlib
import json
import threading
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
from PIL import Image
from support.pictures import encoded

from tlbatch.errors import ErrorKind, Failure
from tlbatch.execution.decoder import Decoder
from tlbatch.execution.records import ClassifyJob, attempts_from_table, attempts_to_table
from tlbatch.images import reader
from tlbatch.images.decode import Pixels, prepare_process
from tlbatch.images.shards import Member
from tlbatch.schema import PixelRules

RED, BLUE = (220, 30, 20), (20, 30, 220)


@pytest.fixture
def decoder(tmp_path):
    """The decoder of an actor with local and remote rows. A watchdog would end this process, so there is none."""
    prepare_process()
    job = ClassifyJob(
        bundle_url="unused",
        head_urls=(),
        storage_options={},
        engine="auto",
        decode_threads=2,
        predict_threads=1,
        gpu=False,
        batch_size=None,
        remote=True,
        image_field=None,
        max_bytes=1 << 30,
        max_pixels=1 << 30,
        max_side=1 << 16,
        top_k=1,
        predictions=True,
        features_dtype=None,
        quarantine_url=str(tmp_path / "suspects"),
    )
    return Decoder(
        job, SimpleNamespace(size=(32, 48), pixel_rules=PixelRules()), 4, SimpleNamespace(watching=contextlib.nullcontext)
    )


@pytest.fixture
def rows(tmp_path):
    """A red local image, a blue remote image, and a remote image that does not exist."""
    red, blue = (encoded(Image.new("RGB", (96, 64), color), "PNG") for color in (RED, BLUE))
    (tmp_path / "red.png").write_bytes(red)
    store = fsspec.filesystem("memory")
    store.pipe_file("/mixed/blue.png", blue)
    uris = [str(tmp_path / "red.png"), "memory://mixed/blue.png", "memory://mixed/gone.png"]
    names = ("row", "uri", "key", "size", "etag", "format")
    yield [dict(zip(names, (number, uri, uri, None, None, "image"), strict=True)) for number, uri in enumerate(uris)]
    store.rm("/mixed", recursive=True)


def test_a_row_is_read_by_a_fetch_thread_if_that_row_is_remote(decoder, rows, monkeypatch):
    read_in = {}
    image = decoder._reader.image

    def recorded(row):
        read_in[row["uri"]] = threading.current_thread().name.rsplit("_", 1)[0]
        return image(row)

    monkeypatch.setattr(decoder._reader, "image", recorded)
    red, blue, gone = decoder.attempts(rows)
    assert read_in == {
        rows[0]["uri"]: "tlbatch-decode",
        rows[1]["uri"]: "tlbatch-fetch",
        rows[2]["uri"]: "tlbatch-fetch",
    }
    for attempt, row, color in ((red, rows[0], RED), (blue, rows[1], BLUE)):
        assert (attempt.row, attempt.index, attempt.key) == (row, 0, row["key"])
        assert isinstance(attempt.outcome, Pixels)
        assert attempt.outcome.array.shape == (32, 48, 3)
        assert (attempt.outcome.array == np.array(color, np.uint8)).all()
        assert (attempt.outcome.width, attempt.outcome.height) == (96, 64)
    assert isinstance(gone.outcome, Failure)
    assert gone.outcome.kind == ErrorKind.NOT_FOUND


def test_isolated_images_are_the_same_and_leave_no_mark(decoder, rows, tmp_path):
    expected, found = list(decoder.attempts(rows)), list(decoder.attempts_isolated(rows))
    for one, other in zip(expected[:2], found[:2], strict=True):
        assert np.array_equal(one.outcome.array, other.outcome.array)
    assert found[2].outcome == expected[2].outcome
    assert not list((tmp_path / "suspects").glob("*"))


def test_what_is_skipped_in_a_shard_is_counted_with_its_first_image(decoder, tmp_path, monkeypatch):
    red = encoded(Image.new("RGB", (96, 64), RED), "PNG")

    def read(_kind, _file, wanted):
        wanted.skip("._*")
        yield Member(0, "1.png", red)
        wanted.skip(".json")
        yield Member(1, "2.png", red)
        wanted.skip(".json")

    monkeypatch.setattr(reader, "read_members", read)
    (tmp_path / "a.tar").write_bytes(b"x")
    row = {"row": 7, "uri": str(tmp_path / "a.tar"), "key": "a.tar", "size": 1, "etag": None, "format": "tar"}
    for attempts in (decoder.attempts([row]), decoder.attempts_isolated([row])):
        table = attempts_to_table(list(attempts), (32, 48))
        passed = [json.loads(one) if one else None for one in table["passed"].to_pylist()]
        assert passed == [{"._*": 1, ".json": 2}, None]
        assert attempts_from_table(table, (32, 48))[0].passed == {"._*": 1, ".json": 2}
