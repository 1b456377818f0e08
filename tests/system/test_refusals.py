"""Objects that a store refuses are rows: what can be read is predicted, and no night repeats what cannot change."""

import json

import pytest
from support.command import run_cli
from support.pictures import COLORS, encoded, noisy
from support.s3_server import BUCKET, HALF, HALF_OPEN, environment, filesystem, options
from support.shards import tar_of

import tlbatch
from tlbatch.output.standing import too_many_failed


def picture(number: int) -> bytes:
    return encoded(noisy(COLORS["red"], number))


@pytest.fixture
def archive(moto, monkeypatch, request):
    """Puts objects of storage classes into a bucket of its own; gives its name and a client."""
    import botocore.session

    for name, value in environment(moto).items():
        monkeypatch.setenv(name, value)
    client = botocore.session.get_session().create_client("s3")
    name = f"archive-{abs(hash(request.node.name))}"
    client.create_bucket(Bucket=name)

    def put(key: str, data: bytes, kind: str = "STANDARD") -> None:
        client.put_object(Bucket=name, Key=key, Body=data, StorageClass=kind)

    return name, client, put


@pytest.mark.sampled(1)
def test_archived_objects_are_rows_and_restored_ones_are_done_by_the_next_night(
    archive, moto_asked, bundle_url, ray_here, tmp_path
):
    name, client, put = archive
    for number in range(40):  # more than the refusals after which a store would count as failing
        put(f"2019/{number:03d}.png", picture(number), "DEEP_ARCHIVE" if number % 4 else "GLACIER")
    for number in range(6):
        put(f"2024/{number:03d}.png", picture(number), "GLACIER_IR" if number % 2 else "STANDARD")
    put("old.tar", tar_of({"1.png": picture(1)}), "GLACIER")
    put("new.tar", tar_of({"2.png": picture(2)}))
    settings = {"images": f"s3://{name}", "bundle": bundle_url, "output": str(tmp_path / "out"), "incremental": True}
    settings["storage_options"] = options(moto_asked[0])
    first = tlbatch.classify(**settings)
    assert (first["predicted"], first["failed_by_kind"], first["failed_transient"]) == (7, {"archived": 41}, 0)
    assert [path for how, path in moto_asked[1] if how == "GET" and path.startswith(f"/{name}/2019/")] == []
    errors = tlbatch.read_errors(settings["output"])
    assert errors["message"].str.contains("in an archive; restore it first").all()
    assert too_many_failed(first, 0.01)
    second = tlbatch.classify(**settings)
    assert second["already_done"]
    assert too_many_failed(second, 0.01) is None
    client.restore_object(Bucket=name, Key="2019/007.png", RestoreRequest={"Days": 2})
    client.restore_object(Bucket=name, Key="old.tar", RestoreRequest={"Days": 2})
    third = tlbatch.classify(**settings)
    assert (third["counts"]["changed"], third["predicted"], third["failed"]) == (2, 2, 0)
    client.copy_object(Bucket=name, Key="2024/000.png", CopySource=f"{name}/2024/000.png", StorageClass="GLACIER")
    assert tlbatch.classify(**settings)["already_done"], "what was predicted before it was archived stays"
    assert len(tlbatch.read_predictions(settings["output"])) == 9
    assert tlbatch.verify(settings["output"])["ok"]


@pytest.mark.sampled(1)
def test_an_archive_that_only_a_request_finds_is_tried_each_night_and_ends_with_3_once(
    archive, moto, bundle_url, ray_here, tmp_path
):
    """As an archive tier of INTELLIGENT_TIERING: a list of addresses has no storage classes either."""
    name, client, put = archive
    for number in range(4):
        put(f"{number}.png", picture(number), "GLACIER" if number < 2 else "STANDARD")
    (tmp_path / "list.csv").write_text("uri\n" + "".join(f"s3://{name}/{number}.png\n" for number in range(4)))
    settings = {
        "images": str(tmp_path / "list.csv"),
        "bundle": bundle_url,
        "output": str(tmp_path / "out"),
        "incremental": True,
    }
    settings["storage_options"] = options(moto)
    first = tlbatch.classify(**settings)
    assert first["failed_by_kind"] == {"archived": 2}
    assert too_many_failed(first, 0.01)
    second = tlbatch.classify(**settings)
    assert (second["failed"], second["failed_new"], second["table"]) == (2, 0, {"listed": 4, "failed": 2})
    assert too_many_failed(second, 0.01) is None
    client.restore_object(Bucket=name, Key="0.png", RestoreRequest={"Days": 2})
    third = tlbatch.classify(**settings)
    assert (third["predicted"], third["failed"]) == (1, 1)
    (tmp_path / "list.csv").write_text(f"uri\ns3://{name}/1.png\n")  # nothing else: all there is to do fails each night
    settings |= {"output": str(tmp_path / "alone")}
    nights = [tlbatch.classify(**settings) for _ in range(2)]
    assert [too_many_failed(night, 0.01) is None for night in nights] == [False, True]


@pytest.mark.sampled(1)
def test_a_prefix_that_may_not_be_read_costs_only_its_own_rows(s3_server, bundle_url, tmp_path):
    """The closed folders come first and last, and each has more objects than a reader is refused before it looks elsewhere."""
    fs, root = filesystem(s3_server.endpoint), f"{BUCKET}/{HALF_OPEN.rsplit('/', 1)[0]}"
    fs.pipe({f"{root}/{folder}/{number:03d}.png": picture(number) for folder in ("a", "open", "z") for number in range(40)})
    words = [
        "classify",
        "--images",
        f"s3://{root}",
        "--bundle",
        bundle_url,
        "--output",
        tmp_path / "out",
        "--incremental",
        "--json",
    ]
    env = environment(s3_server.endpoint, HALF)
    done = run_cli(*words, "--set", "report=false", **env)
    assert done.returncode == 3, done.stderr
    report = json.loads(done.stdout)
    assert (report["predicted"], report["failed_by_kind"]) == (40, {"access_denied": 80})
    fs.pipe(f"{root}/a/999.png", picture(1))  # tonight everything to do is closed, and one image of it is new
    done = run_cli(*words, "--set", "report=false", **env)
    assert done.returncode == 3, done.stderr
    assert [json.loads(done.stdout)[name] for name in ("failed", "failed_new")] == [81, 1]
    assert "81 of 81 images failed, 1 of them newly; of the whole table 81 of 121" in done.stderr
