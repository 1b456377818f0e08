"""The head as a convex problem: its minimum, the strength of its penalty, held-out scores, and folds."""

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from tlbatch.commands.splits import fold_pictures
from tlbatch.model import convex_head
from tlbatch.model.convex_head import STRENGTHS, fit_convex


def points(count: int, features: int, classes: int, seed: int = 0, noise: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Points around the centers of classes that overlap; the columns have different means and spreads."""
    random = np.random.default_rng(seed)
    truth = random.integers(0, classes, count)
    values = random.normal(0, 1, (classes, features))[truth] + random.normal(0, noise, (count, features))
    return (values * np.logspace(-2, 2, features) + np.arange(features)).astype(np.float32), truth


def scores(fit: convex_head.ConvexFit, features: np.ndarray) -> np.ndarray:
    logits = features.astype(np.float64) @ fit.layer.weights + fit.layer.biases
    each = np.exp(logits - logits.max(axis=1, keepdims=True))
    return each / each.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("count", "features"), [(300, 20), (40, 200)])
def test_it_is_the_minimum_that_scikit_learn_finds(count, features):
    """Also with fewer images than features, where the columns are as many as the images."""
    values, truth = points(count, features, 3)
    fit = fit_convex(values, truth, np.arange(count) % 5, 3, np.ones(count))
    scaled = (values - values.mean(axis=0)) / values.std(axis=0)
    other = LogisticRegression(C=1 / fit.strengths[0], max_iter=2000, tol=1e-8).fit(scaled, truth)
    assert scores(fit, values) == pytest.approx(other.predict_proba(scaled), abs=5e-3)


def test_the_same_images_give_the_same_layer_to_the_bit():
    values, truth = points(200, 50, 4)
    first, second = (fit_convex(values, truth, np.arange(200) % 5, 4, np.ones(200)) for _ in range(2))
    assert first.layer.weights.tobytes() == second.layer.weights.tobytes()
    assert first.layer.biases.tobytes() == second.layer.biases.tobytes()


def test_held_out_scores_are_as_good_as_scores_of_new_images():
    values, truth = points(3000, 60, 3, noise=3.0)
    fit = fit_convex(values[:300], truth[:300], np.arange(300) % 5, 3, np.ones(300))
    held_out = (fit.held_out.argmax(axis=1) == truth[:300]).mean()
    new = (scores(fit, values[300:]).argmax(axis=1) == truth[300:]).mean()
    assert held_out == pytest.approx(new, abs=0.06)
    assert (scores(fit, values[:300]).argmax(axis=1) == truth[:300]).mean() > new + 0.05, "it knows the images it was fitted on"


def test_noise_is_penalised_more_than_what_can_be_told_apart():
    clear, truth = points(200, 100, 2, noise=0.3)
    noise = np.random.default_rng(1).normal(0, 1, clear.shape).astype(np.float32)
    folds, ones = np.arange(200) % 5, np.ones(200)
    assert fit_convex(clear, truth, folds, 2, ones).strengths < fit_convex(noise, truth, folds, 2, ones).strengths
    assert fit_convex(noise, truth, folds, 2, ones).losses[0] == pytest.approx(np.log(2), abs=0.02)


def test_several_labels_an_image_are_one_problem_each():
    values, truth = points(400, 30, 2, noise=1.0)
    labels = np.stack([truth, np.random.default_rng(2).integers(0, 2, 400)], axis=1).astype(np.float32)
    fit = fit_convex(values, labels, np.arange(400) % 5, 2, np.ones(400))
    clear, random = fit.strengths
    assert clear < random
    alone = fit_convex(values, labels[:, :1], np.arange(400) % 5, 1, np.ones(400))
    assert alone.strengths[0] == clear
    both, one = (expit(values.astype(np.float64) @ each.layer.weights + each.layer.biases)[:, 0] for each in (fit, alone))
    assert both == pytest.approx(one, abs=0.01)
    assert ((fit.held_out[:, 0] > 0.5) == truth).mean() > 0.9


def test_weights_of_images_count_as_copies_do():
    values, truth = points(120, 10, 2)
    twice = np.concatenate([values, values[:40]]), np.concatenate([truth, truth[:40]])
    folds = np.arange(120) % 5
    weighted = fit_convex(values, truth, folds, 2, np.where(np.arange(120) < 40, 2.0, 1.0))
    copied = fit_convex(*twice, np.concatenate([folds, folds[:40]]), 2, np.ones(160))
    assert weighted.strengths == copied.strengths
    assert scores(weighted, values) == pytest.approx(scores(copied, values), abs=0.02)


def test_constant_features_and_a_class_that_only_one_fold_has_do_no_harm():
    values, truth = points(60, 8, 2)
    values[:, 3] = 7.0
    truth[0] = 2
    fit = fit_convex(values, truth, np.arange(60) % 5, 3, np.ones(60))
    assert np.isfinite(fit.layer.weights).all()
    assert np.isfinite(fit.layer.biases).all()
    assert np.abs(fit.layer.weights[3]).max() == 0


def test_a_large_problem_is_held_against_one_fold_and_says_how_far_it_is(monkeypatch):
    monkeypatch.setattr(convex_head, "_ONE_FOLD_FROM", 1000)
    values, truth = points(100, 10, 2)
    told = []
    fit = fit_convex(values, truth, np.arange(100) % 5, 2, np.ones(100), lambda done, of: told.append((done, of)))
    assert fit.rows.tolist() == list(range(0, 100, 5))
    assert fit.held_out.shape == (20, 2)
    assert [done for done, _ in told] == list(range(1, len(told) + 1))
    assert told[0][1] == len(STRENGTHS) + 3
    assert told[-1] == (len(told), len(told))


def test_folds_have_the_share_of_each_class_and_keep_copies_together():
    truth = np.repeat([0, 1, 2], [50, 25, 10])
    pictures = np.arange(85)
    pictures[[1, 2]] = 0
    folds = fold_pictures(truth, pictures, 5)
    assert folds[0] == folds[1] == folds[2]
    for label, count in ((1, 5), (2, 2)):
        assert np.bincount(folds[truth == label], minlength=5).tolist() == [count] * 5
    assert np.array_equal(folds, fold_pictures(truth, pictures, 5))


def test_the_learning_curve_is_that_of_new_images():
    values, truth = points(4000, 60, 3, noise=4.0)
    few, rest = slice(0, 400), slice(400, None)
    fit = fit_convex(values[few], truth[few], np.arange(400) % 5, 3, np.ones(400), curve=True)
    images, accuracies = zip(*fit.curve, strict=True)
    assert images == pytest.approx([40, 80, 160, 320], abs=3)
    assert list(accuracies) == sorted(accuracies)
    for count, accuracy in fit.curve:
        alone = fit_convex(values[:count], truth[:count], np.arange(count) % 5, 3, np.ones(count))
        assert (scores(alone, values[rest]).argmax(axis=1) == truth[rest]).mean() == pytest.approx(accuracy, abs=0.08)


def test_a_share_without_an_image_of_every_class_is_no_point_of_the_learning_curve():
    values, truth = points(60, 8, 2)
    truth[:5] = 2
    assert [point.images for point in fit_convex(values, truth, np.arange(60) % 5, 3, np.ones(60), curve=True).curve][-1] == 48
    labels = np.eye(3, dtype=np.float32)[truth]
    assert fit_convex(values, labels, np.arange(60) % 5, 3, np.ones(60), curve=True).curve == ()


def test_many_classes_of_few_images_are_fitted_although_the_strongest_penalties_change_nothing():
    """Three images of each of thirty classes, told apart by a few features."""
    random = np.random.default_rng(0)
    truth = np.tile(np.arange(30), 3)
    values = (random.normal(0, 1, (30, 16))[truth] + random.normal(0, 0.2, (90, 16))).astype(np.float32)
    told = []
    tell = lambda done, of: told.append((done, of))  # noqa: E731
    fit = fit_convex(values, truth, np.arange(90) // 30, 30, np.ones(90), tell, curve=True)
    assert (fit.held_out.argmax(axis=1) == truth).mean() > 0.8
    assert all(done <= of for done, of in told)
