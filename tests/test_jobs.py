"""What is submitted to a cluster: thin, and opening with the line that submits it."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

JOBS = sorted((ROOT / "jobs").glob("*.py"))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_a_job_opens_with_its_command_and_holds_no_logic(path):
    parsed = ast.parse(path.read_text())
    assert f"ray job submit --working-dir . -- python jobs/{path.name} " in ast.get_docstring(parsed)
    assert len(parsed.body) <= 5
    assert not [node for node in ast.walk(parsed) if isinstance(node, ast.FunctionDef | ast.If | ast.For)]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_a_job_is_the_verb_of_its_name(path):
    done = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, check=True)
    assert f"{path.stem} [OPTIONS]" in done.stdout
