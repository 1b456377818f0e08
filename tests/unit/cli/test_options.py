"""Every field of a verb's configuration is a flag, and the field's description is its help."""

import pytest
import typer

from tlbatch.cli.main import VERBS, app, read_command
from tlbatch.errors import ConfigError

#: Set in a file or with --set.
WITHOUT_FLAG = {"storage_options", "other_bundles", "predictions"}


def commands():
    return typer.main.get_command(app).commands


@pytest.mark.parametrize("name", VERBS)
def test_every_field_is_a_flag_with_its_description(name):
    verb = VERBS[name]
    parameters = {parameter.name: parameter for parameter in commands()[name].params}
    fixed = {"features", "predictions"} if name == "extract" else set()
    wanted = {field for field in verb.config.model_fields if field not in WITHOUT_FLAG | fixed}
    assert wanted <= set(parameters)
    assert set(parameters) - wanted <= {"config_file", "assignments", "as_json", "verbose", "help"}
    for field in wanted:
        assert parameters[field].help.startswith(verb.config.model_fields[field].description), field


def test_verbs_are_in_four_groups():
    assert {verb.group for verb in VERBS.values()} == {"Train", "Run", "Look", "Keep house"}
    assert list(commands()) == list(VERBS)


def test_flags_become_checked_settings():
    words = [
        "classify",
        "--images",
        "a",
        "--bundle",
        "one",
        "--bundle",
        "two",
        "--output",
        "c",
        "--features",
        "--no-report",
        "--include",
        "*.jpg",
        "--top-k",
        "3",
    ]
    name, settings = read_command(words)
    assert name == "classify"
    assert (settings.bundle, settings.other_bundles) == ("one", ("two",))
    assert (settings.features, settings.report, settings.incremental, settings.top_k) == (True, False, False, 3)
    assert settings.include == ("*.jpg",)


def test_a_flag_that_is_not_given_leaves_the_file_alone(tmp_path):
    (tmp_path / "run.yaml").write_text("images: a\nbundle: b\noutput: c\nfeatures: true\nreport: false\ntop_k: 2\n")
    _, settings = read_command(["classify", "--config", str(tmp_path / "run.yaml"), "--top-k", "4"])
    assert (settings.features, settings.report, settings.top_k) == (True, False, 4)


def test_a_command_inside_another_is_read_and_not_carried_out():
    words = ["submit", "--address", "http://head:8265", "classify", "--images", "a", "--bundle", "b", "--output", "c"]
    name, settings = read_command(words)
    assert (name, settings.output) == ("classify", "c"), "of the job"
    with pytest.raises(ConfigError, match="cannot be submitted or scheduled"):
        read_command(["demo"])
    with pytest.raises(ConfigError, match="Write the command behind the flags"):
        read_command([])
