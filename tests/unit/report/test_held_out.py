"""What held-out scores tell: confusions, doubted labels, and what more labels give."""

import numpy as np
import pytest

from tlbatch.report.evaluate import measure, measure_many
from tlbatch.report.held_out import doubted_labels, held_out_facts, learning_facts, learning_in_words


def test_what_is_confused_most_stands_first_with_the_recall_of_each_class():
    actual = ["cat"] * 10 + ["dog"] * 5 + ["fox"] * 5
    predicted = ["cat"] * 7 + ["dog"] * 2 + ["fox"] + ["dog"] * 5 + ["cat"] * 4 + ["fox"]
    facts = held_out_facts(measure(actual, predicted, ["cat", "dog", "fox", "owl"]))
    assert facts["confused"] == [
        {"label": "fox", "predicted": "cat", "images": 4},
        {"label": "cat", "predicted": "dog", "images": 2},
        {"label": "cat", "predicted": "fox", "images": 1},
    ]
    assert facts["recall"] == {"cat": 0.7, "dog": 1.0, "fox": 0.2}
    assert facts["accuracy"] == 13 / 20
    low, high = facts["interval"]
    assert low == pytest.approx(0.433, abs=0.001), "Wilson's interval"
    assert high == pytest.approx(0.819, abs=0.001)


def test_images_with_several_labels_have_no_pairs():
    facts = held_out_facts(measure_many([{"a"}, {"b"}, set()], [{"a"}, set(), set()], ["a", "b"]))
    assert facts["confused"] == []
    assert facts["recall"] == {"a": 1.0, "b": 0.0}


def test_the_label_that_is_least_likely_is_doubted_first():
    scores = np.array([[0.9, 0.1], [0.05, 0.95], [0.4, 0.6], [0.2, 0.8]])
    found = doubted_labels(scores, np.array([0, 0, 0, 1]), ["cat", "dog"], [("u", key) for key in "abcd"])
    assert [(one["key"], one["label"], one["suggested"]) for one in found] == [("b", "cat", "dog"), ("c", "cat", "dog")]
    assert (found[0]["label_score"], found[0]["score"]) == (0.05, 0.95)


def test_wrong_labels_are_found_among_right_ones():
    random = np.random.default_rng(0)
    truth = random.integers(0, 3, 400)
    scores = np.eye(3)[truth] * 0.8 + random.dirichlet([1, 1, 1], 400) * 0.2
    given = truth.copy()
    wrong = random.permutation(400)[:12]
    given[wrong] = (truth[wrong] + 1) % 3
    found = doubted_labels(scores, given, list("abc"), [("u", str(row)) for row in range(400)])
    assert {int(one["key"]) for one in found} == set(wrong.tolist())


def test_a_power_law_is_followed():
    facts = learning_facts([(n, 1 - 0.8 * n**-0.3) for n in (100, 200, 400, 800)])
    assert facts["twice"] == pytest.approx(1 - 0.8 * 1600**-0.3, abs=1e-3)
    last = 0.8 * 800**-0.3
    assert 0.8 * (800 * facts["one_point"]) ** -0.3 == pytest.approx(last - 0.01, abs=1e-3)
    assert "twice as many labels give about 91.3%; one point more takes about 1.4 times" in learning_in_words(facts)


@pytest.mark.parametrize("accuracies", [(0.8, 0.8, 0.8), (0.8, 0.79, 0.78), (0.9, 0.95, 1.0)])
def test_where_more_labels_give_nothing_no_number_of_them_is_named(accuracies):
    facts = learning_facts(list(zip((100, 200, 400), accuracies, strict=True)))
    assert facts["one_point"] is None
    assert facts["twice"] == accuracies[-1]
    assert ("over 10 times" in learning_in_words(facts)) == (accuracies[-1] < 1), "nothing is above 100 %"


def test_two_points_are_no_trend():
    assert learning_facts([(100, 0.8), (200, 0.9)]) is None
