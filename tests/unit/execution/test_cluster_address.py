"""RAY_ADDRESS as people have it: one sentence, and no wait for many minutes."""

import contextlib
import os
import socket
import threading

import pytest

from tlbatch.errors import ClusterError, UnfinishedError
from tlbatch.execution import ray_errors
from tlbatch.execution.ray_errors import connection_error, require_address, require_answer


@pytest.mark.parametrize(
    "where",
    ["http://127.0.0.1:8265", "https://head", "head:port", "garbage", "head:0", "head:70000", ":6379", " head:1", "ray://head"],
)
def test_what_is_no_address_of_a_cluster_is_a_mistake(where):
    with pytest.raises(ClusterError, match="RAY_ADDRESS is"):
        require_address(where)


@pytest.mark.parametrize("where", ["", "auto", "ray://head:10001", "10.0.0.5:6379", "head.example:6379", "[::1]:6379"])
def test_what_ray_can_use_is_left_as_it_is(where):
    assert require_address(where) == where


def test_a_cluster_that_is_gone_may_come_back(monkeypatch):
    monkeypatch.setattr(ray_errors, "_PATIENCE", 0.1)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # it does not listen
        with pytest.raises(UnfinishedError, match=r"RAY_ADDRESS.*does not answer: Connection refused"):
            require_answer(f"127.0.0.1:{held.getsockname()[1]}")


@pytest.fixture
def answering():
    """A server that says one thing and nothing more: its address."""
    servers = []

    def serve(says: bytes | None) -> str:
        server = socket.create_server(("127.0.0.1", 0))

        def answer():
            with contextlib.ExitStack() as kept, contextlib.suppress(OSError):
                while True:
                    connection = kept.enter_context(server.accept()[0])
                    if says is None:
                        connection.close()
                    else:
                        connection.sendall(says)

        servers.append((server, threading.Thread(target=answer)))
        servers[-1][1].start()
        return f"127.0.0.1:{server.getsockname()[1]}"

    yield serve
    for server, thread in servers:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()


def test_what_is_not_ray_is_known_by_its_first_answer(answering, monkeypatch):
    monkeypatch.setattr(ray_errors, "_PATIENCE", 0.2)
    require_answer(answering(bytes((0, 0, 6, 4, 0, 0, 0, 0, 0))))
    with pytest.raises(ClusterError, match="is not the head of a Ray cluster"):
        require_answer(answering(b"HTTP/1.1 400 Bad Request"))
    with pytest.raises(UnfinishedError, match="does not answer: timed out"):
        require_answer(answering(b""))
    with pytest.raises(UnfinishedError, match="does not answer"):
        require_answer(answering(None))


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (ConnectionError("Failed to connect to Ray cluster at h:1"), "is not the head of a Ray cluster"),
        (RuntimeError("Version mismatch: the cluster has Ray 2.9.\nsecond line"), r"the cluster has Ray 2\.9\. If"),
        (Exception(""), r"Exception\."),
    ],
)
def test_what_ray_says_is_one_sentence_and_nothing_stays_set(raised, words, monkeypatch):
    monkeypatch.delenv("RAY_gcs_server_port_wait_time_s", raising=False)

    def connect():
        raise raised

    before = dict(os.environ)
    refused = connection_error("h:1", connect)
    assert isinstance(refused, ClusterError)
    with pytest.raises(ClusterError, match=words):
        raise refused
    assert "\n" not in str(refused)
    assert dict(os.environ) == before
    assert connection_error("h:1", dict) is None
