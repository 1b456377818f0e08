"""`gc` finds what only S3 has: uploads that were never completed."""

import numpy as np
from support.s3_server import BUCKET, filesystem
from support.tables import SPEC, manifest

import tlbatch
from tlbatch.output.run import begin_run, read_runs
from tlbatch.storage.resolve import resolve


def test_uploads_that_were_never_ended_are_found_on_s3(s3_server):
    fs = filesystem(s3_server.endpoint)
    output = resolve(f"s3://{BUCKET}/gc/out", {"endpoint_url": s3_server.endpoint})
    options = {"storage_options": {"endpoint_url": s3_server.endpoint}}
    begin_run(output, "now", manifest(10), {"spec": SPEC, "bundle": "b" * 64, "skipped": 0}, began=2.0)
    output.join("latest.json.probe-123").write(b"1")
    for key in ("gc/out/runs/now/features/part-00000.parquet", "gc/other"):
        begun = fs.call_s3("create_multipart_upload", Bucket=BUCKET, Key=key)
        piece = np.random.default_rng(0).bytes(5 << 20)
        fs.call_s3("upload_part", Bucket=BUCKET, Key=key, UploadId=begun["UploadId"], PartNumber=1, Body=piece)
    assert tlbatch.gc(output.url, **options)["leftovers"] == [], "they are young"
    found = tlbatch.gc(output.url, older_than=0.0, remove=True, **options)
    assert {one["path"]: one["why"] for one in found["leftovers"]} == {
        "latest.json.probe-123": "interrupted write",
        "runs/now/features/part-00000.parquet": "unfinished upload",
    }
    assert list(output.uploads()) == []
    assert [one["Key"] for one in fs.call_s3("list_multipart_uploads", Bucket=BUCKET)["Uploads"]] == ["gc/other"]
    assert read_runs(output)[0].run_id == "now"
