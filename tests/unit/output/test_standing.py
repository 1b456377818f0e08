"""Failures are measured against the table as it stands, and what failed before for the same reason is not new."""

import pyarrow as pa
import pytest
from support.tables import publish_run

from tlbatch import schema
from tlbatch.errors import OutputError
from tlbatch.output.run import begin_run, read_output, read_pointer
from tlbatch.output.standing import failures_after, too_many_failed
from tlbatch.storage.resolve import resolve


def rows_of(keys, table, **columns):
    rows = [{"uri": f"/s/{key}", "key": key, **{name: value.get(key) for name, value in columns.items()}} for key in keys]
    return pa.Table.from_pylist(rows, table)


def publish(output, name, keys, failed, *, counts=None, unreadable=(), images=None, alone=False):
    """A published run of objects, some of which failed; `images` are the keys of predicted images, if objects are shards.

    If it stands `alone`, it replaces the table, because everything had to be done again.
    """
    before = read_output(output).table
    on = () if alone else read_pointer(output)
    facts = {"spec": {"images": "/s", "predictions": True}, "bundle": "b", "base": "b", "unreadable": list(unreadable)}
    manifest = rows_of(keys, schema.MANIFEST_SCHEMA, format=dict.fromkeys(keys, "image"))
    run = begin_run(output, name, manifest, facts | ({"counts": counts} if counts else {}), on=on)
    errors = rows_of(failed, schema.ERRORS, kind=failed)
    predicted = [key for key in (images or keys) if key not in failed]
    run.location.join("errors", "part-00000.parquet").write(schema.to_parquet(errors))
    run.location.join("predictions", "part-00000.parquet").write(schema.to_parquet(rows_of(predicted, schema.PREDICTIONS)))
    report = {"listed": len(predicted) + len(failed), "objects": len(keys), "failed": len(failed), "predicted": len(predicted)}
    report |= {"failed_by_kind": {}, "labels": {}, "files": {}, "manifest_sha256": run.facts["manifest_sha256"]}
    publish_run(output, run, report | {"failed_transient": 0})
    state = read_output(output)
    return failures_after(before, state.by_id[name], report["listed"], report["failed"]) if before else report


def test_the_table_counts_and_old_failures_are_not_new(tmp_path):
    output = resolve(str(tmp_path))
    publish(output, "n0", "abcdefghij", {"a": "access_denied", "b": "truncated", "c": "timeout"})
    counts = {"new": 1, "changed": 0, "retry": 2, "stale": 0, "unchanged": 8, "deleted": 0}
    found = publish(output, "n1", "ack", {"a": "access_denied", "c": "truncated"}, counts=counts)
    assert found == {"table": {"listed": 11, "failed": 3}, "failed_new": 1}
    counts = {"new": 0, "changed": 1, "retry": 0, "stale": 0, "unchanged": 10, "deleted": 0}
    assert publish(output, "n2", "d", {}, counts=counts) == {}


def test_a_night_that_does_everything_again_has_the_failures_of_the_table_it_replaces(tmp_path):
    """As if all objects were in an archive: nothing of the old table stays."""
    output = resolve(str(tmp_path))
    publish(output, "n0", "ab", {"a": "archived", "b": "archived"})
    counts = {"new": 0, "changed": 0, "retry": 2, "stale": 0, "unchanged": 0, "deleted": 0}
    found = publish(output, "n1", "ab", {"a": "archived", "b": "archived"}, counts=counts, alone=True)
    assert found == {"table": {"listed": 2, "failed": 2}, "failed_new": 0}
    found = publish(output, "n2", "abc", {"a": "truncated", "b": "archived"}, counts={**counts, "new": 1}, alone=True)
    assert found == {"table": {"listed": 3, "failed": 2}, "failed_new": 1}


def test_images_in_shards_are_counted_in_the_table(tmp_path):
    output = resolve(str(tmp_path))
    publish(output, "n0", "ab", {}, images="aaaabbb")
    counts = {"new": 1, "changed": 1, "retry": 0, "stale": 0, "unchanged": 1, "deleted": 0}
    found = publish(output, "n1", "bc", {"c": "truncated"}, counts=counts, images="bb")
    assert found == {"table": {"listed": 4 + 2 + 1, "failed": 1}, "failed_new": 1}


def test_a_closed_folder_is_new_once(tmp_path):
    output = resolve(str(tmp_path))
    publish(output, "n0", "ab", {})
    counts = {"new": 1, "changed": 0, "retry": 0, "stale": 0, "unchanged": 2, "deleted": 0}
    found = publish(output, "n1", "c", {}, counts=counts, unreadable=["x/"])
    assert found == {"unreadable_new": 1, "table": {"listed": 3, "failed": 0}, "failed_new": 0}
    found = publish(output, "n2", "d", {}, counts={**counts, "unchanged": 3}, unreadable=["x/"])
    assert found["unreadable_new"] == 0


@pytest.mark.parametrize(
    ("report", "sentence"),
    [
        ({"listed": 100, "failed": 1}, None),
        (
            {"listed": 100, "failed": 2},
            "2 of 100 images failed, more than max_failed_ratio=0.01 allows; the table is published",
        ),
        ({"listed": 100, "failed": 2, "already_done": True}, None),
        ({"listed": 3, "failed": 3, "failed_new": 3, "table": {"listed": 1000, "failed": 3}}, None),
        ({"listed": 3, "failed": 3, "failed_new": 0, "table": {"listed": 100, "failed": 50}}, None),
        (
            {"listed": 3, "failed": 3, "failed_new": 1, "table": {"listed": 100, "failed": 50}},
            "3 of 3 images failed, 1 of them newly; of the whole table 50 of 100, more than",
        ),
        ({"listed": 9, "failed": 0, "unreadable": ["x/"]}, "0 of 9 images failed and 1 folder could not be opened, more than"),
        ({"listed": 999, "failed": 0, "unreadable": ["x/"]}, None),
    ],
)
def test_when_too_many_failed(report, sentence):
    found = too_many_failed(report, 0.01)
    assert found is None if sentence is None else found.startswith(sentence)


@pytest.mark.parametrize("name", [schema.LATEST, f"{schema.RUNS}/n0/{schema.RUN}"])
def test_what_a_newer_version_wrote_is_refused_in_a_sentence(tmp_path, name):
    output = resolve(str(tmp_path))
    publish(output, "n0", "ab", {})
    path = tmp_path / name
    body = schema.unseal(path.read_bytes())
    path.write_bytes(schema.seal({**body, "schema_version": schema.SCHEMA_VERSION + 1}))
    with pytest.raises(OutputError, match=r"was written by a newer tlbatch \(schema version \d+, and this one knows up to"):
        read_output(output)
