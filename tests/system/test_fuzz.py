"""Bytes nobody meant: every reader of strangers' bytes keeps its promises for what fuzzers make of real files.

`make fuzz` runs the same for half an hour.
"""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.contracts import FACTS, TARGETS, seeds
from support.paths import SUPPORT

SECONDS = int(os.environ.get("TLBATCH_FUZZ_SECONDS", "0"))
EXAMPLES = int(os.environ.get("TLBATCH_EXAMPLES", "200"))
RUNS = 3000
FUZZ = SUPPORT / "fuzz.py"


@pytest.fixture
def folder(tmp_path) -> Path:
    """For corpus and findings; those of `make fuzz` stay, outside the repository, and the next one goes on with them."""
    return Path.home() / ".cache" / "tlbatch-fuzz" if SECONDS else tmp_path


def fuzz(target: str, folder: Path, *options: str) -> subprocess.CompletedProcess:
    pytest.importorskip("atheris", reason="atheris has no build for this Python or system")
    # Through a shell that stays: libFuzzer takes the memory of the process it is started from for its own.
    command = ["sh", "-c", '"$0" "$@"; exit $?', sys.executable, FUZZ, target, "--folder", folder, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS + 240)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("target", TARGETS)
def test_guided_by_coverage(target, folder):
    done = fuzz(target, folder, *(["--seconds", str(SECONDS)] if SECONDS else ["--runs", str(RUNS)]))
    assert done.returncode == 0, done.stderr[-3000:]
    runs, memory = (
        int(re.search(f"stat::{of}: +([0-9]+)", done.stderr)[1]) for of in ("number_of_executed_units", "peak_rss_mb")
    )
    print(f"\n{target}: {runs:,} executions, {memory} MB, findings: none")
    assert runs >= RUNS
    assert memory < 1000


def test_the_fuzzer_finds_what_can_be_found(tmp_path):
    done = fuzz("canary", tmp_path, "--runs", "2000000")
    assert done.returncode != 0
    (found,) = tmp_path.glob("crash-*")
    assert found.read_bytes().startswith(b"bug!")
    again = subprocess.run([sys.executable, FUZZ, "canary", found], capture_output=True, text=True, check=False, timeout=60)
    assert "RuntimeError: the canary" in again.stderr


@st.composite
def bent(draw: st.DrawFn, target: str) -> bytes:
    """A real file with some of its bytes changed, lost, doubled or taken from another one."""
    files = seeds(target)
    data = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, max(0, len(data) - 1)))
        end = start + draw(st.integers(0, 64))
        other = draw(st.sampled_from(files))
        piece = draw(st.one_of(st.binary(max_size=16), st.just(data[start:end] * 2), st.just(other[start:end]), st.just(b"")))
        data[start:end] = piece
    return bytes(data)


@pytest.mark.parametrize("target", [target for target in TARGETS if target != "bundle"])
def test_by_hypothesis(target):
    @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=EXAMPLES <= 200)
    @given(bent(target))
    def check(data):
        TARGETS[target](data)

    check()


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=5 * EXAMPLES, deadline=None, database=None, derandomize=EXAMPLES <= 200)
@given(st.data())
def test_facts_of_a_bundle_by_hypothesis(data):
    """`bundle.json` with anything at all in one or two places."""
    facts = copy.deepcopy(FACTS)
    for _ in range(data.draw(st.integers(1, 2))):
        inside = facts
        name = data.draw(st.sampled_from(sorted(inside)))
        while isinstance(inside[name], dict) and inside[name] and data.draw(st.booleans()):
            inside = inside[name]
            name = data.draw(st.sampled_from(sorted(inside)))
        inside[name] = data.draw(_JSON)
    TARGETS["bundle"](json.dumps(facts).encode())
