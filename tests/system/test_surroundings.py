"""Whole commands where something around them is missing: a home folder, somebody who reads, a cluster."""

import os
import subprocess
import time

import pytest
from support.paths import TLBATCH

import tlbatch


def classify(store, bundle_url, output, environment, stdout=subprocess.DEVNULL) -> subprocess.CompletedProcess[str]:
    words = [TLBATCH, "classify", "--images", str(store), "--bundle", bundle_url, "--output", str(output)]
    env = {**os.environ, "RAY_ADDRESS": "local", **environment}
    return subprocess.run(words, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, env=env, timeout=120)


def test_without_a_home_and_with_a_full_standard_output_a_run_is_published(store, bundle_url, tmp_path):
    """/proc/1 is a folder in which not even root can write."""
    with open("/dev/full", "w") as full:
        done = classify(store, bundle_url, tmp_path / "out", {"HOME": "/proc/1", "XDG_CACHE_HOME": "/proc/1"}, full)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert len(tlbatch.read_predictions(str(tmp_path / "out"))) == 60


@pytest.mark.parametrize(
    ("address", "code", "sentence"),
    [
        ("http://127.0.0.1:8265", 2, "where a cluster takes jobs"),
        ("head:port", 2, "address or RAY_ADDRESS is 'head:port'"),
        ("127.0.0.1:9", 4, "does not answer: Connection refused"),
        ("auto", 4, "no cluster runs on this machine"),
    ],
)
def test_an_address_of_no_cluster_is_one_sentence_within_a_minute(store, bundle_url, tmp_path, address, code, sentence):
    began = time.monotonic()
    done = classify(store, bundle_url, tmp_path / "out", {"RAY_ADDRESS": address, "RAY_TMPDIR": str(tmp_path)})
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (code, 1), done.stderr
    assert sentence in done.stderr
    assert time.monotonic() - began < 60
