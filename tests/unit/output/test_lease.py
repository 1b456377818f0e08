"""Of two who want an output, one gets it, and the dead keep nobody out."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from tlbatch import schema
from tlbatch.errors import LeaseHeldError
from tlbatch.output.lease import Lease, _machine
from tlbatch.storage.resolve import resolve


@pytest.fixture
def output(tmp_path):
    return resolve(str(tmp_path / "out"))


def test_the_second_run_is_told_who_holds_the_lease(output):
    with Lease(output, "first"), pytest.raises(LeaseHeldError) as caught, Lease(output, "second"):
        pass
    assert "Run first has been working on this output since 20" in str(caught.value)
    assert f"as process {os.getpid()}" in str(caught.value)
    assert not output.join(schema.LEASE).exists()
    with Lease(output, "third"):
        pass


def test_a_lease_that_is_not_renewed_expires(output):
    output.join(schema.LEASE).write(_lease_of("elsewhere", 1, expires=100.0))
    with pytest.raises(LeaseHeldError, match="until its lease expires"), Lease(output, "heir", clock=lambda: 99.0):
        pass
    with Lease(output, "heir", clock=lambda: 1001.0) as lease:
        lease.require_held()


@pytest.mark.parametrize("renewed", [False, True])
def test_a_lease_that_expired_just_now_is_watched_before_it_is_taken(output, monkeypatch, renewed):
    """The clocks of two hosts differ: whoever still renews is alive, whatever the time is here."""
    output.join(schema.LEASE).write(_lease_of("elsewhere", 1, expires=100.0))
    watched = []

    def watch(seconds):
        watched.append(seconds)
        if renewed:
            output.join(schema.LEASE).write(_lease_of("elsewhere", 1, expires=101.0))

    monkeypatch.setattr("tlbatch.output.lease.time", SimpleNamespace(**{**vars(time), "sleep": watch}))
    if renewed:
        with pytest.raises(LeaseHeldError, match="the clock of its host is behind"), Lease(output, "heir", clock=lambda: 160.0):
            pass
    else:
        with Lease(output, "heir", clock=lambda: 160.0) as lease:
            lease.require_held()
    assert watched == [1.5 * Lease.HEARTBEAT]


def test_a_process_number_means_nothing_on_another_machine_or_in_another_container(output):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    output.join(schema.LEASE).write(_lease_of("this boot pid:[another container]", child.pid, expires=time.time() + 1000))
    with pytest.raises(LeaseHeldError), Lease(output, "heir"):
        pass


def test_a_lease_of_a_dead_process_of_this_host_is_taken_at_once(output):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    output.join(schema.LEASE).write(_lease_of(_machine(), child.pid, expires=time.time() + 1000))
    with Lease(output, "heir") as lease:
        lease.require_held()


def _lease_of(machine: str, pid: int, expires: float) -> bytes:
    facts = {
        "run_id": "old",
        "host": "host",
        "machine": machine,
        "pid": pid,
        "since": "s",
        "expires": "e",
        "expires_at": expires,
    }
    return json.dumps(facts).encode()


@pytest.mark.parametrize("garbage", [b"", b"{", b"[]", b"{}"])
def test_garbage_holds_nothing(output, garbage):
    output.join(schema.LEASE).write(garbage)
    with Lease(output, "heir") as lease:
        lease.require_held()


def wait_until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def heeds_one(request):
    """This process heeds one signal and ignores the other, whatever its parent left it with."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, signal.default_int_handler if number == request.param else signal.SIG_IGN)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_heartbeat_renews_and_a_loser_stops(output, monkeypatch, heeds_one):
    monkeypatch.setattr(Lease, "HEARTBEAT", 0.05)

    def work():
        with Lease(output, "first") as lease:
            before = output.join(schema.LEASE).read()
            wait_until(lambda: output.join(schema.LEASE).read() != before)
            lease.require_held()
            while not output.join(schema.LEASE).swap(b"{}", output.join(schema.LEASE).read()):
                pass
            time.sleep(30)
            pytest.fail("it went on")

    with pytest.raises(LeaseHeldError, match="lost its lease"):
        work()
    assert output.join(schema.LEASE).read() == b"{}", "a lease that is somebody else's is not removed"


def test_a_loser_in_another_thread_finds_out_when_it_asks(output, monkeypatch):
    monkeypatch.setattr(Lease, "HEARTBEAT", 0.05)
    said = []

    def work():
        with Lease(output, "first") as lease:
            output.join(schema.LEASE).delete()
            time.sleep(0.3)
            try:
                lease.require_held()
            except LeaseHeldError as error:
                said.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "is gone: lease.json or the whole output was removed" in said[0]


def test_a_beat_whose_answer_was_lost_is_no_loss(output, monkeypatch):
    swap, lost = type(output).swap, []

    def unheard(location, data, old):
        swap(location, data, old)
        lost.append(data)
        raise OSError("the answer was lost")

    monkeypatch.setattr(Lease, "HEARTBEAT", 0.1)
    with Lease(output, "first") as lease:
        with monkeypatch.context() as patch:
            patch.setattr(type(output), "swap", unheard)
            wait_until(lambda: lost)
        wait_until(lambda: output.join(schema.LEASE).read() not in lost)
        lease.require_held()
    assert not output.join(schema.LEASE).exists()


def test_of_many_heirs_one_wins(output):
    for _ in range(10):
        output.join(schema.LEASE).write(_lease_of("elsewhere", 1, expires=0.0))
        won, gate = [], threading.Barrier(8)

        def inherit(name, won=won, gate=gate):
            gate.wait()
            try:
                with Lease(output, name):
                    won.append(name)
                    gate.wait()
            except LeaseHeldError:
                gate.wait()

        threads = [threading.Thread(target=inherit, args=(str(number),)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
