"""What is done and left follows from receipts alone; of two who want an output, one gets it."""

import numpy as np
import pyarrow as pa
import pytest
from support.tables import SPEC, begin, manifest, outcome

from tlbatch import schema
from tlbatch.errors import CountsError, OutputError
from tlbatch.output.parts import stage_part
from tlbatch.output.receipts import ReceiptGroups, Receipts, count_staged, read_receipts
from tlbatch.output.run import new_run_id, read_output, read_runs, require_output, require_same
from tlbatch.schema import seal, unseal
from tlbatch.storage.local import LocalLocation
from tlbatch.storage.resolve import resolve


@pytest.fixture
def output(tmp_path):
    return resolve(str(tmp_path / "out"))


def test_a_part_is_real_when_its_receipt_is(output):
    run = begin(output)
    stage_part(run.staged, outcome([4, 2, 3], failed=(3,)))
    receipts = read_receipts(run)
    (body,) = receipts.bodies
    assert body["rows"] == [[2, 5]]
    assert (body["predicted"], body["failed"], body["failed_by_kind"]) == (2, 1, {"empty": 1})
    assert receipts.images(10).nonzero()[0].tolist() == [2, 3, 4]
    assert receipts.seconds()["decode"] == 0.75
    assert count_staged(run.staged.names()) == (3, 2, 1)


def test_a_part_without_a_receipt_and_a_receipt_without_a_part_are_nothing(output):
    run = begin(output)
    stage_part(run.staged, outcome([0]))
    stage_part(run.staged, outcome([1]))
    first, second = (name for name in run.staged.names() if name.endswith(".parquet"))
    run.staged.join(first).delete()
    run.staged.join(
        next(name for name in run.staged.names() if name.startswith(second.removesuffix(".parquet")) and name.endswith("json"))
    ).delete()
    assert not read_receipts(run).images(10).any()


def test_a_damaged_receipt_counts_as_none_and_is_named(output):
    run = begin(output)
    stage_part(run.staged, outcome([0, 1]))
    name = next(name for name in run.staged.names() if name.endswith(".json"))
    run.staged.join(name).write(run.staged.join(name).read().replace(b'"predicted": 2', b'"predicted": 3'))
    receipts = read_receipts(run)
    assert receipts.broken == (name,)
    assert not receipts.images(10).any()


def staged_in_groups(output, monkeypatch):
    """A run of ten parts, seven of them in groups of three, and a list of what is read from now on."""
    run = begin(output)
    groups = ReceiptGroups(run, size=3)
    for row in range(7):
        groups.add(stage_part(run.staged, outcome([row])))
    groups.write()
    for row in range(7, 10):
        stage_part(run.staged, outcome([row]))
    reads, read = [], LocalLocation.read
    monkeypatch.setattr(LocalLocation, "read", lambda location: reads.append(location.url.rpartition("/")[2]) or read(location))
    return run, reads


def test_receipts_in_groups_are_read_in_a_few_requests(output, monkeypatch):
    run, reads = staged_in_groups(output, monkeypatch)
    receipts = read_receipts(run)
    assert [body["rows"] for body in receipts.bodies] == [[[row, row + 1]] for row in range(10)]
    assert sorted(name.rpartition(".")[2] for name in reads) == ["json"] * 3 + ["receipts"] * 3
    reads.clear()
    assert read_receipts(run, each=True) == receipts
    assert len(reads) == 13
    assert count_staged(run.staged.names()) == (10, 10, 0)


def test_a_group_counts_for_nothing_without_the_receipts_and_parts_and_its_own_seal(output, monkeypatch):
    run, _ = staged_in_groups(output, monkeypatch)
    names = run.staged.names()
    run.staged.join(next(name for name in names if name.startswith(f"{2:012d}") and name.endswith(".json"))).delete()
    run.staged.join(next(name for name in names if name.startswith(f"{4:012d}") and name.endswith(".parquet"))).delete()
    assert np.flatnonzero(read_receipts(run).images(10) == 0).tolist() == [2, 4]
    for name in names:
        if name.endswith(".receipts"):
            group = run.staged.join(name)
            group.write(group.read().replace(b'"predicted": 1', b'"predicted": 9'))
    found = read_receipts(run)
    assert np.flatnonzero(found.images(10) == 0).tolist() == [2, 4]
    assert sum(body["predicted"] for body in found.bodies) == 8
    assert sorted(found.broken) == sorted(name for name in names if name.endswith(".receipts"))


def test_a_group_that_cannot_be_read_costs_only_requests(output, monkeypatch):
    run, _ = staged_in_groups(output, monkeypatch)
    read = LocalLocation.read

    def refused(location):
        if location.url.endswith(".receipts"):
            raise PermissionError("denied")
        return read(location)

    monkeypatch.setattr(LocalLocation, "read", refused)
    assert len(read_receipts(run).bodies) == 10


def test_a_group_that_cannot_be_written_stops_nothing(output, monkeypatch):
    run, _ = staged_in_groups(output, monkeypatch)

    def full(*_):
        raise OSError("No space left on device")

    groups = ReceiptGroups(run)
    groups.add(read_receipts(run).bodies[0])
    with monkeypatch.context() as patch:
        patch.setattr(LocalLocation, "write", full)
        groups.write()
    assert len(read_receipts(run).bodies) == 10


def test_every_flipped_bit_breaks_a_seal():
    data = seal({"rows": [[0, 3]], "seconds": 1.2345678901234567, "part": "x"})
    assert unseal(data) is not None
    for bit in range(len(data) * 8):
        hurt = bytearray(data)
        hurt[bit // 8] ^= 1 << bit % 8
        assert unseal(bytes(hurt)) is None, bit


def test_ten_million_done_rows_are_tens_of_megabytes():
    bodies = tuple(
        {"rows": [[start, start + 512]], "images": {}, "part": "", "stage_seconds": {}} for start in range(0, 10_000_000, 512)
    )
    done = Receipts(bodies).images(10_000_384)
    assert done.sum() == 10_000_384
    assert done.nbytes < 41_000_000


def test_a_changed_manifest_is_not_trusted(output):
    run = begin(output)
    run.location.join(schema.MANIFEST).write(schema.to_parquet(manifest(11)))
    with pytest.raises(CountsError, match=r"manifest of run .* differs"):
        _ = read_runs(output)[0].manifest


def test_an_unfinished_run_of_another_spec_is_refused_with_the_fields_that_differ(output):
    run = begin(output)
    assert read_output(output).unfinished.run_id == run.run_id
    require_same(run, SPEC, "b" * 64)
    with pytest.raises(OutputError, match=r"is unfinished and bundle was \"b+….* and is \"c+….*, top_k was 5 and is 3"):
        require_same(run, {**SPEC, "top_k": 3}, "c" * 64)


def test_an_output_of_another_store_or_of_anything_else_is_refused(output, tmp_path):
    require_output(read_output(output), "/store")
    begin(output)
    require_output(read_output(output), "/store")
    with pytest.raises(OutputError, match="belongs to another run: it holds the table of /store, not of /other"):
        require_output(read_output(output), "/other")
    with pytest.raises(OutputError, match="is not empty and holds no tlbatch runs"):
        require_output(read_output(resolve(str(tmp_path))), "/store")


def test_run_ids_sort_by_time():
    assert new_run_id(lambda: 1.0) < new_run_id(lambda: 2.0) < new_run_id(lambda: 1e9)


def test_ranges_are_half_open_and_sorted(output):
    run = begin(output)
    stage_part(run.staged, outcome([9, 4, 5, 6, 0]))
    assert read_receipts(run).bodies[0]["rows"] == [[0, 1], [4, 7], [9, 10]]
    assert np.array_equal(read_receipts(run).images(10).nonzero()[0], [0, 4, 5, 6, 9])


def test_what_shards_skipped_is_counted_once_however_often_they_are_staged(tmp_path):
    run = begin(resolve(str(tmp_path)), 4)
    for rows, passed in (
        ([0, 1], ['{".json": 2, "._*": 1}', None]),
        ([0], ['{".json": 2, "._*": 1}']),
        ([2, 3], [None, '{".json": 1}']),
    ):
        table = outcome(rows)
        stage_part(run.staged, table.set_column(table.column_names.index("passed"), "passed", pa.array(passed, pa.string())))
    assert read_receipts(run).passed(4) == {".json": 3, "._*": 1}
