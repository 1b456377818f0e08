"""Measure `tlbatch browse` on a made-up table: how long until it answers, how fast pages and filters are, and its memory.

    .venv/bin/python benchmarks/browsing.py [IMAGES]

By default 10,000,000 images, whose rows are made up and whose pictures are the photographs, repeated. Times are those of a
client on the same machine, from the request to the last byte, in milliseconds: the median of seven different requests of a kind
and the slowest. The memory is what the process holds then, without files that it maps.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from http.cookiejar import CookieJar
from pathlib import Path
from statistics import median
from unittest import mock

import layers
import numpy as np
import psutil
import pyarrow as pa
from photographs import PHOTOGRAPHS

#: Requests of each kind.
_TIMES = 7


def main() -> None:
    """Print a row for each kind of request."""
    images = int(sys.argv[1].replace(",", "")) if len(sys.argv) > 1 else 10_000_000
    photographs = [str(path) for path in sorted(PHOTOGRAPHS.glob("*.JPEG"))]
    with tempfile.TemporaryDirectory() as folder:
        predictions = layers._predictions

        def of_photographs(rows: pa.Table, numbers: np.ndarray, run_id: str) -> pa.Table:
            uris = pa.array([photographs[number % len(photographs)] for number in numbers.tolist()])
            empty = pa.nulls(rows.num_rows, pa.string())
            made = predictions(rows, numbers, run_id)
            return made.set_column(0, "uri", uris).set_column(made.column_names.index("etag"), "etag", empty)

        with mock.patch.object(layers, "_predictions", of_photographs):
            layers._publish_table(f"{folder}/out", images, 1, whole=True)
        _measure(Path(folder), images)


def _measure(folder: Path, images: int) -> None:
    env = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-m", "tlbatch", "browse", folder / "out", "--corrections", folder / "corrections.csv"]
    began = time.perf_counter()
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, env=env, text=True) as running:
        address = str(running.stderr and running.stderr.readline()).strip()
        ready = time.perf_counter() - began
        client = _Client(address)
        memory = psutil.Process(running.pid).memory_info
        print(f"{images:,} images: {ready:.1f} s until the address is printed\n")
        print("| request | median, ms | slowest, ms | memory, MiB |\n| --- | ---: | ---: | ---: |")
        for name, paths in _requests(client, images).items():
            times = [client.ask(path)[1] for path in paths]
            held = (memory().rss - memory().shared) / 2**20
            print(f"| {name} | {median(times):.0f} | {max(times):.0f} | {held:.0f} |", flush=True)
        running.terminate()


def _requests(client: _Client, images: int) -> dict[str, Sequence[str]]:
    """Kinds of requests, and the paths of some."""
    orders = [f"/?order=sure&label=label-{number:02d}" for number in range(_TIMES)]
    pages, path = [], "/"
    for _ in range(_TIMES):
        page = client.ask(path)[0].decode()
        path = re.findall(r'hx-get="(/tiles[^"]+)"', page)[0].replace("&amp;", "&")
        pages.append(path)
    shown = re.findall(r'data-address="([^"]+)"', client.ask("/?order=sure")[0].decode())
    folders = [f"folder-{int(images / 1_024 * step / _TIMES) // 10:07d}" for step in range(_TIMES)]
    return {
        "first page": ["/"] * _TIMES,
        "further pages": pages,
        "a label, surest first": orders,
        "scores from 0.6 to 0.7": [f"/?low=0.6&high=0.7{number:02d}" for number in range(_TIMES)],
        "a folder": [f"/?folder={folder}" for folder in folders],
        "as stored": ["/?order=stored"] * _TIMES,
        "labels and chart of scores": ["/facets", *(f"/facets?label=label-{number:02d}" for number in range(_TIMES - 1))],
        "labels and chart of a folder": [f"/facets?folder={folder}" for folder in folders],
        "one image": [f"/image/{address}" for address in shown[:_TIMES]],
        "a small picture, new": [f"/small/predictions/{address}" for address in shown[:_TIMES]],
        "a small picture, again": [f"/small/predictions/{address}" for address in shown[:_TIMES]],
    }


class _Client:
    def __init__(self, address: str) -> None:
        self._base = address.partition("/?")[0]
        self._opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
        self._opener.open(address).read()

    def ask(self, path: str) -> tuple[bytes, float]:
        """An answer, and the milliseconds until its last byte."""
        began = time.perf_counter()
        data = self._opener.open(self._base + path).read()
        return data, 1_000 * (time.perf_counter() - began)


if __name__ == "__main__":
    main()
