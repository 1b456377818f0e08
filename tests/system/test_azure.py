"""Azure Blob Storage, as Azurite speaks it: the same rows as on a disk, and one winner of each race.

`TLBATCH_CHAOS` is how many disturbed runs and races there are.
"""

import base64
import json
import os
import pickle
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from deltalake import DeltaTable
from support.azure_server import ACCOUNT, CONTAINER, ENVIRONMENT, KEY, connection_string, options
from support.command import run_cli
from support.faulty_proxy import FaultyS3
from support.paths import TLBATCH
from support.pictures import write_store

import tlbatch
from tlbatch.commands.sync import sync
from tlbatch.config import SyncConfig
from tlbatch.errors import ChangedError, ConfigError, RefusedError, StoreError
from tlbatch.images.listing import Selection, list_store
from tlbatch.output.verify import verify
from tlbatch.storage import clouds, retry
from tlbatch.storage.conditions import Conditions
from tlbatch.storage.resolve import resolve

RUNS = int(os.environ.get("TLBATCH_CHAOS", "2"))
#: A bad night: shares of requests. Bits are not flipped: Azure is reached by HTTPS, which finds them.
BAD_NIGHT = {
    "slow_down": 0.05,
    "internal_error": 0.01,
    "reset_before": 0.005,
    "reset_after": 0.01,
    "truncate": 0.002,
    "stall": 0.0005,
}


@pytest.fixture
def folder(azurite, request):
    """A folder of the container for one test."""
    name = request.node.name.translate(str.maketrans("[]/ \\", "_____"))
    return resolve(f"az://{CONTAINER}/{name}", options(azurite.host))


def copy_to(location, path) -> None:
    """Copy a folder of this disk."""
    files = [one for one in path.rglob("*") if one.is_file()]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda one: location.join(*one.relative_to(path).parts).write(one.read_bytes()), files))


def published(location) -> dict[str, bytes]:
    """The published Parquet files of a run."""
    return {one.key: location.join(*one.key.split("/")).read() for one in location.contents() if one.key.endswith(".parquet")}


@pytest.fixture(scope="module")
def there(azurite, store, bundle_url):
    """Pictures and a bundle in the container."""
    found = resolve(f"az://{CONTAINER}/there", options(azurite.host))
    copy_to(found.join("store"), store)
    copy_to(found.join("bundle"), Path(bundle_url))
    return found


def classify(host: str, there, output: str, **settings) -> dict:
    return tlbatch.classify(
        images=f"{there.url}/store",
        bundle=f"{there.url}/bundle",
        output=f"{there.url}/{output}",
        rows_per_task=10,
        storage_options=options(host),
        **settings,
    )


@pytest.fixture(scope="module")
def undisturbed(azurite, there, ray_here) -> dict[str, bytes]:
    """What a quiet run publishes."""
    assert classify(azurite.host, there, "quiet", run_id="one")["failed"] == 0
    return published(there.join("quiet", "runs", "one"))


def test_the_whole_story_on_azure_gives_the_rows_of_a_local_disk(azurite, weights, tmp_path):
    """train, classify, verify, status, sql: images, weights, bundle and output in a container."""
    local = write_store(tmp_path / "store", 12)
    url = f"az://{CONTAINER}/story"
    story = resolve(url, options(azurite.host))
    copy_to(story.join("store"), local)
    story.join("weights.h5").write(Path(weights).read_bytes())
    env = {"AZURE_STORAGE_CONNECTION_STRING": connection_string(azurite.host)}

    def said(*words: str | Path) -> dict:
        done = run_cli(*words, "--json", **env)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    train = ("--weights", f"{url}/weights.h5", "--size", "96", "--epochs", "20", "--learning-rate", "0.01")
    said("train", "--images", f"{url}/store", *train, "--bundle", f"{url}/bundle")
    words = ("--set", "run_id=one", "--bundle", f"{url}/bundle")
    report = said("classify", "--images", f"{url}/store", "--output", f"{url}/out", *words)
    assert (report["listed"], report["predicted"], report["failed"]) == (36, 36, 0)
    assert said("verify", f"{url}/out")["ok"]
    assert said("status", f"{url}/out")["runs"][0]["state"] == "published"
    said("classify", "--images", local, "--output", tmp_path / "out", *words)
    cloud = tlbatch.read_predictions(f"{url}/out", storage_options=options(azurite.host))
    columns = cloud.columns.drop(["uri", "etag"])  # those of a disk are others
    assert cloud[columns].equals(tlbatch.read_predictions(str(tmp_path / "out"))[columns])
    assert story.join("out").names() == ["latest.json", "runs"]
    assert said("sql", f"{url}/out", "--query", "select count(*) from predictions")["rows"] == [[36]]


@pytest.mark.parametrize("seed", range(RUNS))
def test_a_bad_night_of_the_network_changes_nothing(seed, azurite, there, undisturbed):
    with FaultyS3(azurite.host, seed, BAD_NIGHT) as proxy:
        report = classify(proxy.endpoint, there, f"bad-{seed}", run_id="one")
        faults = {name: count for name, count in proxy.counts().items() if name.startswith("fault")}
    print(f"seed {seed}: {faults}")
    assert sum(faults.values()) >= 2
    assert (report["listed"], report["predicted"], report["failed"]) == (60, 60, 0), report["failed_by_kind"]
    assert published(there.join(f"bad-{seed}", "runs", "one")) == undisturbed
    assert verify(f"{there.url}/bad-{seed}", options(azurite.host))["ok"]


@pytest.mark.parametrize("number", range(RUNS))
def test_of_two_commands_one_wins(number, azurite, there, undisturbed):
    words = ["--images", f"{there.url}/store", "--bundle", f"{there.url}/bundle", "--output", f"{there.url}/race-{number}"]
    env = {**os.environ, "AZURE_STORAGE_CONNECTION_STRING": connection_string(azurite.host)}
    both = [
        subprocess.Popen([TLBATCH, "classify", *words, "--json"], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    said = [running.communicate(timeout=300) for running in both]
    codes = sorted(running.returncode for running in both)
    assert codes == [0, 4], [error.decode()[-500:] for _, error in said]
    assert any(b"another run" in error.lower() or b"lease" in error.lower() for _, error in said)
    assert verify(f"{there.url}/race-{number}", options(azurite.host))["ok"]
    assert len(there.join(f"race-{number}", "runs").folders()) == 1


@pytest.mark.sampled(1)
def test_a_killed_command_is_continued_by_the_same_one(azurite, there, undisturbed):
    words = ["--images", f"{there.url}/store", "--bundle", f"{there.url}/bundle", "--output", f"{there.url}/killed"]
    words += ["--set", "rows_per_task=10", "--set", "run_id=one"]
    env = {"AZURE_STORAGE_CONNECTION_STRING": connection_string(azurite.host)}
    with subprocess.Popen([TLBATCH, "classify", *words], env={**os.environ, **env}, stderr=subprocess.PIPE) as running:
        staged, end = there.join("killed", "runs", "one", "staged"), time.monotonic() + 120
        while not any(name.endswith(".parquet") for name in staged.names()):
            assert running.poll() is None, "it ended"
            assert time.monotonic() < end, "nothing was staged"
            time.sleep(0.02)
        running.kill()
        running.communicate()
    done = run_cli("classify", *words, "--json", **env)
    assert done.returncode == 0, done.stderr
    assert published(there.join("killed", "runs", "one")) == undisturbed


def test_nights_and_a_copy_in_a_lake(azurite, store, there, undisturbed, tmp_path):
    """New, changed and deleted images, and a Delta table that follows."""
    evening = resolve(f"az://{CONTAINER}/nights", options(azurite.host))
    copy_to(evening.join("store"), store)
    names = [one.key for one in evening.join("store").contents()]
    words = {"bundle": f"{there.url}/bundle", "storage_options": options(azurite.host)}
    images, output, lake = (f"{evening.url}/{name}" for name in ("store", "out", "lake"))
    assert tlbatch.classify(images=images, output=output, **words)["predicted"] == 60
    sync(SyncConfig(output=output, to=lake, as_="delta", storage_options=options(azurite.host)))
    evening.join("store", *names[0].split("/")).unlink()
    evening.join("store", *names[1].split("/")).write(evening.join("store", *names[2].split("/")).read())
    evening.join("store", "new.jpg").write(evening.join("store", *names[3].split("/")).read())
    report = tlbatch.classify(images=images, output=output, incremental=True, **words)
    assert {name: report["counts"][name] for name in ("new", "changed", "deleted")} == {"new": 1, "changed": 1, "deleted": 1}
    assert verify(output, options(azurite.host))["ok"]
    sync(SyncConfig(output=output, to=lake, as_="delta", storage_options=options(azurite.host)))
    table = tlbatch.read_predictions(output, storage_options=options(azurite.host))
    assert len(table) == 60
    copied = DeltaTable(lake, storage_options=resolve(lake, options(azurite.host)).object_store_settings()).to_pyarrow_table()
    assert sorted(copied["uri"].to_pylist()) == sorted(table["uri"])


def test_a_race_for_one_object_has_one_winner(folder):
    names = [b"a", b"b", b"c", b"d"]
    for attempt in range(20):
        one = folder.join(str(attempt))
        with ThreadPoolExecutor(len(names)) as pool:
            won = [name for name, mine in zip(names, pool.map(one.create, names), strict=True) if mine]
            assert [one.read()] == won
            won = list(pool.map(partial(replace, one, won[0]), names))
        assert [one.read()] == [name * 2 for name, mine in zip(names, won, strict=True) if mine]


def replace(one, old: bytes, name: bytes) -> bool:
    return one.swap(name * 2, old)


def test_a_put_whose_answer_is_lost_is_ours(azurite, folder):
    with FaultyS3(azurite.host, 3, {"reset_after": 0.5}) as proxy:
        location = resolve(folder.url, options(proxy.endpoint))
        for number in range(12):
            mine = location.join(f"{number}.json")
            assert mine.create(f"mine {number}".encode())
            assert mine.swap(f"next {number}".encode(), f"mine {number}".encode())
            assert not mine.create(b"somebody else's")
        assert proxy.counts()["fault reset_after"] > 5


def test_a_listing_goes_on_after_failed_pages(azurite, folder, monkeypatch):
    names = sorted(f"{number % 3}/{number:03d}.jpg" for number in range(60))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: folder.join(*name.split("/")).write(b"x"), names))
    monkeypatch.setattr(clouds, "_LISTED_AT_ONCE", 7)
    with FaultyS3(azurite.host, 5, {"internal_error": 0.5}) as proxy:
        location = resolve(folder.url, options(proxy.endpoint))
        assert [key for batch in location.walk() for key in batch["key"].to_pylist()] == names


def test_what_a_store_keeps_is_found_out(folder):
    assert folder.join("lease.json").create(b"1")
    assert folder._conditions == Conditions(create=True, replace=True, read=True)
    assert folder.names() == ["lease.json"], "the probe is gone"


def test_a_changed_object_is_not_read(folder):
    one = folder.join("a.jpg")
    one.write(b"first")
    old = one.info()
    one.write(b"later")
    with pytest.raises(ChangedError):
        one.fetch(0, None, old.etag)
    assert one.fetch(0, None, one.info().etag) == b"later"
    assert one.fetch(1, 3) == b"at"
    assert one.fetch(2) == b"ter"


STRANGE = ("a b.jpg", "100%.jpg", "x#y?z=1.jpg", "a+b&c.jpg", "🐱.jpg", "%2e%2e.jpg", "quote\"'.jpg", "é.jpg", "a~b*c.jpg")


def test_strange_keys_come_back_as_they_are(folder):
    for name in STRANGE:
        folder.join("q", name).write(name.encode())
    listed = {key for batch in folder.walk() for key in batch["key"].to_pylist()}
    assert listed == {f"q/{name}" for name in STRANGE}
    assert sorted(folder.join("q").names()) == sorted(STRANGE)
    for name in STRANGE:
        assert folder.join("q", name).read() == name.encode()
        folder.join("q", name).unlink()
    assert not folder.exists()


@pytest.mark.parametrize("name", ["a//b.jpg", "./c.jpg", "new\nline.jpg"])
def test_a_key_that_is_no_path_is_refused_in_a_sentence(azurite, folder, name):
    with pytest.raises(RefusedError, match=r"a key with an empty part, '.', '..' or a control character cannot be reached"):
        resolve(f"{folder.url}/{name}", options(azurite.host)).read()
    key = f"{folder.url.split('/', 3)[3]}/{name}"
    azurite.ask("PUT", f"{CONTAINER}/{key}", b"x")
    with pytest.raises(StoreError, match=re.escape(f"{folder.url} has an object whose name cannot be listed here, {key!r}")):
        list_store(folder, Selection())


def test_what_is_wrong_with_a_store_is_said_in_one_sentence(azurite, folder, monkeypatch):
    monkeypatch.setattr(retry, "RETRY_SECONDS", 1.0)
    with pytest.raises(StoreError, match=r"The store az://nowhere/x does not exist: there is no bucket 'nowhere'"):
        list_store(resolve("az://nowhere/x", options(azurite.host)), Selection())
    with pytest.raises(StoreError, match=f"The store {folder.url} does not exist: nothing is stored under this name"):
        list_store(folder, Selection())
    with pytest.raises(PermissionError):
        resolve(folder.url, {**options(azurite.host), "anon": True}).join("x").read()
    with pytest.raises(ConfigError, match=r"az:// has no option 'acount_name'; did you mean 'account_name'\?"):
        resolve(folder.url, {"acount_name": "x"}).exists()
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", base64.b64encode(b"another".ljust(32)).decode())
    clouds._client.cache_clear()
    with pytest.raises(PermissionError, match="failed to authenticate the request"):
        folder.join("x").read()
    clouds._client.cache_clear()
    for name in ENVIRONMENT:
        monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match=r"nothing says which storage account this is\. Set AZURE_STORAGE_ACCOUNT_NAME"):
        resolve(folder.url).exists()
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "AccountName")
    with pytest.raises(ConfigError, match="has a part without '='"):
        resolve(folder.url).exists()


@pytest.mark.parametrize(
    ("url", "given", "expected"),
    [
        ("abfss://c@acc.dfs.core.windows.net/x/y", {}, ("c", "x/y", {"account_name": "acc"})),
        (
            "abfss://c@acc.dfs.core.chinacloudapi.cn/x",
            {},
            ("c", "x", {"account_name": "acc", "endpoint": "https://acc.blob.core.chinacloudapi.cn"}),
        ),
        ("az://c", {"account_name": "acc", "anon": True}, ("c", "", {"account_name": "acc", "skip_signature": True})),
        ("gs://b/x/y", {"token": "anon"}, ("b", "x/y", {"skip_signature": True})),
        ("gs://b/x", {"endpoint_url": "http://127.0.0.1:1"}, ("b", "x", {"base_url": "http://127.0.0.1:1"})),
    ],
)
def test_an_address_leads_to_the_settings_of_its_client(url, given, expected):
    assert tuple(resolve(url, given)._address) == expected


def test_no_key_travels_with_a_location(folder):
    assert KEY not in repr(folder)
    assert KEY.encode() not in pickle.dumps(folder)
    assert ACCOUNT in folder.object_store_settings()["endpoint"]
