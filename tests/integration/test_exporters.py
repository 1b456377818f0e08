"""Models of usual size as PyTorch's exporters write them: their own labels, features, a new head (`make exporters`)."""

import os
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from support.pictures import write_store

import tlbatch
from tlbatch.model.bundle import load_bundle

FOLDER = Path(os.environ.get("TLBATCH_EXPORTERS", "nowhere"))
FILES = sorted(path.name for path in FOLDER.glob("*.onnx"))
MEAN, STD = (np.array(one, np.float32) for one in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
LABELS = "abcde"


@pytest.mark.skipif(not FILES, reason="their models are made by `make exporters`")
@pytest.mark.parametrize("name", FILES or ["none"])
def test_a_model_of_usual_size_gives_its_own_labels_and_features(tmp_path, photos, ray_here, name):
    (tmp_path / "labels.txt").write_text("\n".join(LABELS) + "\n")
    settings = {"labels": str(tmp_path / "labels.txt"), "trained_with": "torchvision", "bundle": str(tmp_path / "bundle")}
    result = tlbatch.import_model(model=str(FOLDER / name), **settings)
    assert (result["split"], load_bundle(result["bundle"]).batch) == (True, 1 if "one" in name else None)
    output = str(tmp_path / "table")
    report = tlbatch.classify(images=str(photos), bundle=result["bundle"], output=output, features=True, report=False)
    assert report["predicted"] == 200
    session, own = onnxruntime.InferenceSession(FOLDER / name), {}
    for path in sorted(photos.glob("*.JPEG")):
        scores = session.run(None, {session.get_inputs()[0].name: as_torchvision(path)})[0]
        own[path.name] = LABELS[int(scores.argmax())]
    table = tlbatch.read_predictions(output)
    assert dict(zip(table["key"], table["label"], strict=True)) == own
    store = tmp_path / "store"
    write_store(store, 10)
    extracted = str(tmp_path / "extracted")
    tlbatch.classify(images=str(store), bundle=result["bundle"], output=extracted, features=True, report=False)
    head = tlbatch.train(features=extracted, bundle=str(tmp_path / "head"))
    again = tlbatch.rescore(features=extracted, bundle=head["bundle"], output=str(tmp_path / "again"))
    assert again["predicted"] == 30


def as_torchvision(path: Path) -> np.ndarray:
    """`Resize(256)`, `CenterCrop(224)`, `ToTensor` and `Normalize`, in Pillow and NumPy."""
    image = Image.open(path).convert("RGB")
    short = min(image.size)
    inner = [256 if side == short else int(256 * side / short) for side in image.size]
    left, top = (round((side - 224) / 2) for side in inner)
    cut = image.resize(inner, Image.Resampling.BILINEAR).crop((left, top, left + 224, top + 224))
    return ((np.asarray(cut, np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1)[None]
