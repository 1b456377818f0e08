"""Nights on a real S3 server: each does what is new and no more, and after each the table is that of a whole run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
from support.command import run_cli
from support.paths import TLBATCH
from support.pictures import COLORS, encoded, noisy
from support.s3_server import BUCKET, environment, filesystem

import tlbatch
from tlbatch.commands.classify import classify
from tlbatch.commands.plan import plan
from tlbatch.config import RunConfig, load
from tlbatch.errors import ConfigError, OutputError
from tlbatch.output.run import begin_run, read_output, read_pointer, read_runs
from tlbatch.storage.resolve import resolve

pytestmark = pytest.mark.usefixtures("ray_here")


class Nights:
    """A store behind a counting proxy, and the same command night after night."""

    def __init__(self, proxy, server, bundle: str, name: str) -> None:
        self.fs = filesystem(server.endpoint)
        self.proxy = proxy
        self.options = {"endpoint_url": proxy.endpoint}
        self.images, self.output = f"s3://{BUCKET}/{name}/images", f"s3://{BUCKET}/{name}/table"
        self.bundle = bundle

    def put(self, numbers, seed: int = 0) -> None:
        """Pictures by number; another `seed` gives them other contents."""
        labels = list(COLORS)
        names = {f"{labels[number % 3]}/{number:05d}.jpg": (labels[number % 3], number + seed) for number in numbers}
        self.fs.pipe({f"{self.images[5:]}/{name}": encoded(noisy(COLORS[label], n)) for name, (label, n) in names.items()})

    def delete(self, numbers) -> None:
        labels = list(COLORS)
        for number in numbers:
            self.fs.rm_file(f"{self.images[5:]}/{labels[number % 3]}/{number:05d}.jpg")

    def config(self, **settings) -> RunConfig:
        given = {"images": self.images, "bundle": self.bundle, "output": self.output, "incremental": True}
        return load(RunConfig, {**given, "storage_options": self.options, "features": True, **settings})

    def night(self, **settings) -> tuple[dict, set[str]]:
        """One night; its report, and the images that were fetched."""
        before = self.fetched()
        report = classify(self.config(**settings))
        after = self.fetched()
        return report, {key for key in after if after[key] > before.get(key, 0)}

    def fetched(self) -> dict[str, int]:
        path = self.images[4:] + "/"
        return {name.removeprefix(path): n for name, n in self.proxy.counts()["gets"].items() if name.startswith(path)}

    def whole(self, name: str, bundle: str | None = None) -> pd.DataFrame:
        """The table that a whole run over the store as it stands gives."""
        output = f"{self.output}-{name}"
        settings = {"output": output, "incremental": False, "bundle": bundle or self.bundle, "features": False}
        classify(self.config(**settings))
        return read(output, self.options)

    def table(self) -> pd.DataFrame:
        return read(self.output, self.options)


def read(output: str, options) -> pd.DataFrame:
    """A table without what tells one run from another."""
    frame = tlbatch.read_predictions(output, storage_options=options)
    return frame.drop(columns=["run_id"]).sort_values("key").reset_index(drop=True)


def same(one: pd.DataFrame, other: pd.DataFrame, within: float = 0.0) -> None:
    """Equal in every column; scores from features in float16 are a little off."""
    scores = ["score", "top_scores"]
    rest = [name for name in one.columns if name not in (*scores, "top_labels")]
    pd.testing.assert_frame_equal(one[rest], other[rest])
    assert (one["score"] - other["score"]).abs().max() <= within


@pytest.fixture
def nights(faulty, s3_server, bundle_url, request) -> Nights:
    return Nights(faulty(), s3_server, bundle_url, request.node.name.split("[")[0].replace("_", "-"))


@pytest.fixture(scope="module")
def second_bundle(store, bundle_url, tmp_path_factory) -> str:
    """Another head on the same base."""
    folder = tmp_path_factory.mktemp("second")
    tlbatch.extract(images=str(store), bundle=bundle_url, output=str(folder / "features"))
    trained = tlbatch.train(features=str(folder / "features"), bundle=str(folder / "bundle"), seed=7, epochs=20)
    return trained["bundle"]


@pytest.mark.sampled(3)
@pytest.mark.timeout(600)
def test_five_nights(nights, second_bundle):
    size = int(os.environ.get("TLBATCH_NIGHTS", "100"))
    some = size // 10
    nights.put(range(size))
    first, fetched = nights.night()
    assert first["counts"]["new"] == first["predicted"] == len(fetched) == size
    same(nights.table(), nights.whole("1"))

    nights.put(range(size, size + some))
    nights.put(range(some // 5), seed=10_000)
    nights.delete(range(size - some // 10, size))
    second, fetched = nights.night()
    wanted = {"new": some, "changed": some // 5, "retry": 0, "stale": 0, "deleted": some // 10}
    assert second["counts"] == {**wanted, "unchanged": size - some // 5 - some // 10}
    assert len(fetched) == second["listed"] == some + some // 5, "what was new or changed, and nothing else"
    same(nights.table(), nights.whole("2"))
    runs = tlbatch.status(nights.output, storage_options=nights.options)
    assert [one["state"] for one in runs["runs"]] == ["published", "published"]

    third, fetched = nights.night()
    assert third["already_done"]
    assert not fetched
    assert len(runs["runs"]) == len(tlbatch.status(nights.output, storage_options=nights.options)["runs"])

    nights.put(range(size + some, size + some + 3))
    said = plan(nights.config(bundle=second_bundle, stale="rescore"))
    fourth, fetched = nights.night(bundle=second_bundle, stale="rescore")
    assert said["counts"] == fourth["counts"]
    assert (said["objects"], said["rescored"]) == (fourth["objects"], fourth["objects"] - 3)
    assert len(fetched) == 3, "what had stored features was not read"
    assert fourth["counts"]["stale"] == fourth["listed"] - 3
    same(nights.table(), nights.whole("4", second_bundle), within=2e-3)

    _a_killed_night(nights, second_bundle, size)
    _compacted(nights, second_bundle)


def _a_killed_night(nights, second_bundle, size):
    nights.put(range(2 * size, 2 * size + 100))
    killed = start(nights, second_bundle, "rows_per_task=10")
    wait_for(lambda: len(parts(nights)) >= 2, killed)
    killed.kill()
    killed.communicate()
    nights.put(range(3 * size, 3 * size + 2))  # the store goes on
    done = run_cli(*command(nights, second_bundle), **environment(nights.proxy.endpoint))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["continued"], "the killed night is finished first, then the store is looked at again"
    assert sum(report["labels"].values()) == report["predicted"]
    assert report["counts"]["new"] == 2
    assert report["listed"] == 102, "the books are those of both"
    same(nights.table(), nights.whole("5", second_bundle), within=2e-3)
    found = tlbatch.verify(nights.output, nights.options)
    assert found["ok"], found["differences"]
    assert found["listed"] == len(nights.table())


def _compacted(nights, second_bundle):
    before = nights.table()
    folded = tlbatch.compact(output=nights.output, storage_options=nights.options)
    assert folded["listed"] == len(before)
    same(nights.table(), before)
    assert len(tlbatch.status(nights.output, storage_options=nights.options)["published"]) == 1
    assert tlbatch.verify(nights.output, nights.options)["ok"]
    assert nights.night(bundle=second_bundle)[0]["already_done"], "a compacted table needs nothing done again"
    assert tlbatch.train(features=nights.output, storage_options=nights.options, bundle=str(nights_bundle(nights)), epochs=2)


def nights_bundle(nights: Nights) -> str:
    return f"{nights.output}-bundle"


def command(nights: Nights, bundle: str, *settings: str) -> list[str]:
    given = ["--images", nights.images, "--bundle", bundle, "--output", nights.output, "--incremental", "--features", "--json"]
    return ["classify", *given, *(word for one in settings for word in ("--set", one))]


def start(nights: Nights, bundle: str, *settings: str) -> subprocess.Popen:
    env = {**os.environ, **environment(nights.proxy.endpoint)}
    return subprocess.Popen(
        [TLBATCH, *command(nights, bundle, *settings)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def parts(nights: Nights) -> list[str]:
    nights.fs.invalidate_cache()
    return [name for name in nights.fs.find(nights.output[5:]) if "/staged/" in name and name.endswith(".json")]


def wait_for(what, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not what():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.sampled(3)
def test_of_two_nights_one_runs_and_the_other_says_who(nights, bundle_url):
    nights.put(range(300))
    first = start(nights, bundle_url, "rows_per_task=10", "run_id=first")
    wait_for(lambda: len(parts(nights)) >= 1, first)
    os.kill(first.pid, signal.SIGSTOP)  # it would be done before the second has looked
    try:
        second = run_cli(*command(nights, bundle_url), **environment(nights.proxy.endpoint))
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert second.returncode == 4
    assert "Run first has been working on this output since" in second.stderr
    _, said = first.communicate(timeout=200)
    assert first.returncode == 0, said


@pytest.mark.sampled(3)
def test_what_failed_for_now_is_tried_again_and_what_is_broken_is_not(tmp_path, store, bundle_url):
    images = tmp_path / "images"
    images.mkdir()
    for number, path in enumerate(sorted(store.rglob("*.jpg"))[:6]):
        (images / f"{number}.jpg").write_bytes(path.read_bytes())
    (images / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    secret = images / "5.jpg"
    listed = tmp_path / "list.csv"
    rows = [f"{path},{path.name}," for path in sorted(images.iterdir())]
    listed.write_text("\n".join(["uri,key,etag", *rows]).replace(f"{secret},5.jpg,", f"{secret},5.jpg,another-version"))
    settings = {"images": str(listed), "bundle": bundle_url, "output": str(tmp_path / "out"), "incremental": True}
    first = tlbatch.classify(**settings)
    assert first["failed_by_kind"] == {"changed": 1, "truncated": 1} or first["failed"] == 2
    again = tlbatch.classify(**settings)
    assert again["counts"] == {"new": 0, "changed": 0, "retry": 1, "stale": 0, "unchanged": 6, "deleted": 0}
    assert (again["listed"], again["failed"]) == (1, 1)
    listed.write_text("\n".join(["uri,key,etag", *rows]))  # now it is the version that is there
    third = tlbatch.classify(**settings)
    assert third["predicted"] == 1
    errors = tlbatch.read_errors(str(tmp_path / "out"))
    assert errors["key"].tolist() == ["broken.jpg"], "what is predicted now is no error any more"
    assert len(tlbatch.read_predictions(str(tmp_path / "out"))) == 6
    assert tlbatch.verify(str(tmp_path / "out"))["failed"] == 1


@pytest.mark.sampled(3)
def test_a_night_on_which_things_were_only_deleted(tmp_path, store, bundle_url):
    images = shutil.copytree(store, tmp_path / "images")
    settings = {"images": str(images), "bundle": bundle_url, "output": str(tmp_path / "out"), "incremental": True}
    tlbatch.classify(**settings)
    shutil.rmtree(images / "red")
    report = tlbatch.classify(**settings, features=False)
    assert (report["listed"], report["counts"]["deleted"]) == (0, 20)
    assert set(tlbatch.read_predictions(settings["output"])["label"]) == {"green", "blue"}
    assert tlbatch.verify(settings["output"])["ok"]
    assert tlbatch.classify(**settings)["already_done"]
    whole = tlbatch.classify(**{**settings, "incremental": False})
    assert whole["listed"] == 40
    names = tlbatch.status(settings["output"])["published"]
    assert names == [whole["run_id"]], "a whole run replaces the table"


@pytest.mark.sampled(3)
def test_a_table_goes_back_to_what_it_was_after_a_run(tmp_path, store, bundle_url):
    images = tmp_path / "images"
    (images / "a").mkdir(parents=True)
    pictures = sorted(store.rglob("*.jpg"))
    for path in pictures[:5]:
        (images / "a" / path.name).write_bytes(path.read_bytes())
    settings = {"images": str(images), "bundle": bundle_url, "output": str(tmp_path / "out"), "incremental": True}
    names = [tlbatch.classify(**settings)["run_id"]]
    tables = [tlbatch.read_predictions(settings["output"])]
    for number in (1, 2):
        (images / "a" / f"more-{number}.jpg").write_bytes(pictures[number].read_bytes())
        names.append(tlbatch.classify(**settings)["run_id"])
        tables.append(tlbatch.read_predictions(settings["output"]))
    for number in (1, 0, 2):
        found = tlbatch.rollback(settings["output"], names[number])
        assert found["table"] == names[: number + 1]
        pd.testing.assert_frame_equal(tlbatch.read_predictions(settings["output"]), tables[number])
        assert tlbatch.verify(settings["output"])["ok"]
    tlbatch.rollback(settings["output"], names[0])
    assert tlbatch.classify(**settings)["counts"]["new"] == 2, "the next night brings it up to the store"
    with pytest.raises(OutputError, match="has never published a run 'nonsense'"):
        tlbatch.rollback(settings["output"], "nonsense")


@pytest.mark.sampled(3)
def test_an_unfinished_increment_is_not_taken_for_a_whole_run(tmp_path, store, bundle_url):
    settings = {"images": str(store), "bundle": bundle_url, "output": str(tmp_path / "out")}
    tlbatch.classify(**settings, max_images=40)
    latest = Path(settings["output"], "latest.json").read_text()
    process = subprocess.Popen(
        [
            TLBATCH,
            "classify",
            *("--images", store),
            *("--bundle", bundle_url),
            *("--output", settings["output"]),
            "--incremental",
        ],
        stderr=subprocess.PIPE,
    )
    wait_for(lambda: len(list(Path(settings["output"], "runs").glob("*/run.json"))) == 2, process)
    process.kill()
    process.communicate()
    assert Path(settings["output"], "latest.json").read_text() == latest
    with pytest.raises(OutputError, match="incremental was true and is false"):
        tlbatch.classify(**settings)
    assert tlbatch.classify(**settings, incremental=True)["listed"] == 20


@pytest.mark.sampled(3)
def test_features_of_a_table_of_several_nights_are_those_of_all(tmp_path, store, real_bundle_url):
    """With a real base: of a tiny one's features, pictures of one color are near-duplicates to `review`."""
    settings = {"images": str(store), "bundle": real_bundle_url, "output": str(tmp_path / "out"), "incremental": True}
    tlbatch.classify(**{**settings, "incremental": False}, features=True, max_images=50)
    tlbatch.classify(**settings, features=True)
    again = tlbatch.rescore(features=settings["output"], bundle=real_bundle_url, output=str(tmp_path / "again"))
    assert again["predicted"] == 60
    first, second = (tlbatch.read_predictions(str(tmp_path / name)).sort_values("key") for name in ("out", "again"))
    assert first["key"].tolist() == second["key"].tolist()
    assert first["label"].tolist() == second["label"].tolist()
    trained = tlbatch.train(features=settings["output"], bundle=str(tmp_path / "head"), epochs=2)
    assert sum(trained["images"].values()) == 60
    assert tlbatch.review(output=settings["output"], to=str(tmp_path / "review"), budget=10)["images"] == 10


def settings_of(tmp_path, store, bundle_url) -> dict:
    return {"images": str(store), "bundle": bundle_url, "output": str(tmp_path / "out")}


@pytest.mark.sampled(3)
def test_features_of_a_part_of_a_table_are_not_taken_for_all_of_them(tmp_path, store, bundle_url):
    """Or `rescore` would publish an older night's images as the table."""
    settings = settings_of(tmp_path, store, bundle_url)
    tlbatch.classify(**settings, features=True, max_images=50)
    tlbatch.classify(**settings, incremental=True)
    rescoring = {"features": settings["output"], "bundle": bundle_url, "output": settings["output"]}
    with pytest.raises(OutputError, match="does not have features of the same kind as the newest"):
        tlbatch.rescore(**rescoring)
    report = tlbatch.classify(**settings, incremental=True, features=True)
    assert report["counts"]["stale"] == 10, "what lacks features is done again"
    assert tlbatch.rescore(**rescoring)["predicted"] == 60
    assert tlbatch.rescore(**rescoring)["already_done"]
    assert len(tlbatch.read_predictions(settings["output"])) == 60


@pytest.mark.sampled(3)
def test_features_of_another_precision_are_made_again(tmp_path, store, bundle_url):
    settings = settings_of(tmp_path, store, bundle_url)
    tlbatch.classify(**settings, features=True, max_images=50)
    report = tlbatch.classify(**settings, incremental=True, features=True, features_dtype="float32", promote_if="psi<9")
    assert report["counts"] == {"new": 10, "changed": 0, "retry": 0, "stale": 50, "unchanged": 0, "deleted": 0}
    assert "on" not in report, "nothing of the old table is left"


@pytest.mark.sampled(3)
def test_a_night_over_features_alone_predicts_all_of_them(tmp_path, store, bundle_url):
    settings = settings_of(tmp_path, store, bundle_url)
    tlbatch.extract(**settings)
    assert tlbatch.extract(**settings, incremental=True)["already_done"]
    report = tlbatch.classify(**settings, incremental=True, stale="rescore")
    assert (report["counts"]["stale"], report["predicted"]) == (60, 60)
    assert len(tlbatch.read_predictions(settings["output"])) == 60
    with pytest.raises(OutputError, match="has predictions; extract features into an output of their own"):
        tlbatch.extract(**settings, incremental=True)


@pytest.mark.sampled(3)
def test_a_whole_run_is_done_where_the_table_is_more_than_the_store(tmp_path, store, bundle_url):
    """Added, a night, deleted: the manifest is the first run's again, and the table is not."""
    images = shutil.copytree(store, tmp_path / "images")
    settings = settings_of(tmp_path, images, bundle_url)
    tlbatch.classify(**settings)
    more = images / "red" / "more.jpg"
    more.write_bytes((images / "red" / "0000.jpg").read_bytes())
    tlbatch.classify(**settings, incremental=True)
    more.unlink()
    report = tlbatch.classify(**settings)
    assert not report.get("already_done")
    assert len(tlbatch.read_predictions(settings["output"])) == 60


@pytest.mark.sampled(3)
def test_a_night_that_was_killed_is_forgotten_when_the_table_goes_back(tmp_path, store, bundle_url):
    settings = settings_of(tmp_path, store, bundle_url)
    first = tlbatch.classify(**settings, max_images=20)
    location = resolve(settings["output"])
    tlbatch.classify(**settings, incremental=True)
    night = read_runs(location)[-1]
    facts = {name: night.facts[name] for name in ("spec", "bundle", "base", "skipped", "list_seconds")}
    begin_run(location, "killed", night.manifest, facts, on=read_pointer(location))
    assert read_output(location).unfinished.run_id == "killed", "while the table is what it adds to, it is the one to continue"
    tlbatch.rollback(settings["output"], first["run_id"])
    report = tlbatch.classify(**settings, incremental=True)
    assert report["listed"] == 40
    assert report["run_id"] != "killed"
    assert tlbatch.verify(settings["output"])["ok"]


def test_what_was_let_through_loses_its_mark_even_if_that_is_the_last_thing_left(tmp_path, store, bundle_url):
    settings = settings_of(tmp_path, store, bundle_url)
    report = tlbatch.classify(**settings, features=True)
    mark = Path(settings["output"], "runs", report["run_id"], "_KEPT_BACK")
    mark.touch()  # as a command leaves it that dies between the flip and its last step
    assert tlbatch.classify(**settings, features=True)["already_done"]
    assert not mark.exists()


def test_what_max_images_leaves_out_is_not_deleted():
    with pytest.raises(ConfigError, match="the images it leaves out would be taken for deleted"):
        load(RunConfig, {"images": "/a", "bundle": "/b", "output": "/o", "incremental": True, "max_images": 5})


def test_a_plan_is_of_one_bundle(tmp_path):
    with pytest.raises(ConfigError, match="give one bundle at a time"):
        tlbatch.plan(images="/a", bundle=["/b", "/c"], output="/o")


def test_several_bundles_and_rescore_do_not_go_together():
    with pytest.raises(ConfigError, match="rescore is for one bundle"):
        load(RunConfig, {"images": "/a", "bundle": ["/b", "/c"], "output": "/o", "incremental": True, "stale": "rescore"})
