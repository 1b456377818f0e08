"""Standard streams that are closed, full or no longer read: what is done stays done, and its exit code too."""

import errno
import shlex
import subprocess

import pytest
from support.paths import TLBATCH

from tlbatch import stdio
from tlbatch.cli.main import VERBS, _print_result

PUBLISHED = {"run_id": "r", "bundle": "b"}
CRON = f'{shlex.quote(TLBATCH)} schedule --target cron --at "0 2 * * *" status s3://b/o'


@pytest.mark.parametrize("failure", [errno.EPIPE, errno.ENOSPC])
def test_what_was_published_stays_so_where_it_cannot_be_printed(failure, monkeypatch, capsys):
    class Broken:
        def write(self, _):
            raise OSError(failure, "it cannot be written")

        def flush(self):
            pass

    monkeypatch.setattr(stdio, "_results", [Broken()])
    _print_result(VERBS["classify"], PUBLISHED, as_json=True)
    _print_result(VERBS["review"], {"images": 1, "why": {}, "near_duplicates": 0, "sheet": "s", "labels": "l"}, as_json=False)
    said = capsys.readouterr().err
    assert ("the result could not be printed: it cannot be written." in said) == (failure == errno.ENOSPC)
    if failure == errno.ENOSPC:
        with pytest.raises(OSError, match="it cannot be written"):
            _print_result(VERBS["verify"], {"ok": True}, as_json=True)


@pytest.mark.parametrize(
    ("redirected", "code"),
    [(">&-", 0), (">&- 2>&- <&-", 0), ("2>/dev/full", 0), (">/dev/full", 4), ("| true; exit ${PIPESTATUS[0]}", 0)],
)
def test_streams_of_a_process(redirected, code, tmp_path):
    done = subprocess.run(["bash", "-c", f"{CRON} {redirected}"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
