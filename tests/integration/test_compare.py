"""Two runs held against each other, and a run that is not published because of what that gave."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.command import run_cli
from support.pictures import write_store

import tlbatch
from tlbatch.commands.classify import ClassifyWork
from tlbatch.errors import ConfigError, InterruptedRunError, NotPromotedError, OutputError
from tlbatch.output.features import find_features
from tlbatch.report.drift import stability_index
from tlbatch.report.promotion import Condition, parse_conditions
from tlbatch.storage.local import LocalLocation

pytestmark = pytest.mark.usefixtures("ray_here")


def test_the_stability_index_by_hand():
    """Ten equal bins; the second sample has twice the share in one half and none in the other."""
    first = np.arange(1000) / 1000
    assert stability_index(first, first) == pytest.approx(0, abs=1e-12)
    shifted = stability_index(first, first / 2)
    by_hand = 5 * (0.2 - 0.1) * np.log(2) + 5 * (1e-4 - 0.1) * np.log(1e-4 / 0.1)
    assert shifted == pytest.approx(by_hand, rel=0.02)
    assert stability_index(np.zeros(100), np.zeros(50)) == 0
    assert stability_index(np.array([]), first) == stability_index(first, np.array([])) == 0


@pytest.mark.parametrize(
    ("text", "conditions"),
    [
        ("psi<0.2", [Condition("psi", "<", 0.2)]),
        (" psi <= .2 and agreement>0.9 ", [Condition("psi", "<=", 0.2), Condition("agreement", ">", 0.9)]),
    ],
)
def test_conditions_are_read(text, conditions):
    assert parse_conditions(text) == conditions


@pytest.mark.parametrize("text", ["", "psi", "psi<x", "psi<0.2 or agreement>1", "__import__('os')<1", "accuracy>0.9"])
def test_other_conditions_are_a_sentence(text):
    with pytest.raises(ConfigError, match="promote_if: write conditions as"):
        parse_conditions(text)


@pytest.fixture(scope="module")
def two_runs(store, bundle_url, tmp_path_factory) -> tuple[str, str]:
    """The same store with one head and with another that was told that most blue ones are red."""
    folder = tmp_path_factory.mktemp("compare")
    tlbatch.classify(images=str(store), bundle=bundle_url, output=str(folder / "a"), features=True)
    keys = sorted(str(path.relative_to(store)) for path in store.rglob("*.jpg"))
    names = ["red" if key.startswith("blue") and key < "blue/0016" else key.split("/")[0] for key in keys]
    pd.DataFrame({"key": keys, "label": names}).to_csv(folder / "labels.csv", index=False)
    head = tlbatch.train(
        features=str(folder / "a"),
        labels=str(folder / "labels.csv"),
        bundle=str(folder / "head"),
        learning_rate=0.05,
        epochs=20,
    )
    tlbatch.classify(images=str(store), bundle=head["bundle"], output=str(folder / "b"), features=True)
    return str(folder / "a"), str(folder / "b")


def test_what_moved_is_named_and_features_of_the_same_images_have_not_drifted(two_runs):
    found = tlbatch.compare(*two_runs)
    first, second = (tlbatch.read_predictions(output).set_index("key")["label"] for output in two_runs)
    assert found["images"] == 60
    assert found["only_a"] == found["only_b"] == 0
    assert found["agreement"] == (first == second).mean() < 1
    assert sum(move["images"] for move in found["moved"]) == (first != second).sum()
    assert found["moved"][0]["from"] == "blue"
    assert found["psi_features"] == 0
    assert found["psi"] == max(found["psi_scores"], found["psi_labels"]) > 0
    top = found["most_changed"][0]
    assert (first[top["key"]], second[top["key"]]) == (top["from"], top["to"])
    assert top["from"] != top["to"]


def test_a_run_against_itself_has_nothing_to_show(two_runs):
    found = tlbatch.compare(two_runs[0], two_runs[0])
    assert (found["agreement"], found["psi"], found["moved"], found["most_changed"]) == (1.0, 0.0, [], [])


def test_images_of_one_run_only_are_counted_and_other_images_are_a_drift(two_runs, bundle_url, tmp_path):
    other = write_store(tmp_path / "store", 4, first=100)
    for path in (other / "green").iterdir():
        path.unlink()
    tlbatch.classify(images=str(other), bundle=bundle_url, output=str(tmp_path / "out"), features=True)
    found = tlbatch.compare(two_runs[0], str(tmp_path / "out"))
    assert (found["images"], found["only_a"], found["only_b"], found["agreement"]) == (0, 60, 8, 0.0)
    assert found["psi_labels"] > 0.25
    assert found["psi_features"] > 0.25


def test_what_is_no_run_is_a_sentence(two_runs, tmp_path):
    with pytest.raises(OutputError, match="Nothing is published at"):
        tlbatch.compare(two_runs[0], str(tmp_path))


def test_the_command_as_a_person_sees_it(two_runs):
    done = run_cli("compare", *two_runs)
    assert done.returncode == 0, done.stderr
    assert "60 images in both, 0 only in the first, 0 only in the second" in done.stdout
    assert "blue -> " in done.stdout
    assert json.loads(run_cli("compare", *two_runs, "--json").stdout)["images"] == 60


@pytest.fixture
def published(store, bundle_url, tmp_path) -> Path:
    """A table that a first run with a condition made: nothing is there that it could differ from."""
    output = tmp_path / "out"
    report = tlbatch.classify(images=str(store), bundle=bundle_url, output=str(output), promote_if="agreement>0.99")
    assert report["compared"] is None
    return output


@pytest.mark.sampled(2)
def test_a_run_that_differs_too_much_is_kept_back_and_the_table_stays(published, two_runs, store, monkeypatch):
    before = (published / "latest.json").read_bytes()
    head = json.loads(next(Path(two_runs[1]).glob("runs/*/run.json")).read_text())["bundle_url"]
    settings = {"images": str(store), "bundle": head, "output": str(published)}
    with pytest.raises(NotPromotedError, match=r"is complete and not published: agreement is 0\.\d+ and not > 0.999") as caught:
        tlbatch.classify(**settings, promote_if="psi<9 and agreement>0.999")
    assert caught.value.exit_code == 1
    assert (published / "latest.json").read_bytes() == before
    states = [run["state"] for run in tlbatch.status(str(published))["runs"]]
    assert states == ["published", "kept back"]
    assert tlbatch.verify(str(published))["ok"]
    assert tlbatch.gc(str(published), older_than=0, remove=True)["leftovers"] == []

    monkeypatch.setattr(ClassifyWork, "process", lambda *_: pytest.fail("it worked again"))
    with pytest.raises(NotPromotedError):
        tlbatch.classify(**settings, promote_if="agreement>0.999")
    report = tlbatch.classify(**settings, promote_if="agreement>0.1")
    assert report["compared"]["agreement"] > 0.1
    assert "kept_back" not in report
    told = [(run["state"], run["predicted"], run["left"]) for run in tlbatch.status(str(published))["runs"]]
    assert told == [("superseded", 60, 0), ("published", 60, 0)]
    assert tlbatch.verify(str(published))["ok"]
    assert not list(published.rglob("_KEPT_BACK"))


@pytest.mark.sampled(2)
def test_a_run_that_is_kept_back_is_not_taken_for_other_images(published, two_runs, bundle_url, store, tmp_path):
    """It waits for its own command; another one goes on as if it were not there."""
    head = json.loads(next(Path(two_runs[1]).glob("runs/*/run.json")).read_text())["bundle_url"]
    with pytest.raises(NotPromotedError):
        tlbatch.classify(images=str(store), bundle=head, output=str(published), promote_if="agreement>0.999")
    again = tlbatch.classify(images=str(store), bundle=bundle_url, output=str(published))
    assert again["already_done"]
    more = tlbatch.classify(images=str(store), bundle=bundle_url, output=str(published), top_k=2)
    assert more["predicted"] == 60


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dies_at", ["staged", "_SUCCESS"])
def test_a_run_that_dies_while_it_is_kept_back_is_kept_back(published, two_runs, store, monkeypatch, dies_at):
    """Once it is marked it only wants to be tidied: nothing is done again."""
    head = json.loads(next(Path(two_runs[1]).glob("runs/*/run.json")).read_text())["bundle_url"]
    settings = {"images": str(store), "bundle": head, "output": str(published), "promote_if": "agreement>0.999"}

    def dies(self, *_):
        if self.path.name == dies_at and (self.path.parent / "_KEPT_BACK").exists():
            raise KeyboardInterrupt
        return real(self, *_)

    step = "delete" if dies_at == "staged" else "write"
    real = getattr(LocalLocation, step)
    with monkeypatch.context() as patch:
        patch.setattr(LocalLocation, step, dies)
        with pytest.raises(InterruptedRunError):
            tlbatch.classify(**settings)
    monkeypatch.setattr(ClassifyWork, "process", lambda *_: pytest.fail("it worked again"))
    with pytest.raises(NotPromotedError):
        tlbatch.classify(**settings)
    assert [run["state"] for run in tlbatch.status(str(published))["runs"]] == ["published", "kept back"]
    assert tlbatch.classify(**{**settings, "promote_if": None})["predicted"] == 60


@pytest.mark.sampled(2)
def test_of_several_tables_the_one_that_is_kept_back_holds_up_no_other(published, two_runs, bundle_url, store, tmp_path):
    head = json.loads(next(Path(two_runs[1]).glob("runs/*/run.json")).read_text())["bundle_url"]
    copy = shutil.copytree(head, tmp_path / "changing")
    bundles = [str(copy), bundle_url]
    settings = {"images": str(store), "output": str(tmp_path / "both")}
    tlbatch.classify(bundle=[str(shutil.copytree(bundle_url, tmp_path / "x" / "changing")), bundle_url], **settings)
    with pytest.raises(NotPromotedError, match="agreement is"):
        tlbatch.classify(bundle=bundles, top_k=2, promote_if="agreement>0.999", **settings)
    other = Path(bundle_url).name
    states = {name: tlbatch.status(str(tmp_path / "both" / name))["runs"][-1]["state"] for name in ("changing", other)}
    assert states == {"changing": "kept back", other: "published"}


@pytest.mark.sampled(2)
def test_features_of_a_run_that_is_kept_back_are_not_the_tables(two_runs, published, store):
    head = json.loads(next(Path(two_runs[1]).glob("runs/*/run.json")).read_text())["bundle_url"]
    settings = {"images": str(store), "bundle": head, "output": str(published), "features": True}
    with pytest.raises(NotPromotedError):
        tlbatch.classify(**settings, promote_if="agreement>0.999")
    with pytest.raises(OutputError, match="There are no features at"):
        find_features(str(published))


@pytest.mark.sampled(2)
def test_a_condition_on_features_counts_at_the_first_attempt(two_runs, published, store):
    head = json.loads(next(Path(two_runs[1]).glob("runs/*/run.json")).read_text())["bundle_url"]
    tlbatch.classify(images=str(store), bundle=head, output=str(published), features=True)
    settings = {"images": str(store), "bundle": head, "output": str(published), "features": True, "top_k": 2}
    report = tlbatch.classify(**settings, promote_if="psi_features<0.1")
    assert report["compared"]["psi_features"] == 0


@pytest.mark.sampled(2)
def test_a_condition_on_features_that_are_not_there_does_not_hold(published, store, bundle_url):
    with pytest.raises(NotPromotedError, match="psi_features is unknown, because one of the runs has no features"):
        tlbatch.classify(images=str(store), bundle=bundle_url, output=str(published), top_k=1, promote_if="psi_features<0.1")


def test_a_condition_that_cannot_be_read_is_said_before_any_work(store, bundle_url, tmp_path):
    with pytest.raises(ConfigError, match="promote_if"):
        tlbatch.classify(images=str(store), bundle=bundle_url, output=str(tmp_path / "out"), promote_if="better")
    assert not (tmp_path / "out").exists()
