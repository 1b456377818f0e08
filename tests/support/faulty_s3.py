"""A proxy in front of an S3 server that misbehaves on purpose, the same way for the same seed.

Which request meets which fault follows from the seed, the request's method and path, and how often it was asked before, so
that a run can be repeated whatever the order in which its workers ask.

    python tests/support/faulty_s3.py --upstream http://127.0.0.1:8333 --port 9000 --seed 7 --faults '{"slow_down": 0.05}'

While it runs, `PUT /__faults__` (JSON) changes the faults and `GET /__counts__` tells what was asked and what went wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import dataclasses
import hashlib
import json
import random
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import aiohttp
from aiohttp import web
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from yarl import URL

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.s3_server import ACCESS, SECRET

_HOP = {"connection", "transfer-encoding", "content-encoding", "keep-alive", "content-length"}


@dataclasses.dataclass
class Faults:
    """Shares of the requests that meet a fault, and what else is wrong with this store."""

    slow_down: float = 0.0
    internal_error: float = 0.0
    reset_before: float = 0.0  # the connection is cut before the server has heard of the request
    reset_after: float = 0.0  # the server has done it, and the client never hears so
    truncate: float = 0.0  # of bodies that are read
    flip_bit: float = 0.0  # of bodies that are read
    stall: float = 0.0
    stall_seconds: float = 30.0
    latency: float = 0.0  # seconds, for every request
    expired: bool = False  # every request is refused: the token has expired
    ignore_conditions: bool = False  # as stores do that have never heard of If-None-Match
    fail_list_pages: tuple[int, ...] = ()  # the k-th pages of listings, from 1, fail once each


class Proxy:
    """Passes requests on, or not."""

    def __init__(self, upstream: str, seed: int, faults: Faults) -> None:
        self.upstream = upstream.rstrip("/")
        self.seed = seed
        self.faults = faults
        self.counts: Counter[str] = Counter()
        self.gets: Counter[str] = Counter()
        self.peers: Counter[str] = Counter()
        self._asked: Counter[str] = Counter()
        self._pages = 0
        self._session: aiohttp.ClientSession | None = None

    async def close(self, _: web.Application) -> None:
        """Let go of the server."""
        if self._session is not None:
            await self._session.close()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """One request."""
        if request.path == "/__faults__":
            self.faults = Faults(**{**dataclasses.asdict(self.faults), **await request.json()})
            return web.Response()
        if request.path == "/__counts__":
            return web.json_response({**self.counts, "gets": dict(self.gets), "peers": dict(self.peers)})
        body = await request.read()
        listing = "list-type" in request.query
        self.counts[f"{request.method} list" if listing else request.method] += 1
        if request.method == "GET" and not listing:
            self.gets[request.path] += 1
            if request.path.endswith(".jpg"):
                self.peers[str(request.remote)] += 1
        faults = self.faults
        if faults.latency:
            await asyncio.sleep(faults.latency)
        fault = self._fault(request, listing)
        if fault:
            self.counts[f"fault {fault}"] += 1
        if fault == "stall":
            await asyncio.sleep(faults.stall_seconds)
        refused = _REFUSALS.get(fault)
        if refused is not None:
            return _refuse(*refused)
        if fault == "reset_before":
            return self._cut(request)
        return await self._pass_on(request, body, fault)

    def _fault(self, request: web.Request, listing: bool) -> str:
        faults = self.faults
        if faults.expired:
            return "expired"
        if listing:
            self._pages += 1
            if self._pages in faults.fail_list_pages:
                return "internal_error"
        name = f"{request.method} {request.path_qs}"
        self._asked[name] += 1
        drawn = hashlib.sha256(f"{self.seed} {name} {self._asked[name]}".encode()).digest()
        chance = int.from_bytes(drawn[:8]) / 2**64
        for fault in ("slow_down", "internal_error", "reset_before", "reset_after", "truncate", "flip_bit", "stall"):
            share = getattr(faults, fault)
            if fault in ("truncate", "flip_bit") and (request.method != "GET" or listing):
                continue
            if chance < share:
                return fault
            chance -= share
        return ""

    async def _pass_on(self, request: web.Request, body: bytes, fault: str) -> web.StreamResponse:
        if self._session is None:
            self._session = aiohttp.ClientSession(auto_decompress=False, connector=aiohttp.TCPConnector(limit=200))
        headers = {name: value for name, value in request.headers.items() if name.lower() not in ("connection",)}
        if self.faults.ignore_conditions and request.method == "PUT":
            headers = _signed_anew(request, self.upstream, body)
        try:
            async with self._session.request(
                request.method,
                URL(self.upstream + request.raw_path, encoded=True),
                headers=headers,
                data=body or None,
                allow_redirects=False,
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            ) as answer:
                data = await answer.read()
                head = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP}
                status, length = answer.status, answer.headers.get("Content-Length")
        except (aiohttp.ClientError, OSError):
            self.counts["upstream down"] += 1
            return self._cut(request)
        if fault == "reset_after":
            return self._cut(request)
        if fault == "flip_bit" and status in (200, 206) and data:
            location = random.randrange(len(data))
            data = data[:location] + bytes([data[location] ^ 1]) + data[location + 1 :]
        response = web.StreamResponse(status=status, headers=head)
        response.content_length = int(length) if request.method == "HEAD" and length else len(data)
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        if fault == "truncate" and status in (200, 206) and len(data) > 1:
            await response.write(data[: len(data) // 2])
            return self._cut(request)
        await response.write(data)
        await response.write_eof()
        return response

    @staticmethod
    def _cut(request: web.Request) -> web.StreamResponse:
        if request.transport is not None:
            request.transport.abort()
        raise asyncio.CancelledError


def _signed_anew(request: web.Request, upstream: str, body: bytes) -> dict[str, str]:
    """The headers of a PUT without its conditions, which are part of what was signed."""
    url = upstream + request.raw_path
    anew = AWSRequest("PUT", url, data=body, headers={"x-amz-content-sha256": hashlib.sha256(body).hexdigest()})
    S3SigV4Auth(Credentials(ACCESS, SECRET), "s3", "us-east-1").add_auth(anew)
    return dict(anew.headers.items())


_REFUSALS = {
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "internal_error": (500, "InternalError", "We encountered an internal error. Please try again."),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
}


def _refuse(status: int, code: str, message: str) -> web.Response:
    text = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return web.Response(status=status, text=text, content_type="application/xml")


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--netns", help="listen in this network namespace; the server is reached from the one it is started in")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=json.loads, default={})
    options = parser.parse_args()
    proxy = Proxy(options.upstream, options.seed, Faults(**options.faults))
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{tail:.*}", proxy.handle)
    app.on_cleanup.append(proxy.close)
    with inside(options.netns):
        listener = socket.create_server((options.host, options.port), backlog=512)
    web.run_app(app, sock=listener, print=None, access_log=None, handle_signals=True)


@contextlib.contextmanager
def inside(netns: str | None) -> Iterator[None]:
    """This thread in a network namespace while the block runs. What is opened there stays there."""
    if netns is None:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/ns/net") as here, open(f"/run/netns/{netns}") as there:
        for namespace in (there, here):
            if libc.setns(namespace.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"setns {namespace.name}")
            if namespace is there:
                yield


if __name__ == "__main__":
    main()
