#!/usr/bin/env bash
# Loading a saved model with Keras on JAX compiles a program for random values that nobody uses.
#
# Seen with keras 3.15.1 and jax 0.10.2 on Python 3.11 (and with jax 0.11.2 on Python 3.12). `keras.saving.load_model` builds
# each layer before it reads the weights from the file, and building draws initial values. On JAX each draw is a compiled
# program, one for every shape: for MobileNetV2 without a top 27 programs. Loading took 17.8 s on two busy cores and 8 s on idle
# ones, nearly all of it for compiling. The same file with the initializers in its configuration replaced by "Zeros" loads in a
# third of the time (5.5 and 2.5 s), and the weights are equal. Keras on TensorFlow draws the values without compiling.
#
# With the persistent compilation cache (`jax_compilation_cache_dir` and `jax_persistent_cache_min_compile_time_secs=0`) the
# second process on a machine loads in 2 s. By default the cache keeps only what took longer than a second to compile, so it
# keeps none of these.
#
# Takes a minute or two and 700 MB in a temporary folder. PYTHON: a Python 3.11 or newer (default: python3).
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check keras==3.15.1 "jax==0.10.2"
cat > "$folder/load.py" <<'PYTHON'
import json
import logging
import sys
import time
import zipfile

import jax
import keras

folder, kind = sys.argv[1:]
saved, zeros = f"{folder}/saved.keras", f"{folder}/zeros.keras"
if kind == "save":
    keras.applications.MobileNetV2(weights=None, include_top=False, input_shape=(96, 96, 3)).save(saved)

    def with_zeros(part):
        if isinstance(part, list):
            return [with_zeros(one) for one in part]
        if not isinstance(part, dict):
            return part
        plain = {"module": "keras.initializers", "class_name": "Zeros", "config": {}, "registered_name": None}
        return {name: plain if name.endswith("_initializer") and value else with_zeros(value) for name, value in part.items()}

    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(zeros, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, json.dumps(with_zeros(json.loads(data))) if name == "config.json" else data)
    raise SystemExit

drawn = []


class Compilations(logging.Handler):
    def emit(self, record):
        text = record.getMessage()
        if text.startswith("Compiling") and ("uniform" in text or "truncated_normal" in text):
            drawn.append(text)


jax.config.update("jax_log_compiles", True)
for name in ("jax._src.interpreters.pxla", "jax._src.dispatch"):
    logging.getLogger(name).addHandler(Compilations())
    logging.getLogger(name).propagate = False
began = time.perf_counter()
model = keras.saving.load_model(saved if kind == "saved" else zeros, compile=False)
seconds = time.perf_counter() - began
total = float(sum(abs(weight).sum() for weight in model.get_weights()))
print(json.dumps({"random programs": len(drawn), "seconds": round(seconds, 2), "weights": total}))
PYTHON
export KERAS_BACKEND=jax
"$folder/venv/bin/python" "$folder/load.py" "$folder" save 2> /dev/null
saved=$("$folder/venv/bin/python" "$folder/load.py" "$folder" saved 2> /dev/null)
zeros=$("$folder/venv/bin/python" "$folder/load.py" "$folder" zeros 2> /dev/null)
echo "as saved:   $saved"
echo "with zeros: $zeros"
python3 - "$saved" "$zeros" <<'PYTHON'
import json
import sys

saved, zeros = map(json.loads, sys.argv[1:])
assert saved["random programs"] >= 20, f"changed: {saved['random programs']} programs for random values"
assert zeros["random programs"] == 0
assert saved["weights"] == zeros["weights"], "the initializers leave a trace in the loaded weights"
print("as found: loading compiles", saved["random programs"], "programs for values that the file replaces")
PYTHON
