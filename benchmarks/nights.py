"""Compare the estimate of `plan` with the run that follows, and time an incremental run with nothing to do.

    .venv/bin/python benchmarks/nights.py [--sizes 500 2000 8000]

Every size is planned and run twice: a first run, whose rates come from a few seconds of work, and an incremental run with as
many new images, whose rates come from the first run if that was large enough.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from photographs import repeated, run, train


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 2_000, 8_000])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plans(Path(folder), options.sizes)


def plans(root: Path, sizes: list[int]) -> None:
    """Print planned and real seconds of a first run and of the incremental run that follows."""
    bundle = train(root)
    print("| images | night | known from | planned, s | real, s | planned / real |\n| ---: | --- | --- | ---: | ---: | ---: |")
    for size in sizes:
        whole, store = repeated(root, 2 * size), root / "store"
        for night, (first, last) in enumerate(((0, size), (size, 2 * size)), 1):
            store.mkdir(exist_ok=True)
            for path in sorted(whole.iterdir())[first:last]:
                (store / path.name).hardlink_to(path)
            words = ["--images", store, "--bundle", bundle, "--output", root / "table", "--incremental"]
            planned = run("plan", *words)
            began = time.perf_counter()
            report = run("classify", *words)
            took = time.perf_counter() - began
            assert planned["counts"] == report["counts"], (planned["counts"], report["counts"])
            known, ratio = planned["known_from"].split()[0], planned["seconds"] / took
            print(f"| {size:,} | {night} | {known} | {planned['seconds']:.1f} | {took:.1f} | {ratio:.2f} |", flush=True)
        print(json.dumps(run("classify", *words)["seconds"]), "s with nothing to do", file=sys.stderr)
        shutil.rmtree(store)
        shutil.rmtree(root / "table")


if __name__ == "__main__":
    main()
