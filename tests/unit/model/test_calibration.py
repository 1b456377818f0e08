"""Honest scores: the temperature, the error, the thresholds, by numbers that can be worked out by hand."""

import keras
import numpy as np
import pytest

from tlbatch.errors import ConfigError
from tlbatch.execution.records import PredictionFormat
from tlbatch.model.calibration import at_threshold, calibration_error, fit_temperature, threshold_for, thresholds_by_f1
from tlbatch.model.head import DataSplit, HeadTraining, Scored, build_head, calibrate, fit_head, scores_of, train_head
from tlbatch.report.evaluate import measure_many


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_that_was_put_in_is_found(temperature):
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (20_000, 4))
    classes = np.array([random.choice(4, p=one) for one in softmax(logits)])
    found = fit_temperature(softmax(logits * temperature).astype(np.float32), classes)
    assert found == pytest.approx(temperature, rel=0.05)


def test_a_few_images_that_are_all_told_right_do_not_make_a_head_infallible():
    """Nine of nine right: (9 + 1) / (9 + 2) is what that is worth."""
    scores = np.tile(np.array([[0.6, 0.3, 0.1]], np.float32), (9, 1))
    temperature = fit_temperature(scores, np.zeros(9, int))
    assert 0.83 < softmax(np.log(scores) / temperature)[0, 0] < 0.91


def test_many_classes_do_not_hold_down_the_scores_of_what_is_always_right():
    """Forty classes, 80 images, all right: with a target of (n + 1) / (n + C) every score would be below 0.7."""
    scores = softmax(np.eye(40)[np.arange(80) % 40] * 5.0)
    temperature = fit_temperature(scores, np.arange(80) % 40)
    assert calibration_error(softmax(np.log(scores) / temperature), np.arange(80) % 40) < 0.02


def test_the_calibration_error_by_hand():
    """Ten images say 0.9 and six are right; ten say 0.6 and six are right."""
    scores = np.array([[0.9, 0.1]] * 10 + [[0.6, 0.4]] * 10)
    classes = np.array([0] * 6 + [1] * 4 + [0] * 6 + [1] * 4)
    assert calibration_error(scores, classes) == pytest.approx((10 * 0.3 + 10 * 0.0) / 20)
    assert calibration_error(np.array([[1.0, 0.0]]), np.array([0])) == 0


def test_the_threshold_is_the_lowest_with_that_precision():
    scores = np.array([[0.99, 0.01], [0.95, 0.05], [0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    classes = np.array([0, 0, 0, 1, 0])
    chosen = threshold_for(scores, classes, 0.8)
    assert chosen == (0.7, 0.8, 5, 5)
    assert threshold_for(scores, classes, 0.9) == (pytest.approx(0.85), 1.0, 3, 5)
    assert threshold_for(scores, np.ones(5, int), 0.5) is None
    assert at_threshold(scores, classes, 0.94).answered == 2


def test_thresholds_by_f1_separate_what_can_be_separated():
    truth = np.array([[1, 0], [1, 0], [0, 0], [0, 0]])
    scores = np.array([[0.3, 0.1], [0.4, 0.2], [0.1, 0.3], [0.2, 0.4]])
    first, second = thresholds_by_f1(scores, truth)
    assert first == pytest.approx(0.25)
    assert second == 0.5, "no image has the second label, so nothing tells"


def parts(seed: int, noise: float = 2.0) -> tuple[DataSplit, DataSplit, DataSplit]:
    """Three parts of points around three centers that overlap."""
    random = np.random.default_rng(seed)
    centers = random.normal(0, 1, (3, 8))
    made = []
    for count in (60, 300, 600):
        classes = random.integers(0, 3, count)
        made.append(DataSplit((centers[classes] + random.normal(0, noise, (count, 8))).astype(np.float32), classes))
    return made[0], made[1], made[2]


def test_a_head_that_is_too_sure_becomes_honest_and_no_label_changes():
    train, validation, test = parts(0)
    head, _ = train_head(train, train, 3, HeadTraining(epochs=30, learning_rate=0.02))
    last = head.get_layer("scores")
    last.set_weights([4 * weight for weight in last.get_weights()])
    before = scores_of(head, test)
    reading = calibrate(head, Scored(scores_of(head, validation), validation.classes), test, 0.8)
    after = scores_of(head, test)
    assert np.array_equal(before.argmax(1), after.argmax(1))
    assert reading.facts["temperature"] > 2
    error = reading.facts["calibration_error"]
    assert error["after"] < error["before"] / 2
    assert error["after"] == pytest.approx(calibration_error(after, test.classes))
    told = reading.facts["abstaining"]
    assert told["test"]["precision"] == pytest.approx(0.8, abs=0.06)
    assert told["test"]["answered"] < told["test"]["images"] == 600


def test_a_precision_that_cannot_be_had_is_a_sentence():
    train, validation, test = parts(0)
    head, _ = train_head(train, validation, 3, HeadTraining(epochs=1))
    scores = scores_of(head, validation)
    wrong = Scored(scores, np.argmin(scores, axis=1))
    with pytest.raises(ConfigError, match="precision: no score threshold reaches 90% on the held-out images"):
        calibrate(head, wrong, test, 0.9)


def test_a_head_for_several_labels_is_a_sigmoid():
    assert build_head(4, 3, "sigmoid").get_layer("scores").activation is keras.activations.sigmoid


def test_answers_abstain_below_the_threshold_and_equal_scores_keep_the_order_of_the_classes():
    scores = np.array([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]], np.float32)
    columns = PredictionFormat(["a", "b", "c"], 2, abstain_threshold=0.6).columns(scores)
    assert columns["label"].to_pylist() == ["a", "c"]
    assert columns["top_labels"].to_pylist() == [["a", "b"], ["c", "b"]]
    assert columns["abstained"].to_pylist() == [True, False]
    assert PredictionFormat(["a", "b", "c"], 9).columns(scores)["abstained"].to_pylist() == [False, False]


def test_of_several_labels_those_above_their_thresholds_are_given():
    scores = np.array([[0.5, 0.9, 0.1], [0.1, 0.2, 0.3]], np.float32)
    columns = PredictionFormat(["a", "b", "c"], 1, label_thresholds=[0.4, 0.5, 0.6]).columns(scores)
    assert columns["top_labels"].to_pylist() == [["b", "a"], []]
    assert columns["label"].to_pylist() == ["b", "c"]
    assert columns["abstained"].to_pylist() == [False, True]


def test_of_a_single_label_the_images_that_have_it_are_measured():
    found = measure_many([["scratch"], *[[]] * 9], [[]] * 10, ["scratch"])
    assert found["by_class"] == {"scratch": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "images": 1}}
    assert (found["micro_f1"], found["accuracy"]) == (0.0, 0.9)
    assert measure_many([["a"], []], [["a"], []], ["a"])["micro_f1"] == 1.0


def test_a_head_of_many_labels_is_trained_by_adam_unless_the_convex_one_is_asked_for(monkeypatch):
    train, validation, _ = parts(0)

    def fold(features, classes):
        assert features.shape == (360, 8)
        return np.arange(len(classes)) % 5

    monkeypatch.setattr("tlbatch.model.head._CONVEX_UP_TO", 360 * 8 - 1)
    fitted = {way: fit_head(train, validation, fold, 3, HeadTraining(way, epochs=2)) for way in ("auto", "convex")}
    assert fitted["auto"].how.head == "sgd"
    assert fitted["auto"].facts["epochs"] == 2
    assert len(fitted["auto"].held_out.scores) == 300
    assert "epochs" not in fitted["convex"].how.facts
    assert len(fitted["convex"].held_out.scores) == 360
    monkeypatch.undo()
    assert fit_head(train, validation, fold, 3, HeadTraining("auto")).how.head == "convex"


def test_classes_weigh_the_same_where_one_is_rare_unless_told_otherwise():
    rare, validation = (DataSplit(part.features[kept], part.classes[kept]) for part, kept in map(thinned, parts(0)[:2]))
    found = {}
    for way in ("auto", "none"):
        fitted = fit_head(rare, validation, lambda _, classes: np.arange(len(classes)) % 5, 3, HeadTraining(class_weight=way))
        of_rare = fitted.held_out.scores[fitted.held_out.classes == 0]
        found[fitted.how.class_weight] = float((of_rare.argmax(axis=1) == 0).mean())
    assert set(found) == {"balanced", "none"}
    assert found["balanced"] > found["none"] + 0.1, "the rare class is found more often"
    several = np.eye(3, dtype=np.float32)[rare.classes]
    fitted = fit_head(
        DataSplit(rare.features, several),
        DataSplit(validation.features, np.eye(3)[validation.classes]),
        lambda _, classes: np.arange(len(classes)) % 5,
        3,
        HeadTraining(),
    )
    assert fitted.how.class_weight == "none"


def thinned(part: DataSplit) -> tuple[DataSplit, np.ndarray]:
    """A part, and its images without most of the class 0."""
    return part, (part.classes != 0) | (np.arange(len(part.classes)) % 12 == 0)
