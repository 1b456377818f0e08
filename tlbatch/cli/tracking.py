"""A finished command -> a run of MLflow: its settings, its numbers, and its model card or its report.

A server that does not take it is a line of the log and changes nothing else; the same command, run again, tells it then.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
import os
import re
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tlbatch import schema
from tlbatch.errors import ConfigError
from tlbatch.model.bundle import CARD
from tlbatch.storage.resolve import resolve

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from pydantic import BaseModel

log = logging.getLogger(__name__)

#: The experiment, unless MLFLOW_EXPERIMENT_NAME says another.
_EXPERIMENT = "tlbatch"
#: Settings that are no parameters: addresses that may hold a secret.
_NOT_LOGGED = {"mlflow_uri", "notify", "storage_options"}
#: What MLflow takes at most: characters of a value and of a name, numbers and parameters of a request.
_MOST_OF_A_VALUE, _MOST_OF_A_NAME, _NUMBERS, _PARAMETERS = 5_000, 250, 1_000, 100
_MOST_OF_A_REASON = 300
#: What a name may not have in it.
_STRANGE = re.compile(r"[^\w\-./ :]")
#: The query of a URL.
_QUERY = re.compile(r"(://[^\s\"?]*)\?[^\s\"]*")
#: MLflow asks seven times, and for two minutes each. It also tells its makers how it is used.
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

#: Takes the result of a command.
Track = Callable[[Mapping[str, Any]], None]


def tracking(settings: BaseModel, verb: str) -> Track:
    """What tells MLflow of a command, if its settings name a server; it is told once of each published run.

    Args:
        settings: those of the command. In its field `mlflow_uri`, `${NAME}` is read from the environment.
        verb: the command.

    Raises:
        ConfigError: a variable is not set, or MLflow's client is not installed.
    """
    uri = getattr(settings, "mlflow_uri", None)
    if uri is None:
        return lambda _: None
    address = os.path.expandvars(uri)
    if "$" in address:
        raise ConfigError("mlflow_uri: a variable ${NAME} in it must be set in the environment.")
    if importlib.util.find_spec("mlflow") is None:
        raise ConfigError("mlflow_uri: This needs the package mlflow-skinny: install tlbatch[mlflow].")

    def track(result: Mapping[str, Any]) -> None:
        try:
            for one in result.get("tables", {"": result}).values():
                _track(_client(address), verb, settings, one)
        except Exception as error:  # MLflow raises what its server, its store and its client's libraries raise
            why = type(error).__name__
            if address == uri and urlsplit(uri).username is None:  # otherwise the message may contain a secret
                why += f": {textwrap.shorten(str(error), _MOST_OF_A_REASON, placeholder=' …')}"
            log.warning("mlflow_uri: the work is done, but MLflow was not told of it: %s", why)

    return track


def _client(address: str) -> MlflowClient:
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient  # a second

    return MlflowClient(tracking_uri=address)


def _track(client: MlflowClient, verb: str, settings: BaseModel, result: Mapping[str, Any]) -> None:
    """Make a run for a training; find or make one for a published run."""
    experiment = _experiment_of(client)
    texts = {name: value for name, value in result.items() if isinstance(value, str)}
    tags = {"tlbatch.verb": verb, "tlbatch.version": version("tlbatch")}
    tags |= {f"tlbatch.{name}": value[:_MOST_OF_A_VALUE] for name, value in texts.items()}
    run = None
    if "run_id" in result:
        tags["tlbatch.identity"] = hashlib.sha256(f"{result['output']}\0{result['run_id']}".encode()).hexdigest()
        known = client.search_runs([experiment], f"tags.`tlbatch.identity` = '{tags['tlbatch.identity']}'")
        run = known[0] if known else None
        if run is not None and run.info.status == "FINISHED":
            return
    if run is None:
        began = time.time() - float(result.get("seconds") or 0)
        named = result.get("run_id") or Path(result["bundle"]).name
        run = client.create_run(experiment, start_time=int(began * 1_000), tags=tags, run_name=named)
    _fill(client, run, settings, result)
    client.set_terminated(run.info.run_id)


def _experiment_of(client: MlflowClient) -> str:
    from mlflow.exceptions import MlflowException

    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _EXPERIMENT)
    for _ in range(2):
        found = client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        try:
            return str(client.create_experiment(name))
        except MlflowException:  # somebody else has made it meanwhile
            continue
    raise MlflowException(f"no experiment {name}")


def _fill(client: MlflowClient, run: Any, settings: BaseModel, result: Mapping[str, Any]) -> None:
    """Log parameters, numbers and files; those that a command that was killed has logged stay."""
    from mlflow.entities import Metric, Param

    given = parameters_of(settings)
    new = [Param(name, text) for name, text in given.items() if name not in run.data.params]
    for start in range(0, len(new), _PARAMETERS):
        client.log_batch(run.info.run_id, params=new[start : start + _PARAMETERS])
    now = int(time.time() * 1_000)
    numbers = [Metric(name, value, now, 0) for name, value in dict(numbers_of(result)).items()]
    for start in range(0, len(numbers), _NUMBERS):
        client.log_batch(run.info.run_id, metrics=numbers[start : start + _NUMBERS])
    options = getattr(settings, "storage_options", {})
    if "run_id" in result:
        folder = resolve(result["output"], options).join(schema.RUNS, result["run_id"])
        names = [schema.REPORT, schema.REPORT_PAGE]
    else:
        folder, names = resolve(result["bundle"], options), [CARD]
    with tempfile.TemporaryDirectory() as here:
        for name in names:
            source = folder.join(name)
            if source.exists():  # not every command writes a page
                Path(here, name).write_bytes(source.read())
                client.log_artifact(run.info.run_id, str(Path(here, name)))


def parameters_of(settings: BaseModel) -> dict[str, str]:
    """The settings that are given, as texts; without the queries of URLs, which may be signatures."""
    given = settings.model_dump(mode="json", exclude=_NOT_LOGGED, exclude_none=True)
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in given.items()}
    return {name: _QUERY.sub(r"\1", text)[:_MOST_OF_A_VALUE] for name, text in texts.items()}


def numbers_of(facts: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers in nested facts, each with its path as MLflow takes names."""
    for name, value in facts.items():
        path = f"{above}{_STRANGE.sub('_', str(name))}"
        if isinstance(value, Mapping):
            yield from numbers_of(value, f"{path}.")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield path[:_MOST_OF_A_NAME], float(value)
