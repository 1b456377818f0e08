"""Everything on a real S3 server, quiet and in its bad minutes."""

import json
import os
import random
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml
from support.command import run_cli
from support.paths import TLBATCH
from support.pictures import COLORS, encoded, noisy, write_store
from support.s3_server import ACCESS, BUCKET, LISTER, PUBLIC, SECRET, STRANGER, environment, filesystem, free_ports, options
from support.shards import WRITERS
from support.tables import publish_images

import tlbatch
from tlbatch.commands.sql import sql
from tlbatch.config import SqlConfig
from tlbatch.errors import ChangedError, StoreError, StoreUnavailableError
from tlbatch.images.listing import Selection, list_store
from tlbatch.images.reader import Patience, Reader
from tlbatch.storage import retry, s3, s3_listing
from tlbatch.storage.resolve import resolve


@pytest.fixture
def bucket(s3_server, request):
    """A folder of the bucket for one test, on the server itself."""
    name = request.node.name.translate(str.maketrans("[]/ ", "____"))
    return resolve(f"s3://{BUCKET}/{name}", options(s3_server.endpoint))


def fill(location, per_class: int = 10) -> None:
    names = [(label, number) for label in COLORS for number in range(per_class)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda one: location.join(one[0], f"{one[1]:04d}.jpg").write(picture(*one)), names))


def picture(label: str, number: int) -> bytes:
    return encoded(noisy(COLORS[label], number))


@pytest.mark.sampled(1)
def test_the_whole_story_on_s3_gives_the_rows_of_a_local_disk(s3_server, weights, tmp_path):
    """train, classify, evaluate, verify, status: images, labels, weights, bundle and output in a bucket."""
    local = write_store(tmp_path / "store", 12)
    url = f"s3://{BUCKET}/story"
    fs = filesystem(s3_server.endpoint)
    fs.put(f"{local}/", f"{BUCKET}/story/store/", recursive=True)
    fs.put(weights, f"{BUCKET}/story/weights.h5")
    rows = "".join(f"{label}/{number:04d}.jpg,{label}\n" for label in COLORS for number in range(12))
    fs.pipe(f"{BUCKET}/story/labels.csv", f"key,label\n{rows}".encode())
    env = environment(s3_server.endpoint)

    def said(*words: str) -> dict:
        done = run_cli(*words, "--json", **env)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    train = [
        "--images",
        f"{url}/store",
        "--labels",
        f"{url}/labels.csv",
        "--size",
        "96",
        "--weights",
        f"{url}/weights.h5",
        "--epochs",
        "20",
        "--learning-rate",
        "0.01",
    ]
    trained = said("train", *train, "--bundle", f"{url}/bundle")
    assert trained["bundle"] == f"{url}/bundle"
    same = ["--set", "run_id=one"]
    report = said("classify", "--images", f"{url}/store", "--bundle", f"{url}/bundle", "--output", f"{url}/out", *same)
    assert (report["listed"], report["predicted"], report["failed"]) == (36, 36, 0)
    assert said("verify", f"{url}/out")["ok"]
    assert said("status", f"{url}/out")["runs"][0]["state"] == "published"
    assert said("evaluate", "--output", f"{url}/out", "--labels", f"{url}/labels.csv")["accuracy"] > 0.9
    assert said("classify", "--images", f"{url}/store", "--bundle", f"{url}/bundle", "--output", f"{url}/out")["already_done"]

    fs.get(f"{BUCKET}/story/bundle", str(tmp_path / "bundle"), recursive=True)
    here = run_cli(
        *("classify", "--images", local, "--bundle", tmp_path / "bundle", "--output", tmp_path / "out", "--json"), *same
    )
    assert here.returncode == 0, here.stderr
    there = tlbatch.read_predictions(f"{url}/out", storage_options=options(s3_server.endpoint))
    # A local file has no etag: what stands for one differs, as the address does.
    columns = there.columns.drop(["uri", "etag"])
    assert there[columns].equals(tlbatch.read_predictions(str(tmp_path / "out"))[columns])
    assert not [name for name in fs.find(f"{BUCKET}/story/out") if "staged" in name]


def test_classify_says_in_one_sentence_what_is_wrong_with_the_store(s3_server, bundle_url, bucket, tmp_path):
    fill(bucket, 1)

    def failing(images: str, access: str = ACCESS, secret: str = SECRET, endpoint: str = s3_server.endpoint) -> tuple[int, str]:
        done = run_cli(
            *("classify", "--images", images, "--bundle", bundle_url, "--output", tmp_path / "out"),
            **environment(endpoint, access, secret),
        )
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert not (tmp_path / "out").exists()
        return done.returncode, done.stderr

    code, said = failing("s3://no-such-bucket/x")
    assert (code, "there is no bucket 'no-such-bucket'" in said) == (2, True), said
    code, said = failing(f"{bucket.url}-nowhere")
    assert (code, "nothing is stored under this name" in said) == (2, True), said
    code, said = failing(bucket.url, "somebody-else")
    assert (code, "InvalidAccessKeyId" in said) == (2, True), said
    code, said = failing(bucket.url, secret="wrong")
    assert (code, "SignatureDoesNotMatch" in said) == (2, True), said


@pytest.mark.sampled(1)
def test_a_store_that_may_be_listed_and_not_read_ends_the_run(s3_server, bundle_url, bucket, tmp_path):
    fill(bucket, 20)
    done = run_cli(
        *("classify", "--images", bucket.url, "--bundle", bundle_url, "--output", tmp_path / "out"),
        **environment(s3_server.endpoint, LISTER),
    )
    assert done.returncode == 4, done.stderr
    assert "the store lists its images, but none of them can be read" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.sampled(1)
def test_expired_credentials_are_said_and_new_ones_will_do(faulty, bundle_url, bucket, tmp_path, monkeypatch):
    fill(bucket, 5)
    proxy = faulty(expired=True)
    words = ["classify", "--images", bucket.url, "--bundle", bundle_url, "--output", str(tmp_path / "out")]
    done = run_cli(*words, **environment(proxy.endpoint))
    assert (done.returncode, "ExpiredToken" in done.stderr) == (2, True), done.stderr
    proxy.set(expired=False)
    assert run_cli(*words, **environment(proxy.endpoint)).returncode == 0


def test_no_credential_is_written_anywhere(s3_server, bundle_url, bucket, ray_here):
    fill(bucket, 1)
    tlbatch.classify(
        images=bucket.url,
        bundle=bundle_url,
        output=f"{bucket.url}-out",
        storage_options=options(s3_server.endpoint),
    )
    fs = filesystem(s3_server.endpoint)
    for name in fs.find(f"{bucket.url}-out"):
        assert SECRET.encode() not in fs.cat(name), name
    assert SECRET not in repr(bucket) + repr(bucket.__getstate__())


@pytest.fixture
def places(bucket, tmp_path):
    """The same place on S3 and on the disk: they behave alike."""
    return [bucket, resolve(str(tmp_path / "place"))]


def create_and_swap(one) -> None:
    """An object that is put if absent, and replaced if it is what it was."""
    assert one.create(b"1")
    assert not one.create(b"2")
    assert one.swap(b"2", b"1")
    assert not one.swap(b"3", b"1")
    assert one.read() == b"2"


def test_conditional_puts(places):
    for location in places:
        create_and_swap(location.join("lease.json"))
        assert not location.join("other").swap(b"1", b"0")
        assert location.join("other").swap(b"1", None)


def test_a_race_for_one_object_has_one_winner(bucket):
    names = [b"a", b"b", b"c", b"d"]
    for attempt in range(5):
        one = bucket.join(str(attempt))
        with ThreadPoolExecutor(len(names)) as pool:
            won = [name for name, mine in zip(names, pool.map(one.create, names), strict=True) if mine]
        assert [one.read()] == won


def test_a_store_that_ignores_conditions_is_found_out_and_checked_before_it_is_written(faulty, bucket, caplog):
    location = resolve(bucket.url, options(faulty(ignore_conditions=True).endpoint))
    create_and_swap(location.join("lease.json"))
    said = [record.message for record in caplog.records if "one run at a time" in record.message]
    assert len(said) == 1
    assert bucket.join("other.json").create(b"1")
    assert bucket.names() == ["lease.json", "other.json"], "the probe is gone"


@pytest.mark.sampled(1)
def test_a_put_whose_answer_is_lost_is_ours(faulty, bucket):
    proxy = faulty(seed=3, reset_after=0.5)
    location = resolve(bucket.url, options(proxy.endpoint))
    for number in range(12):
        mine = location.join(f"{number}.json")
        assert mine.create(f"mine {number}".encode())
        assert mine.swap(f"next {number}".encode(), f"mine {number}".encode())
        assert not mine.create(b"somebody else's")
    assert proxy.counts()["fault reset_after"] > 5


def test_a_changed_object_is_not_read(places):
    for location in places:
        one = location.join("a.jpg")
        one.write(b"first")
        old = one.info()
        time.sleep(0.01)
        one.write(b"later")
        with pytest.raises(ChangedError):
            one.fetch(0, None, old.etag)
        assert one.fetch(0, None, one.info().etag) == b"later"
        assert one.fetch(1, 3) == b"at"


STRANGE = ("a b.jpg", "100%.jpg", "x#y?z=1.jpg", "a+b&c.jpg", "🐱.jpg", "new\nline.jpg", "%2e%2e.jpg", "quote\"'.jpg", "é.jpg")


@pytest.mark.parametrize("levels", [0, 4], ids=["pages", "levels"])
@pytest.mark.parametrize("names", [STRANGE, ("a\x01b.jpg", "\ufffe.jpg")], ids=["no paths", "not for XML"])
def test_strange_keys_come_back_as_they_are(bucket, monkeypatch, names, levels):
    monkeypatch.setattr(s3_listing, "_LEVELS", levels)  # with none looked for first, all pages are of one folder
    for name in names:
        bucket.join("deep", name).write(name.encode())
    listing = list_store(bucket, Selection())
    assert sorted(listing.manifest["key"].to_pylist()) == sorted(f"deep/{name}" for name in names)
    reader = Reader(bucket.options)
    for row in listing.manifest.to_pylist():
        assert reader.image(row) == row["key"].removeprefix("deep/").encode()


def test_a_listing_goes_on_after_failed_pages(faulty, bucket, monkeypatch):
    monkeypatch.setattr(s3_listing, "_LEVELS", 0)
    names = [f"{number:04d}.jpg" for number in range(2500)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: bucket.join(name).write(b"x"), names))
    proxy = faulty(fail_list_pages=(3, 4, 6))
    location = resolve(bucket.url, options(proxy.endpoint))
    assert list_store(location, Selection()).manifest["key"].to_pylist() == names
    assert proxy.counts()["fault internal_error"] == 3


def test_folders_that_are_objects_are_no_images(bucket, s3_server, monkeypatch):
    for levels in (0, 4):
        monkeypatch.setattr(s3_listing, "_LEVELS", levels)
        bucket.join("a", "1.jpg").write(b"x")
        bucket.join("a", "2.jpg").write(b"")
        filesystem(s3_server.endpoint).pipe_file(bucket.join("b").url.removeprefix("s3://") + "/", b"")
        listing = list_store(bucket, Selection(kind="images"))
        assert listing.manifest["key"].to_pylist() == ["a/1.jpg", "a/2.jpg"]


def test_options_that_obstore_does_not_know_take_the_way_through_s3fs(s3_server, bucket):
    fill(bucket, 2)
    plain = resolve(bucket.url, {**options(s3_server.endpoint), "default_block_size": 1 << 20})
    assert not s3.serves(plain.options)
    assert list_store(plain, Selection()).manifest.equals(list_store(bucket, Selection()).manifest)
    row = list_store(plain, Selection()).manifest.to_pylist()[0]
    assert Reader(plain.options).image(row) == Reader(bucket.options).image(row)
    with pytest.raises(ChangedError):
        resolve(row["uri"], plain.options).fetch(0, None, "0" * 32)


def test_a_flipped_bit_on_the_way_is_read_again(faulty, bucket):
    fill(bucket, 10)
    proxy = faulty(seed=1, flip_bit=0.3)
    rows = list_store(bucket, Selection()).manifest.to_pylist()
    through, direct = Reader(options(proxy.endpoint)), Reader(bucket.options)
    assert all(through.image(row) == direct.image(row) for row in rows)
    assert proxy.counts()["fault flip_bit"] > 3


def test_etags_that_are_no_digest_are_left_alone():
    """Encrypted buckets have etags that look like an MD5 and are none: the same bytes twice are believed, and it is learned."""
    checksums = s3.Checksums()
    checksums.require("a", b"x", "9dd4e461268c8034f5c8564e155c67a6")
    checksums.require("a", b"x", "an etag of several parts-2")
    with pytest.raises(OSError, match="differ from its etag"):
        checksums.require("a", b"x", "0" * 32)
    checksums.require("a", b"x", "0" * 32)
    checksums.require("b", b"y", "0" * 32)


def test_shards_on_s3_survive_bad_minutes(faulty, bucket):
    images = {f"{number:03d}.jpg": os.urandom(300_000) for number in range(60)}
    proxy = faulty(seed=5, slow_down=0.15, truncate=0.15, reset_before=0.05)
    reader = Reader(options(proxy.endpoint))
    for kind, write in WRITERS.items():
        location = bucket.join(f"shard.{kind}")
        location.write(write(images))
        info = location.info()
        row = {"uri": info.uri, "key": info.key, "size": info.size, "etag": info.etag, "format": kind}
        assert {one.key: one.data for one in reader.members(row)} == images
    assert sum(count for name, count in proxy.counts().items() if name.startswith("fault")) > 3


def test_a_store_that_is_down_ends_the_run_and_not_its_images(bucket, s3_server, monkeypatch):
    monkeypatch.setattr(retry, "RETRY_SECONDS", 1.0)  # of the last question, whether the store is there at all
    fill(bucket, 1)
    row = list_store(bucket, Selection()).manifest.to_pylist()[0]
    reader = Reader(options("http://127.0.0.1:9"), patience=Patience(deadline=1.0))
    with pytest.raises(StoreUnavailableError, match="the store did not answer for 1 s"):
        reader.image(row)


def test_one_object_that_cannot_be_read_costs_only_itself(faulty, bucket):
    fill(bucket, 1)
    rows = list_store(bucket, Selection()).manifest.to_pylist()
    reader = Reader(bucket.options, patience=Patience(deadline=0.5))
    assert isinstance(reader.image(rows[0]), bytes)
    gone = reader.image({**rows[1], "uri": rows[1]["uri"] + "x"})
    assert gone.kind == "not_found"

    def bad() -> bytes:
        raise TimeoutError("this one hangs")

    reader._answered -= 100  # nothing else was read for a while, and what could be read still can
    assert reader._with_retries(bad, bucket).kind == "timeout"


def test_a_wrong_address_is_given_up_after_a_while(monkeypatch):
    monkeypatch.setattr(retry, "RETRY_SECONDS", 1.0)
    with pytest.raises(OSError, match="the connection failed"):
        resolve("s3://bucket/x", options("http://127.0.0.1:9")).read()


def classifying(s3_server, bundle_url: str, bucket, parts: int = 1) -> tuple[list[str], subprocess.Popen]:
    """A run in a process of its own, and its command, once its first parts are staged."""
    words = ["--images", bucket.url, "--bundle", bundle_url, "--output", f"{bucket.url}-out", "--set", "rows_per_task=20"]
    command = [TLBATCH, "classify", *words, "--json", "--set", "report=false"]
    env = {**os.environ, **environment(s3_server.endpoint)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    fs = filesystem(s3_server.endpoint)
    while sum("/staged/" in name and name.endswith(".json") for name in fs.find(f"{bucket.url}-out")) < parts:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    return command, process


@pytest.mark.sampled(1)
def test_after_a_kill_only_what_was_in_flight_is_read_again(faulty, bundle_url, bucket, s3_server):
    """Counted at the store: nothing that has a receipt is read a second time."""
    fill(bucket, 200)
    proxy = faulty()
    command, process = classifying(proxy, bundle_url, bucket, parts=12)
    process.kill()
    process.communicate()
    images = f"{bucket.url.removeprefix('s3:/')}/"

    def read() -> dict[str, int]:
        return {name.removeprefix(images): count for name, count in proxy.counts()["gets"].items() if name.startswith(images)}

    before = still(read)
    fs = filesystem(s3_server.endpoint)
    staged = [name for name in fs.find(f"{bucket.url}-out") if "/staged/" in name and name.endswith(".json")]
    keys = list_store(bucket, Selection()).manifest["key"].to_pylist()
    done = {keys[row] for name in staged for span in json.loads(fs.cat(name))["rows"] for row in range(*span)}
    assert len(done) >= 12 * 20  # a worker may still have finished what it had
    env = {**os.environ, **environment(proxy.endpoint)}
    again = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=200)
    assert again.returncode == 0, again.stderr
    report = json.loads(again.stdout)
    assert (report["listed"], report["predicted"]) == (600, 600)
    after = read()
    twice = {key for key in before if after[key] > before[key]}
    print(f"killed with {len(done)} of 600 images done and {len(before) - len(done)} in flight: {len(twice)} were read again")
    assert after.keys() == set(keys)
    assert set(before.values()) == {1}
    assert set(after.values()) <= {1, 2}
    assert not twice & done
    assert twice == before.keys() - done


def still(read):
    """What `read` gives once it does not change any more: Ray's workers outlive their driver by a moment."""
    last = None
    while last != (last := read()):
        time.sleep(3)
    return last


@pytest.mark.sampled(1)
def test_an_outage_of_half_a_minute_is_waited_out(s3_server, bundle_url, bucket):
    fill(bucket, 100)
    _, process = classifying(s3_server, bundle_url, bucket)
    s3_server.stop()
    time.sleep(30)
    s3_server.start()
    stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    report = json.loads(stdout)
    assert (report["listed"], report["predicted"]) == (300, 300)


@pytest.mark.sampled(1)
def test_a_store_that_stays_away_ends_the_run_and_the_same_command_completes_it(s3_server, bundle_url, bucket):
    fill(bucket, 100)
    command, process = classifying(s3_server, bundle_url, bucket)
    s3_server.stop()
    stopped = time.monotonic()
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 4, stderr
    assert time.monotonic() - stopped < 120, "a minute of patience, and a minute to end"
    assert "Nothing more is published. Solve the problem, then run the same command again." in stderr.splitlines()[-1]
    s3_server.start()
    done = subprocess.run(
        command, env={**os.environ, **environment(s3_server.endpoint)}, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["listed"], report["predicted"]) == (300, 300)
    runs = {name.split("/")[3] for name in filesystem(s3_server.endpoint).find(f"{bucket.url}-out/runs")}
    assert runs == {report["run_id"]}


def test_a_stopped_server_finds_its_ports_again_whatever_was_seeded():
    random.seed(0)  # as training does, in each worker of pytest
    given = set(free_ports(5))
    random.seed(0)
    assert not given & set(free_ports(5))


def test_a_bucket_that_refuses_the_credentials_and_answers_anybody_is_said_to(s3_server, monkeypatch):
    own_access = filesystem(s3_server.endpoint)
    own_access.mkdir(PUBLIC)
    own_access.pipe({f"{PUBLIC}/images/a.jpg": picture("red", 1), f"{BUCKET}/closed/a.jpg": b"x"})
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", STRANGER)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setattr(own_access.__class__, "_cache", {})  # clients that other tests made have other credentials
    url, own = f"s3://{PUBLIC}/images", options(s3_server.endpoint)
    with pytest.raises(StoreError, match=r'answers without credentials: .*\{"s3://public": \{anon: true\}\}') as raised:
        list_store(resolve(url, own), Selection())
    told = yaml.safe_load(str(raised.value).split("storage_options=")[1].rstrip("'."))
    public = resolve(url, {**own, **told})
    assert list_store(public, Selection()).manifest["key"].to_pylist() == ["a.jpg"]
    assert public.join("a.jpg").read() == picture("red", 1)
    with pytest.raises(StoreError, match="No permission") as raised:
        list_store(resolve(f"s3://{BUCKET}/closed", own), Selection())
    assert "without credentials" not in str(raised.value)


def test_views_of_an_output_in_a_bucket_are_queried_through_its_own_file_system(bucket):
    publish_images(bucket, "n0", {"a": {"score": 0.5}, "b": {"score": 0.5}})
    publish_images(bucket, "n1", {"b": {"score": 1.0}})
    query = "select key, score from predictions order by key"
    found = sql(SqlConfig(output=bucket.url, query=query, storage_options=bucket.options))
    assert found == {"columns": ["key", "score"], "rows": [["a", 0.5], ["b", 1.0]]}
