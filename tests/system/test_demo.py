"""The demo on its real data: the numbers README names."""

import json
from importlib.util import find_spec

import pytest
from support.command import run_cli


@pytest.mark.skipif(find_spec("elpv_dataset") is None, reason="the package elpv-dataset is not installed")
@pytest.mark.timeout(600)
def test_the_demo_reaches_its_accuracy_and_its_books_balance(tmp_path, weights):
    done = run_cli("demo", "--output", tmp_path / "demo", "--json", timeout=540)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert result["accuracy"] >= 0.845
    run = result["run"]
    assert run["listed"] == 2624 == run["predicted"] + run["failed"]
    assert run["failed"] == 0
    assert result["verify"]["ok"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    refused = run_cli("demo", "--output", tmp_path / "full")
    assert refused.returncode == 2
    assert "not from a demo" in refused.stderr
