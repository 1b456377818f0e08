"""No library that tlbatch uses reports that it is used."""

import os
import subprocess
import sys

SCRIPT = """
import multiprocessing.process
import sys

started = []
multiprocessing.process.BaseProcess.start = lambda self: started.append(self)
import keras

from tlbatch.model.openvino import export_openvino, import_openvino
from tlbatch.model.quantize import quantize_to_int8

openvino = import_openvino()
if "plain" in sys.argv:
    import openvino_telemetry
inputs = keras.Input((8,))
files = export_openvino(keras.Model(inputs, keras.layers.Dense(3)(inputs)))
assert len(files) == 2
import numpy as np

assert quantize_to_int8(files, np.eye(8, dtype=np.float32)) == quantize_to_int8(files, np.eye(8, dtype=np.float32)) != files
print(len(started), "openvino_telemetry" in sys.modules)
"""


def test_openvino_reports_nothing(tmp_path):
    """Neither on import nor when it converts or quantises; each report is a process, and a file in the home folder."""
    unset = {"CI", "TF_BUILD", "JENKINS_URL"}  # where OpenVINO reports nothing in any case
    environment = {name: value for name, value in os.environ.items() if name not in unset} | {"HOME": str(tmp_path)}
    for word, imported in (("", "False"), ("plain", "True")):
        command = [sys.executable, "-c", SCRIPT, word]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.stdout.split() == ["0", imported], done.stderr[-2000:]
    assert not (tmp_path / "intel").exists()
