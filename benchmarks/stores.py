"""Compare s3fs with obstore on S3, for small objects and long listings, and measure the cost of a slow network.

    .venv/bin/python benchmarks/stores.py [get] [azure] [list] [flat] [inventory] [latency]

`get` reads 20,000-byte objects from a real server (SeaweedFS on the loopback) with 32 threads. `azure` does so from
Azurite, and lists 10,000 keys under 16 prefixes, beside adlfs, if that is installed. `list` lists 1,000,000 keys
under 16 prefixes from a server that generates its pages, with tlbatch's listing, with obstore alone, which gives Arrow batches
if `arro3-core` is installed (it is left out otherwise), and once with s3fs's `find`. `flat` lists as many
keys from a server that takes 50 ms for a page: under one prefix, as in a first night and with the bounds that a table gives
the nights after it, and under 16 prefixes. `inventory` lists the keys of `list` and reads inventories of them in each format,
whose rows are in no order; all give the same manifest. `latency` classifies photographs from a local disk and from a store that
delays every answer by 100 ms. It measures the whole command, and the steady rate, which is the difference between 4,000 and
12,000 photographs.
"""

from __future__ import annotations

import asyncio
import hashlib
import http.server
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, cast
from urllib.parse import parse_qs, urlsplit

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
from photographs import PHOTOGRAPHS, repeated, run, train  # noqa: E402
from support import azure_server  # noqa: E402
from support.azure_server import CONTAINER, AzureServer  # noqa: E402
from support.inventories import KINDS, table_of, write_inventory  # noqa: E402
from support.s3_server import BUCKET, S3Server, environment, filesystem, free_ports  # noqa: E402

from tlbatch.images.listing import Selection, list_store  # noqa: E402
from tlbatch.storage.resolve import resolve  # noqa: E402

OBJECTS, OBJECT_BYTES, THREADS, ROUNDS = 2_000, 20_000, 32, 3
KEYS, PREFIXES, PAGE = 1_000_000, 16, 1_000
AZURE_KEYS = 10_000
#: Data files of an inventory.
FILES = 4
LATENCY, PHOTOS, FEWER = 0.1, 12_000, 4_000
#: Seconds that the buckets `flat` and `late` take for a page.
PAGE_SECONDS = 0.05


def main() -> None:
    """Run the requested sections; by default all of them."""
    chosen = sys.argv[1:] or ["get", "azure", "list", "flat", "inventory", "latency"]
    if chosen[0] == "--serve-slowly":
        serve_slowly(chosen[1])
        return
    if chosen[0] == "--list-one":
        print(json.dumps(list_once(*chosen[1:])))
        return
    if chosen[0] == "--walk-one":
        print(json.dumps(walk_once(*chosen[1:])))
        return
    if chosen[0] == "--list-images":
        print(json.dumps(list_images_once(*chosen[1:])))
        return
    sections = {
        "get": bench_get,
        "azure": bench_azure,
        "list": bench_list,
        "flat": bench_flat,
        "inventory": bench_inventory,
        "latency": bench_latency,
    }
    for name in chosen:
        sections[name]()


def bench_get() -> None:
    """Print objects a second and processor seconds for 1,000 objects; the two clients alternate."""
    with tempfile.TemporaryDirectory() as folder:
        server = S3Server(Path(folder))
        server.start()
        os.environ.update(environment(server.endpoint))
        fs = filesystem(server.endpoint)
        keys = [f"{BUCKET}/get/{number:05d}.jpg" for number in range(OBJECTS)]
        data = os.urandom(OBJECT_BYTES)
        fs.pipe(dict.fromkeys(keys, data))
        ways = {
            "s3fs, a call a thread": fs.cat_file,
            "obstore, a call a thread": lambda key: resolve(f"s3://{key}").fetch(),
        }
        compare_gets(ways, keys)
        server.stop()


def compare_gets(ways: Mapping[str, Callable[[str], bytes]], keys: Sequence[str]) -> None:
    """Print how fast objects are read in several ways, which alternate, with 32 threads."""

    def read_all(way: Callable[[str], bytes]) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            assert all(len(got) == OBJECT_BYTES for got in pool.map(way, keys))

    print("| client | objects/s | processor seconds for 1,000 objects |\n| --- | ---: | ---: |")
    for name, (seconds, cpu) in in_turn({name: partial(read_all, way) for name, way in ways.items()}).items():
        print(f"| {name} | {OBJECTS / seconds:,.0f} | {1000 * cpu / OBJECTS:.2f} |")


def in_turn(ways: Mapping[str, Callable[[], None]]) -> dict[str, tuple[float, float]]:
    """Median seconds and processor seconds of ways that alternate."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            began, cpu = time.perf_counter(), time.process_time()
            way()
            found[name].append((time.perf_counter() - began, time.process_time() - cpu))
    return {
        name: (statistics.median(one[0] for one in rounds), statistics.median(one[1] for one in rounds))
        for name, rounds in found.items()
    }


def bench_azure() -> None:
    """Print what reading and listing cost on Azurite; the clients alternate."""
    with tempfile.TemporaryDirectory() as folder, AzureServer(Path(folder)).serve() as server:
        os.environ.update(azure_server.ENVIRONMENT)
        there = resolve(f"az://{CONTAINER}", azure_server.options(server.host))
        data = os.urandom(OBJECT_BYTES)
        keys = [f"get/{number:05d}.jpg" for number in range(OBJECTS)]
        listed = [f"list/p{number % PREFIXES:02d}/{number:06d}.jpg" for number in range(AZURE_KEYS)]
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda key: there.join(*key.split("/")).write(data if key[0] == "g" else b"x"), [*keys, *listed]))
        gets: dict[str, Callable[[str], bytes]] = {"tlbatch (obstore)": lambda key: there.join(*key.split("/")).fetch()}
        lists: dict[str, Callable[[], int]] = {
            "tlbatch (obstore)": lambda: list_store(there.join("list"), Selection()).manifest.num_rows
        }
        if find_spec("adlfs"):
            files = import_module("adlfs").AzureBlobFileSystem(connection_string=azure_server.connection_string(server.host))
            gets["adlfs"] = lambda key: bytes(files.cat_file(f"{CONTAINER}/{key}"))
            lists["adlfs find"] = lambda: files.invalidate_cache() or len(files.find(f"{CONTAINER}/list", detail=True))
        compare_gets(gets, keys)
        print(f"\n| {AZURE_KEYS:,} keys, 16 prefixes | s | processor time, us/key |\n| --- | ---: | ---: |")

        def list_all(way: Callable[[], int]) -> None:
            assert way() == AZURE_KEYS

        for name, (seconds, cpu) in in_turn({name: partial(list_all, way) for name, way in lists.items()}).items():
            print(f"| {name} | {seconds:.1f} | {1e6 * cpu / AZURE_KEYS:.0f} |")


class Pages(http.server.BaseHTTPRequestHandler):
    """ListObjectsV2 over generated keys such as `p07/000123.jpg`, 1,000 per page, and a few objects that can be read."""

    protocol_version = "HTTP/1.1"
    #: Objects by their paths.
    objects: ClassVar[dict[str, bytes]] = {}

    def do_HEAD(self) -> None:
        """Answer that any bucket exists, and no object."""
        self.send_response(404 if urlsplit(self.path).path.strip("/").count("/") else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        """Answer with an object, or a range of it, or with one page."""
        found = self.objects.get(urlsplit(self.path).path)
        if found is not None:
            self._send(found)
            return
        query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        after = query.get("continuation-token") or query.get("start-after", "")
        bucket = urlsplit(self.path).path.strip("/")
        time.sleep(PAGE_SECONDS if bucket in ("flat", "late") else 0)
        has_levels = "delimiter" in query and not query.get("prefix") and bucket != "flat"
        body = (levels() if has_levels else page(query.get("prefix", ""), after)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send(self, data: bytes) -> None:
        wanted = self.headers.get("Range", "")
        start, end = (
            (int(word or len(data) - 1) for word in wanted.removeprefix("bytes=").split("-")) if wanted else (0, len(data))
        )
        body = data[start : end + 1]
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(data)}")
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


_HEAD = (
    '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>keys</Name>'
)
_ONE = (
    "<Contents><Key>{}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
    "<ETag>&quot;900150983cd24fb0d6963f7d28e17f72&quot;</ETag><Size>20000</Size><StorageClass>STANDARD</StorageClass></Contents>"
)


def levels() -> str:
    """The listing of the bucket's folders."""
    folders = "".join(f"<CommonPrefixes><Prefix>p{number:02d}/</Prefix></CommonPrefixes>" for number in range(PREFIXES))
    return f"{_HEAD}<IsTruncated>false</IsTruncated>{folders}</ListBucketResult>"


def page(prefix: str, after: str) -> str:
    """The next page of a prefix, or of the whole bucket."""
    each = KEYS // PREFIXES
    first = (int(after[1:3]) * each + int(after[4:10]) + 1) if after else (int(prefix[1:3]) * each if prefix else 0)
    end = (int(prefix[1:3]) + 1) * each if prefix else KEYS
    last = min(first + PAGE, end)
    keys = [f"p{number // each:02d}/{number % each:06d}.jpg" for number in range(first, last)]
    more = f"<NextContinuationToken>{keys[-1]}</NextContinuationToken>" if last < end else ""
    truncated = "true" if more else "false"
    return f"{_HEAD}<IsTruncated>{truncated}</IsTruncated>{more}{''.join(map(_ONE.format, keys))}</ListBucketResult>"


def bench_list() -> None:
    """Measure the ways to list in turn, each in a process of its own, against a server in this process."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    print(f"| {KEYS:,} keys, 16 prefixes | s | processor time, us/key | peak memory, MiB | of it before |")
    print("| --- | ---: | ---: | ---: | ---: |")
    bare = ["obstore"] if find_spec("arro3") else []
    told: dict[str, list[dict[str, float]]] = {way: [] for way in ("tlbatch", *bare, "s3fs find")}
    for way in [*(ROUNDS * ["tlbatch", *bare]), "s3fs find"]:
        command = [sys.executable, __file__, "--list-one", way, endpoint]
        env = {**os.environ, **environment(endpoint)}
        told[way].append(json.loads(subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True).stdout))
    for way, rounds in told.items():
        seconds, peak, before = (statistics.median(one[name] for one in rounds) for name in ("seconds", "peak", "before"))
        cpu = sorted(1e6 * one["cpu"] / KEYS for one in rounds)
        shown = f"{statistics.median(cpu):.1f} ({cpu[0]:.1f} to {cpu[-1]:.1f})"
        print(f"| {way} | {seconds:.1f} | {shown} | {peak:.0f} | {before:.0f} |")
    server.shutdown()


def list_once(way: str, endpoint: str) -> dict[str, float]:
    """Seconds, processor seconds and peak memory of one listing."""
    import obstore
    from obstore.store import S3Store

    fs = filesystem(endpoint)
    fs.connect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    began, cpu = time.perf_counter(), time.process_time()
    if way == "tlbatch":
        count = list_store(resolve("s3://keys"), Selection()).manifest.num_rows
    elif way == "obstore":
        store = S3Store("keys", endpoint=endpoint, client_options={"allow_http": True})
        folders = (obstore.list(store, f"p{number:02d}/", return_arrow=True) for number in range(PREFIXES))
        count = sum(batch.num_rows for folder in folders for batch in folder)
    else:
        count = len(fs.find("keys", detail=True))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    assert count == KEYS, count
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "cpu": cpu, "peak": peak, "before": before}


def bench_flat() -> None:
    """Measure how a bucket with late pages is listed, each time in a process of its own."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    ways = {
        "one prefix, first night": ("flat", ""),
        "one prefix, later nights": ("flat", "cut"),
        "16 prefixes, first night": ("late", ""),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, (bucket, cut) in ways.items():
            command = [sys.executable, __file__, "--walk-one", f"{endpoint}/{bucket}", cut]
            found[name].append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))
    print(f"| {KEYS:,} keys, pages {PAGE_SECONDS * 1000:.0f} ms late | s | range |\n| --- | ---: | ---: |")
    for name, seconds in found.items():
        print(f"| {name} | {statistics.median(seconds):.1f} | {min(seconds):.1f} to {max(seconds):.1f} |")
    server.shutdown()


def walk_once(url: str, cut: str) -> float:
    """Seconds of one listing of a bucket as Amazon's are listed, cut at every 65,536th key if that is wanted."""
    from tlbatch.storage.location import WalkRules
    from tlbatch.storage.s3_listing import Endpoint, walk

    each = KEYS // PREFIXES
    bounds = [f"p{number // each:02d}/{number % each:06d}.jpg" for number in range(65_535, KEYS, 65_536)] if cut else []
    endpoint = Endpoint(url, "us-east-1", True, True, (5, 20), None, lambda _: {})
    began = time.perf_counter()
    count = sum(batch.num_rows for batch in walk(endpoint, "", lambda ask: ask(), WalkRules(bounds=bounds)))
    assert count == KEYS, count
    return time.perf_counter() - began


def bench_inventory() -> None:
    """Measure a listing and inventories of the same keys, in turn, each in a process of its own; they give one manifest."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    rows = shuffled_keys()
    ways = {"listed": "s3://keys"}
    for kind in KINDS:
        files = [rows.slice(start, KEYS // FILES) for start in range(0, KEYS, KEYS // FILES)]
        put = partial(put_object, f"inventories-{kind.lower()}")
        ways[f"inventory, {kind}"] = write_inventory(put, files, kind, "keys", f"inventories-{kind.lower()}")
    told: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, images in ways.items():
            command = [sys.executable, __file__, "--list-images", images]
            env = {**os.environ, **environment(endpoint)}
            told[name].append(json.loads(subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True).stdout))
    assert len({one["manifest"] for rounds in told.values() for one in rounds}) == 1
    print(f"| {KEYS:,} keys | s | processor time, us/key | peak memory, MiB |\n| --- | ---: | ---: | ---: |")
    for name, rounds in told.items():
        seconds, cpu, peak = (statistics.median(one[column] for one in rounds) for column in ("seconds", "cpu", "peak"))
        print(f"| {name} | {seconds:.1f} | {1e6 * cpu / KEYS:.1f} | {peak:.0f} |")
    server.shutdown()


def put_object(bucket: str, key: str, data: bytes) -> None:
    """Let the server have an object."""
    Pages.objects[f"/{bucket}/{key}"] = data


def shuffled_keys() -> pa.Table:
    """The keys that the server lists, in no order, with the columns of an inventory."""
    each = KEYS // PREFIXES
    numbers = np.random.default_rng(1).permutation(KEYS).tolist()
    usual = table_of("keys", [{"size": 20_000, "e_tag": "900150983cd24fb0d6963f7d28e17f72"}])
    columns = {name: pa.repeat(usual[name][0], KEYS) for name in usual.column_names}
    columns["key"] = pa.array([f"p{number // each:02d}/{number % each:06d}.jpg" for number in numbers])
    return pa.table(columns, usual.schema)


def list_images_once(images: str) -> dict[str, Any]:
    """Seconds, processor seconds, peak memory and the digest of the manifest of one listing."""
    from tlbatch.commands.list_images import list_images
    from tlbatch.config import RunConfig
    from tlbatch.schema import sha256, to_parquet

    config = RunConfig(images=images, bundle="-", output="/nowhere")
    began, cpu = time.perf_counter(), time.process_time()
    manifest = list_images(config, resolve(config.output)).manifest
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "cpu": cpu, "peak": peak, "manifest": sha256(to_parquet(manifest))}


class SlowStore(asyncio.Protocol):
    """An in-memory store of photographs that delays every answer by `LATENCY` seconds and uses little processor time."""

    def __init__(self, photos: list[bytes]) -> None:
        self._photos = photos
        self._etags = [hashlib.md5(photo, usedforsecurity=False).hexdigest() for photo in photos]
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport for the answers."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Answer each complete request after the delay."""
        self._buffer += data
        while b"\r\n\r\n" in self._buffer:
            head, self._buffer = self._buffer.split(b"\r\n\r\n", 1)
            target = head.split(b" ", 2)[1].decode()
            asyncio.get_running_loop().call_later(LATENCY, self._transport.write, self._answer(target))

    def _answer(self, target: str) -> bytes:
        url = urlsplit(target)
        if url.query:
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            return self._response(self._listing(query).encode(), "application/xml", "")
        number = int(url.path.rsplit("/", 1)[1][:5]) % len(self._photos)
        return self._response(self._photos[number], "image/jpeg", f'ETag: "{self._etags[number]}"\r\n')

    @staticmethod
    def _response(body: bytes, kind: str, more: str) -> bytes:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n{more}Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    def _listing(self, query: dict[str, str]) -> str:
        if not query.get("prefix", "").endswith("/"):
            return f"{_HEAD}<IsTruncated>false</IsTruncated></ListBucketResult>"
        after = query.get("continuation-token") or query.get("start-after")
        first = int(after[2:7]) + 1 if after else 0
        last = min(first + PAGE, PHOTOS)
        count = len(self._photos)
        rows = [
            f"<Contents><Key>s/{n:05d}.jpg</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>"
            f"&quot;{self._etags[n % count]}&quot;</ETag><Size>{len(self._photos[n % count])}</Size></Contents>"
            for n in range(first, last)
        ]
        token = f"s/{last - 1:05d}.jpg"
        more = f"<NextContinuationToken>{token}</NextContinuationToken>" if last < PHOTOS else ""
        return f"{_HEAD}<IsTruncated>{'true' if more else 'false'}</IsTruncated>{more}{''.join(rows)}</ListBucketResult>"


def serve_slowly(port: str) -> None:
    """Serve photographs until the process ends."""
    photos = [path.read_bytes() for path in sorted(PHOTOGRAPHS.glob("*.JPEG"))]

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(lambda: SlowStore(photos), "127.0.0.1", int(port))
        await server.serve_forever()

    asyncio.run(serve())


def bench_latency() -> None:
    """Measure the same command on a local disk and over a slow network, alternating."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        bundle, store = train(root), repeated(root, PHOTOS)
        (port,) = free_ports(1)
        server = subprocess.Popen([sys.executable, __file__, "--serve-slowly", str(port)])
        time.sleep(2)
        far = environment(f"http://127.0.0.1:{port}")
        print("| | local, images/s | 100 ms away, images/s | kept |\n| --- | ---: | ---: | ---: |")
        kept: dict[str, list[float]] = {"whole command": [], "steady": []}
        for number in range(ROUNDS):
            seconds = {
                (where, count): classify(images, bundle, root / f"{where}-{count}-{number}", count, env)
                for count in (FEWER, PHOTOS)
                for where, images, env in (("near", str(store), {}), ("far", "s3://slow/s", far))
            }
            for name, less in (("whole command", 0), ("steady", FEWER)):
                near, slow = (
                    (PHOTOS - less) / (seconds[where, PHOTOS] - (seconds[where, less] if less else 0))
                    for where in ("near", "far")
                )
                kept[name].append(slow / near)
                print(f"| {name} | {near:.0f} | {slow:.0f} | {100 * slow / near:.0f} % |", flush=True)
        print("\nmedians: " + ", ".join(f"{name} {100 * statistics.median(ratios):.0f} %" for name, ratios in kept.items()))
        server.terminate()


def classify(images: str, bundle: str, output: Path, count: int, env: dict[str, str]) -> float:
    """Seconds of a whole command over the first `count` photographs."""
    words = ["--images", images, "--bundle", bundle, "--output", output, "--max-images", count]
    began = time.perf_counter()
    assert run("classify", *words, env=env)["predicted"] == count
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
