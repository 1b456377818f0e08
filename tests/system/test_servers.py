"""What S3 servers do, as docs/stores.md says it: `make servers` starts all six of its table, `make test` those it has."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time

import botocore.session
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from support.command import run_cli
from support.paths import ROOT, TLBATCH
from support.pictures import write_store
from support.s3_server import ACCESS, SECRET, environment, filesystem, options
from support.servers import SERVERS

import tlbatch

_WRONG_ETAG = f'"{"0" * 32}"'
_HERE = {"SeaweedFS", "moto", "rclone"}
#: The one identity that s3rver knows.
_KEYS = {"s3rver": ("S3RVER", "S3RVER")}


def documented(server: str) -> dict[str, str]:
    """The column of a server in the table."""
    text = (ROOT / "docs" / "stores.md").read_text().split("\n## Servers\n")[1].split("\n## ")[0]
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    (column,) = (number for number, name in enumerate(head) if name.startswith(f"{server} "))
    return {row[0].replace("`", ""): row[column].replace("`", "") for row in rows}


def status(call, **asked) -> int:
    """The status of an answer."""
    try:
        return call(**asked)["ResponseMetadata"]["HTTPStatusCode"]
    except ClientError as error:
        return error.response["ResponseMetadata"]["HTTPStatusCode"]


class Bucket:
    """What a server does, measured in a bucket of its own."""

    def __init__(self, endpoint: str, access: str, secret: str, bucket: str) -> None:
        self._reached = endpoint, access, secret
        self.client = self._connected()
        self.name = bucket
        with contextlib.suppress(ClientError):
            self.client.create_bucket(Bucket=bucket)

    def _connected(self):
        endpoint, access, secret = self._reached
        session = botocore.session.get_session()
        session.set_credentials(access, secret)
        # Signed as a whole, without a checksum behind the body: two of the servers would store it as content.
        config = Config(
            s3={"addressing_style": "path"}, request_checksum_calculation="when_required", retries={"total_max_attempts": 1}
        )
        return session.create_client("s3", "us-east-1", endpoint_url=endpoint, config=config)

    def put(self, key: str, body: bytes = b"0123456789", **more) -> int:
        return status(self.client.put_object, Bucket=self.name, Key=key, Body=body, **more)

    def get(self, key: str, **more) -> int:
        return status(self.client.get_object, Bucket=self.name, Key=key, **more)

    def keys(self, prefix: str) -> dict[str, str]:
        """The etags of the objects below a prefix."""
        found = self.client.list_objects_v2(Bucket=self.name, Prefix=prefix)
        return {one["Key"]: one["ETag"].strip('"') for one in found.get("Contents", ())}

    def facts(self) -> dict[str, str]:
        """The rows of the table."""
        assert self.put("there") == 200
        return {
            "PUT If-None-Match: *": "kept" if self.put("there", IfNoneMatch="*") == 412 else "ignored",
            "PUT If-Match": "kept" if self.put("there", IfMatch=_WRONG_ETAG) == 412 else "ignored",
            "PUT If-Match, no object": {200: "creates"}.get(code := self.put("nowhere", IfMatch=_WRONG_ETAG), str(code)),
            "GET If-Match": "kept" if self.get("there", IfMatch=_WRONG_ETAG) == 412 else "ignored",
            "etag of listing and GET": "equal" if self.same_etags() else "different",
            "a range": str(self.get("there", Range="bytes=2-4")),
            "DeleteObjects in a folder": self.deletes(),
            "folder that holds only folders": self.folder_of_folders(),
            "key a//b": self.stored_as("odd/a//b", "odd/").removeprefix("odd/"),
            "key /a": self.stored_as("/leading", "").replace("leading", "a"),
        }

    def same_etags(self) -> bool:
        """Whether a GET gives the etag of the listing, also of an object in several parts."""
        begun = self.client.create_multipart_upload(Bucket=self.name, Key="parts")["UploadId"]
        parts = []
        for number, body in enumerate((bytes(5 << 20), b"end"), 1):
            done = self.client.upload_part(Bucket=self.name, Key="parts", UploadId=begun, PartNumber=number, Body=body)
            parts.append({"PartNumber": number, "ETag": done["ETag"]})
        upload = {"Bucket": self.name, "Key": "parts", "UploadId": begun, "MultipartUpload": {"Parts": parts}}
        self.client.complete_multipart_upload(**upload)
        answers = {key: self.client.get_object(Bucket=self.name, Key=key)["ETag"].strip('"') for key in ("there", "parts")}
        listed = self.keys("")
        return all(listed[key] == answers[key] for key in answers)

    def deletes(self) -> str:
        """Whether several objects of a folder are removed with one request; the status of the answer if not."""
        for key in ("gone/1", "gone/2"):
            self.put(key)
        objects = {"Objects": [{"Key": key} for key in ("gone/1", "gone/2")]}
        code = status(self.client.delete_objects, Bucket=self.name, Delete=objects)
        return "yes" if code == 200 and not self.keys("gone/") else str(code)

    def folder_of_folders(self) -> str:
        """Whether a listing of one level has a folder without objects of its own."""
        self.put("deep/a/b/1")
        found = self.client.list_objects_v2(Bucket=self.name, Prefix="deep/", Delimiter="/")
        return "listed" if found.get("CommonPrefixes") else "left out"

    def stored_as(self, key: str, prefix: str) -> str:
        """What becomes of a key."""
        before = self.keys(prefix).keys()
        if self.put(key) != 200:
            self.client = self._connected()  # some servers take the body that they did not read for the next request
            return "refused"
        (found,) = self.keys(prefix).keys() - before
        return "kept" if found == key else found


@pytest.mark.parametrize("server", ["SeaweedFS", *SERVERS])
def test_a_server_does_what_the_table_says(server, tmp_path, request):
    if server not in _HERE and not os.environ.get("TLBATCH_SERVERS"):
        pytest.skip("`make servers` installs and starts it")
    if server == "SeaweedFS":  # the server of most tests
        reached = contextlib.nullcontext(request.getfixturevalue("s3_server").endpoint)
    else:
        reached = SERVERS[server](tmp_path)
    with reached as endpoint:
        found = Bucket(endpoint, *_KEYS.get(server, (ACCESS, SECRET)), "facts").facts()
    assert found == documented(server)


def test_the_story_on_rclone_and_which_conditions_it_lacks(store, bundle_url, tmp_path):
    """Kill and continue, a night, verify: the rows of a local disk, and one sentence about what the server ignores."""
    bucket, images = tmp_path / "data" / "photos", tmp_path / "store"  # rclone's buckets are folders
    shutil.copytree(store, bucket / "store")
    shutil.copytree(store, images)
    shutil.copytree(bundle_url, bucket / "bundle")
    local = ["--images", images, "--bundle", bundle_url, "--output", tmp_path / "out", "--json"]
    with SERVERS["rclone"](tmp_path / "data") as endpoint:
        env, output = environment(endpoint), "s3://photos/out"
        words = ["--images", "s3://photos/store", "--bundle", "s3://photos/bundle", "--output", output, "--json"]
        slow = [TLBATCH, "classify", *words, "--set", "rows_per_task=5"]
        with subprocess.Popen(slow, env={**os.environ, **env}, stderr=subprocess.PIPE) as running:
            end = time.monotonic() + 120
            while not list(bucket.glob("out/runs/*/staged/*.parquet")):
                assert running.poll() is None, "it ended"
                assert time.monotonic() < end, "nothing was staged"
                time.sleep(0.02)
            running.kill()
            running.communicate()
        done = run_cli("classify", *words, **env)
        assert done.returncode == 0, done.stderr
        missing = "does not keep conditions: it ignores If-None-Match on PUT, If-Match on PUT, If-Match on GET"
        assert done.stderr.count(missing) == 1
        assert json.loads(done.stdout)["predicted"] == 60
        assert run_cli("classify", *local).returncode == 0
        same_rows(output, endpoint, tmp_path / "out")
        first, second, *_ = sorted((images / "red").iterdir())
        first.unlink()
        second.write_bytes((images / "blue" / second.name).read_bytes())
        write_store(images, 1, first=50)
        files = filesystem(endpoint)
        files.rm_file(f"photos/store/red/{first.name}")
        for path in (second, *images.glob("*/0050.jpg")):
            files.pipe_file(f"photos/store/{path.relative_to(images)}", path.read_bytes())
        for command in (words, local):
            done = run_cli("classify", *command, "--incremental", **env)
            assert done.returncode == 0, done.stderr
            counts = json.loads(done.stdout)["counts"]
            assert [counts[name] for name in ("new", "changed", "deleted")] == [3, 1, 1]
        same_rows(output, endpoint, tmp_path / "out")
        assert run_cli("verify", output, **env).returncode == 0


def same_rows(output: str, endpoint: str, local) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in environment(endpoint).items():
            monkeypatch.setenv(name, value)
        there = tlbatch.read_predictions(output, storage_options=options(endpoint))
    columns = there.columns.drop(["uri", "etag", "run_id"])
    assert there[columns].equals(tlbatch.read_predictions(str(local))[columns])
