#!/usr/bin/env bash
# OpenVINO computes signed activations in int8 otherwise with AMX than with AVX2, AVX512 and VNNI.
#
# Seen with openvino 2026.4.1 and numpy 2.4.6 on an Intel Xeon with AMX (Sapphire Rapids). Twelve convolutions whose weights have
# 7 bits and whose inputs are quantised to 256 steps, the sums far from overflow:
#   steps from 0 to 6 (unsigned)             the same bits with every set of instructions
#   steps on both sides of 0 (signed)        the same bits with AVX2, AVX2-VNNI, AVX512 and AVX512-VNNI;
#                                            with AMX 1 output in 700 differs, by up to 1.4 % of the largest one
# So one file of a network in int8 does not give one answer on Intel's newer servers and on all others: NNCF's preset MIXED makes
# a few activations signed, and in its MobileNetV2 some 5 % of images get other features. The names of the kernels tell: without
# AMX they end in I8 for both kinds, with AMX the signed ones end in i8.
#
# ONEDNN_MAX_CPU_ISA=AVX512_CORE_FP16, set before the CPU plugin is asked for the first time, keeps OpenVINO from AMX.
#
# Needs a processor with AMX. Takes a minute.
set -euo pipefail
grep -q amx_int8 /proc/cpuinfo || { echo "this processor has no AMX"; exit 2; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check openvino==2026.4.1 numpy==2.4.6
cat >"$folder/answers.py" <<'PYTHON'
import sys

import numpy as np
import openvino
from openvino import opset13 as op

CHANNELS, IMAGES, BATCH = 64, 256, 16
rng = np.random.default_rng(0)


def number(value):
    return op.constant(np.float32(value))


def convolved(given, channels, least, most):
    steps = op.fake_quantize(given, number(least), number(most), number(least), number(most), 256)
    before = given.get_output_shape(0)[1]
    whole = op.convert(op.constant(rng.integers(-63, 64, (channels, before, 1, 1)).astype(np.int8)), "f32")
    scale = op.constant(rng.uniform(0.001, 0.005, (channels, 1, 1, 1)).astype(np.float32))
    bias = op.constant(rng.normal(0.5, 0.5, (1, channels, 1, 1)).astype(np.float32))
    sums = op.convolution(steps, op.multiply(whole, scale), [1, 1], [0, 0], [0, 0], [1, 1])
    return op.add(sums, bias)


step = 4.3 / 127
least, most = (-128 * step, 127 * step) if sys.argv[1] == "signed" else (0, 6)
given = now = op.parameter([BATCH, CHANNELS, 14, 14], np.float32)
for _ in range(6):
    wide = op.relu(convolved(now, 2 * CHANNELS, least, most))
    now = convolved(wide, CHANNELS, 0, 6)
model = openvino.Model([op.result(now)], [given])
compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
pixels = rng.uniform(-2, 4, (IMAGES, CHANNELS, 14, 14)).astype(np.float32)
np.save(sys.argv[2], np.concatenate([compiled(pixels[n : n + BATCH])[0].copy() for n in range(0, IMAGES, BATCH)]))
PYTHON
for kind in unsigned signed; do
    for isa in AVX2 AVX2_VNNI AVX512_CORE AVX512_CORE_VNNI AVX512_CORE_FP16 AVX512_CORE_AMX; do
        ONEDNN_MAX_CPU_ISA=$isa "$folder/venv/bin/python" "$folder/answers.py" $kind "$folder/$kind-$isa.npy"
    done
done
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys

import numpy as np

OTHERS = ("AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_FP16")
for kind in ("unsigned", "signed"):
    first, amx = (np.load(f"{sys.argv[1]}/{kind}-{isa}.npy") for isa in ("AVX2", "AVX512_CORE_AMX"))
    same = all(np.array_equal(np.load(f"{sys.argv[1]}/{kind}-{isa}.npy"), first) for isa in OTHERS)
    off, share = float(np.abs(amx - first).max() / first.max()), float((amx != first).mean())
    print(f"{kind}: the others {'agree' if same else 'differ'}; with AMX {share:.3%} of the outputs differ, by up to {off:.1%}")
    if not same or (share > 0) != (kind == "signed"):
        raise SystemExit("changed: this is not what was found")
print("as found: only signed activations with AMX differ")
PYTHON
