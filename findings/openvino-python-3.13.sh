#!/usr/bin/env bash
# OpenVINO cannot convert a TensorFlow function on Python 3.13.
#
# Seen with openvino 2026.4.1 and tensorflow 2.21.0 on Python 3.13.0. `openvino.convert_model` of a `tf.function` raises
#   NameError: name 'tensorflow' is not defined
# and so does `keras.Model.export(format="openvino")` (Keras 3.15.1). On Python 3.12 and before the same lines convert.
#
# `get_environment_setup` in openvino/frontend/tensorflow/utils.py imports TensorFlow by exec("import tensorflow") and removes
# the name by exec("del tensorflow"). Since PEP 667 each `exec` in a function gets a fresh copy of its local variables, so the
# second one does not see what the first one made. The function expects ImportError and AttributeError, not NameError.
#
# Takes a few minutes and two gigabytes in a temporary folder. PYTHON: a Python 3.13 (default: python3.13).
set -euo pipefail
python=${PYTHON:-python3.13}
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 13))' || { echo "set PYTHON to a Python 3.13"; exit 2; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check openvino==2026.4.1 tensorflow==2.21.0
TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" - <<'PYTHON'
import openvino
import tensorflow as tf


@tf.function(input_signature=[tf.TensorSpec([None, 3], tf.float32)])
def twice(x):
    return 2.0 * x


try:
    openvino.convert_model(twice)
except NameError as error:
    assert str(error) == "name 'tensorflow' is not defined", error
    print("as found: NameError:", error)
else:
    raise SystemExit("changed: OpenVINO converts a TensorFlow function on Python 3.13")
PYTHON
