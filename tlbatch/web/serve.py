"""`tlbatch browse`: an output -> an application that a browser on this machine shows, until Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlbatch.config import BrowseConfig
from tlbatch.errors import ConfigError
from tlbatch.storage.resolve import resolve

if TYPE_CHECKING:
    from tlbatch.web.application import Application

#: The only address that is listened on.
_HOST = "127.0.0.1"
#: Seconds in which requests may end after Ctrl-C.
_LAST_SECONDS = 2


@dataclass(frozen=True)
class Serving:
    """A server that runs in a thread of its own, until it has `ended`; `url` has the token that a browser needs."""

    url: str
    application: Application
    ended: threading.Event


def browse(config: BrowseConfig) -> dict[str, Any]:
    """Show the images of an output's published table in a browser on this machine, until the command is interrupted.

    Returns:
        `images`, the number of images of the table, and `corrections`, the URL of the labels file with what was corrected.

    Raises:
        OutputError: nothing is published there, or the table has no predictions.
        LabelsError: a labels file cannot be used.
        ConfigError: a package is not installed, or the port is in use.
    """
    with serving(config) as server:
        print(server.url, file=sys.stderr, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.ended.wait()
    corrections = resolve(config.corrections, config.storage_options).url
    return {"images": server.application.images, "corrections": corrections}


@contextlib.contextmanager
def serving(config: BrowseConfig) -> Iterator[Serving]:
    """Serve an output while the block runs; errors as `browse` raises them."""
    try:
        import uvicorn

        from tlbatch.web.application import Application
        from tlbatch.web.corrections import Corrections
        from tlbatch.web.doors import TOKEN, Doors
        from tlbatch.web.opened import Opened
        from tlbatch.web.pictures import PictureCache
    except ImportError as error:
        raise ConfigError(f"This needs the package {error.name}: install tlbatch[browse].") from None
    options = config.storage_options
    output = resolve(config.output, options)
    corrections = Corrections(resolve(config.corrections, options))
    labels = resolve(config.labels, options) if config.labels is not None else None
    with _listening(config.port) as listening:
        reopen = partial(Opened.of, output, options, labels, corrections, PictureCache(_cache()))
        application = Application(output.url.rstrip("/").rsplit("/", 1)[-1], reopen, corrections)
        port, token = listening.getsockname()[1], secrets.token_urlsafe(24)
        settings = uvicorn.Config(
            Doors(application.asgi(), port, token),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_LAST_SECONDS,
        )
        server, ended = uvicorn.Server(settings), threading.Event()

        def run() -> None:
            try:
                server.run([listening])
            finally:
                ended.set()

        thread = threading.Thread(target=run, name="tlbatch-browse")
        thread.start()
        try:
            # A thread whose `join` is interrupted counts as ended in Python 3.11; an event may be waited for.
            yield Serving(f"http://{_HOST}:{port}/?{TOKEN}={token}", application, ended)
        finally:
            server.should_exit = True
            thread.join()


def _listening(port: int) -> socket.socket:
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((_HOST, port))
        found.listen()  # whoever comes before the server is ready waits
    except OSError as error:
        found.close()
        raise ConfigError(f"port: {port} cannot be used ({error.strerror}); choose another one, or 0 for any.") from None
    return found


def _cache() -> Path:
    """The folder of small pictures, which belongs to the user alone."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "tlbatch", "pictures")
