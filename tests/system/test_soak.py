"""A long night: one run over loose images on S3 with a request in a hundred failing, and nothing that grows.

`make soak` takes about an hour, or 500,000 images; `make test` a sample, too short to see growth. What is watched are the
processes of the run, all of them: memory (PSS: what several share is counted once), open files, threads, and `/dev/shm`.
"""

import asyncio
import json
import os
import shutil
import statistics
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import psutil
from support.paths import TLBATCH
from support.pictures import COLORS, encoded, noisy
from support.s3_server import BUCKET, environment, filesystem

from tlbatch.output.verify import verify

SECONDS = int(os.environ.get("TLBATCH_SOAK_SECONDS", "0"))
MOST_IMAGES, SAMPLE = 500_000, 2_000
FAULTS = {
    "slow_down": 0.004,
    "internal_error": 0.002,
    "reset_before": 0.001,
    "reset_after": 0.001,
    "truncate": 0.001,
    "flip_bit": 0.001,
}


class Seen(NamedTuple):
    """The processes of a run at one moment."""

    seconds: float
    memory_mib: float
    files: int
    threads: int
    shm_mib: float


class Watch:
    """Looks at a process and all below it, again and again."""

    def __init__(self, process: psutil.Process, every: float) -> None:
        self.seen: list[Seen] = []
        self.processes: dict[int, tuple[str, list[float]]] = {}
        self._process = process
        self._every = every
        self._began = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def stop(self) -> list[Seen]:
        self._end.set()
        self._thread.join()
        return self.seen

    def _look(self) -> None:
        while not self._end.wait(self._every):
            memory = files = threads = 0
            try:
                family = [self._process, *self._process.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for one in family:
                try:
                    held = one.memory_full_info().pss
                    name = one.name()
                    memory += held
                    files += one.num_fds()
                    threads += one.num_threads()
                except psutil.Error:
                    continue  # it ended meanwhile
                self.processes[one.pid] = (name, [*self.processes.get(one.pid, ("", []))[1], held / 2**20])
            shm = shutil.disk_usage("/dev/shm").used
            self.seen.append(Seen(time.monotonic() - self._began, memory / 2**20, files, threads, shm / 2**20))


def upload(endpoint: str, folder: str, count: int) -> None:
    """As many objects, of sixty pictures."""
    import obstore
    from obstore.store import S3Store
    from support.s3_server import ACCESS, SECRET

    store = S3Store(
        BUCKET,
        endpoint=endpoint,
        region="us-east-1",
        access_key_id=ACCESS,
        secret_access_key=SECRET,
        client_options={"allow_http": True},
    )
    pictures = [encoded(noisy(color, number)) for color in COLORS.values() for number in range(20)]

    async def put_all() -> None:
        for start in range(0, count, 500):
            numbers = range(start, min(start + 500, count))
            names = (f"{folder}/{number // 1000:04d}/{number % 1000:03d}.jpg" for number in numbers)
            await asyncio.gather(
                *(obstore.put_async(store, name, pictures[n % 60]) for name, n in zip(names, numbers, strict=True))
            )

    with ThreadPoolExecutor(1) as beside:  # in this thread the loop of a browser may run, which tests of the report share
        beside.submit(asyncio.run, put_all()).result()


def soak(endpoint: str, proxy: str, bundle_url: str, folder: str, count: int, every: float) -> tuple[dict, Watch]:
    """One run over new images; its result and what was seen of it."""
    upload(endpoint, f"{folder}/store", count)
    url = f"s3://{BUCKET}/{folder}"
    command = [TLBATCH, "classify", "--set", "report=false", "--images", f"{url}/store", "--bundle", bundle_url, "--json"]
    command += ["--output", f"{url}/out"]
    process = subprocess.Popen(
        command, env={**os.environ, **environment(proxy)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    watch = Watch(psutil.Process(process.pid), every)
    try:
        stdout, stderr = process.communicate(timeout=SECONDS * 3 + 240)
    finally:
        process.kill()
        watch.stop()
    assert process.returncode == 0, stderr[-3000:]
    return json.loads(stdout), watch


def quarters(seen: list[Seen], name: str) -> list[float]:
    """The medians of four parts of a run, its first and last tenth, which start and end it, left out."""
    values = [getattr(one, name) for one in seen][len(seen) // 10 : len(seen) - len(seen) // 10]
    size = len(values) // 4
    return [statistics.median(values[size * part : size * (part + 1)]) for part in range(4)]


def test_an_hour_with_one_request_in_a_hundred_failing(faulty, s3_server, bundle_url):
    proxy = faulty(11, **FAULTS)
    report, watch = soak(s3_server.endpoint, proxy.endpoint, bundle_url, "soak-sample", SAMPLE, 0.5)
    assert (report["predicted"], report["failed"]) == (SAMPLE, 0)
    if SECONDS:
        count = min(
            MOST_IMAGES, int(2.5 * report["images_per_second"] * SECONDS)
        )  # more than half of so short a run is its start
        report, watch = soak(s3_server.endpoint, proxy.endpoint, bundle_url, "soak", count, 5)
    faults = {name: count for name, count in proxy.counts().items() if name.startswith("fault")}
    url = f"s3://{BUCKET}/soak{'' if SECONDS else '-sample'}/out"
    found = {name: quarters(watch.seen, name) for name in Seen._fields[1:]}
    print(f"\n{report['predicted']:,} images in {report['seconds']:.0f} s, {sum(faults.values()):,} faults: {faults}")
    for name, values in found.items():
        print(f"{name:12}" + "".join(f"{value:10,.0f}" for value in values))
    for name, values in watch.processes.values():
        print(f"    {name:40}{values[len(values) // 4]:7.0f}{values[-1 - len(values) // 8]:7.0f} MiB")
    assert sum(faults.values()) > report["predicted"] / 500
    assert report["failed"] == 0
    assert verify(url, {"endpoint_url": s3_server.endpoint})["ok"]
    assert filesystem(s3_server.endpoint).exists(url.removeprefix("s3://") + "/latest.json")
    if SECONDS:
        assert found["memory_mib"][3] - found["memory_mib"][0] < 50
        assert found["files"][3] <= 1.05 * found["files"][0]
        assert found["threads"][3] <= 1.05 * found["threads"][0]
        assert found["shm_mib"][3] - found["shm_mib"][0] < 16
