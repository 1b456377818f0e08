"""Attempts become Arrow and come back as they were."""

from dataclasses import replace

import numpy as np
import pytest

from tlbatch.errors import ErrorKind, Failure
from tlbatch.execution.predictor import _stacked
from tlbatch.execution.records import Attempt, attempts_from_table, attempts_to_table
from tlbatch.images.decode import Pixels

SIZE = (4, 6)
ROW = {"row": 7, "uri": "s3://b/a.tar", "etag": "x", "format": "tar", "size": 9}


def picture(seed):
    return Pixels(np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), np.uint8), 40, 30)


def attempts():
    gone = Failure("read", ErrorKind.TIMEOUT, "no answer", 4)
    torn = Failure("decode", ErrorKind.TRUNCATED, "torn")
    outcomes = [picture(1), gone, picture(2), torn]
    return [Attempt(ROW, number, f"{number}.jpg", outcome, 0.5, 0.25) for number, outcome in enumerate(outcomes)]


@pytest.mark.parametrize("chosen", [slice(0, 4), slice(1, 3), slice(3, 4), slice(0, 1), slice(0, 0)])
def test_there_and_back(chosen):
    given = attempts()[chosen]
    table = attempts_to_table(given, SIZE)
    assert table.schema.equals(attempts_to_table(attempts(), SIZE).schema), "whatever is in it"
    same_as(attempts_from_table(table, SIZE), given)


def test_pixels_that_are_not_rounded_keep_their_fractions():
    given = [
        replace(one, outcome=one.outcome._replace(array=one.outcome.array / np.float32(3)))
        if isinstance(one.outcome, Pixels)
        else one
        for one in attempts()
    ]
    table = attempts_to_table(given, SIZE, "float32")
    assert table.schema.equals(attempts_to_table(given[1:2], SIZE, "float32").schema), "also of failures alone"
    same_as(attempts_from_table(table, SIZE), given)


def test_a_slice_of_a_block_has_its_own_pixels():
    same_as(attempts_from_table(attempts_to_table(attempts(), SIZE).slice(2, 2), SIZE), attempts()[2:])


def same_as(found, given):
    assert len(found) == len(given)
    for one, other in zip(found, given, strict=True):
        assert (one.index, one.key, one.fetch_seconds, one.decode_seconds) == (other.index, other.key, 0.5, 0.25)
        assert {name: one.row[name] for name in ("row", "uri", "etag")} == {"row": 7, "uri": "s3://b/a.tar", "etag": "x"}
        if isinstance(other.outcome, Failure):
            assert one.outcome == other.outcome
        else:
            assert np.array_equal(one.outcome.array, other.outcome.array)
            assert one.outcome[1:] == other.outcome[1:]


def test_pixels_of_one_block_are_stacked_without_a_copy():
    block = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
    views = list(block)
    stacked = _stacked(views[1:4])
    assert np.shares_memory(stacked, block)
    assert np.array_equal(stacked, block[1:4])
    with pytest.raises(ValueError, match="read-only"):
        stacked[0] = 0
    for others in (
        views[::2],
        views[::-1],
        [views[0], views[0]],
        [block[0].copy(), block[1].copy()],
        [block[0], block[1].copy()],
    ):
        assert np.array_equal(_stacked(others), np.stack(others))
        assert not np.shares_memory(_stacked(others), block)
    assert np.array_equal(_stacked(views[:1]), block[:1])
