"""Marked credentials go in everywhere a user may have them; everything that is written or said is searched for them."""

import os
import secrets
import shutil
import tempfile
from pathlib import Path

from support.command import run_cli
from support.pictures import COLORS, encoded, noisy
from support.s3_server import BUCKET, SECRET, environment, filesystem

#: No part of any name or text of tlbatch's own.
HOOK, ELSEWHERE, WRONG = "canary-hook-3f9c", "canary-env-77ab", "canary-wrong-51d0"
MARKS = [SECRET, HOOK, ELSEWHERE, WRONG]


class Watched:
    """Runs commands with marked credentials in their environment, and keeps all that they say and write."""

    def __init__(self, endpoint: str, hook: str, folder: Path) -> None:
        self.folder = folder
        self.ray = Path(tempfile.mkdtemp(prefix="tlbs-", dir="/tmp"))  # a socket's path has room for a hundred characters
        self.said: list[str] = []
        self._env = {
            **environment(endpoint),
            "TLBATCH_WEBHOOK": hook,
            "DATABASE_PASSWORD": ELSEWHERE,
            "RAY_TMPDIR": str(self.ray),
        }

    def run(self, code: int, *words: str | Path, **changed: str) -> str:
        """Run a command, which must end with `code`."""
        done = run_cli(*words, **{**self._env, **changed})
        self.said += [done.stdout, done.stderr]
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr


def test_no_mark_is_found_in_anything_that_is_said_or_written(s3_server, receiver, bundle_url, tmp_path):
    """What works and what fails, with the whole log on: S3, features, a page, a night, wrong credentials, no bucket."""
    name = f"{BUCKET}/secrets-{secrets.token_hex(4)}"
    url = f"s3://{name}"
    files = filesystem(s3_server.endpoint)
    for number, color in enumerate(COLORS.values()):
        files.pipe(f"{name}/images/{number}.jpg", encoded(noisy(color, number)))
    files.pipe(f"{name}/images/broken.jpg", b"no image")
    files.put(f"{bundle_url}/", f"{name}/bundle/", recursive=True)
    watched = Watched(s3_server.endpoint, f"{receiver[0]}/broken/{HOOK}", tmp_path)
    asked = ["--images", f"{url}/images", "--bundle", f"{url}/bundle", "--verbose"]
    classify = ["classify", *asked, "--output", f"{url}/out", "--notify", "${TLBATCH_WEBHOOK}"]
    try:
        watched.run(3, *classify, "--features", "--set", "report=true")
        watched.run(0, "plan", *asked[:4], "--output", f"{url}/out", "--incremental")
        watched.run(0, "verify", f"{url}/out")
        watched.run(2, *classify, AWS_SECRET_ACCESS_KEY=WRONG)
        watched.run(2, *classify, "--set", f"storage_options={{secret: {WRONG}}}")
        watched.run(2, "classify", "--images", f"s3://me:{WRONG}@{name}/images", *asked[2:], "--output", f"{url}/out2")
        watched.run(2, "classify", "--images", "s3://no-such-bucket/x", *asked[2:], "--output", f"{url}/out2")
        files.rm(f"{name}/bundle/bundle.json")
        watched.run(2, "classify", *asked, "--output", f"{url}/out3")
        texts = {f"said {number}": text.encode() for number, text in enumerate(watched.said)}
        texts |= {f"{url}: {path}": files.cat(path) for path in files.find(name)}
        logs = [path for path in watched.ray.rglob("*") if path.is_file()]
        texts |= {str(path): path.read_bytes() for path in logs}
    finally:
        shutil.rmtree(watched.ray, ignore_errors=True)
    assert any("report.html" in name for name in texts)
    assert any(path.suffix in (".log", ".err", ".out") for path in logs)
    found = [(where, mark) for where, text in texts.items() for mark in MARKS if mark.encode() in text]
    assert found == []


def test_the_marks_would_be_found(tmp_path):
    """What is searched is what is written: a mark that a process prints is in what `Watched` keeps."""
    watched = Watched("http://127.0.0.1:1", f"http://127.0.0.1:1/{HOOK}", tmp_path)
    shutil.rmtree(watched.ray)
    watched.run(2, "status", f"/nowhere/{ELSEWHERE}")
    assert any(ELSEWHERE in text for text in watched.said)
    assert os.environ.get("DATABASE_PASSWORD") is None
