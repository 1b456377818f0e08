#!/usr/bin/env bash
# Pillow rounds down what it interpolates in `Image.transform` and `Image.rotate`, but to nearest in `Image.resize`.
#
# Seen with Pillow 13.0.0 and 11.3.0 on Python 3.11. For 8 bits a band, `transform(..., EXTENT or AFFINE, resample=BILINEAR)`
# gives the whole number below the interpolated value: every pixel of a shrunken picture equals floor(bilinear), and the mean
# is half a level lower than that of the exact values. BICUBIC is cut off in the same way. So each rotation by a degree darkens
# a picture by half a level, twelve of them by six, while the same number of `resize` calls keeps the mean.
#
# It matters where pixels have to be those of another library: `tf.image.resize` without antialiasing takes the same four
# pixels and does not round, and a classifier that was trained on its output gives other labels to rounded pixels.
#
# Takes a minute in a temporary folder. PYTHON: a Python 3.11 or newer (default: python3).
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 13.0.0 11.3.0; do
    "$python" -m venv "$folder/$version"
    "$folder/$version/bin/python" -m pip install --quiet --disable-pip-version-check "pillow==$version" numpy==2.4.6
    "$folder/$version/bin/python" - <<'PYTHON'
import numpy as np
import PIL
from PIL import Image

samples = np.random.default_rng(0).integers(0, 256, (300, 300), np.uint8)
picture, side = Image.fromarray(samples), 160


def exact(values: np.ndarray) -> np.ndarray:
    """Bilinear interpolation between the four pixels around each point, in float64."""
    for axis in (0, 1):
        places = (np.arange(side) + 0.5) * 300 / side - 0.5
        low = np.floor(places).astype(int)
        share = np.expand_dims(places - low, 1 - axis)
        values = values.take(low, axis) * (1 - share) + values.take(low + 1, axis) * share
    return values


wanted = exact(samples.astype(np.float64))
shrunk = np.asarray(picture.transform((side, side), Image.Transform.EXTENT, (0, 0, 300, 300), Image.Resampling.BILINEAR))
down = float((shrunk == np.floor(wanted + 1e-9)).mean())
nearest = float((shrunk == np.rint(wanted)).mean())
print(f"Pillow {PIL.__version__}: transform: {down:.1%} of the pixels are rounded down, {nearest:.1%} to nearest; "
      f"mean {shrunk.mean() - wanted.mean():+.2f}")
assert down == 1.0 and nearest < 0.6, "changed: it does not round down"

smooth = Image.fromarray((np.indices((300, 300)).sum(0) % 200 + 20).astype(np.uint8)).resize((300, 300), Image.Resampling.BOX)
turned = resized = smooth
for number in range(12):
    turned = turned.rotate(1 if number % 2 else -1, Image.Resampling.BILINEAR)
    resized = resized.resize((301 - number % 2,) * 2, Image.Resampling.BILINEAR)
inner = (60, 60, 240, 240)
first, last, other = (float(np.asarray(one.crop(inner)).mean()) for one in (smooth, turned, resized))
print(f"  12 rotations: mean {last - first:+.2f}; 12 resizes: {other - first:+.2f}")
assert last - first < -4 and abs(other - first) < 1, "changed: rotations keep the mean"
PYTHON
done
echo "as found"
