"""The public names: few, typed, documented, loaded when used."""

import inspect
import subprocess
import sys
from typing import get_type_hints

import pytest

import tlbatch
from tlbatch.config import (
    CompactConfig,
    ExportConfig,
    ExtractConfig,
    ImportConfig,
    RescoreConfig,
    ReviewConfig,
    RunConfig,
    TrainConfig,
)
from tlbatch.output.documents import PointerDocument, Receipt, ReportDocument, RunDocument


def test_the_public_names_are_these():
    names = (
        "TlbatchError classify compact compare evaluate export_model extract gc import_model load_bundle load_report plan "
        "read_errors read_predictions rescore review rollback run status train verify"
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
    "compact": CompactConfig,
    "import_model": ImportConfig,
    "export_model": ExportConfig,
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


def test_a_verb_takes_its_settings_by_name():
    with pytest.raises(TypeError, match="by name"):
        tlbatch.classify("images")


@pytest.mark.parametrize("document", [RunDocument, ReportDocument, Receipt, PointerDocument])
def test_documents_are_typed(document):
    assert get_type_hints(document)
