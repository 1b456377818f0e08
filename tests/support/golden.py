"""Outputs of every kind, made on an S3 server: `before`, and `after` each was continued with the same commands.

    python tests/support/golden.py

writes `tests/golden/before.zip`, `after.zip` and `made.json` again. Do that only when the format of an output changes on
purpose: `tests/system/test_golden.py` continues what an earlier version began, and compares the result byte for byte.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from support.paths import GOLDEN
from support.s3_server import S3Server, environment, filesystem
from support.shards import parquet_of, tar_of

BUCKET = "golden"
#: Where a run of `compact`, which has no setting for it, gets its name.
COMPACT_RUN_ID = "tlbatch.commands.compact.new_run_id"


def picture(number: int) -> bytes:
    """A small PNG: one of the three colors, with a gradient that tells it from the others."""
    color = np.array([(200, 40, 40), (40, 200, 40), (40, 40, 200)][number % 3])
    ramp = np.linspace(0, 8 + number, 40).astype(int)
    pixels = np.broadcast_to(color + ramp[None, :, None], (30, 40, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class Bucket:
    """The golden bucket of one server, and the commands on it."""

    def __init__(self, endpoint: str) -> None:
        self.fs = filesystem(endpoint)
        self.options = {"endpoint_url": endpoint}

    def put(self, objects: Mapping[str, bytes]) -> None:
        """Write objects, by their key."""
        self.fs.pipe({f"{BUCKET}/{key}": data for key, data in objects.items()})

    def contents(self) -> dict[str, bytes]:
        """Every object, by its key."""
        self.fs.invalidate_cache()
        return {key.removeprefix(f"{BUCKET}/"): self.fs.cat_file(key) for key in sorted(self.fs.find(BUCKET))}

    def classify(self, store: str, output: str, run_id: str, bundle: str | list[str] = "a", **settings: Any) -> dict[str, Any]:
        """`tlbatch.classify` from one prefix to another."""
        import tlbatch

        bundles = [f"s3://{BUCKET}/bundles/{name}" for name in ([bundle] if isinstance(bundle, str) else bundle)]
        return tlbatch.classify(
            images=f"s3://{BUCKET}/{store}",
            bundle=bundles if len(bundles) > 1 else bundles[0],
            output=f"s3://{BUCKET}/{output}",
            run_id=run_id,
            storage_options=self.options,
            **settings,
        )


def before(bucket: Bucket, die_at_publishing: Callable[[], Any]) -> None:
    """Outputs of every kind: loose images, shards, features, several heads, three incremental runs, one unfinished run.

    Args:
        bucket: where.
        die_at_publishing: a patch under which a run stages all its parts and publishes nothing.
    """
    loose = {f"loose/{number:02d}.png": picture(number) for number in range(9)}
    bucket.put({**loose, "loose/broken.png": b"\x89PNG\r\n\x1a\nbroken", "loose/empty.jpg": b"", "loose/notes.txt": b"skipped"})
    shard = {f"in/{number}.png": picture(number) for number in range(4)}
    bucket.put({"shards/a.tar": tar_of(shard), "shards/b.parquet": parquet_of({f"b/{n}.png": picture(n) for n in range(3)})})
    bucket.classify("loose", "out/loose", "run-1")
    bucket.classify("shards", "out/shards", "run-1", features=True, features_dtype="float32")
    bucket.classify("loose", "out/features", "run-1", features=True)
    bucket.classify("loose", "out/heads", "run-1", ["a", "b"], features=True)
    for output, settings in (("out/nights", {"features": True}), ("out/plain", {})):
        store = output.replace("out", "growing")
        bucket.put({f"{store}/{number:02d}.png": picture(number) for number in range(6)})
        bucket.classify(store, output, "run-1", incremental=True, **settings)
        bucket.put({f"{store}/06.png": picture(6), f"{store}/07.png": picture(7), f"{store}/01.png": picture(10)})
        bucket.fs.rm_file(f"{BUCKET}/{store}/05.png")
        bucket.classify(store, output, "run-2", incremental=True, **settings)
        bucket.put({f"{store}/08.png": picture(8), f"{store}/broken.png": b"\x89PNG\r\n\x1a\nbroken"})
        bucket.classify(store, output, "run-3", incremental=True, **settings)
    with die_at_publishing(), contextlib.suppress(_DiedError):
        bucket.classify("loose", "out/unfinished", "run-1", rows_per_task=2)
    staged = sorted(key for key in bucket.fs.find(f"{BUCKET}/out/unfinished") if "/staged/" in key)
    for key in staged[len(staged) // 2 :]:
        bucket.fs.rm_file(key)


class _DiedError(Exception):
    """A run died before it published anything."""


def died(*_: object, **__: object) -> None:
    """Stands for a step before which a run dies."""
    raise _DiedError


def continued(bucket: Bucket) -> dict[str, dict[str, Any]]:
    """Continue every output; returns what the commands returned, by name."""
    import tlbatch

    found = {
        "loose": bucket.classify("loose", "out/loose", "run-2"),
        "shards": bucket.classify("shards", "out/shards", "run-2", features=True, features_dtype="float32"),
        "features": bucket.classify("loose", "out/features", "run-2", features=True),
        "heads": bucket.classify("loose", "out/heads", "run-2", ["a", "b"], features=True),
        "unfinished": bucket.classify("loose", "out/unfinished", "run-2", rows_per_task=3),
    }
    for output, settings in (("out/nights", {"features": True}), ("out/plain", {})):
        store = output.replace("out", "growing")
        bucket.put({f"{store}/09.png": picture(9)})
        found[f"{output} run-4"] = bucket.classify(store, output, "run-4", incremental=True, **settings)
    options = {"storage_options": bucket.options}
    head = f"s3://{BUCKET}/bundles/b"
    for source in ("features", "shards"):
        output = f"s3://{BUCKET}/out/rescored-{source}"
        features = f"s3://{BUCKET}/out/{source}"
        found[f"rescored {source}"] = tlbatch.rescore(features=features, bundle=head, output=output, run_id="run-1", **options)
    for output in ("nights", "plain"):
        with mock.patch(COMPACT_RUN_ID, return_value="compacted"):
            found[f"compacted {output}"] = tlbatch.compact(output=f"s3://{BUCKET}/out/{output}", **options)
    return found


def _zipped(objects: Mapping[str, bytes], path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, data in objects.items():
            archive.writestr(zipfile.ZipInfo(key, (2026, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)


def main() -> None:
    """Make the golden outputs anew."""
    from support.tiny import HEAD_B, tiny_base, tiny_bundle
    from tlbatch.execution.session import ray_session

    os.environ.update({name: value for name, value in environment("").items() if name != "AWS_ENDPOINT_URL"})
    with tempfile.TemporaryDirectory() as folder:
        server = S3Server(Path(folder, "s3"))
        server.start()
        try:
            bucket = Bucket(server.endpoint)
            bucket.fs.mkdir(BUCKET)
            frozen = tiny_base()
            for name, bundle in (
                ("a", tiny_bundle(f"{folder}/a", frozen=frozen)),
                ("b", tiny_bundle(f"{folder}/b", HEAD_B, frozen)),
            ):
                files = [path for path in bundle.folder.rglob("*") if path.is_file()]
                bucket.put({f"bundles/{name}/{path.relative_to(bundle.folder)}": path.read_bytes() for path in files})
            with ray_session() as start:
                start()
                before(bucket, lambda: mock.patch("tlbatch.output.commit.freeze_part_plan", died))
                first = bucket.contents()
                reports = continued(bucket)
                second = bucket.contents()
        finally:
            server.stop()
    GOLDEN.mkdir(exist_ok=True)
    _zipped(first, GOLDEN / "before.zip")
    _zipped({key: data for key, data in second.items() if first.get(key) != data}, GOLDEN / "after.zip")
    made = {name: version(name) for name in ("pyarrow", "numpy", "tlbatch")}
    done = {name: bool(report.get("already_done")) for name, report in reports.items()}
    (GOLDEN / "made.json").write_text(json.dumps({"versions": made, "already_done": done}, indent=1) + "\n")


if __name__ == "__main__":
    main()
