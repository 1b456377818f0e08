"""Objects are whole or not there, on a disk and behind fsspec."""

import os
import pickle
import re
import threading
import tracemalloc
from urllib.parse import quote

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations
from support.azure_server import CONTAINER, options

from tlbatch.errors import ConfigError
from tlbatch.storage.location import UNREADABLE, WalkRules
from tlbatch.storage.resolve import resolve

REMOTE = "memory://tests"


@pytest.fixture(params=["local", "memory", "azure"])
def location(request, tmp_path):
    if request.param == "local":
        yield resolve(str(tmp_path / "root"))
        return
    if request.param == "azure":
        host = request.getfixturevalue("azurite").host
        found = resolve(f"az://{CONTAINER}/{tmp_path.name}/root", options(host))
        yield found
        found.delete()
        return
    yield resolve(REMOTE)
    fsspec.filesystem("memory").rm("/tests", recursive=True) if fsspec.filesystem("memory").exists("/tests") else None


def test_an_object_comes_back_as_it_was_put(location):
    thing = location.join("a", "b.bin")
    assert thing.info() is None
    thing.write(b"one")
    thing.write(b"three")
    assert thing.read() == b"three"
    assert thing.info().size == 5
    assert location.exists()
    assert location.join("a").names() == ["b.bin"]


def test_create_never_replaces(location):
    assert location.join("x").create(b"first")
    assert not location.join("x").create(b"second")
    assert location.join("x").read() == b"first"


def test_swap_wants_what_it_saw(location):
    assert location.join("p").swap(b"1", None)
    assert not location.join("p").swap(b"2", None)
    assert not location.join("p").swap(b"2", b"0")
    assert location.join("p").swap(b"2", b"1")
    assert location.join("p").read() == b"2"


def keys_of(location):
    return [key for batch in location.walk() for key in batch["key"].to_pylist()]


def test_walk_names_keys_below_the_root(location):
    for key in ("b/2.jpg", "a/1.jpg", ".hidden/3.jpg", "a/.4.jpg", "0.txt"):
        location.join(*key.split("/")).write(b"x")
    assert sorted(keys_of(location)) == [".hidden/3.jpg", "0.txt", "a/.4.jpg", "a/1.jpg", "b/2.jpg"]
    assert all(location.join(key).read() == b"x" for key in keys_of(location))


def test_delete_takes_objects_and_folders_and_does_not_mind_their_absence(location):
    location.join("f", "g").write(b"x")
    location.join("f").delete()
    assert not location.join("f").exists()
    location.join("f").delete()


def test_what_is_missing_raises_file_not_found(location):
    with pytest.raises(FileNotFoundError):
        location.join("nothing").read()
    assert location.join("nothing").names() == []


def test_places_travel(location):
    location.join("x").write(b"x")
    assert pickle.loads(pickle.dumps(location)).join("x").read() == b"x"


def test_a_local_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    thing = resolve(str(tmp_path / "file"))
    thing.write(b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        thing.write(b"new")
    assert thing.read() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_of_many_who_swap_at_once_one_wins(tmp_path):
    thing = resolve(str(tmp_path / "pointer"))
    thing.write(b"start")
    won = []
    threads = [
        threading.Thread(target=lambda n=number: won.append(n) if thing.swap(b"%d" % n, b"start") else None)
        for number in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [b"%d" % number for number in won] == [thing.read()]


def test_of_many_who_create_at_once_one_wins(tmp_path):
    won = []
    threads = [
        threading.Thread(target=lambda n=number: won.append(n) if resolve(str(tmp_path / "x")).create(b"%d" % n) else None)
        for number in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1


def test_links_are_followed_and_a_loop_of_them_ends(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "1.jpg").write_bytes(b"x")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "store")
    assert keys_of(resolve(str(tmp_path / "store"))) == ["link/1.jpg"]


def test_links_that_lead_nowhere_are_objects_that_are_not_found_and_a_pipe_is_none(tmp_path):
    (tmp_path / "1.jpg").write_bytes(b"x")
    (tmp_path / "2.jpg").symlink_to(tmp_path / "gone")
    (tmp_path / "3.jpg").symlink_to(tmp_path / "3.jpg")
    (tmp_path / "4.jpg").symlink_to(tmp_path / "1.jpg" / "5.jpg")
    os.mkfifo(tmp_path / "6.jpg")
    (tmp_path / "folder").symlink_to(tmp_path / "gone")
    assert keys_of(resolve(str(tmp_path))) == ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    for name in ("2.jpg", "3.jpg", "4.jpg"):
        with pytest.raises((FileNotFoundError, NotADirectoryError)):
            resolve(str(tmp_path / name)).fetch()


def test_a_walk_holds_little_more_than_the_names_of_a_folder(tmp_path):
    folder = resolve(str(tmp_path))
    for number in range(20_000):
        (tmp_path / f"{number:06d}.jpg").touch()
    next(folder.walk())  # what is imported at the first time
    tracemalloc.start()
    assert sum(batch.num_rows for batch in folder.walk()) == 20_000
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 400 * 20_000


def test_strange_names_are_names_and_no_urls(tmp_path):
    for name in ("a b.jpg", "100%.jpg", "x#y?z=1.jpg", "a::b.jpg", "🐱.jpg", "a+b&c.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    keys = keys_of(resolve(str(tmp_path)))
    assert len(keys) == 6
    for key in keys:
        assert resolve(f"{tmp_path}/{key}").read() == key.encode()


@pytest.mark.parametrize("url", ["s3://AKIA:secret@bucket/x", "sftp://me:secret@host/x"])
def test_a_credential_in_a_url_is_refused_without_repeating_it(url):
    with pytest.raises(ConfigError) as caught:
        resolve(url)
    assert "secret" not in str(caught.value)


def test_an_unknown_protocol_is_named():
    with pytest.raises(ConfigError, match="Unknown protocol nonsense://"):
        resolve("nonsense://x")


def test_a_file_url_is_a_path(tmp_path):
    for name in ("x", "a b.jpg", "ü.jpg", "100%.jpg", "c%20d.jpg"):
        (tmp_path / name).write_bytes(name.encode())
        assert resolve(f"file://{tmp_path}/{name}").read() == name.encode(), "as it is"
        assert resolve(f"file://{quote(str(tmp_path / name))}").read() == name.encode(), "with escapes"
    assert resolve(f"file://localhost{tmp_path}/a%20b.jpg").read() == b"a b.jpg"


def test_options_may_belong_to_one_bucket():
    given = {"endpoint_url": "http://all", "s3://open": {"anon": True}, "s3://other": {"profile": "p"}}
    assert resolve("s3://open/images/1.jpg", given).options == {"endpoint_url": "http://all", "anon": True}
    assert resolve("s3://open", given).options == {"endpoint_url": "http://all", "anon": True}
    assert resolve("s3://opened/x", given).options == {"endpoint_url": "http://all"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"endpoint_ulr": "http://x"}, "s3:// has no option 'endpoint_ulr'; did you mean 'endpoint_url'?"),
        ({"client_kwargs": {"endpoint": "http://x"}}, "s3:// has no option 'endpoint'"),
        ({"endpoint_url": "minio:9000"}, "Invalid endpoint: minio:9000"),
        ({"endpoint_url": "http://minio:port"}, "port"),
        ({"profile": "nobody"}, "The config profile (nobody) could not be found"),
        ({"client_kwargs": {"region_name": "not a region"}}, "not a region"),
        ({"client_kwargs": "us-east-1"}, "does not work with these storage_options"),
    ],
)
def test_a_mistake_in_the_options_is_said_at_once(options, said):
    for ask in (lambda one: one.read(), lambda one: one.exists(), lambda one: one.create(b""), lambda one: list(one.walk())):
        with pytest.raises(ConfigError, match=re.escape(said)):
            ask(resolve("s3://bucket/x", options))


@pytest.mark.parametrize("url", ["s3://", "s3:///x", "s3://a bucket/x", "s3://[bucket/x", "s3://b?x/y"])
def test_a_bucket_without_a_possible_name_is_a_mistake(url):
    with pytest.raises(ConfigError, match=r"cannot be the name of a bucket|is not a URL"):
        resolve(url)


class Wrong(fsspec.AbstractFileSystem):
    """A client that is not content with its environment, as adlfs with a malformed connection string."""

    def __init__(self, **_):
        raise ValueError("Connection string is either blank or malformed.")


def test_a_malformed_connection_string_is_no_store_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(fsspec, "filesystem", lambda *_, **options: Wrong(**options))
    with pytest.raises(ConfigError, match="Connection string is either blank or malformed"):
        resolve("memory://container/x").exists()


class Disk(LocalFileSystem):
    """A protocol with folders and no search of its own, one folder of which cannot be listed, and one is no longer there."""

    protocol = "disk"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("disk://"))

    def ls(self, path, detail=False, **kwargs):
        for name, error in (("closed", PermissionError(13, "closed")), ("gone", FileNotFoundError(2, "gone"))):
            if path.rstrip("/").endswith(f"/{name}"):
                raise error
        return super().ls(path, detail=detail, **kwargs)


def test_a_folder_of_any_protocol_that_cannot_be_listed_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    """fsspec's own walk would take it for one, and an incremental run would remove its images from the table."""
    monkeypatch.setitem(known_implementations, "disk", {})
    fsspec.register_implementation("disk", Disk, clobber=True)
    for name in ("a/1.jpg", "b/c/2.jpg", "closed/3.jpg", "gone/4.jpg", "skipped/5.jpg", "6.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    passed: list[tuple[str, str]] = []
    rules = WalkRules(lambda folder: folder == "skipped/", lambda *told: passed.append(told))
    found = [key for batch in resolve(f"disk://{tmp_path}").walk(rules) for key in batch["key"].to_pylist()]
    assert found == ["6.jpg", "a/1.jpg", "b/c/2.jpg"]
    assert passed == [("closed/", UNREADABLE)]


def test_options_belong_to_what_lies_below_their_address_and_the_longest_address_counts_most():
    options = {
        "profile": "own",
        "s3://public": {"anon": True},
        "s3://public/theirs/": {"anon": False, "requester_pays": True},
    }
    of = {url: resolve(url, options).options for url in ("s3://own/a", "s3://public-2", "s3://public", "s3://public/theirs-2")}
    assert of == {
        "s3://own/a": {"profile": "own"},
        "s3://public-2": {"profile": "own"},
        "s3://public": {"profile": "own", "anon": True},
        "s3://public/theirs-2": {"profile": "own", "anon": True},
    }
    for url in ("s3://public/theirs", "s3://public/theirs/x.jpg"):
        assert resolve(url, options).options == {"profile": "own", "anon": False, "requester_pays": True}
