"""What stands in the environment and in keras.json for other work does not reach tlbatch."""

import json
import os
import subprocess
import sys

import pytest
from support.paths import ROOT

USUAL = {"floatx": "float32", "epsilon": 1e-07, "backend": "tensorflow", "image_data_format": "channels_last"}
CODE = """
import os, sys
from tlbatch.model.bases import BASES
from tlbatch.model.frozen import freeze, save_bundle
from tlbatch.model.engines import load_engine
from tlbatch.schema import PixelRules
from tlbatch.storage.resolve import resolve
import numpy as np
before = os.environ.get("KERAS_BACKEND")
frozen = freeze(BASES["MobileNetV2"], 32, PixelRules(), "random", "random")
bundle = save_bundle(resolve(sys.argv[1]), frozen, None, np.zeros((2, 32, 32, 3), np.uint8))
for engine in ("openvino", "tensorflow"):
    assert load_engine(bundle, engine, threads=1).predict(np.zeros((3, 32, 32, 3), np.uint8)).features.shape == (3, 1280)
assert os.environ.get("KERAS_BACKEND") == before
print("whole")
"""


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("environment", "config"),
    [
        ({"KERAS_BACKEND": "jax"}, None),
        ({"KERAS_BACKEND": "torch"}, None),
        ({}, {**USUAL, "backend": "jax"}),
        ({}, {**USUAL, "image_data_format": "channels_first"}),
        ({}, {**USUAL, "floatx": "float16"}),
    ],
)
def test_settings_for_other_work_change_nothing(tmp_path, environment, config):
    (tmp_path / ".keras").mkdir()
    if config is not None:
        (tmp_path / ".keras" / "keras.json").write_text(json.dumps(config))
    clean = {name: value for name, value in os.environ.items() if name not in ("KERAS_BACKEND", "KERAS_HOME")}
    done = subprocess.run(
        [sys.executable, "-c", CODE, tmp_path / "bundle"],
        env={**clean, **environment, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "whole"), done.stderr[-2000:]
