"""The stages joined: every listed image ends in one table, once, whatever it is and whatever dies."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from support.pictures import COLORS, encoded, noisy, write_store

import tlbatch
from tlbatch import schema
from tlbatch.commands.classify import ClassifyWork
from tlbatch.errors import (
    ConfigError,
    CountsError,
    Failure,
    InterruptedRunError,
    NoRoomError,
    OutputError,
    StoreError,
    StoreUnavailableError,
)
from tlbatch.execution.predictor import _predict
from tlbatch.images.decode import decode
from tlbatch.model.batches import Outputs
from tlbatch.model.bundle import load_bundle
from tlbatch.model.engines import load_engine
from tlbatch.output import commit, publish
from tlbatch.output.commit import WorkStats
from tlbatch.schema import NEW_RULES
from tlbatch.storage.local import LocalLocation

pytestmark = pytest.mark.usefixtures("ray_here")

RUN_ID = "20260101T000000Z-abcdef"


def classify(images, bundle, output, **settings) -> dict:
    return tlbatch.classify(images=str(images), bundle=str(bundle), output=str(output), **settings)


def published_bytes(output: Path) -> dict[str, bytes]:
    """Every published Parquet file of an output, by its path below the run."""
    run = output / "runs" / json.loads((output / "latest.json").read_text())["runs"][-1]["run_id"]
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("part-*.parquet"))}


@pytest.fixture(scope="module")
def reference(store, bundle_url, tmp_path_factory) -> Path:
    """An undisturbed run over the store, of a fixed name."""
    output = tmp_path_factory.mktemp("reference") / "out"
    classify(store, bundle_url, output, run_id=RUN_ID)
    return output


def test_the_report_holds_the_contracts_keys(reference):
    report = json.loads((reference / "runs" / RUN_ID / "report.json").read_text())
    wanted = (
        "run_id output listed predicted failed skipped seconds images_per_second bundle engine failed_by_kind stage_seconds"
    )
    assert set(wanted.split()) <= set(report)
    assert (report["listed"], report["predicted"], report["failed"], report["engine"]) == (60, 60, 0, "openvino")
    assert set(report["stage_seconds"]) == {"list", "fetch", "decode", "predict", "write"}
    assert min(report["stage_seconds"].values()) > 0
    assert report["bottleneck"]["stage"] == "start", "sixty small images are no work"
    assert 0 < report["bottleneck"]["busy"] < 0.5


def test_the_folder_is_the_designs(reference):
    names = {str(path.relative_to(reference)) for path in reference.rglob("*") if path.is_file()}
    run = f"runs/{RUN_ID}/"
    assert names == {
        "latest.json",
        *(run + name for name in ("run.json", "manifest.parquet", "progress.json", "report.json", "_SUCCESS")),
        *(run + name for name in ("predictions/part-00000.parquet", "errors/part-00000.parquet")),
    }


def test_the_table_has_the_contracts_columns_and_is_right(reference, store):
    file = pq.ParquetFile(next(reference.rglob("predictions/*.parquet")))
    assert file.schema_arrow.equals(schema.PREDICTIONS, check_metadata=True)
    frame = tlbatch.read_predictions(str(reference))
    named = "uri key label score top_labels top_scores abstained etag width height bundle run_id index"
    assert list(frame.columns) == named.split()
    assert list(frame["key"]) == sorted(str(path.relative_to(store)) for path in store.rglob("*.jpg"))
    assert (frame["label"] == frame["key"].str.split("/").str[0]).mean() >= 0.95
    assert (frame["width"] == 120).all()
    assert (frame["height"] == 90).all()
    assert frame["top_scores"].map(sum).to_numpy() == pytest.approx(np.ones(60), abs=1e-5)
    assert (frame["top_labels"].str[0] == frame["label"]).all()
    assert not frame["abstained"].any()


def test_scores_through_ray_equal_the_stacked_keras_model_on_the_same_pixels(reference, keras_model, bundle_url):
    frame = tlbatch.read_predictions(str(reference))
    pixels = np.stack([decode(Path(uri).read_bytes(), (96, 96), rules=NEW_RULES).array for uri in frame["uri"]])
    scores = np.asarray(keras_model(pixels)["scores"])
    labels = load_bundle(bundle_url).labels
    assert [labels[best] for best in scores.argmax(1)] == list(frame["label"])
    assert frame["score"].to_numpy() == pytest.approx(scores.max(1), abs=1e-5)


def test_scores_through_ray_are_those_of_the_engine_alone_to_the_bit(reference, bundle_url):
    frame = tlbatch.read_predictions(str(reference))
    pixels = np.stack([decode(Path(uri).read_bytes(), (96, 96), rules=NEW_RULES).array for uri in frame["uri"]])
    given = load_engine(load_bundle(bundle_url), threads=1).predict(pixels)
    assert np.array_equal(frame["score"].to_numpy(), given.scores.max(1))


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 3, "rows_per_task": 7},
        {"num_cpus": 1, "concurrency": 2, "rows_per_task": 20},
        {"plan": "split", "rows_per_task": 13},
    ],
)
def test_the_same_inputs_give_the_same_bytes_whatever_the_resources(reference, store, bundle_url, tmp_path, settings):
    classify(store, bundle_url, tmp_path / "out", run_id=RUN_ID, **settings)
    assert published_bytes(tmp_path / "out") == published_bytes(reference)


@pytest.mark.sampled(2)
def test_where_ray_counts_a_gpu(reference, store, bundle_url, tmp_path):
    """A Ray of its own that believes in a GPU: actors are placed on it, and its absence is noticed."""
    code = f"""
import ray, tlbatch
from tlbatch.errors import ConfigError
ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
def classify(name, **settings):
    return tlbatch.classify(images={str(store)!r}, bundle={bundle_url!r}, output={str(tmp_path)!r} + "/" + name,
                            run_id={RUN_ID!r}, rows_per_task=16, **settings)
classify("placed", engine="openvino", num_gpus=0.5)
print(classify("auto")["engine"])
try:
    classify("refused", num_gpus=1)
except ConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert published_bytes(tmp_path / "placed") == published_bytes(tmp_path / "auto") == published_bytes(reference)
    assert "openvino" in done.stdout.splitlines()
    assert "GPUs are reserved, but neither JAX nor TensorFlow sees them" in done.stdout
    assert "The cluster has GPUs, but neither JAX nor TensorFlow sees them" in done.stderr
    placed = json.loads((tmp_path / "placed" / "runs" / RUN_ID / "run.json").read_text())
    assert placed["resources"]["num_gpus"] == 0.5


def test_a_second_run_does_nothing(reference, store, bundle_url, monkeypatch):
    monkeypatch.setattr(ClassifyWork, "process", lambda *_: pytest.fail("it worked again"))
    before = {path: path.stat().st_mtime_ns for path in reference.rglob("*")}
    again = classify(store, bundle_url, reference)
    assert again["already_done"]
    assert again["run_id"] == RUN_ID
    assert {path: path.stat().st_mtime_ns for path in reference.rglob("*") if path.is_file()}.items() <= before.items()


BROKEN = {
    "red/zero bytes.jpg": (b"", "decode", "empty"),
    "red/cut short.jpg": (encoded(noisy((200, 40, 40), 1))[:900], "decode", "truncated"),
    "page.jpg": (b"<!doctype html><p>404</p>", "decode", "not_an_image"),
    "notes.png": (b"these are notes", "decode", "not_an_image"),
    "drawing.png": (b"<svg xmlns='http://www.w3.org/2000/svg'></svg>", "decode", "unsupported"),
}
STRANGE = ["a b c.jpg", "100% #1?x=y&z.jpg", "🐱 кот/猫.jpg", "a::b.jpg", "quote'\".jpg", "new\nline.jpg", "..jpg", "x.JPEG"]


@pytest.mark.parametrize("plan", ["fused", "split"])
def test_broken_images_end_in_errors_and_cost_no_other(tmp_path, bundle_url, plan):
    store = write_store(tmp_path / "store", 5)
    for key, (data, _, _) in BROKEN.items():
        (store / key).write_bytes(data)
    for number, key in enumerate(STRANGE):
        (store / key).parent.mkdir(parents=True, exist_ok=True)
        (store / key).write_bytes(encoded(noisy(COLORS["green"], number)))
    (store / "readme.txt").write_bytes(b"not listed")
    report = classify(store, bundle_url, tmp_path / "out", rows_per_task=4, plan=plan)
    strange = [key for key in STRANGE if not key.startswith(".")]
    assert report["listed"] == 15 + len(BROKEN) + len(strange)
    assert (report["predicted"], report["failed"], report["skipped"]) == (15 + len(strange), len(BROKEN), 2)
    assert report["skipped_by_kind"] == {".txt": 1, "hidden": 1}
    assert report["failed_by_kind"] == {"empty": 1, "not_an_image": 2, "truncated": 1, "unsupported": 1}
    errors = tlbatch.read_errors(str(tmp_path / "out")).set_index("key")
    assert {key: (errors["stage"][key], errors["kind"][key]) for key in BROKEN} == {
        key: (stage, kind) for key, (_, stage, kind) in BROKEN.items()
    }
    assert not errors["transient"].any()
    assert errors["message"].str.len().min() > 10
    frame = tlbatch.read_predictions(str(tmp_path / "out")).set_index("key")
    assert set(strange) <= set(frame.index)
    assert (frame.loc[strange, "label"] == "green").all()
    assert tlbatch.verify(str(tmp_path / "out"))["ok"]


def test_an_image_that_is_gone_or_another_one_by_the_time_it_is_read(tmp_path, bundle_url, monkeypatch):
    store = write_store(tmp_path / "store", 3)
    begin = commit.begin_run

    def change(*arguments, **options):
        run = begin(*arguments, **options)
        (store / "red" / "0000.jpg").unlink()
        (store / "red" / "0001.jpg").write_bytes(encoded(noisy(COLORS["blue"], 9)))
        (store / "red" / "0002.jpg").chmod(0)
        return run

    monkeypatch.setattr(commit, "begin_run", change)
    report = classify(store, bundle_url, tmp_path / "out")
    errors = tlbatch.read_errors(str(tmp_path / "out")).set_index("key")
    assert errors["kind"]["red/0000.jpg"] == "not_found"
    assert (errors["kind"]["red/0001.jpg"], errors["transient"]["red/0001.jpg"]) == ("changed", True)
    assert report["listed"] == 9 == report["predicted"] + report["failed"]


def test_one_image_the_engine_refuses_costs_no_other():
    class Touchy:
        name = "touchy"

        def predict(self, pixels):
            if (pixels == 13).all(axis=(1, 2, 3)).any():
                raise RuntimeError("I do not like 13")
            scores = pixels[:, 0, 0, :1].astype("float32")
            scores[scores == 14] = np.nan
            return Outputs(scores, scores)

    pixels = np.stack([np.full((2, 2, 3), value, np.uint8) for value in (1, 13, 14, 2)])
    given = _predict(Touchy(), pixels)
    assert [isinstance(one, Failure) for one in given] == [False, True, True, False]
    assert given[1].message == "RuntimeError: I do not like 13"
    assert given[2].kind == "predict_failed"
    assert given[3][1].tolist() == [2.0]


def interrupted_before(room, step: str, monkeypatch, images, bundle, output) -> None:
    """A run that is stopped right before one of its steps."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(room, step, stop)
        with pytest.raises(InterruptedRunError, match="run the same command again to continue it"):
            classify(images, bundle, output, run_id=RUN_ID, rows_per_task=10)


@pytest.fixture
def staged(store, bundle_url, tmp_path, monkeypatch) -> Path:
    """An output whose run has all its parts and is not yet published."""
    interrupted_before(commit, "freeze_part_plan", monkeypatch, store, bundle_url, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.sampled(2)
def test_a_run_continues_with_what_is_left(staged, reference, store, bundle_url, monkeypatch):
    parts = sorted((staged / "runs" / RUN_ID / "staged").glob("*.json"))
    assert len(parts) == 6
    for receipt in parts[:2]:
        receipt.unlink()
    read = []
    missing = commit.missing_rows
    monkeypatch.setattr(commit, "missing_rows", lambda *given: read.append((missing(*given), given[1])) or read[-1][0])
    report = classify(store, bundle_url, staged)
    assert [(table.num_rows, before.images(60).sum()) for table, before in read] == [(20, 40)]
    assert report["run_id"] == RUN_ID
    assert published_bytes(staged) == published_bytes(reference)


@pytest.mark.sampled(2)
def test_images_that_come_later_belong_to_the_next_run(tmp_path, bundle_url, monkeypatch):
    store = write_store(tmp_path / "store", 3)
    interrupted_before(ClassifyWork, "process", monkeypatch, store, bundle_url, tmp_path / "out")
    write_store(store, 1, first=3)
    assert classify(store, bundle_url, tmp_path / "out")["listed"] == 9
    later = classify(store, bundle_url, tmp_path / "out")
    assert (later["listed"], "already_done" in later) == (12, False)
    assert len(tlbatch.read_predictions(str(tmp_path / "out"))) == 12


def test_changed_resources_continue_and_a_changed_spec_is_refused(staged, store, bundle_url):
    with pytest.raises(OutputError, match="is unfinished and top_k was 5 and is 2"):
        classify(store, bundle_url, staged, top_k=2)
    assert classify(store, bundle_url, staged, batch_size=5, num_cpus=1)["run_id"] == RUN_ID


@pytest.mark.sampled(2)
def test_a_run_that_died_right_after_the_flip_is_published_whatever_comes_next(staged, store, bundle_url, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(commit, "remove_staged", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(InterruptedRunError):
            classify(store, bundle_url, staged)
    assert classify(store, bundle_url, staged, top_k=2)["run_id"] != RUN_ID
    assert not (staged / "runs" / RUN_ID / "staged").exists()
    assert (staged / "runs" / RUN_ID / "_SUCCESS").exists()


@pytest.mark.sampled(2)
def test_what_the_next_run_may_do_better_is_done_again(tmp_path, bundle_url, monkeypatch):
    store = write_store(tmp_path / "store", 2)
    begin = commit.begin_run

    def change(*arguments, **options):
        run = begin(*arguments, **options)
        os.utime(store / "red" / "0000.jpg", (1, 1))
        return run

    with monkeypatch.context() as patch:
        patch.setattr(commit, "begin_run", change)
        os.utime(store / "red" / "0000.jpg", (2, 2))
        assert classify(store, bundle_url, tmp_path / "out")["failed_transient"] == 1
    os.utime(store / "red" / "0000.jpg", (2, 2))
    assert classify(store, bundle_url, tmp_path / "out")["failed"] == 0


@pytest.mark.parametrize("settings", [{"num_cpus": 64}, {"num_gpus": 1}])
def test_an_actor_no_machine_can_hold_is_said_at_once(store, bundle_url, tmp_path, settings):
    with pytest.raises(ConfigError, match=r"one actor needs .*, but no machine has them"):
        classify(store, bundle_url, tmp_path / "out", **settings)


def test_a_write_that_was_killed_leaves_the_output_usable(store, bundle_url, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lease.json.abc.tmp").write_bytes(b"half")
    assert classify(store, bundle_url, tmp_path / "out", max_images=2)["predicted"] == 2


def test_verify_names_a_file_that_nobody_published(reference, tmp_path):
    output = shutil.copytree(reference, tmp_path / "out")
    part = next(output.rglob("predictions/part-00000.parquet"))
    shutil.copy(part, part.with_name("part-00001.parquet"))
    assert "is not in the report" in tlbatch.verify(str(output))["differences"][0]


def test_an_output_of_another_store_is_refused(reference, bundle_url, tmp_path):
    other = write_store(tmp_path / "other", 1)
    with pytest.raises(OutputError, match="belongs to another run"):
        classify(other, bundle_url, reference)


@pytest.mark.sampled(2)
def test_a_name_is_given_to_one_run_only(tmp_path, bundle_url):
    store = write_store(tmp_path / "store", 2)
    classify(store, bundle_url, tmp_path / "out", run_id="monday")
    write_store(store, 1, first=2)
    with pytest.raises(OutputError, match="already has a run 'monday'"):
        classify(store, bundle_url, tmp_path / "out", run_id="monday")
    assert classify(store, bundle_url, tmp_path / "out", run_id="before")["listed"] == 9
    assert [run["run_id"] for run in tlbatch.status(str(tmp_path / "out"))["runs"]] == ["monday", "before"]


def test_a_disk_that_is_full_is_a_sentence_and_the_run_continues(staged, reference, store, bundle_url, monkeypatch):
    write = LocalLocation.write

    def full(location, data):
        if "predictions" in location.url:
            raise OSError(28, "No space left on device")
        write(location, data)

    with monkeypatch.context() as patch:
        patch.setattr(LocalLocation, "write", full)
        with pytest.raises(StoreUnavailableError, match=r"No space left on device.*Nothing more is published"):
            classify(store, bundle_url, staged)
    assert not (staged / "latest.json").exists()
    classify(store, bundle_url, staged)
    assert published_bytes(staged) == published_bytes(reference)


class CrashError(Exception):
    """The process dies here."""


def test_a_crash_between_any_two_steps_of_publishing_is_mended_by_the_same_command(
    staged, reference, store, bundle_url, tmp_path, monkeypatch
):
    """Every write, swap and delete of the commit, one crash before each: the next run gives the undisturbed files."""
    crashes = 0
    while True:
        output = shutil.copytree(staged, tmp_path / f"crash{crashes}")
        done = []

        def crash_before(step, limit=crashes, done=done):
            def act(*arguments, **options):
                if len(done) >= limit:
                    raise CrashError
                done.append(step)
                return step(*arguments, **options)

            return act

        with monkeypatch.context() as patch:
            for name in ("write", "swap", "delete", "create"):
                patch.setattr(LocalLocation, name, crash_before(getattr(LocalLocation, name)))
            finished = False
            with contextlib.suppress(CrashError):
                classify(store, bundle_url, output)
                finished = True
        (output / "lease.json").unlink(missing_ok=True)  # its holder is dead; here it is this very process
        visible = (output / "latest.json").exists()
        if visible:
            assert published_bytes(output) == published_bytes(reference), "a reader saw something half"
        classify(store, bundle_url, output)
        assert published_bytes(output) == published_bytes(reference)
        assert tlbatch.verify(str(output))["ok"]
        assert not (output / "runs" / RUN_ID / "staged").exists()
        if finished:
            break
        crashes += 1
    assert crashes >= 8


def test_many_files_are_written_on_ray_and_hold_the_same_rows(staged, reference, store, bundle_url, monkeypatch):
    monkeypatch.setattr(publish, "ROWS_PER_FILE", 25)
    files = classify(store, bundle_url, staged)["files"]
    predictions = {name: facts for name, facts in files.items() if name.startswith("predictions/")}
    assert [facts["objects"] for facts in predictions.values()] == [[0, 25], [25, 50], [50, 60]]
    assert tlbatch.read_predictions(str(staged)).equals(tlbatch.read_predictions(str(reference)))
    assert tlbatch.verify(str(staged))["ok"]


@pytest.mark.sampled(2)
def test_a_damaged_part_is_found_on_ray_too(staged, store, bundle_url, monkeypatch):
    monkeypatch.setattr(publish, "ROWS_PER_FILE", 25)
    part = next((staged / "runs" / RUN_ID / "staged").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(CountsError, match=r"differs from its receipt; nothing is published. Delete its receipt"):
        classify(store, bundle_url, staged)
    next(part.parent.glob(f"{part.stem}*.json")).unlink()
    assert classify(store, bundle_url, staged)["predicted"] == 60, "the plan is made anew"


def test_nothing_is_published_when_the_books_do_not_balance(staged, store, bundle_url, monkeypatch):
    receipt = next((staged / "runs" / RUN_ID / "staged").glob("*.json"))
    receipt.unlink()
    monkeypatch.setattr(ClassifyWork, "process", lambda *_: WorkStats())
    with pytest.raises(CountsError, match="was listed and is in no part; nothing is published"):
        classify(store, bundle_url, staged)
    assert not (staged / "latest.json").exists()


def test_a_bundle_trained_on_one_machine_works_from_another_place(bundle_url, store, reference, tmp_path):
    moved = shutil.copytree(bundle_url, tmp_path / "moved bundle")
    assert classify(store, moved, reference)["already_done"], "a bundle is its digest, not its place"


def test_no_image_is_a_sentence_and_writes_nothing(bundle_url, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="it is empty"):
        classify(tmp_path / "empty", bundle_url, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_evaluate_measures_the_table(reference, trained, tmp_path):
    split = Path(trained["bundle"], "split.csv")
    metrics = tlbatch.evaluate(str(reference), str(split), split="test")
    assert metrics["images"] == 12
    held_out = pd.read_csv(split).query("split == 'test'").merge(tlbatch.read_predictions(str(reference)), on="key")
    assert metrics["accuracy"] == pytest.approx((held_out["label_x"] == held_out["label_y"]).mean())
    keys = tlbatch.read_predictions(str(reference))["key"]
    wrong = pd.DataFrame({"key": [*keys[:10], "gone.jpg"], "label": ["red"] * 11})
    wrong.to_csv(tmp_path / "wrong.csv", index=False)
    measured = tlbatch.evaluate(str(reference), str(tmp_path / "wrong.csv"))
    assert (measured["accuracy"], measured["missing"], measured["images"]) == (0.0, 1, 10)


def test_status_tells_each_run_and_who_is_at_work(reference, staged):
    (run,) = tlbatch.status(str(reference))["runs"]
    assert (run["state"], run["predicted"], run["left"]) == ("published", 60, 0)
    (run,) = tlbatch.status(str(staged))["runs"]
    assert (run["state"], run["predicted"], run["progress"]["listed"]) == ("unfinished", 60, 60)


@pytest.mark.parametrize("state", ["published", "unfinished"])
def test_verify_finds_one_flipped_bit_in_any_file(state, reference, staged, tmp_path):
    """Tables, report and pointer of a published run; parts, receipts and what they promise of one that is not."""
    whole = {"published": reference, "unfinished": staged}[state]
    files = [path for path in sorted(whole.rglob("*")) if path.is_file() and path.name not in ("progress.json", "_SUCCESS")]
    assert state == "published" or len([path for path in files if path.parent.name == "staged"]) == 13, (
        "six parts, their receipts, and the group of these"
    )
    random = np.random.default_rng(0)
    for number in range(200):
        output = shutil.copytree(whole, tmp_path / str(number))
        victim = output / files[number % len(files)].relative_to(whole)
        data = bytearray(victim.read_bytes())
        data[random.integers(len(data))] ^= 1 << int(random.integers(8))
        victim.write_bytes(data)
        with contextlib.suppress(CountsError):  # where run.json or latest.json is damaged there is nothing to go by
            assert not tlbatch.verify(str(output))["ok"], victim
        shutil.rmtree(output)


@pytest.mark.sampled(2)
def test_a_run_of_many_objects_has_the_files_of_a_run_of_few(tmp_path, tiny_url, monkeypatch):
    """Of many objects, listing and manifest lie in temporary files, and the actors read the rows of their blocks."""
    store = write_store(tmp_path / "store", 8)
    settings = {"images": str(store), "bundle": tiny_url, "rows_per_task": 2, "run_id": "the-run"}
    few = tlbatch.classify(**settings, output=str(tmp_path / "few"))
    monkeypatch.setattr("tlbatch.storage.temporary_rows.ROWS_IN_MEMORY", 3)
    monkeypatch.setattr("tlbatch.schema.ROWS_OF_GROUP", 5)
    monkeypatch.setattr("tlbatch.execution.executor.MOST_BLOCKS", 1)
    many = tlbatch.classify(**settings, output=str(tmp_path / "many"))
    for name in ("listed", "predicted", "failed", "labels"):
        assert many[name] == few[name]
    frames = [tlbatch.read_predictions(str(tmp_path / name)) for name in ("few", "many")]
    pd.testing.assert_frame_equal(*frames)
    assert tlbatch.verify(str(tmp_path / "many"))["ok"]
    write_store(store, 1, first=8)
    night = tlbatch.classify(**{**settings, "run_id": None}, output=str(tmp_path / "many"), incremental=True)
    assert night["counts"] == {"new": 3, "changed": 0, "retry": 0, "stale": 0, "unchanged": 24, "deleted": 0}


def test_a_run_that_does_not_fit_into_the_memory_writes_nothing(tmp_path, tiny_url, monkeypatch):
    monkeypatch.setattr("tlbatch.storage.room.ROWS_IN_MEMORY", 3)
    monkeypatch.setattr("tlbatch.storage.room.memory_left", lambda: 1 << 20)
    store = write_store(tmp_path / "store", 2)
    with pytest.raises(NoRoomError, match=r"A run of 6 objects takes about 0\.3 GiB of memory"):
        tlbatch.classify(images=str(store), bundle=tiny_url, output=str(tmp_path / "out"))
    assert not list((tmp_path / "out").rglob("run.json"))
