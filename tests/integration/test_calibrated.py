"""Thresholds, several labels and class weights, from training to the table."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import tlbatch
from tlbatch.model.bundle import load_bundle
from tlbatch.model.head import DataSplit, HeadTraining, scores_of, train_head


@pytest.mark.sampled(1)
def test_balanced_weights_make_a_rare_class_count():
    random = np.random.default_rng(0)
    classes = (random.random(1500) < 0.08).astype(np.int64)
    part = DataSplit((random.normal(0, 1, (1500, 4)) + classes[:, None] * 1.2).astype(np.float32), classes)
    recall = {}
    for weight in ("none", "balanced"):
        head, _ = train_head(part, part, 2, HeadTraining(epochs=15, class_weight=weight, learning_rate=0.02))
        recall[weight] = (scores_of(head, part).argmax(1)[classes == 1] == 1).mean()
    assert recall["balanced"] > recall["none"] + 0.1


@pytest.mark.sampled(1)
@pytest.mark.usefixtures("ray_here")
def test_precision_is_asked_for_at_training_and_seen_in_the_table(store, weights, tmp_path):
    labels = tmp_path / "labels.csv"
    keys = sorted(str(path.relative_to(store)) for path in store.rglob("*.jpg"))
    random = np.random.default_rng(0)
    names = [key[0] if random.random() < 0.8 else "rgb"[random.integers(3)] for key in keys]  # a fifth is mislabelled
    pd.DataFrame({"key": keys, "label": names}).to_csv(labels, index=False)
    settings = {
        "labels": str(labels),
        "size": 64,
        "weights": weights,
        "precision": 0.8,
        "validation": 0.3,
        "epochs": 12,
        "learning_rate": 0.01,
    }
    trained = tlbatch.train(images=str(store), bundle=str(tmp_path / "b"), **settings)
    bundle = load_bundle(trained["bundle"])
    threshold = trained["calibration"]["abstaining"]["test"]["threshold"]
    assert bundle.abstain_threshold == threshold
    assert "The model abstains" in Path(trained["bundle"], "card.html").read_text()
    tlbatch.classify(images=str(store), bundle=trained["bundle"], output=str(tmp_path / "out"))
    table = tlbatch.read_predictions(str(tmp_path / "out"))
    assert (table["abstained"] == (table["score"] < np.float32(threshold))).all()


@pytest.mark.sampled(1)
@pytest.mark.usefixtures("ray_here")
def test_images_of_several_labels_from_training_to_evaluation(store, weights, tmp_path):
    """Each picture is `red`, `green` or `blue`, the red and green ones also `warm`; a few have no label at all."""
    rows = []
    for path in sorted(store.rglob("*.jpg")):
        key = str(path.relative_to(store))
        color = key.split("/", maxsplit=1)[0]
        rows += [(key, color), *([(key, "warm")] if color != "blue" else [])] if not key.endswith("9.jpg") else [(key, "-")]
    labels = tmp_path / "labels.csv"
    pd.DataFrame(rows, columns=["key", "label"]).to_csv(labels, index=False)
    settings = {"labels": str(labels), "multi_label": True, "size": 96, "weights": weights, "epochs": 12, "learning_rate": 0.01}
    trained = tlbatch.train(images=str(store), bundle=str(tmp_path / "b"), **settings)
    assert trained["labels"] == ["blue", "green", "red", "warm"]
    bundle = load_bundle(trained["bundle"])
    assert len(bundle.label_thresholds) == 4
    tlbatch.classify(images=str(store), bundle=trained["bundle"], output=str(tmp_path / "out"), features=True)
    found = tlbatch.evaluate(str(tmp_path / "out"), str(labels))
    assert found["micro_f1"] > 0.8
    assert found["confusion"] == []
    assert found["images"] == 60
    assert (
        tlbatch.evaluate(str(tmp_path / "out"), str(Path(trained["bundle"], "split.csv")), split="test")["images"]
        == trained["images"]["test"]
    )
    again = tlbatch.rescore(features=str(tmp_path / "out"), bundle=trained["bundle"], output=str(tmp_path / "again"))
    assert again["predicted"] == 60
    first, second = (tlbatch.read_predictions(str(tmp_path / name)) for name in ("out", "again"))
    assert list(map(list, first["top_labels"])) == list(map(list, second["top_labels"]))
