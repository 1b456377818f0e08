"""Which stage a run waited for."""

import pytest

from tlbatch.output.bottleneck import bottleneck, gain_in_int8

LANES = {"list": 1, "fetch": 64, "decode": 4, "predict": 2, "write": 4}
QUIET = {"list": 1.0, "fetch": 10.0, "decode": 10.0, "predict": 5.0, "write": 1.0}


@pytest.mark.parametrize(
    ("stage", "seconds", "gpu", "busy", "setting"),
    [
        ("list", 40.0, False, 0.8, "images"),
        ("fetch", 1920.0, False, 0.6, "address"),
        ("decode", 150.0, False, 0.75, "address"),
        ("predict", 90.0, False, 0.9, "num_gpus"),
        ("predict", 90.0, True, 0.9, "more GPUs"),
        ("write", 220.0, False, 1.0, "rows_per_task"),
    ],
)
def test_the_stage_whose_lanes_are_taken_most_binds(stage, seconds, gpu, busy, setting):
    found = bottleneck({**QUIET, stage: seconds}, LANES, 50.0, gpu=gpu)
    assert (found["stage"], found["busy"]) == (stage, busy)
    assert setting in found["remedy"]


def test_a_model_that_binds_in_float32_could_run_in_int8():
    found = bottleneck({**QUIET, "predict": 90.0}, LANES, 50.0, gpu=False, quantizable=True)
    assert found["remedy"].startswith("a base in int8 (`train --quantize int8`, about 1.8 times as fast), a GPU")
    assert "int8" not in bottleneck({**QUIET, "decode": 150.0}, LANES, 50.0, gpu=False, quantizable=True)["remedy"]


@pytest.mark.parametrize(
    ("predict", "decode", "times"), [(10.0, 0.0, 2.0), (10.0, 10.0, 4 / 3), (0.0, 10.0, 1.0), (0.0, 0.0, 1.0)]
)
def test_int8_makes_the_model_faster_and_not_the_decoder(predict, decode, times):
    assert gain_in_int8({"predict": predict, "decode": decode, "fetch": 99.0}) == pytest.approx(times)


def test_a_short_run_waits_for_its_start():
    assert bottleneck(QUIET, LANES, 50.0, gpu=False)["stage"] == "start"


def test_every_stage_has_a_remedy():
    assert {bottleneck({stage: 1e9}, LANES, 1.0, gpu=False)["stage"] for stage in LANES} == set(LANES)
