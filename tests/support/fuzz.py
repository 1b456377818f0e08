"""Coverage-guided fuzzing of whatever reads strangers' bytes: atheris (libFuzzer) mutates real files and watches lines run.

    python tests/support/fuzz.py decode --seconds 360 --folder /tmp/fuzz
    python tests/support/fuzz.py decode finding.bin

The first looks for bytes for which a reader does not do what `contracts.py` says, takes over 20 seconds or 1 GB, or crashes,
and leaves them in the folder as `crash-*`, `timeout-*` or `oom-*`. The second tries one such file. Lines of Python are
watched, those of C are not: there mutation is blind.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))

with atheris.instrument_imports(include=["tlbatch", "tarfile", "gzip", "zipfile", "PIL"]):
    from support.contracts import TARGETS, seeds
    from tlbatch.images.decode import prepare_process


def canary(data: bytes) -> None:
    """Breaks for few bytes, which are found step by step: a fuzzer that does not find them finds nothing."""
    if data[:1] == b"b" and data[1:2] == b"u" and data[2:3] == b"g":  # noqa: SIM102
        if data[3:4] == b"!":
            raise RuntimeError("the canary")


def main() -> None:
    """Fuzz one target, or run one file through it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("target", choices=[*TARGETS, "canary"])
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--seconds", type=int, default=0, help="how long; 0 is for ever, or for as many --runs")
    parser.add_argument("--runs", type=int, default=-1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="for the corpus, which is gone on with, and for findings")
    options = parser.parse_args()
    prepare_process()
    run = {**TARGETS, "canary": atheris.instrument_func(canary)}[options.target]
    if options.file is not None:
        run(options.file.read_bytes())
        return
    folder = options.folder or Path(tempfile.mkdtemp(prefix="tlbatch-fuzz-"))
    corpus = folder / options.target
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds(options.target) if options.target in TARGETS else [b"none"]):
        (corpus / f"seed-{number:03d}").write_bytes(data)
    limits = ["-max_len=16384", "-timeout=20", "-rss_limit_mb=1000", "-print_final_stats=1", f"-artifact_prefix={folder}/"]
    limits += [f"-seed={options.seed}", f"-max_total_time={options.seconds}", f"-runs={options.runs}"]
    atheris.Setup([sys.argv[0], *limits, str(corpus)], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
