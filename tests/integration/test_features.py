"""Stored features stand for images: heads are trained and whole stores re-scored on them, and nothing is read or run again."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.paths import ROOT
from support.pictures import write_store

import tlbatch
from tlbatch import schema
from tlbatch.errors import BundleError, ConfigError, CountsError, LabelsError, OutputError
from tlbatch.model.batches import HEAD_BATCH
from tlbatch.model.bundle import load_bundle
from tlbatch.model.engines import load_engine, load_head
from tlbatch.output import features as stored

pytestmark = pytest.mark.usefixtures("ray_here")

RUN_ID = "20260101T000000Z-abcdef"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """60 pictures in three classes, some more in a tar, and some that cannot be read."""
    store = write_store(tmp_path_factory.mktemp("mixed"), 20)
    (store / "red" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (store / "green" / "empty.jpg").write_bytes(b"")
    with tarfile.open(store / "more.tar", "w") as tar:
        for number in range(5):
            path = store / "red" / f"{number:04d}.jpg"
            tar.add(path, f"in-tar/{number}.jpg")
            if number == 2:
                (store.parent / "torn.jpg").write_bytes(b"no image")
                tar.add(store.parent / "torn.jpg", "in-tar/torn.jpg")
    return store


def classified(mixed, bundle_url, tmp_path_factory, dtype: str) -> Path:
    output = tmp_path_factory.mktemp("features") / "out"
    settings = {"features": True, "features_dtype": dtype, "run_id": RUN_ID, "max_failed_ratio": 1.0}
    tlbatch.classify(images=str(mixed), bundle=bundle_url, output=str(output), **settings)
    return output


@pytest.fixture(scope="module")
def extracted(mixed, bundle_url, tmp_path_factory) -> Path:
    """What `classify --features` made of it."""
    return classified(mixed, bundle_url, tmp_path_factory, "float16")


@pytest.fixture(scope="module")
def precise(mixed, bundle_url, tmp_path_factory) -> Path:
    """The same with features in float32."""
    return classified(mixed, bundle_url, tmp_path_factory, "float32")


@pytest.fixture(params=["extracted", "precise"])
def either(request) -> tuple[Path, str]:
    """An output and the precision of its features."""
    return request.getfixturevalue(request.param), {"extracted": "float16", "precise": "float32"}[request.param]


def tables(output: Path) -> dict[str, pd.DataFrame]:
    return {
        "predictions": tlbatch.read_predictions(str(output)).drop(columns=["run_id"]),
        "errors": tlbatch.read_errors(str(output)).drop(columns=["run_id"]),
    }


def test_rescoring_with_the_same_bundle_gives_the_same_table(either, bundle_url, tmp_path):
    """Labels equal; in float32 also every score to the bit, and every failure with its reason, width, height and etag."""
    output, dtype = either
    report = tlbatch.rescore(features=str(output), bundle=bundle_url, output=str(tmp_path / "again"))
    assert (report["listed"], report["predicted"], report["failed"]) == (68, 65, 3)
    assert tlbatch.verify(str(tmp_path / "again"))["ok"]
    first, second = tables(output), tables(tmp_path / "again")
    pd.testing.assert_frame_equal(first["errors"], second["errors"])
    scores = ["score", "top_scores"] if dtype == "float16" else []
    pd.testing.assert_frame_equal(
        first["predictions"].drop(columns=[*scores, "top_labels"]), second["predictions"].drop(columns=[*scores, "top_labels"])
    )
    assert np.abs(first["predictions"]["score"] - second["predictions"]["score"]).max() <= (2e-3 if scores else 0)


def test_rescoring_promises_the_same_manifest_and_a_second_time_does_nothing(extracted, bundle_url, tmp_path):
    output = extracted
    settings = {"features": str(output / "runs" / RUN_ID), "bundle": bundle_url, "output": str(tmp_path / "again")}
    report = tlbatch.rescore(**settings)
    again = Path(report["output"], "runs", report["run_id"])
    assert (again / "manifest.parquet").read_bytes() == (output / "runs" / RUN_ID / "manifest.parquet").read_bytes()
    assert tlbatch.rescore(**settings)["already_done"]


@pytest.mark.sampled(1)
def test_what_failed_for_now_stays_failed_and_is_not_done_again(mixed, bundle_url, tmp_path):
    """`rescore` asks no store: a reason that may have passed there has not passed here."""
    listed = tmp_path / "list.csv"
    listed.write_text(f"uri,etag\n{mixed}/red/0000.jpg,\n{mixed}/red/0001.jpg,another-version\n")
    settings = {"features": True, "max_failed_ratio": 1.0}
    first = tlbatch.classify(images=str(listed), bundle=bundle_url, output=str(tmp_path / "first"), **settings)
    assert (first["failed_by_kind"], first["failed_transient"]) == ({"changed": 1}, 1)
    again = {"features": str(tmp_path / "first"), "bundle": bundle_url, "output": str(tmp_path / "again")}
    assert tlbatch.rescore(**again)["failed_transient"] == 1
    assert tlbatch.rescore(**again)["already_done"]


@pytest.mark.sampled(1)
def test_no_image_is_read_to_rescore_or_to_train(extracted, mixed, bundle_url, tmp_path):
    """The images are gone, and nobody notices."""
    output = extracted
    away = mixed.with_name("away")
    mixed.rename(away)
    try:
        labels = tmp_path / "labels.csv"
        keys = [f"{color}/{number:04d}.jpg" for color in ("red", "green", "blue") for number in range(20)]
        pd.DataFrame({"key": keys, "label": [key[0] for key in keys]}).to_csv(labels, index=False)
        trained = tlbatch.train(
            features=str(output), labels=str(labels), bundle=str(tmp_path / "head"), epochs=12, learning_rate=0.02
        )
        assert trained["images_read"] == 0
        assert trained["accuracy"] >= 0.9
        report = tlbatch.rescore(features=str(output), bundle=trained["bundle"], output=str(tmp_path / "table"))
        assert report["predicted"] == 65
        assert set(tlbatch.read_predictions(str(tmp_path / "table"))["label"]) <= {"r", "g", "b"}
    finally:
        away.rename(mixed)


@pytest.mark.sampled(1)
def test_a_head_trained_on_features_has_the_base_that_gave_them(extracted, bundle_url, store, tmp_path):
    output = extracted
    trained = tlbatch.train(features=str(output), bundle=str(tmp_path / "head"), epochs=5)  # labels: the folders
    old, new = load_bundle(bundle_url), load_bundle(trained["bundle"])
    assert new.base_digest == old.base_digest
    assert new.facts["base"] == old.facts["base"]
    report = tlbatch.classify(images=str(store), bundle=trained["bundle"], output=str(tmp_path / "table"))
    assert report["predicted"] == 60


@pytest.mark.sampled(1)
def test_features_of_another_size_are_refused_with_both_digests(extracted, store, weights, bundle_url, tmp_path):
    output = extracted
    other = tlbatch.train(images=str(store), size=64, weights=weights, bundle=str(tmp_path / "small"), epochs=1)
    mine, theirs = load_bundle(bundle_url).base_digest, load_bundle(other["bundle"]).base_digest
    assert mine != theirs, "the weights are the same, the size is not"
    with pytest.raises(OutputError, match=f"(?s){mine}.*{theirs}"):
        tlbatch.rescore(features=str(output), bundle=other["bundle"], output=str(tmp_path / "out"))
    with pytest.raises(OutputError, match=mine):
        tlbatch.train(features=str(output), base="MobileNetV2", size=64, weights=weights, bundle=str(tmp_path / "b"))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        ({"features": "/nowhere"}, OutputError, "There are no features at /nowhere"),
        ({"features": "TABLE"}, OutputError, "There are no features at"),
        ({"bundle": "/nowhere"}, BundleError, "There is no bundle at /nowhere"),
    ],
)
def test_mistakes_are_sentences(extracted, store, bundle_url, tmp_path, settings, error, sentence):
    output = extracted
    if settings.get("features") == "TABLE":
        tlbatch.classify(images=str(store), bundle=bundle_url, output=str(tmp_path / "table"))
        settings = {"features": str(tmp_path / "table")}
    with pytest.raises(error, match=sentence):
        tlbatch.rescore(**{"features": str(output), "bundle": bundle_url, "output": str(tmp_path / "out"), **settings})
    assert not (tmp_path / "out").exists()


@pytest.mark.sampled(1)
def test_labels_that_have_no_features_are_counted_and_left_out(extracted, tmp_path, caplog):
    output = extracted
    labels = tmp_path / "labels.csv"
    keys = [f"{color}/{number:04d}.jpg" for color in ("red", "green") for number in range(6)]
    rows = [*keys, "red/broken.jpg", "nowhere.jpg"]
    pd.DataFrame({"key": rows, "label": [key[0] for key in rows]}).to_csv(labels, index=False)
    with pytest.raises(LabelsError, match="The class 'n' has 0 images"):
        tlbatch.train(features=str(output), labels=str(labels), bundle=str(tmp_path / "b"))
    pd.DataFrame({"key": rows[:-1], "label": [key[0] for key in rows[:-1]]}).to_csv(labels, index=False)
    result = tlbatch.train(features=str(output), labels=str(labels), bundle=str(tmp_path / "b"), epochs=3)
    assert result["failed"] == 1
    assert "1 labelled images have no features" in caplog.text


def test_one_trains_either_on_images_or_on_features(tmp_path):
    for given in ({}, {"images": "a", "features": "b"}):
        with pytest.raises(ConfigError, match="either images or features"):
            tlbatch.train(bundle=str(tmp_path / "b"), **given)


def test_a_damaged_features_file_is_not_used(extracted, bundle_url, tmp_path):
    output = extracted
    copy = shutil.copytree(output, tmp_path / "copy")
    path = copy / "runs" / RUN_ID / "features" / "part-00000.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CountsError, match=r"features/part-00000.parquet differs from its recorded sha256"):
        tlbatch.rescore(features=str(copy), bundle=bundle_url, output=str(tmp_path / "out"))


@pytest.mark.sampled(1)
def test_features_in_many_files_are_rescored_file_by_file(extracted, bundle_url, tmp_path, monkeypatch):
    """Published files of seven images: every window finds its own errors and its part of the manifest."""
    from tlbatch.output import publish

    output = extracted
    monkeypatch.setattr(publish.TableSpec, "rows_per_file", 7)
    images = json.loads((output / "runs" / RUN_ID / "run.json").read_text())["spec"]["images"]
    settings = {"features": True, "features_dtype": "float32", "run_id": RUN_ID, "max_failed_ratio": 1.0}
    tlbatch.classify(images=images, bundle=bundle_url, output=str(tmp_path / "many"), **settings)
    found = stored.find_features(str(tmp_path / "many"))
    (run,) = found.runs
    assert len(run.ranges()) > 5
    keys = pa.array(["blue/0000.jpg", "red/0019.jpg", "in-tar/3.jpg", "nowhere.jpg"])
    few = stored.look_up(found, pa.array([], pa.string()), keys)
    assert few["key"].to_pylist() == ["blue/0000.jpg", "in-tar/3.jpg", "red/0019.jpg"]
    read = list(run.vectors(np.array([0, 1])))
    assert [table.num_rows for table in read] == [7]
    tlbatch.rescore(features=str(tmp_path / "many"), bundle=bundle_url, output=str(tmp_path / "again"))
    first, second = tables(tmp_path / "many"), tables(tmp_path / "again")
    pd.testing.assert_frame_equal(first["predictions"], second["predictions"])
    pd.testing.assert_frame_equal(first["errors"], second["errors"])
    assert tlbatch.verify(str(tmp_path / "again"))["ok"]


@pytest.mark.sampled(1)
def test_objects_that_are_listed_twice_stay_twice(mixed, bundle_url, tmp_path):
    listed = tmp_path / "list.csv"
    twice = [*["red/0000.jpg"] * 2, *["more.tar"] * 2, "red/broken.jpg", "red/broken.jpg"]
    listed.write_text("uri\n" + "".join(f"{mixed / name}\n" for name in twice))
    settings = {"features": True, "features_dtype": "float32", "max_failed_ratio": 1.0}
    made = tlbatch.classify(images=str(listed), bundle=bundle_url, output=str(tmp_path / "first"), **settings)
    again = tlbatch.rescore(features=str(tmp_path / "first"), bundle=bundle_url, output=str(tmp_path / "again"))
    assert [made[name] for name in ("listed", "predicted", "failed")] == [16, 12, 4]
    assert [again[name] for name in ("listed", "predicted", "failed")] == [16, 12, 4]
    first, second = tables(tmp_path / "first"), tables(tmp_path / "again")
    pd.testing.assert_frame_equal(first["predictions"], second["predictions"])


def test_a_feature_that_float16_cannot_hold_is_no_silent_infinity(bundle_url):
    from tlbatch.execution.predictor import _classify_batch, _writable
    from tlbatch.execution.records import Attempt
    from tlbatch.images.decode import Pixels
    from tlbatch.model.batches import Outputs

    class Large:
        def predict(self, pixels):
            return Outputs(np.full((len(pixels), 4), 70_000, np.float32), None)

    one = Attempt({"row": 0}, 0, "a.jpg", Pixels(np.zeros((8, 8, 3), np.uint8), 8, 8))
    (given,) = _classify_batch(Large(), [one])
    assert given.failure is None, "another table of the same pass writes no features"
    found = _writable(given, float(np.finfo("float16").max))
    assert found.failure.kind == "predict_failed"
    assert "features_dtype=float32" in found.failure.message
    assert _writable(given, float(np.finfo("float32").max)) is given


@pytest.mark.parametrize("engine", ["openvino", "tensorflow"])
def test_a_head_alone_gives_the_scores_of_the_whole(bundle_url, store, engine):
    bundle = load_bundle(bundle_url)
    pixels = np.random.default_rng(0).integers(0, 256, (HEAD_BATCH + 3, 96, 96, 3), np.uint8)
    whole = load_engine(bundle, engine).predict(pixels)
    alone = load_head(bundle, engine).predict(whole.features)
    if engine == "openvino":
        assert np.array_equal(alone, whole.scores), "to the bit"
    assert alone == pytest.approx(whole.scores, abs=1e-6)
    assert load_head(bundle, engine).predict(whole.features[:0]).shape == (0, 3)


def test_the_features_table_is_the_documented_one(either):
    output, dtype = either
    file = pq.ParquetFile(next(output.rglob("features/*.parquet")))
    assert file.schema_arrow.equals(schema.features_schema(1280, dtype), check_metadata=True)
    documented = (ROOT / "docs" / "formats.md").read_text().split("### features")[1].split("##")[0]
    for field in file.schema_arrow:
        assert f"`{field.name}`" in documented
