"""The exception tree and its exit codes are a contract."""

import inspect
import re

import pytest
from support.paths import ROOT

from tlbatch import errors
from tlbatch.errors import TRANSIENT_KINDS, ErrorKind, Failure, TlbatchError, UnfinishedError, UsageError, closest


def test_every_exception_is_in_the_one_tree_and_in_its_drawing():
    found = [item for _, item in inspect.getmembers(errors, inspect.isclass) if issubclass(item, Exception)]
    ours = [item for item in found if issubclass(item, TlbatchError)]
    assert all(item.__name__ in errors.__doc__ for item in ours)
    # The others are storage errors for which Python has no OSError class.
    others = {item.__name__ for item in found if item not in ours}
    assert others == {"ThrottledError", "RefusedError", "NoRangesError", "ChangedError", "CredentialsError", "ArchivedError"}
    assert all(issubclass(item, OSError) for item in found if item not in ours)


def test_the_earlier_name_of_counts_error_is_an_alias():
    assert errors.BooksError is errors.CountsError
    assert "`BooksError` is an alias" in errors.__doc__


@pytest.mark.parametrize(("kind", "code"), [(TlbatchError, 1), (errors.CountsError, 1), (UsageError, 2), (UnfinishedError, 4)])
def test_exit_codes(kind, code):
    assert kind.exit_code == code
    assert all(child.exit_code == code for child in kind.__subclasses__() if kind is not TlbatchError)


def test_kinds_are_the_closed_set_of_the_design():
    named = "not_found access_denied throttled timeout read_failed changed empty not_an_image truncated unsupported too_large"
    assert [str(kind) for kind in ErrorKind] == [*named.split(), "decode_failed", "predict_failed", "worker_lost", "archived"]


def test_bad_bytes_are_not_tried_again_and_bad_networks_are():
    assert Failure("read", ErrorKind.TIMEOUT, "").transient
    assert not Failure("decode", ErrorKind.TRUNCATED, "").transient
    assert ErrorKind.EMPTY not in TRANSIENT_KINDS


def test_closest_suggests_only_what_is_near():
    assert closest("MobilNetV2", ["MobileNetV2", "VGG16"]) == "; did you mean 'MobileNetV2'?"
    assert closest("zebra", ["MobileNetV2", "VGG16"]) == ""


def test_every_kind_says_what_to_do():
    for kind in ErrorKind:
        assert kind.advice.endswith("."), kind


def test_the_documentation_says_of_each_kind_when_it_is_tried_again():
    page = (ROOT / "docs" / "operations.md").read_text().split("| kind | tried again |")[1].split("\n\n")[0]
    rows = [re.findall(r"`([a-z_]+)`", line.split("|")[1]) for line in page.splitlines() if line.startswith("| `")]
    assert sorted(kind for row in rows for kind in row) == sorted(ErrorKind)
    assert set(rows[0]) == TRANSIENT_KINDS
