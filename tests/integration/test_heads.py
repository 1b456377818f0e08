"""Several bundles of one base share a pass: each table is the one that a run of its own gives, and is published by itself."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.bundles import another_head
from support.pictures import write_store

import tlbatch
from tlbatch.commands.classify import ClassifyWork
from tlbatch.commands.list_images import ListedStore
from tlbatch.config import RunConfig, load
from tlbatch.errors import BundleError, ConfigError
from tlbatch.model.bundle import load_bundle
from tlbatch.output import commit
from tlbatch.output.run import read_output
from tlbatch.storage.resolve import resolve

pytestmark = pytest.mark.usefixtures("ray_here")

RUN_ID = "20260101T000000Z-abcdef"


@pytest.fixture(scope="module")
def bundles(store, bundle_url, tmp_path_factory) -> list[str]:
    """Three heads on one base: colors, warm or cold, and colors again, fitted more closely."""
    folder = tmp_path_factory.mktemp("heads")
    warm = another_head(bundle_url, store, folder / "warm", lambda color: "warm" if color == "red" else "cold")
    return [bundle_url, warm, another_head(bundle_url, store, folder / "other", str, strength=1.0)]


@pytest.fixture(scope="module")
def broken_store(tmp_path_factory) -> Path:
    store = write_store(tmp_path_factory.mktemp("s") / "store", 15)
    (store / "red" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    return store


@pytest.fixture(scope="module")
def together(broken_store, bundles, tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("together") / "out"
    settings = {"features": True, "run_id": RUN_ID, "rows_per_task": 16, "max_failed_ratio": 1.0}
    return tlbatch.classify(images=str(broken_store), bundle=bundles, output=str(output), **settings)


@contextlib.contextmanager
def dying_before_the_second_table(monkeypatch):
    """The command in the block is interrupted when one table is published."""
    freeze, calls = commit.freeze_part_plan, []

    def dies_at_the_second(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return freeze(*given)

    with monkeypatch.context() as patch:
        patch.setattr(commit, "freeze_part_plan", dies_at_the_second)
        with pytest.raises(tlbatch.TlbatchError, match="interrupted"):
            yield


def published(output: str | Path) -> dict[str, bytes]:
    run = Path(output, "runs", RUN_ID)
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("part-*.parquet"))}


def test_each_table_is_byte_for_byte_that_of_a_run_of_its_own(together, broken_store, bundles, tmp_path):
    assert list(together["tables"]) == [Path(bundle).name for bundle in bundles]
    for number, bundle in enumerate(bundles):
        name = Path(bundle).name
        alone = tmp_path / name
        settings = {"features": number == 0, "run_id": RUN_ID, "max_failed_ratio": 1.0}
        tlbatch.classify(images=str(broken_store), bundle=bundle, output=str(alone), **settings)
        assert published(alone) == published(Path(together["output"], name)), name
        assert together["tables"][name]["bundle"] == load_bundle(bundle).digest


def test_each_table_verifies_and_an_image_that_fails_fails_in_all(together):
    for name, report in together["tables"].items():
        assert (report["listed"], report["predicted"], report["failed"]) == (46, 45, 1), name
        assert tlbatch.verify(report["output"])["ok"]
        assert list(tlbatch.read_errors(report["output"])["key"]) == ["red/broken.jpg"]
    assert together["listed"] == 46


def test_a_second_time_nothing_is_done(together, broken_store, bundles, monkeypatch):
    monkeypatch.setattr(ClassifyWork, "process", lambda *_: pytest.fail("it worked again"))
    again = tlbatch.classify(
        images=str(broken_store), bundle=bundles, output=together["output"], features=True, max_failed_ratio=1.0
    )
    assert all(report["already_done"] for report in again["tables"].values())


@pytest.mark.sampled(1)
def test_what_one_table_lacks_is_done_for_that_one(together, broken_store, bundles, monkeypatch, tmp_path):
    """One of three tables is lost, and another was never begun: the pass is over what these two lack."""
    output = shutil.copytree(together["output"], tmp_path / "out")
    shutil.rmtree(output / "warm")
    asked = []
    process = ClassifyWork.process
    monkeypatch.setattr(
        ClassifyWork, "process", lambda work, runs, rows: (asked.append(len(runs)), process(work, runs, rows))[1]
    )
    settings = {"features": True, "run_id": RUN_ID, "max_failed_ratio": 1.0}
    again = tlbatch.classify(images=str(broken_store), bundle=bundles, output=str(output), **settings)
    assert asked == [1]
    assert [report.get("already_done", False) for report in again["tables"].values()] == [True, False, True]
    assert published(output / "warm") == published(Path(together["output"], "warm"))


@pytest.mark.sampled(1)
def test_killed_before_the_second_table_is_published_the_same_command_ends_it(broken_store, bundles, tmp_path, monkeypatch):
    settings = {"run_id": RUN_ID, "max_failed_ratio": 1.0}
    with dying_before_the_second_table(monkeypatch):
        tlbatch.classify(images=str(broken_store), bundle=bundles, output=str(tmp_path / "out"), **settings)
    monkeypatch.setattr(ClassifyWork, "process", lambda *_: pytest.fail("it worked again"))
    again = tlbatch.classify(images=str(broken_store), bundle=bundles, output=str(tmp_path / "out"), **settings)
    assert [report.get("already_done", False) for report in again["tables"].values()] == [True, False, False]
    assert all(tlbatch.verify(report["output"])["ok"] for report in again["tables"].values())


@pytest.mark.sampled(1)
def test_a_store_that_changed_between_the_two_halves_of_a_command(bundles, bundle_url, tmp_path, monkeypatch):
    """One table was published and the other not when it died; then an image is new: each table gets what it lacks."""
    store = write_store(tmp_path / "store", 3)
    settings = {"images": str(store), "bundle": bundles[:2], "output": str(tmp_path / "out")}
    with dying_before_the_second_table(monkeypatch):
        tlbatch.classify(**settings)
    write_store(store, 1, first=100)
    tlbatch.classify(**settings)
    again = tlbatch.classify(**settings)
    assert [report["listed"] for report in again["tables"].values()] == [12, 12]
    assert all(tlbatch.verify(report["output"])["ok"] for report in again["tables"].values())


@pytest.mark.sampled(1)
def test_what_another_run_published_since_the_listing_is_listed_again(bundles, tmp_path):
    """The second output of a pass: its table changed after the store was listed, so an older listing would not do."""
    store = write_store(tmp_path / "store", 2)
    config = load(RunConfig, {"images": str(store), "bundle": bundles[:2], "output": str(tmp_path / "out")})
    states = [read_output(resolve(table.output)) for table in config.tables.values()]
    listed = ListedStore(config, states, resolve(config.output), None)
    assert listed.listing(states[0]).manifest.num_rows == 6
    write_store(store, 1, first=100)
    assert listed.listing(states[1]).manifest.num_rows == 6, "nothing was published since"
    tlbatch.classify(images=str(store), bundle=bundles[1], output=states[1].output.url)
    assert listed.listing(read_output(states[1].output)).manifest.num_rows == 9
    assert listed.listing(states[0]).manifest.num_rows == 9


def test_two_copies_of_one_bundle_are_two_tables(bundles, broken_store, tmp_path):
    copy = shutil.copytree(bundles[0], tmp_path / "copy")
    settings = {"output": str(tmp_path / "out"), "max_failed_ratio": 1.0}
    made = tlbatch.classify(images=str(broken_store), bundle=[bundles[0], str(copy)], **settings)
    first, second = (tlbatch.read_predictions(report["output"]) for report in made["tables"].values())
    assert (first["score"] == second["score"]).all()
    assert len(first) == len(second) == 45


@pytest.mark.sampled(1)
def test_bundles_of_different_bases_do_not_share_a_pass(store, bundles, weights, tmp_path):
    other = tlbatch.train(images=str(store), size=64, weights=weights, bundle=str(tmp_path / "small"), epochs=1)
    with pytest.raises(BundleError, match="have different bases"):
        tlbatch.classify(images=str(store), bundle=[bundles[0], other["bundle"]], output=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_two_bundles_of_one_name_would_share_a_folder(store, tmp_path):
    with pytest.raises(ConfigError, match="two of the bundles are named 'model'"):
        tlbatch.classify(images=str(store), bundle=["a/model", "b/model/"], output=str(tmp_path / "out"))


def test_scores_that_are_not_finite_fail_in_the_table_of_their_head_only():
    from tlbatch.execution.predictor import _with_head
    from tlbatch.execution.records import Attempt, Classified
    from tlbatch.images.decode import Pixels

    class Broken:
        def predict(self, features):
            scores = np.full((len(features), 2), 0.5, np.float32)
            scores[0] = np.nan
            return scores

    attempts = [Attempt({"row": row}, 0, "a.jpg", Pixels(np.zeros((8, 8, 3), np.uint8), 8, 8)) for row in range(2)]
    first = [Classified(attempt, None, np.ones(4, np.float32), np.array([1.0], np.float32)) for attempt in attempts]
    found = _with_head(Broken(), first)
    assert [one.failure and one.failure.kind for one in found] == ["predict_failed", None]
    assert found[1].scores.tolist() == [0.5, 0.5]


def test_run_json_of_each_table_is_its_bundles(together):
    for name, report in together["tables"].items():
        facts = json.loads(Path(report["output"], "runs", RUN_ID, "run.json").read_text())
        assert Path(facts["bundle_url"]).name == name
        assert facts["spec"]["features"] == (name == next(iter(together["tables"])))
