"""A server that speaks Azure Blob Storage for the tests: Azurite on the loopback, which checks credentials and conditions."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from urllib.parse import quote

from support.paths import ROOT
from support.s3_server import free_ports

#: Where the Makefile installs it.
AZURITE = ROOT / ".venv-azurite" / "node_modules" / ".bin" / "azurite-blob"
ACCOUNT, KEY = "tlbatchtests", base64.b64encode(b"only on the loopback".ljust(32)).decode()
CONTAINER = "photos"


class AzureServer:
    """Azurite with its data in a folder."""

    def __init__(self, folder: Path) -> None:
        (port,) = free_ports(1)
        self.host = f"http://127.0.0.1:{port}"
        words = ["--blobHost", "127.0.0.1", "--blobPort", port, "--location", folder, "--silent", "--disableTelemetry"]
        self._command = [str(AZURITE), *map(str, words), "--skipApiVersionCheck"]

    @contextlib.contextmanager
    def serve(self) -> Iterator[AzureServer]:
        """Run it, with a container."""
        env = {**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"}
        running = subprocess.Popen(self._command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            end = time.monotonic() + 60
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(self.host.rsplit(":", 1)[1])), 1):
                    break
                assert running.poll() is None, "Azurite ended"
                assert time.monotonic() < end, "Azurite does not answer"
                time.sleep(0.1)
            self.ask("PUT", CONTAINER, restype="container")
            yield self
        finally:
            running.terminate()
            running.wait(20)

    def ask(self, method: str, path: str, body: bytes = b"", **query: str) -> bytes:
        """A signed request, for what obstore does not do: containers, and keys that are no paths."""
        headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2023-11-03"}
        headers |= {"x-ms-blob-type": "BlockBlob"} if method == "PUT" and not query else {}
        where = f"/{ACCOUNT}/{quote(path)}"
        signed = [method, "", "", str(len(body) or ""), "", "application/octet-stream" if body else "", *[""] * 6]
        signed += [f"{name}:{headers[name]}" for name in sorted(headers)]
        signed.append(f"/{ACCOUNT}{where}" + "".join(f"\n{name}:{query[name]}" for name in sorted(query)))
        digest = hmac.new(base64.b64decode(KEY), "\n".join(signed).encode(), hashlib.sha256).digest()
        headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
        headers |= {"Content-Type": "application/octet-stream"} if body else {}
        asked = "&".join(f"{name}={value}" for name, value in query.items())
        request = urllib.request.Request(f"{self.host}{where}?{asked}", body or None, headers, method=method)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return bytes(answer.read())


#: What a process needs in its environment to be known by the server.
ENVIRONMENT = {"AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT, "AZURE_STORAGE_ACCOUNT_KEY": KEY}


def options(host: str) -> dict[str, str]:
    """The storage options that lead to the server, or to a proxy before it."""
    return {"endpoint_url": f"{host}/{ACCOUNT}"}


def connection_string(host: str) -> str:
    """All of it in one text, as Azure's portal gives it."""
    return f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={host}/{ACCOUNT};"
