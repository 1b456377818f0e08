"""Numbers of an evaluation."""

from tlbatch.report.evaluate import measure


def test_a_head_that_never_finds_a_rare_class_shows_it():
    metrics = measure(["common"] * 95 + ["rare"] * 5, ["common"] * 100, ["common", "other", "rare"])
    assert (metrics["accuracy"], metrics["balanced_accuracy"]) == (0.95, 0.5)
    assert metrics["by_class"]["rare"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "images": 5}
