"""Flags, YAML and --set become one checked configuration, or one sentence."""

import pytest
from pydantic import BaseModel

from tlbatch import config as configs
from tlbatch.config import Resources, RunConfig, Spec, TrainConfig, load
from tlbatch.errors import ConfigError

NEEDED = {"images": "/data", "bundle": "/model", "output": "/out"}


def test_later_sources_win(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("images: /yaml\nbatch_size: 8\ntop_k: 2\nrows_per_task: 64\n")
    found = load(RunConfig, {**NEEDED, "images": None, "top_k": 3}, file, ["rows_per_task=128", "include=['*.jpg']"])
    assert (found.images, found.batch_size, found.top_k, found.rows_per_task) == ("/yaml", 8, 3, 128)
    assert found.include == ("*.jpg",)


def test_the_name_of_a_way_to_find_credentials_is_no_secret():
    options = load(RunConfig, NEEDED, None, ["storage_options={'gs://open': {token: anon}}"]).storage_options
    assert options == {"gs://open": {"token": "anon"}}


@pytest.mark.parametrize("options", ["{client_kwargs: {aws_secret_access_key: HUNTER2}}", "{token: HUNTER2}"])
def test_a_secret_is_refused_at_any_depth_and_never_repeated(options):
    with pytest.raises(ConfigError) as caught:
        load(RunConfig, NEEDED, None, [f"storage_options={options}"])
    assert "is a credential" in str(caught.value)
    assert "HUNTER2" not in str(caught.value)


def test_one_pattern_needs_no_list():
    assert load(RunConfig, NEEDED, None, ["include=*.jpg"]).include == ("*.jpg",)


@pytest.mark.parametrize(
    ("flags", "assignments", "sentence"),
    [
        ({**NEEDED, "batchsize": 3}, [], "There is no configuration key 'batchsize'; did you mean 'batch_size'?"),
        ({"images": "/data"}, [], "bundle is missing: give --bundle"),
        (NEEDED, ["batch_size=0"], "batch_size: Input should be greater than or equal to 1; found 0."),
        (NEEDED, ["max_failed_ratio=2"], "max_failed_ratio: Input should be less than or equal to 1"),
        (NEEDED, ["top_k"], "--set top_k: write --set key=value."),
        (NEEDED, ["storage_options={key: AKIA}"], "storage_options: key is a credential"),
        (NEEDED, ["num_gpus=1.5"], "num_gpus: write a fraction of one GPU or a whole number of them"),
        (NEEDED, ["run_id=../x"], "run_id: String should match pattern"),
    ],
)
def test_a_mistake_gets_one_sentence(flags, assignments, sentence):
    with pytest.raises(ConfigError) as caught:
        load(RunConfig, flags, None, assignments)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "sentence"), [("- a\n- b", "found a list"), ("a: [", "is not YAML")])
def test_a_broken_file_is_named(tmp_path, text, sentence):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        load(RunConfig, NEEDED, file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load(RunConfig, NEEDED, tmp_path / "none.yaml")


def test_spec_and_resources_share_no_field_and_are_all_of_a_run():
    spec, resources = set(Spec.model_fields), set(Resources.model_fields)
    assert not spec & resources
    assert set(RunConfig.model_fields) - spec - resources == {
        "output",
        "other_bundles",
        "max_failed_ratio",
        "run_id",
        "promote_if",
        "notify",
        "mlflow_uri",
        "sync",
        "report",
        "incremental",
        "max_deleted_ratio",
        "allow_deletes",
        "stale",
    }


def test_every_field_says_what_it_is():
    for kind in (RunConfig, TrainConfig, configs.ExtractConfig):
        for name, field in kind.model_fields.items():
            assert field.description or name in ("predictions", "features"), f"{kind.__name__}.{name}"


def test_a_split_that_leaves_nothing_is_refused():
    with pytest.raises(ConfigError, match="leave nothing to train on"):
        load(TrainConfig, {"images": "/data", "bundle": "/model"}, None, ["validation=0.5", "test=0.5"])


@pytest.mark.parametrize("given", ["max_images=3", "max_pixels=9", "format=tar", "exclude=a"])
def test_a_setting_of_images_is_refused_where_none_is_read(given):
    needed = {"features": "/features", "labels": "labels.csv", "bundle": "/model"}
    with pytest.raises(ConfigError, match=f"{given.partition('=')[0]}: with features no image is read"):
        load(TrainConfig, needed, None, [given])


def test_configurations_are_frozen():
    found = load(RunConfig, NEEDED)
    assert isinstance(found, BaseModel)
    with pytest.raises(Exception, match="frozen"):
        found.images = "/elsewhere"


def test_options_of_one_bucket_and_the_name_of_a_key_are_no_secrets():
    kms = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "arn:aws:kms:us-east-1:1:key/ab", "BucketKeyEnabled": True}
    options = {"s3_additional_kwargs": kms, "s3://keys-and-tokens": {"anon": True}}
    assert load(RunConfig, {**NEEDED, "storage_options": options}).storage_options == options
    for wrong in ({"s3://b": {"secret": "x"}}, {"s3_additional_kwargs": {"SSECustomerKey": "x"}}, {"s3://b": True}):
        with pytest.raises(ConfigError, match=r"is a credential|of one address"):
            load(RunConfig, {**NEEDED, "storage_options": wrong})
