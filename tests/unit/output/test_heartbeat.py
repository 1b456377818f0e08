"""The progress of a run is what its workers say: nothing is listed while they work."""

import json
import threading

import pytest
from support.tables import begin, outcome

from tlbatch import schema
from tlbatch.output import progress
from tlbatch.output.parts import stage_part
from tlbatch.output.progress import heartbeat
from tlbatch.output.receipts import read_receipts
from tlbatch.storage.local import LocalLocation
from tlbatch.storage.resolve import resolve


@pytest.fixture
def runs(tmp_path):
    """Two runs over ten objects, of which the first one has two already."""
    found = [begin(resolve(str(tmp_path / name))) for name in ("a", "b")]
    stage_part(found[0].staged, outcome([0, 1]))
    return found


def groups(run) -> int:
    return sum(name.endswith(".receipts") for name in run.staged.names())


def test_progress_counts_what_comes_back_and_lists_the_folder_once(runs, monkeypatch):
    listed, names, seen, done = [], LocalLocation.names, [], threading.Event()
    monkeypatch.setattr(progress, "_HEARTBEAT_SECONDS", 0.01)
    with heartbeat(runs, lambda numbers: (seen.append(numbers), numbers["left"] == 5 and done.set())) as staged:
        monkeypatch.setattr(LocalLocation, "names", lambda location: listed.append(location) or names(location))
        staged([stage_part(run.staged, outcome([2, 3, 4], failed=(3,))) for run in runs])
        assert done.wait(10)
    assert not listed
    assert {name: seen[-1][name] for name in ("listed", "predicted", "failed", "left")} == {
        "listed": 10,
        "predicted": 4,
        "failed": 1,
        "left": 5,
    }
    assert json.loads(runs[0].location.join(schema.PROGRESS).read())["left"] == 5
    assert [groups(run) for run in runs] == [1, 1]
    assert [len(read_receipts(run).bodies) for run in runs] == [2, 1]


def test_what_an_interrupted_command_did_is_in_groups_as_well(runs):
    def interrupted() -> None:
        with heartbeat(runs, None) as staged:
            staged([stage_part(run.staged, outcome([2])) for run in runs])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [groups(run) for run in runs] == [1, 1]
