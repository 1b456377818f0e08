"""moto's S3 server behind a filter that answers as less complete servers do; it takes any key and any credentials."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from support.s3_server import free_ports


@dataclass
class OddS3:
    """What the server does otherwise; it may be changed while the server runs.

    Attributes:
        ignored: headers that it does not look at, each after its method: `PUT If-Match`.
        ranges: how it answers a range: "kept", "unmarked" (with status 200), or "whole" (with the whole object).
        bulk: the error with which it answers DeleteObjects, as status and code; "nothing" answers that none was deleted.
        uploads: the error with which it answers ListMultipartUploads, as status and code.
        conflicts: ends of keys; the next conditional PUT of each is answered with 409. One named "always" is for every PUT.
        denied: methods that are answered with 403.
        asked: method, path and query of each request.
        payers: for each request who it says pays.
    """

    ignored: set[str] = field(default_factory=set)
    ranges: str = "kept"
    bulk: str = ""
    uploads: str = ""
    conflicts: list[str] = field(default_factory=list)
    denied: set[str] = field(default_factory=set)
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    payers: list[str | None] = field(default_factory=list)
    endpoint: str = ""

    def reset(self) -> None:
        """Answer like moto again."""
        self.ignored, self.ranges, self.bulk, self.uploads = set(), "kept", "", ""
        self.conflicts, self.denied, self.asked, self.payers = [], set(), [], []

    def __call__(self, environ, start):
        """One request."""
        method, path, query = environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("QUERY_STRING", "")
        self.asked.append((method, path, query))
        self.payers.append(environ.get("HTTP_X_AMZ_REQUEST_PAYER"))
        is_bulk = method == "POST" and query.split("=")[0] == "delete"
        if is_bulk and self.bulk == "nothing":
            return _answer(environ, start, "200 OK", _nothing_deleted(environ))
        refusal = "409 ConditionalRequestConflict" if self._is_conflict(environ, path) else ""
        refusal = refusal or ("403 AccessDenied" if method in self.denied else "") or (self.bulk if is_bulk else "")
        refusal = refusal or (self.uploads if method == "GET" and query.startswith("uploads") else "")
        if refusal:
            return _refuse(environ, start, refusal)
        for name in ("If-Match", "If-None-Match"):
            if f"{method} {name}" in self.ignored:
                environ.pop(f"HTTP_{name.upper().replace('-', '_')}", None)
        if method != "GET" or "HTTP_RANGE" not in environ or self.ranges == "kept":
            return self.inner(environ, start)
        if self.ranges == "whole":
            environ.pop("HTTP_RANGE")
        return self.inner(environ, lambda status, *rest: start("200 OK" if status.startswith("206") else status, *rest))

    def _is_conflict(self, environ, path: str) -> bool:
        if environ["REQUEST_METHOD"] != "PUT" or not {"HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"} & environ.keys():
            return False
        met = next((end for end in self.conflicts if path.endswith(end) or end == "always"), None)
        if met is not None and met != "always":
            self.conflicts.remove(met)
        return met is not None

    @contextlib.contextmanager
    def serve(self) -> Iterator[None]:
        """Serve on the loopback while the block runs."""
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.inner = DomainDispatcherApplication(create_backend_app)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        (port,) = free_ports(1)
        server = make_server("127.0.0.1", port, self, threaded=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        self.endpoint = f"http://127.0.0.1:{port}"
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


def _nothing_deleted(environ) -> str:
    body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])).decode()
    environ["wsgi.input"] = io.BytesIO()
    errors = (f"<Error><Key>{key}</Key><Code>InternalError</Code></Error>" for key in re.findall("<Key>(.*?)</Key>", body))
    return f"<DeleteResult>{''.join(errors)}</DeleteResult>"


def _refuse(environ, start, status: str):
    code = status.split(" ", 1)[1]
    return _answer(environ, start, status, f"<Error><Code>{code}</Code><Message>this server does not do it</Message></Error>")


def _answer(environ, start, status: str, text: str):
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    body = f'<?xml version="1.0" encoding="UTF-8"?>{text}'.encode()
    start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]
