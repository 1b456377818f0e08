"""What a run and the one before counted becomes one sentence: right about what is odd, and silent about chance."""

import numpy as np
import pytest
from scipy.stats import chi2_contingency

from tlbatch.report.drift import stability
from tlbatch.report.verdict import BAD, DOUBTFUL, GOOD, Side, judge_run

EVEN = [50] * 20


def report(predicted: int, failed: int = 0, **more) -> dict:
    return {"listed": predicted + failed, "predicted": predicted, "failed": failed, **more}


def side(red: int, blue: int, failed: int = 0, scores=None) -> Side:
    return Side({"red": red, "blue": blue}, scores if scores is not None else [red, blue], failed)


def test_the_index_by_hand_and_the_chance_of_as_much():
    index, chance = stability([500, 500], [250, 750])
    assert index == pytest.approx((0.25 - 0.5) * np.log(0.5) + (0.75 - 0.5) * np.log(1.5))
    assert chance < 1e-20
    assert stability([5, 5], [5, 5]) == (0.0, 1.0)
    assert stability([5, 0], [9, 0]) == stability([0, 0], [1, 2]) == (0.0, 1.0)


@pytest.mark.parametrize("bins", [2, 3, 12])
def test_the_chance_is_that_of_scipy(bins):
    random = np.random.default_rng(bins)
    for most in (3, 30, 3_000):
        first, second = random.integers(1, most, (2, bins))
        expected = chi2_contingency([first, second]).pvalue
        assert stability(first, second)[1] == pytest.approx(expected, rel=1e-12)


def test_a_first_run_is_good_and_says_that_nothing_is_compared():
    verdict = judge_run(report(1000), side(500, 500), None)
    assert verdict.tone == GOOD
    assert "1,000 listed = 1,000 predicted + 0 failed; there is no previous run" in verdict.sentence


def test_a_run_like_the_one_before_is_good():
    verdict = judge_run(report(1000), side(510, 490), side(500, 500))
    assert (verdict.tone, verdict.odd) == (GOOD, ())
    assert "nothing unusual compared with the previous run" in verdict.sentence


def test_labels_that_have_moved_are_named_with_both_shares():
    verdict = judge_run(report(1000), side(200, 800), side(500, 500))
    assert verdict.tone == DOUBTFUL
    assert "blue was 50.0% of the images and is now 80.0%" in verdict.sentence


def test_scores_that_have_moved_are_told_though_the_labels_have_not():
    verdict = judge_run(report(1000), side(500, 500, scores=[100, 900]), side(500, 500, scores=[500, 500]))
    assert verdict.odd == ("the distribution of scores differs from the previous run",)


def test_a_new_label_counts_as_moved():
    now, before = Side({"red": 500, "green": 500}, EVEN), Side({"red": 1000}, EVEN)
    assert "green was 0.0%" in judge_run(report(1000), now, before).sentence


@pytest.mark.parametrize(("failed", "tone"), [(1, GOOD), (10, GOOD), (11, DOUBTFUL)])
def test_more_failed_images_than_one_in_a_hundred_are_odd(failed, tone):
    assert judge_run(report(1000 - failed, failed), side(500, 500 - failed, failed), None).tone == tone


def test_failures_that_doubled_are_odd_and_those_by_chance_are_not():
    assert judge_run(report(99900, 100), side(50000, 49900, 100), side(50000, 49990, 10)).tone == DOUBTFUL
    assert judge_run(report(998, 2), side(500, 498, 2), side(500, 499, 1)).tone == GOOD


def test_a_run_that_was_kept_back_is_not_published():
    verdict = judge_run(report(10, kept_back=["psi is 0.4 and not < 0.2"]), side(5, 5), side(5, 5))
    assert verdict.tone == BAD
    assert verdict.sentence == "Complete, but not published: psi is 0.4 and not < 0.2."


def test_chance_among_few_images_is_seldom_called_odd():
    """Nights of twelve images of the same population: the index alone would call every second one odd."""
    random = np.random.default_rng(0)
    counts = random.multinomial(12, [0.5, 0.3, 0.2], size=400)
    pairs = list(zip(counts[::2], counts[1::2], strict=True))
    odd = sum(
        bool(judge_run(report(12), *(Side(dict(zip("abc", map(int, one), strict=True)), EVEN) for one in pair)).odd)
        for pair in pairs
    )
    assert odd <= 10
    assert sum(stability(*pair)[0] > 0.1 for pair in pairs) > 80


def test_failures_are_measured_by_the_table_and_old_ones_are_not_unusual():
    night = {"listed": 3, "predicted": 0, "failed": 3, "failed_new": 1, "table": {"listed": 1000, "failed": 3}}
    assert judge_run(night, Side(), None).tone == GOOD
    assert "5.0% of the images failed" in judge_run({**night, "table": {"listed": 60, "failed": 3}}, Side(), None).sentence
    assert judge_run({**night, "failed_new": 0, "table": {"listed": 60, "failed": 3}}, Side(), None).tone == GOOD
    closed = judge_run({**night, "unreadable": ["a/", "b/"]}, Side(), None)
    assert (closed.tone, "folders that could not be opened are missing: a/, b/" in closed.sentence) == (DOUBTFUL, True)
