"""What mypy tells a user of the package."""

import os
import subprocess
import sys

from support.paths import ROOT


def test_a_type_checker_knows_every_setting_and_what_comes_back(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import tlbatch\n"
        'tlbatch.classify(images="a", bundle="b", output="c", top_k=3, include="*.jpg")\n'
        'tlbatch.train(images="a", bundle="b", labels=["one.csv", "two.csv"])\n'
        'tlbatch.classify(images="a", bundle=["b", "c"], output="d")\n'
        'tlbatch.classify(images="a", bundle="b", output="c", topk=3)\n'
        'tlbatch.rescore(features="a", bundle="b")\n'
        'tlbatch.train(images="a", bundle="b", epochs="many")\n'
        'tlbatch.classify(images="a", bundle="b", output="c")["predictd"]\n'
        'tlbatch.read_predictions("a", format="csv")\n'
        'tlbatch.read_errors("a", format="batches", filters=[("key", "=", "b")]).column_names\n'
        'next(tlbatch.read_errors("a", format="batches"))\n'
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--config-file=", "--no-incremental", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "MYPYPATH": str(ROOT)})
    told = [
        line.split(": error: ") for line in done.stdout.splitlines() if line.startswith(str(script)) and ": error: " in line
    ]
    assert [int(where.rsplit(":", 1)[-1]) for where, _ in told] == [5, 6, 7, 8, 9, 10], done.stdout
    assert "did you mean" in told[0][1]
    assert '"output"' in told[1][1]
    assert '"Iterator[' in told[5][1]
