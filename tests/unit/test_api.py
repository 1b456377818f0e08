"""The public names: few, typed, documented, loaded when used."""

import inspect
import shlex
import subprocess
import sys
from typing import get_type_hints

import pytest

import tlbatch
from tlbatch.cli.main import VERBS as COMMANDS
from tlbatch.cli.main import read_command
from tlbatch.config import (
    BrowseConfig,
    CompactConfig,
    DemoConfig,
    ExportConfig,
    ExtractConfig,
    ImportConfig,
    RescoreConfig,
    ReviewConfig,
    RunConfig,
    ScheduleConfig,
    SubmitConfig,
    TrainConfig,
    load,
)
from tlbatch.output.documents import PointerDocument, Receipt, ReportDocument, RunDocument


def test_the_public_names_are_these():
    names = (
        "TlbatchError browse classify compact compare demo evaluate export_model extract gc import_model load_bundle "
        "load_report plan read_errors read_predictions rescore review rollback run schedule sql status submit sync train verify"
    )
    assert tlbatch.__all__ == names.split() == dir(tlbatch)


def test_each_is_documented_and_typed():
    for name in tlbatch.__all__:
        item = getattr(tlbatch, name)
        assert inspect.getdoc(item), name
        if inspect.isfunction(item):
            assert inspect.signature(item).return_annotation is not inspect.Signature.empty, name


def test_what_is_not_there_is_an_attribute_error():
    assert not hasattr(tlbatch, "nonsense")


def test_importing_tlbatch_imports_nothing_heavy():
    code = "import sys, tlbatch; print([n for n in ('ray', 'tensorflow', 'keras', 'openvino', 'pandas') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_worker_on_a_cpu_never_imports_tensorflow():
    code = "import sys, tlbatch.execution.actors; print([n for n in ('tensorflow', 'keras') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


VERBS = {
    "classify": RunConfig,
    "run": RunConfig,
    "plan": RunConfig,
    "extract": ExtractConfig,
    "rescore": RescoreConfig,
    "train": TrainConfig,
    "review": ReviewConfig,
    "browse": BrowseConfig,
    "compact": CompactConfig,
    "import_model": ImportConfig,
    "export_model": ExportConfig,
    "demo": DemoConfig,
}


@pytest.mark.parametrize("name", VERBS)
def test_help_knows_every_setting_of_a_verb(name):
    verb, fields = getattr(tlbatch, name), VERBS[name].model_fields
    parameters = inspect.signature(verb).parameters
    assert set(parameters) == set(fields) == set(verb.__annotations__) - {"return"}
    for field_name, field in fields.items():
        required = parameters[field_name].default is inspect.Parameter.empty
        assert required == field.is_required(), field_name
        if field.description:
            assert f"{field_name}: {field.description.split()[0]}" in inspect.getdoc(verb)


@pytest.mark.parametrize(("name", "config"), [("submit", SubmitConfig), ("schedule", ScheduleConfig)])
def test_help_knows_every_setting_of_a_verb_that_passes_a_command_on(name, config):
    parameters = inspect.signature(getattr(tlbatch, name)).parameters
    assert set(parameters) == {"command", "settings", *config.model_fields}


def test_every_command_has_a_function():
    elsewhere = {"import": "import_model", "export": "export_model", "report": "load_report"}
    assert {elsewhere.get(name, name) for name in COMMANDS} <= set(tlbatch.__all__)


def test_a_scheduled_command_is_the_one_that_the_command_line_schedules():
    settings = {"images": "my images", "bundle": ["a", "b"], "output": "100%", "incremental": True}
    line = tlbatch.schedule(target="cron", at="0 2 * * *", command="classify", settings=settings).splitlines()[-1]
    words = shlex.split(line.replace(r"\%", "%").split(" && ", 1)[1], comments=True)
    verb, scheduled = read_command(words[3:-3])  # between `python -m tlbatch` and `>> FILE.log 2>&1`
    assert (verb, scheduled) == ("classify", load(RunConfig, settings))


@pytest.mark.parametrize("verb", [tlbatch.submit, tlbatch.schedule])
def test_a_setting_of_the_passed_command_is_checked_here(verb):
    own = {"address": "http://127.0.0.1:9"} if verb is tlbatch.submit else {"target": "cron", "at": "0 2 * * *"}
    with pytest.raises(tlbatch.TlbatchError, match="output"):
        verb(command="classify", settings={"images": "a", "bundle": "b"}, **own)
    with pytest.raises(tlbatch.TlbatchError, match="command"):
        verb(command="verify", settings={}, **own)


def test_a_verb_takes_its_settings_by_name():
    with pytest.raises(TypeError, match="by name"):
        tlbatch.classify("images")


@pytest.mark.parametrize("document", [RunDocument, ReportDocument, Receipt, PointerDocument])
def test_documents_are_typed(document):
    assert get_type_hints(document)
