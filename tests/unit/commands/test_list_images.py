"""The store of a configuration is listed with its settings, and a setting that does nothing there is refused."""

import pytest

from tlbatch.commands.list_images import list_images, run_input
from tlbatch.config import RunConfig
from tlbatch.errors import ConfigError
from tlbatch.storage.resolve import resolve


@pytest.fixture
def store(tmp_path):
    for name in ("a/1.jpg", "a/@eaDir/1.jpg", "b/2.jpg"):
        (tmp_path / "store" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "store" / name).write_bytes(b"x")
    return tmp_path / "store"


def listing(store, **settings):
    config = RunConfig(images=str(store), bundle="b", output=str(store / "out"), **settings)
    return list_images(config, resolve(config.output))


def test_a_field_of_shards_is_refused_if_there_are_none(store):
    with pytest.raises(ConfigError, match=r"image_field: .* has no shards, only loose images"):
        listing(store, image_field="jpg")
    (store / "a.tar").write_bytes(b"x")
    assert listing(store, image_field="jpg").manifest.num_rows == 3


def test_what_was_skipped_goes_into_the_documents_of_a_run(store):
    given = run_input(listing(store, exclude=["b/"]))
    assert given.skipped_facts == {"skipped_by_kind": {"@eaDir": 1, "excluded": 1}}
    assert given.skipped == 2
