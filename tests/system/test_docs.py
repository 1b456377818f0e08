"""Every command and every piece of Python in README and docs is carried out, in order, in a folder as its reader has it."""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
import yaml
from support.command import run_cli
from support.inventories import table_of, write_inventory
from support.paths import ROOT
from support.pictures import COLORS, write_store
from support.s3_server import environment, filesystem, free_ports

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_COMMAND = re.compile(r"(?:\.venv/bin/)?(tlbatch|make) +(.*)")

#: Carries out commands and code, one JSON line each, in one process with one Ray for all pages; a placeholder of a run is
#: looked up then.
_READER = r"""
import json, os, pandas, shlex, sys, traceback, urllib.request
import tlbatch
from tlbatch.execution.session import ray_session
from tlbatch.cli.main import app, read_command
from tlbatch.errors import TlbatchError
from tlbatch.storage.resolve import resolve
from tlbatch.web.corrections import Corrections
from tlbatch.web.serve import serving

def run_of(word):
    return tlbatch.status(os.environ["OUTPUT"])["runs"][0]["run_id"] if word == "FIRST_RUN" else word

def fill_in(file):
    # what a person does who has looked at the pictures
    rows = pandas.read_csv(file)
    rows.assign(label=rows["key"].str.split("/").str[0]).to_csv(file, index=False)

def look(text):
    # what a person does: look at the first page, and correct what is wrong there
    _, settings = read_command(shlex.split(text))
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    with serving(settings) as server:
        page = browser.open(server.url).read().decode()
    assert "data-address" in page
    for row in tlbatch.read_predictions(settings.output).head(9).itertuples():
        Corrections(resolve(settings.corrections)).put((row.uri, row.key), row.key.split("/")[0])

def carry_out(kind, text):
    if kind == "page":
        home, os.environ["OUTPUT"] = text
        return os.chdir(home)
    if kind == "python":
        return exec(compile(text, "docs", "exec"), {"__name__": "docs"})
    if text.startswith("browse"):
        return look(text)
    said = app([run_of(word) for word in shlex.split(text)], prog_name="tlbatch", standalone_mode=False)
    if text.startswith("review"):
        fill_in("review/labels.csv")
    return said

answers = os.fdopen(os.dup(1), "w", buffering=1)
with ray_session():
    for line in sys.stdin:
        try:
            said = carry_out(*json.loads(line))
        except TlbatchError as error:
            said = f"{type(error).__name__}: {error}"
        except BaseException as error:
            said = f"{type(error).__name__}: {error!r}"
            traceback.print_exc()
        answers.write("ANSWER " + json.dumps(said) + "\n")
"""


#: The cluster lets in who has the token; its workers tell their counters to Prometheus twice a second.
_CLUSTER = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_metrics_report_interval_ms": "500"}


#: Who submits needs the token alone.
_TOKEN = {"RAY_AUTH_TOKEN": _CLUSTER["RAY_AUTH_TOKEN"]}


class Head(NamedTuple):
    """Where a Ray cluster takes jobs, and where Prometheus finds its counters."""

    jobs: str
    metrics: str


class Piece(NamedTuple):
    """Something to carry out: `kind` is tlbatch, make or python."""

    kind: str
    text: str


def pieces(page: str) -> list[Piece]:
    """What a page asks its reader to do, in its order."""
    found = []
    for language, block in _FENCE.findall((ROOT / page).read_text()):
        if language == "python":
            found.append(Piece("python", block))
            continue
        lines = re.sub(r"\\\n\s*", "", block).splitlines() if not language else []
        matches = (_COMMAND.fullmatch(line.split("  #")[0].strip()) for line in lines)
        found += [Piece(match[1], match[2]) for match in matches if match]
    return found


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory, bundle_url, weights) -> Path:
    """What a reader has before the first command: images, labels, weights and a model from elsewhere."""
    folder = tmp_path_factory.mktemp("docs")
    write_store(folder / "labelled", 10)
    write_store(folder / "images", 12, first=100)
    keys = sorted(str(path.relative_to(folder / "images")) for path in (folder / "images").rglob("*.jpg"))
    labels = pd.DataFrame({"key": keys, "label": [key.split("/")[0] for key in keys]})
    labels.to_csv(folder / "more.csv", index=False)
    labels.groupby("label").head(8).to_csv(folder / "labels.csv", index=False)
    shutil.copy(weights, folder / "mobilenetv2_notop.h5")
    _classifier_of_others(folder / "elsewhere.keras")
    with zipfile.ZipFile(ROOT / "tests" / "golden" / "onnx.zip") as archive:
        (folder / "elsewhere.onnx").write_bytes(archive.read("plain-dynamo.onnx"))
    (folder / "classes.txt").write_text("".join(f"{label}\n" for label in sorted(COLORS)))
    for name in ("model", "defects", "glare", "dirt"):
        shutil.copytree(bundle_url, folder / name)
    shutil.copytree(ROOT / "jobs", folder / "jobs")
    return folder


def _classifier_of_others(path: Path) -> None:
    """A Keras model that takes pixels between -1 and 1."""
    import keras

    inputs = keras.Input((64, 64, 3))
    features = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(8, 3, activation="relu")(inputs))
    keras.Model(inputs, keras.layers.Dense(len(COLORS), activation="softmax")(features)).save(path)


@pytest.fixture
def bucket(kitchen, s3_server):
    """A bucket with the same images and model, and an inventory of it."""
    files = filesystem(s3_server.endpoint)
    name = f"docs-{secrets.token_hex(4)}"
    files.mkdir(name)
    files.put(str(kitchen / "images") + "/", f"{name}/images/", recursive=True)
    for bundle in ("model", "bundles/defects"):
        files.put(str(kitchen / "model") + "/", f"{name}/{bundle}/", recursive=True)
    found = files.find(name, detail=True).values()
    rows = [{"key": one["Key"].partition("/")[2], "size": one["size"], "e_tag": one["ETag"].strip('"')} for one in found]
    put = partial(_put, files, name)
    write_inventory(put, [table_of(name, rows)], "Parquet", name, name, root="inventory")
    return name


def _put(files, bucket: str, key: str, data: bytes) -> None:
    files.pipe_file(f"{bucket}/{key}", data)


@pytest.fixture(scope="module")
def head(tmp_path_factory, s3_server):
    """A Ray cluster of one machine, on the loopback."""
    port, jobs, agent, metrics, client = free_ports(5)
    temp = tempfile.mkdtemp(prefix="tlb-", dir="/tmp")  # a socket's path has room for a hundred characters
    flags = {
        "port": port,
        "dashboard-port": jobs,
        "dashboard-agent-listen-port": agent,
        "metrics-export-port": metrics,
        "ray-client-server-port": client,
        "min-worker-port": 0,
        "max-worker-port": 0,
        "node-ip-address": "127.0.0.1",
        "dashboard-host": "127.0.0.1",
        "num-cpus": 2,
        "object-store-memory": 200_000_000,
        "temp-dir": temp,
    }
    command = [Path(sys.executable).parent / "ray", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    log = tmp_path_factory.mktemp("head") / "log"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # a job is `python -m tlbatch …`
    settings = {**os.environ, **environment(s3_server.endpoint), **_CLUSTER, "PATH": path}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(word) for word in command], stdout=file, stderr=file, env=settings, start_new_session=True
        )
    try:
        end = time.monotonic() + 90
        while not _answers(f"http://127.0.0.1:{jobs}/api/version"):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.3)
        yield Head(f"http://127.0.0.1:{jobs}", f"http://127.0.0.1:{metrics}/metrics")
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:  # it gives its processes half a minute to end
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(temp, ignore_errors=True)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except urllib.error.HTTPError:
        return True  # it wants the token
    except OSError:
        return False
    return True


class Reader:
    """The process that carries out the pages, one after the other."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self._log = folder / "stderr"
        with self._log.open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _READER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=folder,
                env={**os.environ, **environment(endpoint), **_TOKEN},
            )

    def carry_out(self, kind: str, text: object) -> object:
        """The answer to one command; fails if the process has ended."""
        self._process.stdin.write(json.dumps([kind, text]) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        pytest.fail(f"the process ended at {text}: {self.said()}")

    def said(self) -> str:
        return self._log.read_text()[-3000:]

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(60)
        finally:
            self._process.kill()
            self._process.stdout.close()


@pytest.fixture(scope="module")
def reader(tmp_path_factory, s3_server):
    one = Reader(tmp_path_factory.mktemp("reader"), s3_server.endpoint)
    yield one
    one.close()


def carried_out(page: str, reader: Reader, kitchen: Path, endpoint: str, bucket: str, jobs: str, tmp_path: Path) -> None:
    """Carry out a page; fails with the first command that does."""
    home = tmp_path / "home"
    shutil.copytree(kitchen, home)
    for file in (home / "jobs").glob("*.yaml"):
        file.write_text(file.read_text().replace("s3://bucket", f"s3://{bucket}"))
    if any(piece.text.startswith("train") and piece.text.endswith("--bundle model/") for piece in pieces(page)):
        shutil.rmtree(home / "model")
    reader.carry_out("page", [str(home), f"s3://{bucket}/predictions"])
    for piece in pieces(page):
        if piece.kind == "make":
            continue
        answer = reader.carry_out(piece.kind, _here(piece, home, endpoint, bucket, jobs))
        assert _is_well(piece, answer), (piece, answer, reader.said())


def _is_well(piece: Piece, answer: object) -> bool:
    """Whether a command ended as it should; a head of a few images may well be kept back by its condition."""
    return answer in (0, None) or ("--promote-if" in piece.text and str(answer).startswith("NotPromotedError"))


def _here(piece: Piece, home: Path, endpoint: str, bucket: str, jobs: str) -> str:
    """A command with the addresses of this machine."""
    replaced = {
        "s3://bucket": f"s3://{bucket}",
        "http://minio:9000": endpoint,
        "http://HEAD:8265": jobs,
        "http://127.0.0.1:8265": jobs,
        "/etc/tlbatch/nightly.yaml": str(home / "jobs" / "nightly.yaml"),
        "CELLS": "images/",
        "YOUR_FOLDER": "images/",
        "tlbatch-demo/bundle": "defects/",
        "OUTPUT": f"s3://{bucket}/predictions",
        "--to RUN": "--to FIRST_RUN",
        '"rose"': '"red"',
    }
    text = piece.text
    for old, new in replaced.items():
        text = text.replace(old, new)
    return text


@pytest.mark.sampled(1)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", [page for page in PAGES if any(piece.kind != "make" for piece in pieces(page))])
def test_what_a_page_says_can_be_done(page, reader, kitchen, s3_server, bucket, head, tmp_path):
    carried_out(page, reader, kitchen, s3_server.endpoint, bucket, head.jobs, tmp_path)


def test_every_target_of_make_that_is_named_is_one():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in (*PAGES, "CONTRIBUTING.md"):
        for piece in pieces(page):
            assert piece.kind != "make" or piece.text.split()[0] in targets, (page, piece)


def test_the_first_page_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 250
    assert [line for line in lines if len(line) > 100 and not line.startswith("|")] == []


def test_every_verb_is_told_of():
    from tlbatch.cli.main import app

    told = "".join((ROOT / page).read_text() for page in PAGES)
    missing = [command.name or command.callback.__name__ for command in app.registered_commands]
    assert [name for name in missing if f"tlbatch {name}" not in told] == []


def test_every_page_is_found_from_the_first_one():
    reached, waiting = set(), ["README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        for link in re.findall(r"\]\(([\w./-]+\.md)\)", (ROOT / page).read_text()):
            path = os.path.normpath(os.path.join(os.path.dirname(page), link))
            assert (ROOT / path).exists(), (page, link)
            if path not in reached:
                waiting.append(path)
    assert {page for page in PAGES if page not in reached} == set()


@pytest.mark.sampled(1)
def test_the_dashboard_asks_for_counters_that_a_cluster_gives(head, bucket, kitchen, s3_server):
    """A job on the cluster, then what Prometheus would read there."""
    board = (ROOT / "docs" / "grafana.json").read_text()
    asked = set(re.findall(r"ray_tlbatch_\w+", board))
    assert len(json.loads(board)["panels"]) >= 3
    done = run_cli(
        *("submit", "--address", head.jobs, "--follow", "classify", "--images", f"s3://{bucket}/images"),
        *("--bundle", f"s3://{bucket}/model", "--output", f"s3://{bucket}/counted"),
        **environment(s3_server.endpoint),
        **_TOKEN,
    )
    assert done.returncode == 0, done.stderr
    end = time.monotonic() + 30
    while True:
        with urllib.request.urlopen(head.metrics, timeout=10) as answer:
            given = answer.read().decode()
        if all(f"{name}{{" in given for name in asked):
            break
        assert time.monotonic() < end, sorted(line for line in given.splitlines() if "tlbatch" in line)
        time.sleep(0.5)
    counted = re.findall(r'^ray_tlbatch_images_total\{.*outcome="predicted".*\} ([\d.]+)', given, re.MULTILINE)
    assert sum(map(float, counted)) >= 36


def test_the_jobs_configurations_are_yaml_with_the_bucket_of_the_pages():
    for path in (ROOT / "jobs").glob("*.yaml"):
        assert str(yaml.safe_load(path.read_text())["images"]).startswith("s3://bucket"), path
