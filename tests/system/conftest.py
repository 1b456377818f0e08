"""Tests of whole commands are about their bookkeeping: a tiny bundle will do, unless they train one."""

import pytest


@pytest.fixture(scope="session")
def bundle_url(tiny_url: str) -> str:
    """A bundle that tells the three colors apart and loads at once (`support/tiny.py`)."""
    return tiny_url
