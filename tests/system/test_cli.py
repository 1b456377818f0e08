"""The command line as a person or a script meets it: exit codes, one sentence, JSON, and signals."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer
from support.command import run_cli, run_here, without_progress
from support.paths import ROOT, TLBATCH
from support.pictures import COLORS, encoded, noisy, write_store

from tlbatch.cli.main import app
from tlbatch.schema import sha256

VERBS = [
    "compact",
    "plan",
    "rollback",
    "schedule",
    "submit",
    "train",
    "classify",
    "extract",
    "rescore",
    "browse",
    "evaluate",
    "compare",
    "review",
    "import",
    "export",
    "sql",
    "sync",
    "status",
    "report",
    "verify",
    "gc",
    "demo",
]  # in the order of `tlbatch --help`


def test_the_verbs_and_their_help():
    group = typer.main.get_command(app)
    assert sorted(group.commands) == sorted(VERBS)
    for name, command in group.commands.items():
        assert command.help, name
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"


def test_every_verb_takes_a_config_settings_and_json():
    for name, command in typer.main.get_command(app).commands.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert {"--config", "--set", "--json"} <= options, name


def test_help_imports_nothing_heavy():
    heavy = "tensorflow keras ray openvino pyarrow pandas numpy PIL fsspec"
    code = (
        "import sys, tlbatch, tlbatch.cli.main, typer\n"
        "try: tlbatch.cli.main.app(['classify', '--help'])\n"
        "except SystemExit: pass\n"
        f"print([name for name in {heavy.split()!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "--bundle" in done.stdout


def sentence(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line on stderr."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("tlbatch: ")
    return lines[0]


def tree(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["classify", "--images", "nowhere", "--bundle", "{bundle}", "--output", "out"], "nowhere does not exist"),
        (["classify", "--images", "empty", "--bundle", "{bundle}", "--output", "out"], "it is empty"),
        (["classify", "--images", "{store}", "--bundle", "empty", "--output", "out"], "There is no bundle at"),
        (["classify", "--images", "{store}", "--bundle", "{bundle}", "--output", "full"], "holds no tlbatch runs"),
        (
            ["classify", "--images", "{store}", "--bundle", "{bundle}", "--output", "out", "--set", "batchsize=4"],
            "'batch_size'",
        ),
        (["classify", "--config", "typo.yaml"], "no configuration key 'imagse'; did you mean 'images'"),
        (["classify", "--images", "{store}"], "bundle is missing: give --bundle"),
        (["classify", "--images", "{store}", "--bundle", "{bundle}", "--output", "out", "--engine", "onnx"], "engine: "),
        (["train", "--images", "{store}", "--base", "MobilNetV2", "--bundle", "b"], "did you mean 'MobileNetV2'"),
        (["train", "--images", "{store}", "--weights", "w.h5", "--bundle", "b"], "there is no file"),
        (["train", "--images", "{store}", "--weights", "random", "--labels", "column.csv", "--bundle", "b"], "no column label"),
        (
            ["train", "--images", "{store}", "--weights", "random", "--labels", "other.csv", "--bundle", "b"],
            "belongs to an image",
        ),
        (["train", "--images", "{store}", "--weights", "random", "--labels", "one.csv", "--bundle", "b"], "has 1 image;"),
        (["status", "empty"], "There is no tlbatch output at"),
        (["verify", "nowhere"], "There is no tlbatch output at"),
        (["evaluate", "--output", "empty", "--labels", "one.csv"], "Nothing is published at"),
        (["extract", "--images", "{store}", "--base", "Nope", "--weights", "random", "--output", "out"], "no 'Nope'"),
    ],
)
def test_a_persons_mistake_gets_one_sentence_exit_code_2_and_writes_nothing(
    tmp_path, store, bundle_url, monkeypatch, arguments, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("x")
    (tmp_path / "typo.yaml").write_text("imagse: /data\n")
    (tmp_path / "column.csv").write_text("key,kind\nred/0000.jpg,x\n")
    (tmp_path / "other.csv").write_text("key,label\nnope.jpg,x\n")
    rows = [f"{color}/{number:04d}.jpg,{color}" for color in ("red", "green") for number in range(4)]
    (tmp_path / "one.csv").write_text("\n".join(["key,label", *rows, "blue/0000.jpg,blue"]))
    before = tree(tmp_path)
    done = run_here(*(argument.format(store=store, bundle=bundle_url) for argument in arguments))
    assert words in sentence(done, 2)
    assert tree(tmp_path) == before


def test_an_unreachable_download_names_the_file_option(tmp_path, store):
    """A proxy nobody listens at stands for a machine without a network."""
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    arguments = ("train", "--images", store, "--size", "96", "--weights", "imagenet", "--bundle", tmp_path / "b")
    done = run_cli(*arguments, KERAS_HOME=str(tmp_path / "keras"), **nowhere)
    assert "cannot download the ImageNet weights of MobileNetV2" in sentence(done, 2)
    assert "--weights FILE" in done.stderr
    assert not (tmp_path / "b").exists()


def test_unknown_flags_are_usage_errors():
    assert run_cli("classify", "--imagse", "x").returncode == 2


@pytest.fixture(scope="module")
def output(store, bundle_url, tmp_path_factory) -> Path:
    """A table made by the command itself."""
    folder = tmp_path_factory.mktemp("cli") / "out"
    done = run_cli("classify", "--images", store, "--bundle", bundle_url, "--output", folder, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout)["predicted"] == 60
    return folder


def test_verbs_that_look_at_a_folder(output, store, tmp_path):
    keys = sorted(path.relative_to(store).as_posix() for path in store.rglob("*.jpg"))
    labels = pd.DataFrame({"key": keys, "label": [key.split("/")[0] for key in keys]})
    labels.assign(split=["test" if number % 5 == 0 else "train" for number in range(60)]).to_csv(tmp_path / "l.csv")
    assert json.loads(run_here("verify", output, "--json").stdout)["ok"]
    assert json.loads(run_here("status", output, "--json").stdout)["runs"][0]["state"] == "published"
    evaluate = ["evaluate", "--output", output, "--labels", tmp_path / "l.csv"]
    assert json.loads(run_here(*evaluate, "--split", "test", "--json").stdout)["images"] == 12
    for run, verb in ((run_cli, ["verify", output]), (run_here, ["status", output]), (run_here, evaluate)):
        done = run(*verb)
        assert (done.returncode, done.stderr) == (0, "")
        assert "60" in done.stdout


def test_verify_of_a_damaged_output_exits_1_and_names_the_file(store, bundle_url, tmp_path, output):
    damaged = shutil.copytree(output, tmp_path / "damaged")
    part = next(damaged.rglob("predictions/*.parquet"))
    part.write_bytes(part.read_bytes()[:-1] + b"\0")
    done = run_cli("verify", damaged)
    assert done.returncode == 1
    assert "predictions/part-00000.parquet: differs from its recorded sha256" in done.stdout


def spoil(bundle: Path, name: str, data: bytes, *, recorded: bool) -> None:
    """Replace a file of a bundle; `recorded` makes bundle.json agree, so that only the self-test can tell."""
    (bundle / name).write_bytes(data)
    if recorded:
        facts = json.loads((bundle / "bundle.json").read_text())
        facts["files"][name] = sha256(data)
        (bundle / "bundle.json").write_text(json.dumps(facts))


def test_a_damaged_bundle_is_a_sentence_before_anything_is_written(store, bundle_url, tmp_path):
    bundle = shutil.copytree(bundle_url, tmp_path / "bundle")
    spoil(bundle, "model.keras", b"", recorded=False)
    done = run_cli("classify", "--images", store, "--bundle", bundle, "--output", tmp_path / "out")
    assert "is damaged: model.keras differs from its recorded sha256" in sentence(done, 2)
    assert not (tmp_path / "out").exists()


def test_what_an_actor_refuses_is_a_sentence_too(store, bundle_url, tmp_path):
    bundle = shutil.copytree(bundle_url, tmp_path / "bundle")
    with np.load(bundle / "probes.npz") as file:
        probes = {**file, "scores": np.roll(file["scores"], 1, axis=1)}
    buffer = io.BytesIO()
    np.savez(buffer, **probes)
    spoil(bundle, "probes.npz", buffer.getvalue(), recorded=True)
    done = run_cli("classify", "--images", store, "--bundle", bundle, "--output", tmp_path / "out")
    assert "fails its self-test on openvino" in sentence(done, 2)
    assert not (tmp_path / "out" / "latest.json").exists()


@pytest.mark.sampled(1)
def test_train_and_classify_as_a_person_sees_them(tmp_path, weights):
    store = write_store(tmp_path / "store", 4)
    done = run_cli(
        "train",
        "--images",
        store,
        "--size",
        "64",
        "--weights",
        weights,
        "--bundle",
        tmp_path / "b",
        "--epochs",
        "5",
        COLUMNS="100",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "accuracy" in done.stdout
    (store / "red" / "bad.jpg").write_bytes(b"")
    done = run_cli("classify", "--images", store, "--bundle", tmp_path / "b", "--output", tmp_path / "o")
    assert done.returncode == 3, done.stderr
    assert "13 listed = 12 predicted + 1 failed" in done.stdout
    assert done.stderr.splitlines() == [
        "1 of 13 images failed, more than max_failed_ratio=0.01 allows; the table is published all the same."
    ]
    again = run_cli(
        "classify", "--images", store, "--bundle", tmp_path / "b", "--output", tmp_path / "o", "--set", "max_failed_ratio=1"
    )
    assert again.returncode == 0
    assert "Nothing to do" in again.stdout
    assert len(pd.read_parquet(next((tmp_path / "o").rglob("predictions")))) == 12


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """Pictures large enough that a run over them can be caught at work."""
    store = tmp_path_factory.mktemp("many")
    for label, color in COLORS.items():
        (store / label).mkdir()
        pictures = [encoded(noisy(color, number, (640, 512))) for number in range(10)]
        for number in range(300):
            (store / label / f"{number:04d}.jpg").write_bytes(pictures[number % 10])
    return store


def start(store: Path, bundle: str, output: Path) -> subprocess.Popen[str]:
    settings = ["--set", "rows_per_task=30", "--set", "run_id=the-run"]
    command = [TLBATCH, "classify", "--images", str(store), "--bundle", bundle, "--output", str(output), *settings]
    # Whoever runs the tests in the background has SIGINT ignored, and so have all their children.
    heeding = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", heeding, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_receipts(output: Path, process: subprocess.Popen[str], count: int) -> None:
    end = time.monotonic() + 120
    while len(list(output.glob("runs/*/staged/*.json"))) < count:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.05)


def table(output: Path) -> bytes:
    return next(output.rglob("predictions/part-00000.parquet")).read_bytes()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_continues_and_ends_as_an_undisturbed_one(many, bundle_url, tmp_path, number):
    process = start(many, bundle_url, tmp_path / "out")
    wait_for_receipts(tmp_path / "out", process, 3)
    os.kill(process.pid, signal.SIGSTOP)  # it would be done before the second one has looked
    other = run_cli(
        "classify", "--images", many, "--bundle", bundle_url, "--output", tmp_path / "out", "--set", "run_id=second"
    )
    assert "Run the-run has been working on this output since" in sentence(other, 4)
    os.kill(process.pid, number)
    os.kill(process.pid, signal.SIGCONT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 4, said
    wanted = "tlbatch: Run the-run was interrupted; run the same command again to continue it."
    assert without_progress(said).strip() == wanted
    staged = len(list((tmp_path / "out").glob("runs/*/staged/*.json")))
    assert 3 <= staged < 30
    assert json.loads(run_cli("status", tmp_path / "out", "--json").stdout)["runs"][0]["state"] == "unfinished"
    again = run_cli("classify", "--images", many, "--bundle", bundle_url, "--output", tmp_path / "out", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["run_id"] == "the-run"
    undisturbed = tmp_path.parent / "undisturbed"
    if not undisturbed.exists():
        assert without_progress(start(many, bundle_url, undisturbed).communicate(timeout=240)[1]) == ""
    assert table(tmp_path / "out") == table(undisturbed)


def test_the_module_runs_as_the_command_does():
    done = subprocess.run([sys.executable, "-m", "tlbatch", "--help"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "classify" in done.stdout
