"""MLflow is told of what a command has published; nothing that goes wrong there changes what the command did."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import uuid
from pathlib import Path

import pytest
from mlflow import MlflowClient
from support import mlflow_server
from support.command import run_cli
from support.pictures import write_store

from tlbatch.cli.tracking import numbers_of, parameters_of, tracking
from tlbatch.config import RunConfig, TrainConfig
from tlbatch.errors import ConfigError

USER, SECRET = "somebody", "a-secret-of-the-server"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    if not mlflow_server.MLFLOW.exists():
        pytest.skip("MLflow is not installed; `make test` installs it")
    with pytest.MonkeyPatch.context() as patch, mlflow_server.serve(tmp_path_factory.mktemp("mlflow")) as url:
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "100")  # on a busy machine
        yield url


@pytest.fixture
def experiment(address, monkeypatch):
    """The name of an experiment of one test's own, which commands use."""
    name = f"test-{uuid.uuid4()}"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", name)
    return name


def runs_of(address: str, name: str) -> list:
    client = MlflowClient(tracking_uri=address)
    experiment = client.get_experiment_by_name(name)
    return client.search_runs([experiment.experiment_id]) if experiment else []


def file_of(address: str, run, name: str, folder: Path) -> bytes:
    return Path(MlflowClient(tracking_uri=address).download_artifacts(run.info.run_id, name, str(folder))).read_bytes()


def settings(uri: str, **more: object) -> RunConfig:
    return RunConfig.model_validate({"images": "/i", "bundle": "/b", "output": "/o", "mlflow_uri": uri, **more})


@pytest.fixture(scope="module")
def classified(address, bundle_url, tmp_path_factory):
    """A command that tells MLflow of its run, in an experiment; called once."""
    folder, name = tmp_path_factory.mktemp("classified"), f"test-{uuid.uuid4()}"
    store = write_store(folder / "store", 2)
    (store / "broken.jpg").write_bytes(b"no image")
    command = ["classify", "--images", store, "--bundle", bundle_url, "--output", folder / "out"]
    command += ["--max-failed-ratio", "0.5", "--set", "mlflow_uri=${TLBATCH_MLFLOW}", "--set", "report=true", "--json"]

    def call() -> dict:
        secret = address.replace("//", f"//{USER}:{SECRET}@")
        done = run_cli(*command, TLBATCH_MLFLOW=secret, MLFLOW_EXPERIMENT_NAME=name)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return name, call, call()


def test_a_run_with_its_settings_numbers_and_pages(address, classified, tmp_path):
    name, call, report = classified
    (run,) = runs_of(address, name)
    assert (run.info.run_name, run.info.status) == (report["run_id"], "FINISHED")
    assert run.data.params["max_failed_ratio"] == "0.5"
    assert not {"mlflow_uri", "storage_options", "notify"} & set(run.data.params)
    numbers = run.data.metrics
    assert (numbers["listed"], numbers["predicted"], numbers["failed_by_kind.not_an_image"]) == (7, 6, 1)
    assert numbers["seconds"] == report["seconds"]
    assert (run.data.tags["tlbatch.verb"], run.data.tags["tlbatch.output"]) == ("classify", report["output"])
    folder = Path(report["output"], "runs", report["run_id"])
    for page in ("report.json", "report.html"):
        assert file_of(address, run, page, tmp_path) == (folder / page).read_bytes()
    written = [path for path in Path(report["output"]).rglob("*") if path.is_file()]
    assert not any(SECRET.encode() in path.read_bytes() for path in written)
    assert call()["already_done"]
    assert len(runs_of(address, name)) == 1, "nothing was done, and there is nothing to tell"


def test_what_a_killed_command_began_to_tell_is_finished_by_the_same_command(address, classified, experiment):
    track, report = tracking(settings(address), "classify"), classified[2]
    track(report)
    client, (run,) = MlflowClient(tracking_uri=address), runs_of(address, experiment)
    client.update_run(run.info.run_id, status="RUNNING")
    track(report)
    (again,) = runs_of(address, experiment)
    assert (again.info.run_id, again.info.status) == (run.info.run_id, "FINISHED")


def test_each_table_of_a_run_with_several_bundles_is_a_run(address, classified, experiment, tmp_path):
    report = classified[2]
    other = shutil.copytree(report["output"], tmp_path / "other")
    tables = {"one": report, "two": {**report, "output": str(other)}}
    tracking(settings(address), "classify")({"tables": tables})
    assert {run.data.tags["tlbatch.output"] for run in runs_of(address, experiment)} == {report["output"], str(other)}


def test_a_training_with_its_model_card(address, experiment, tmp_path):
    images, bundle = write_store(tmp_path / "images", 6), tmp_path / "colors"
    base = ["--base", "MobileNetV2", "--weights", "random", "--set", "size=32", "--set", "epochs=2"]
    done = run_cli("train", "--images", images, *base, "--bundle", bundle, "--mlflow-uri", address, "--json")
    assert done.returncode == 0, done.stderr
    made, (run,) = json.loads(done.stdout), runs_of(address, experiment)
    assert (run.info.run_name, run.data.tags["tlbatch.digest"]) == ("colors", made["digest"])
    assert run.data.metrics["accuracy"] == made["accuracy"]
    assert (run.data.params["base"], run.data.params["epochs"]) == ("MobileNetV2", "2")
    assert file_of(address, run, "card.html", tmp_path) == (bundle / "card.html").read_bytes()


def test_a_server_that_is_not_there_changes_nothing_and_is_told_later(address, classified, experiment, caplog, monkeypatch):
    report = classified[2]
    monkeypatch.setenv("TLBATCH_MLFLOW", "http://127.0.0.1:9")
    for uri in (f"http://{USER}:{SECRET}@127.0.0.1:9", "${TLBATCH_MLFLOW}", "http://127.0.0.1:9"):
        assert "Max retries exceeded" not in caplog.text, "it could contain a secret"
        tracking(settings(uri), "classify")(report)
    assert caplog.text.count("the work is done, but MLflow was not told of it: MlflowException") == 3
    assert "Max retries exceeded" in caplog.text
    assert SECRET not in caplog.text
    tracking(settings(address), "classify")(report)
    assert len(runs_of(address, experiment)) == 1


def test_what_cannot_be_told_is_known_before_any_work(monkeypatch):
    with pytest.raises(ConfigError, match="must be set in the environment"):
        tracking(settings("http://${NOT_SET_ANYWHERE}/"), "classify")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"install tlbatch\[mlflow\]"):
        tracking(settings("http://127.0.0.1:9"), "classify")


def test_no_signature_of_an_address_is_a_parameter():
    weights = "https://h/w.h5?X-Amz-Signature=secret"
    asked = {"images": "/i?", "bundle": "/b", "weights": weights, "notify": "https://hook/secret", "mlflow_uri": "http://s"}
    given = parameters_of(TrainConfig.model_validate(asked))
    assert (given["weights"], given["images"]) == ("https://h/w.h5", "/i?")
    several = {"images": "s3://b/x?y=secret", "bundle": "/b", "output": "/o", "other_bundles": ["https://h/b?secret", "/c"]}
    several = parameters_of(RunConfig.model_validate(several))
    assert (several["images"], several["other_bundles"]) == ("s3://b/x", '["https://h/b", "/c"]')
    assert "secret" not in str({**given, **several})


def test_numbers_have_their_paths_as_names():
    facts = {"a": 1, "b": {"c(d)": 0.5, "e": {"f": 2}}, "text": "x", "yes": True, "nan": float("nan"), "list": [1]}
    assert dict(numbers_of(facts)) == {"a": 1.0, "b.c_d_": 0.5, "b.e.f": 2.0}


def test_an_answer_that_is_none_is_a_line_of_the_log(receiver, tmp_path, caplog):
    address, _ = receiver
    with caplog.at_level(logging.WARNING):
        tracking(settings(f"{address}/broken"), "classify")({"output": str(tmp_path), "run_id": "r"})
    assert "MLflow was not told of it" in caplog.text
