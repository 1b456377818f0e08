"""Tests of whole commands are about their bookkeeping: a tiny bundle will do, unless they train one."""

import logging
import threading

import pytest
from support.s3_server import free_ports


@pytest.fixture(scope="session")
def bundle_url(tiny_url: str) -> str:
    """A bundle that tells the three colors apart and loads at once (`support/tiny.py`)."""
    return tiny_url


@pytest.fixture(scope="session")
def moto_asked():
    """The endpoint of an S3 server that takes any key and knows archives, and the requests that it gets.

    SeaweedFS keeps keys as paths of a file system, and has no archive.
    """
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    asked: list[tuple[str, str]] = []
    inner = DomainDispatcherApplication(create_backend_app)

    def application(environ, start_response):
        asked.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
        return inner(environ, start_response)

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    (port,) = free_ports(1)
    server = make_server("127.0.0.1", port, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def moto(moto_asked) -> str:
    """The endpoint of the same server."""
    return moto_asked[0]
