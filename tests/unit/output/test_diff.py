"""What an incremental run has to do: a listing and a table sorted into new, changed, retry, stale, deleted and unchanged."""

from __future__ import annotations

import json
import re

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import ROOT
from support.tables import publish_run

from tlbatch import schema
from tlbatch.errors import CountsError, ErrorKind
from tlbatch.output import diff, ranges, run
from tlbatch.output.commit import RunInput
from tlbatch.output.diff import KINDS, StalenessRule, diff_with_table
from tlbatch.output.run import begin_run, read_output, read_pointer, read_table_runs
from tlbatch.output.snapshot import snapshot
from tlbatch.storage.resolve import resolve

BUNDLE = StalenessRule("bundle", "b1")


def manifest(**versions: str | None) -> pa.Table:
    """Objects named by their keys, each in a version."""
    rows = [{"uri": f"/s/{key}", "key": key, "size": 1, "etag": etag, "format": "image"} for key, etag in versions.items()]
    return pa.Table.from_pylist(sorted(rows, key=lambda row: row["key"]), schema.MANIFEST_SCHEMA)


def publish_table(output, name: str, rows: pa.Table, *, bundle="b1", failed=(), removed=(), on=None, kind="timeout") -> None:
    """A published run, with its manifest and errors and nothing else; it adds to what is published unless told otherwise."""
    on = read_pointer(output) if on is None else on
    gone = pa.Table.from_pylist([{"uri": f"/s/{key}", "key": key} for key in removed], schema.REMOVED_SCHEMA)
    facts = {"spec": {"images": "/s"}, "bundle": bundle, "base": "base"}
    run = begin_run(output, name, rows, facts, on=on, removed=gone)
    errors = [{"uri": f"/s/{key}", "key": key, "transient": transient, "kind": kind} for key, transient in failed]
    table = pa.Table.from_pylist(errors, schema.ERRORS)
    run.location.join("errors", "part-00000.parquet").write(schema.to_parquet(table))
    report = {"listed": 0, "predicted": 0, "failed": 0, "failed_by_kind": {kind: len(failed)}, "labels": {}, "files": {}}
    report |= {"manifest_sha256": run.facts["manifest_sha256"], "failed_transient": sum(again for _, again in failed)}
    publish_run(output, run, report)


def increment(output, listed: pa.Table, rule=BUNDLE, stale="redo") -> RunInput:
    return diff_with_table(RunInput(listed, 0, 0.0), read_output(output), rule, stale)


def test_each_object_is_one_of_six_things(tmp_path):
    output = resolve(str(tmp_path))
    rows = manifest(a="1", b="1", c="1", d="1", e="1")
    publish_table(output, "n0", rows, failed=[("c", True), ("d", False)], kind="truncated")
    found = increment(output, manifest(a="1", b="2", c="1", d="1", f="1"))
    assert found.counts == {"new": 1, "changed": 1, "retry": 1, "stale": 0, "unchanged": 2, "deleted": 1}
    assert found.manifest["key"].to_pylist() == ["b", "c", "f"]
    assert found.removed.to_pylist() == [{"uri": "/s/e", "key": "e"}]
    assert [entry["run_id"] for entry in found.on] == ["n0"]


def test_what_another_bundle_predicted_is_stale_whatever_becomes_of_it(tmp_path):
    output = resolve(str(tmp_path))
    publish_table(output, "n0", manifest(a="1", b="1"))
    publish_table(output, "n1", manifest(c="1"), bundle="b2")
    listed = manifest(a="1", b="1", c="1")
    for policy, todo in (("keep", []), ("redo", ["c"]), ("rescore", ["c"])):
        found = increment(output, listed, stale=policy)
        assert found.counts["stale"] == 1
        assert found.manifest["key"].to_pylist() == todo
    assert increment(output, listed, StalenessRule("base", "base")).nothing_to_do, "its features are not stale"
    assert increment(output, listed, StalenessRule("bundle", "b3")).on == (), "nothing of the old table is left"


def test_the_newest_run_that_has_an_object_counts(tmp_path):
    output = resolve(str(tmp_path))
    publish_table(output, "n0", manifest(a="1", b="1", c="1"), failed=[("a", True)])
    publish_table(output, "n1", manifest(a="2"), removed=["b"])
    assert increment(output, manifest(a="2", c="1")).nothing_to_do
    assert increment(output, manifest(a="1", c="1")).counts["changed"] == 1
    assert increment(output, manifest(a="2", b="1", c="1")).counts["new"] == 1, "it was deleted and is there again"


def test_an_object_that_was_listed_under_two_keys_is_done_as_a_whole(tmp_path):
    """One uri is one run's: were one of its keys dropped, or another added, by itself, the other would be hidden or stay."""
    output = resolve(str(tmp_path))
    two = pa.Table.from_pylist(
        [{"uri": "/s/a", "key": key, "size": 1, "etag": "1", "format": "image"} for key in ("x", "y")], schema.MANIFEST_SCHEMA
    )
    publish_table(output, "n0", pa.concat_tables([manifest(b="1"), two]))
    less = increment(output, pa.concat_tables([manifest(b="1"), two.slice(0, 1)]))
    assert (less.manifest["key"].to_pylist(), less.removed.num_rows) == (["x"], 0)
    third = pa.Table.from_pylist(
        [{"uri": "/s/a", "key": "z", "size": 1, "etag": "1", "format": "image"}], schema.MANIFEST_SCHEMA
    )
    assert increment(output, pa.concat_tables([manifest(b="1"), two, third])).manifest["key"].to_pylist() == ["x", "y", "z"]


def test_an_object_that_was_listed_twice_counts_once(tmp_path):
    output = resolve(str(tmp_path))
    twice = manifest(a="1", b="1").take([0, 0, 1])
    publish_table(output, "n0", twice)
    assert increment(output, twice).nothing_to_do
    gone = increment(output, manifest(b="1"))
    assert (gone.removed["key"].to_pylist(), gone.rows) == (["a"], (1, 2))
    assert increment(output, manifest(c="1")).on == (), "nothing of the old table is left"


def test_a_large_run_says_where_its_keys_can_be_cut(tmp_path, monkeypatch):
    output = resolve(str(tmp_path))
    publish_table(output, "n0", manifest(**{f"{number:02d}": "1" for number in range(20)}))
    assert read_output(output).bounds == []
    monkeypatch.setattr(schema, "ROWS_OF_GROUP", 6)
    publish_table(output, "n1", manifest(**{f"{number:02d}": "1" for number in range(20)}), on=())
    publish_table(output, "n2", manifest(a="1"))
    assert read_output(output).bounds == ["06", "12", "18"]
    monkeypatch.setattr(run, "_MOST_BOUNDS", 2)
    publish_table(output, "n3", manifest(**{f"{number:02d}": "1" for number in range(20)}), on=())
    assert read_output(output).bounds == ["10"]


def test_each_kind_of_failure_is_tried_again_as_the_docs_say(tmp_path):
    """In the second run, with the same listing and the same versions of everything."""
    table = (ROOT / "docs" / "operations.md").read_text().partition("| kind | tried again |")[2].partition("\n\n")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| `")]
    said = {kind: when for kinds, when in rows for kind in re.findall(r"`(\w+)`", kinds)}
    assert set(said) == set(map(str, ErrorKind))
    for kind in ErrorKind:
        output = resolve(str(tmp_path / kind))
        publish_table(output, "n0", manifest(a="1"), failed=[("a", False)], kind=str(kind))
        tried = increment(output, manifest(a="1")).counts["retry"] == 1
        assert tried == ("in every run" in said[kind]), kind


def test_a_larger_limit_or_another_reader_tries_again_what_that_may_help(tmp_path):
    output = resolve(str(tmp_path / "large"))
    publish_table(output, "n0", manifest(a="1"), failed=[("a", False)], kind="too_large")
    same, larger = (BUNDLE._replace(limits={"max_pixels": most, "max_side": 65_535}) for most in (100_000_000, 100_000_001))
    assert increment(output, manifest(a="1"), same).nothing_to_do
    assert increment(output, manifest(a="1"), larger).counts["retry"] == 1
    output = resolve(str(tmp_path / "unsupported"))
    publish_table(output, "n0", manifest(a="1"), failed=[("a", False)], kind="unsupported")
    assert increment(output, manifest(a="1")).nothing_to_do
    assert increment(output, manifest(a="1"), BUNDLE._replace(readers={"pillow-heif": "1.0"})).counts["retry"] == 1


def test_without_sizes_and_etags_nothing_is_known_to_have_changed(tmp_path):
    output = resolve(str(tmp_path))
    listed = manifest(a=None, b=None)
    publish_table(output, "n0", listed)
    assert increment(output, listed).nothing_to_do


STORES = st.lists(st.dictionaries(st.sampled_from("abcdef"), st.sampled_from("123"), min_size=1), min_size=1, max_size=6)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(stores=STORES, piece=st.sampled_from([1, 2, 65_536]))
def test_after_any_nights_the_table_is_the_store(tmp_path_factory, stores, piece):
    """What the runs promise, without what newer ones hide, is what the last listing held; no night does more than it must."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "ROWS_AT_ONCE", piece)
        nights(resolve(str(tmp_path_factory.mktemp("runs"))), stores)


def nights(output, stores) -> None:
    """A night for each store, and what must be true after it."""
    before: dict[str, str] = {}
    for number, store in enumerate(stores):
        found = increment(output, manifest(**store))
        assert set(found.manifest["key"].to_pylist()) == {key for key, version in store.items() if before.get(key) != version}
        assert sum(found.counts[kind] for kind in KINDS if kind != "deleted") == len(store)
        if not found.nothing_to_do:
            publish_table(output, f"n{number}", found.manifest, removed=found.removed["key"].to_pylist(), on=found.on)
        runs = snapshot(read_table_runs(output))
        table = pa.concat_tables(one.current_rows(one.run.manifest) for one in runs).sort_by("key")
        assert table.equals(manifest(**store))
        before = store


def test_a_table_that_changed_meanwhile_is_not_added_to(tmp_path):
    output = resolve(str(tmp_path))
    publish_table(output, "n0", manifest(a="1"))
    on = read_pointer(output)
    publish_table(output, "n1", manifest(b="1"))
    facts = {"spec": {"images": "/s"}, "bundle": "b1", "base": "base"}
    run = begin_run(output, "late", manifest(c="1"), facts, on=on)
    before = json.loads(output.join("latest.json").read())
    report = {"listed": 0, "predicted": 0, "failed": 0, "failed_by_kind": {}, "labels": {}, "files": {}, "manifest_sha256": ""}
    with pytest.raises(CountsError, match="no longer the one that run late adds to"):
        publish_run(output, run, report)
    assert json.loads(output.join("latest.json").read()) == before
    assert [entry["run_id"] for entry in before["runs"]] == ["n0", "n1"]


def in_format(table: pa.Table, **formats: str) -> pa.Table:
    """A manifest in which some objects have another format."""
    column = [formats.get(key, kind) for key, kind in zip(table["key"].to_pylist(), table["format"].to_pylist(), strict=True)]
    return table.set_column(4, schema.MANIFEST_SCHEMA.field("format"), pa.array(column))


def test_what_goes_into_the_archive_keeps_its_rows_and_what_is_restored_is_done(tmp_path):
    output = resolve(str(tmp_path))
    publish_table(output, "n0", in_format(manifest(a="1", b="1", c="1"), a="archived"), failed=[("a", False)], kind="archived")
    assert increment(output, in_format(manifest(a="1", b="1", c="1"), a="archived", b="archived")).nothing_to_do
    restored = increment(output, manifest(a="1", b="1", c="1"))
    assert (restored.counts["changed"], restored.manifest["key"].to_pylist()) == (1, ["a"])
    assert increment(output, in_format(manifest(a="1", b="2", c="1"), a="archived", b="archived")).counts["changed"] == 1


def test_an_archive_that_no_listing_shows_is_asked_for_again(tmp_path):
    output = resolve(str(tmp_path))
    publish_table(output, "n0", manifest(a="1", b="1"), failed=[("a", False)], kind="archived")
    assert increment(output, manifest(a="1", b="1")).manifest["key"].to_pylist() == ["a"]


def test_what_lies_in_a_closed_folder_is_not_deleted(tmp_path):
    output = resolve(str(tmp_path))
    publish_table(output, "n0", manifest(**{"a/1": "1", "a/2": "1", "b/1": "1", "ab": "1"}))
    listed = RunInput(manifest(**{"b/1": "2"}), 0, 0.0, unreadable=["a/"])
    found = diff_with_table(listed, read_output(output), BUNDLE, "redo")
    assert (found.removed["key"].to_pylist(), found.counts["deleted"]) == (["ab"], 1)
    assert found.on


def test_etags_of_older_tables_are_compared_by_what_they_hold(tmp_path):
    """Files had two or three numbers in their etag; S3's etags of uploads in parts look alike and are compared whole."""
    output = resolve(str(tmp_path))
    before = {"a": "17a-5", "b": "17a-5", "c": "17a-5-9", "d": "9b2f-3", "e": "17a-5", "f": "17a-5-9-1", "g": "17a-5-9"}
    after = {"a": "17a-5-9-1", "b": "17b-5-9-1", "c": "17a-5-a-1", "d": "9b2f-4", "e": "17a-55-9-1", "f": "17a-5-9-2"}
    publish_table(output, "n0", manifest(**before))
    found = increment(output, manifest(**after, g="17a-5-9-7"))
    assert found.manifest["key"].to_pylist() == ["b", "c", "d", "e", "f"]


NAMED = st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from(["", "", "", "x"])), max_size=8)


def named(objects) -> pa.Table:
    uris, keys = [uri for uri, _ in objects], [f"{uri}{key}" for uri, key in objects]
    return pa.table({"uri": pa.array(uris, pa.string()), "key": pa.array(keys, pa.string())})


@settings(deadline=None, max_examples=400, derandomize=True)
@given(store=NAMED, known=NAMED)
def test_uris_alone_match_what_names_match_or_leave_it_to_them(store, known):
    store, known = named(sorted(store)), named(known)
    by_name, by_uri = diff._matched_by_name(store, known), diff._matched_by_uri(store, known)
    if by_uri is not None:
        assert [column.to_pylist() for column in by_uri[:2]] == [column.to_pylist() for column in by_name[:2]]
        assert by_uri.objects == by_name.objects
    plain = len({*store["uri"].to_pylist()}) == len(store) and len({*known["uri"].to_pylist()}) == len(known)
    if plain and store["uri"].equals(store["key"]) and known["uri"].equals(known["key"]):
        assert by_uri is not None
