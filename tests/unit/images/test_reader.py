"""Reading waits out what passes, gives up what does not, and asks for less when it is told to."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest

from tlbatch.errors import ArchivedError, ChangedError, CredentialsError, ErrorKind, StoreUnavailableError, ThrottledError
from tlbatch.images.reader import Patience, Reader, Throttle, choose_probes
from tlbatch.schema import MANIFEST_SCHEMA
from tlbatch.storage.range_file import RangeFile
from tlbatch.storage.resolve import resolve
from tlbatch.storage.retry import no_retries, with_retries


class Store:
    """Answers with what it is told, one after the other; the last answer is for ever."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = 0

    def __call__(self):
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


class Nowhere:
    """A store that is gone."""

    def info(self):
        raise TimeoutError("nobody answers")


NOWHERE = Nowhere()


def reader(deadline: float = 0.2) -> Reader:
    return Reader({}, patience=Patience(first=0.001, longest=0.01, deadline=deadline))


@pytest.mark.parametrize(
    "trouble",
    [ThrottledError("503"), TimeoutError("late"), ConnectionResetError("cut"), OSError("500"), CredentialsError("expired")],
    ids=lambda error: type(error).__name__,
)
def test_what_passes_is_waited_out(trouble):
    store = Store(trouble, trouble, b"x")
    assert reader(30.0)._with_retries(store, NOWHERE) == (b"x", 3)


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (FileNotFoundError("gone"), ErrorKind.NOT_FOUND),
        (PermissionError("no"), ErrorKind.ACCESS_DENIED),
        (ChangedError("other"), ErrorKind.CHANGED),
    ],
)
def test_a_refusal_is_an_answer(refusal, kind):
    store = Store(refusal)
    failure = reader()._with_retries(store, NOWHERE)
    assert (failure.kind, failure.attempts, store.asked) == (kind, 1, 1)


@pytest.mark.parametrize(
    ("trouble", "kind"),
    [
        (ThrottledError("503"), ErrorKind.THROTTLED),
        (TimeoutError("late"), ErrorKind.TIMEOUT),
        (OSError("500"), ErrorKind.READ_FAILED),
    ],
)
def test_trouble_with_one_object_is_its_failure_while_others_can_be_read(trouble, kind):
    one = reader(1.0)
    one._with_retries(Store(b"fine"), NOWHERE)
    failure = one._with_retries(Store(trouble), NOWHERE)
    assert failure.kind is kind
    assert failure.transient
    assert failure.attempts > 2


def test_trouble_with_every_object_is_the_stores():
    one = reader()
    one._good = Store(b"once", OSError("500"))
    one._good()
    with pytest.raises(StoreUnavailableError, match="the store did not answer for 0 s: 500"):
        one._with_retries(Store(OSError("500")), NOWHERE)


def test_an_object_that_cannot_be_read_first_of_all_is_its_own_failure_where_the_store_knows_of_it(tmp_path):
    one = reader(0.01)
    for _ in range(31):
        assert one._with_retries(Store(OSError("500")), resolve(str(tmp_path))).kind is ErrorKind.READ_FAILED
    with pytest.raises(StoreUnavailableError, match="the store lists its images, but none of them can be read"):
        one._with_retries(Store(OSError("500")), resolve(str(tmp_path)))


def test_what_is_no_address_is_a_failed_image():
    for uri in ("htps://x/y.jpg", "http://u:p@h/x", "s3://[x/y.jpg"):
        row = {"uri": uri, "key": "k", "size": None, "etag": None, "format": "tar"}
        assert reader().image(row).kind is ErrorKind.NOT_FOUND
        (member,) = reader().members(row)
        assert member.data.kind is ErrorKind.NOT_FOUND


def test_too_many_bytes_are_refused_where_nobody_told_how_many(tmp_path):
    (tmp_path / "a").write_bytes(bytes(1000))
    row = {"uri": str(tmp_path / "a"), "key": "a", "size": None, "etag": None}
    assert Reader({}, max_bytes=10).image(row).kind is ErrorKind.TOO_LARGE


def test_a_store_that_refuses_everything_ends_the_run_after_some():
    one = reader()
    for _ in range(31):
        assert one._with_retries(Store(PermissionError("no")), NOWHERE).kind is ErrorKind.ACCESS_DENIED
    with pytest.raises(StoreUnavailableError, match="the store lists its images, but none of them can be read"):
        one._with_retries(Store(PermissionError("no")), NOWHERE)
    other = reader()
    other._with_retries(Store(b"fine"), NOWHERE)
    for _ in range(100):
        assert other._with_retries(Store(PermissionError("no")), NOWHERE).kind is ErrorKind.ACCESS_DENIED


def test_a_refusal_is_a_row_if_another_object_of_the_store_can_be_read(tmp_path):
    (tmp_path / "good.jpg").write_bytes(b"x")
    one = Reader({}, probes=[str(tmp_path / "gone.jpg"), str(tmp_path / "good.jpg"), "htps://no/address"])
    for _ in range(100):
        assert one._with_retries(Store(PermissionError("no")), NOWHERE).kind is ErrorKind.ACCESS_DENIED
    other = Reader({}, probes=[str(tmp_path / "gone.jpg")])
    for _ in range(31):
        other._with_retries(Store(PermissionError("no")), NOWHERE)
    with pytest.raises(StoreUnavailableError, match="none of them can be read"):
        other._with_retries(Store(PermissionError("no")), NOWHERE)


def test_an_archive_is_never_the_stores_fault():
    one = reader()
    for _ in range(100):
        failure = one._with_retries(Store(ArchivedError("InvalidObjectState")), NOWHERE)
        assert (failure.kind, failure.transient, failure.attempts) == (ErrorKind.ARCHIVED, False, 1)
    assert "restore it first" in failure.message
    row = {"uri": "s3://b/k", "key": "k", "size": 1, "etag": "e", "format": "archived"}
    (member,) = one.members(row)
    assert (member.data.kind, member.data.attempts) == (ErrorKind.ARCHIVED, 0), "nothing was requested"


def table_of(keys, closed=0):
    """A manifest; the first key is of an empty object, and the first `closed` ones are in an archive."""
    kinds = ["archived"] * closed + ["image"] * (len(keys) - closed)
    columns = {"uri": keys, "key": keys, "size": [0, *[1] * (len(keys) - 1)], "etag": keys, "format": kinds}
    return pa.table(columns, MANIFEST_SCHEMA)


def test_probes_come_from_all_over_a_store():
    manifest = table_of([f"{folder:03d}/{number:04d}.jpg" for folder in range(300) for number in range(10)], 10)
    probes = choose_probes(manifest)
    assert 512 <= len(probes) <= 1024
    assert {key[:3] for key in probes} == {f"{folder:03d}" for folder in range(1, 300)}
    assert choose_probes(manifest.slice(0, 10)) == ()
    assert choose_probes(manifest.slice(10, 1000)) == tuple(manifest["uri"].to_pylist()[10:1010]), "all of a small store"


def test_one_open_folder_of_many_is_found(tmp_path):
    """Whose objects are not the first to be asked for: others, all refused, come before."""
    (tmp_path / "151").mkdir()
    for number in range(10):
        (tmp_path / f"151/{number}.jpg").write_bytes(b"x")
    keys = [f"{tmp_path}/{folder:03d}/{number}.jpg" for folder in range(300) for number in range(10)]
    one = Reader({}, probes=choose_probes(table_of(keys)))
    for _ in range(100):
        assert one._with_retries(Store(PermissionError("no")), NOWHERE).kind is ErrorKind.ACCESS_DENIED


def test_probes_are_asked_for_no_longer_than_any_object(tmp_path, monkeypatch):
    asked = []
    one = Reader({}, requests=4, patience=Patience(deadline=0.05), probes=[str(tmp_path / f"{n}.jpg") for n in range(1000)])
    monkeypatch.setattr(one, "_call", lambda ask: asked.append(ask) or time.sleep(0.02))
    assert not one._finds_another()
    assert len(asked) < 200


def test_fewer_requests_are_in_flight_after_a_503_and_more_again_later():
    now = [0.0]
    throttle = Throttle(16, clock=lambda: now[0])

    def throttled() -> None:
        with pytest.raises(ThrottledError), throttle.request():
            raise ThrottledError("503")

    throttled()
    throttled()  # of the same moment: it counts once
    assert throttle.limit == 8
    for _ in range(10):
        now[0] += 1.5
        throttled()
    assert throttle.limit == 1
    for _ in range(200):
        with throttle.request():
            pass
    assert throttle.limit == 16


def test_requests_beyond_the_limit_wait():
    throttle = Throttle(3)
    most, now, lock = [0], [0], threading.Lock()

    def ask(_) -> None:
        with throttle.request():
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            time.sleep(0.005)
            with lock:
                now[0] -= 1

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(ask, range(60)))
    assert most[0] == 3


def test_without_retries_nothing_waits():
    store = Store(TimeoutError("late"))
    with no_retries(), pytest.raises(TimeoutError):
        with_retries(store)
    assert store.asked == 1


@pytest.mark.parametrize("piece", [7, 64, 1 << 20])
def test_a_file_of_ranges_is_the_file(piece, monkeypatch):
    monkeypatch.setattr(RangeFile, "_PIECE", piece)
    data = os.urandom(1000)
    random = np.random.default_rng(0)
    with RangeFile(lambda start, end: data[start:end], len(data)) as file:
        assert file.read() == data
        assert file.read() == b""
        for _ in range(200):
            start, size = random.integers(0, 1010, 2).tolist()
            file.seek(start)
            assert file.read(size) == data[start : start + size]
            assert file.tell() == max(start, min(start + size, 1000))
        file.seek(-10, os.SEEK_END)
        assert file.read() == data[-10:]


def test_a_file_of_ranges_reads_each_piece_once_when_it_is_read_through(monkeypatch):
    monkeypatch.setattr(RangeFile, "_PIECE", 100)
    asked = []
    with RangeFile(lambda start, end: asked.append(start) or bytes(end - start), 1000) as file:
        while file.read(33):
            pass
    assert sorted(asked) == list(range(0, 1000, 100))


def test_a_local_file_that_changes_while_it_is_read_is_no_mixture(tmp_path):
    (tmp_path / "a").write_bytes(b"first")
    location = resolve(str(tmp_path / "a"))
    etag = location.info().etag
    time.sleep(0.01)
    (tmp_path / "a").write_bytes(b"other")
    row = {"uri": str(tmp_path / "a"), "key": "a", "size": 5, "etag": etag, "format": "image"}
    assert reader().image(row).kind is ErrorKind.CHANGED
    (member,) = reader().members({**row, "format": "tfrecord"})
    assert member.data.kind is ErrorKind.CHANGED
