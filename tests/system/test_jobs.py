"""What is submitted to a cluster: thin, and opening with the line that submits it."""

import ast
import re
import subprocess
import sys

import pytest
import yaml
from support.paths import ROOT

from tlbatch.config import RunConfig, TrainConfig, load

JOBS = sorted((ROOT / "jobs").glob("*.py"))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_a_job_opens_with_its_command_and_holds_no_logic(path):
    parsed = ast.parse(path.read_text())
    assert f"ray job submit --working-dir . -- python jobs/{path.name} " in ast.get_docstring(parsed)
    assert len(parsed.body) <= 5
    assert not [node for node in ast.walk(parsed) if isinstance(node, ast.FunctionDef | ast.If | ast.For)]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_a_job_is_the_verb_of_its_name(path):
    verb = {"nightly": "classify"}.get(path.stem, path.stem)
    done = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, check=True)
    assert f"{verb} [OPTIONS]" in done.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_configurations_are_ones(path):
    """Also with what they comment out."""
    kind = {"train": TrainConfig}.get(path.stem, RunConfig)
    load(kind, {}, path)
    lines = [line.removeprefix("# ") if re.match(r"# \w+: ", line) else line for line in path.read_text().splitlines()]
    everything = yaml.safe_load("\n".join(lines))
    assert len(everything) > len(yaml.safe_load(path.read_text()))
    load(kind, everything)
