"""The protocol of `docs/protocol.md` under a model: drivers that die, sleep past their lease and wake up, at every step.

Drivers run the real `commit.run_to_publication` on a real folder, in threads that stop before each thing they do to it.
Hypothesis chooses which one continues, which one dies, when a minute passes unnoticed, and when the store changes. After every
step a reader looks at the table. `make chaos` tries many more examples than `make test`; `TLBATCH_EXAMPLES` is how many.
"""

import contextlib
import functools
import json
import os
import shutil
import tempfile
import threading
import time
import types
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.tables import manifest, outcome

from tlbatch import schema
from tlbatch.errors import CountsError, LeaseHeldError, OutputError
from tlbatch.output import commit, lease, parts, publish, receipts
from tlbatch.output import run as runs_module
from tlbatch.output.commit import Promotion, RunInput, RunSpec, Target, WorkStats
from tlbatch.output.gc import gc
from tlbatch.output.parts import stage_part
from tlbatch.output.publish import counts_digest
from tlbatch.output.receipts import ReceiptGroups
from tlbatch.output.run import OutputState, Run, read_pointer
from tlbatch.output.verify import verify
from tlbatch.schema import from_parquet, sha256, unseal
from tlbatch.storage.local import LocalLocation

EXAMPLES = int(os.environ.get("TLBATCH_EXAMPLES", "40"))

#: A run of the model: so many rows in a part, so many in a published file.
ROWS_PER_PART, ROWS_PER_FILE = 2, 3
#: What a driver may end with besides a report: each says that the table is as it was.
KNOWN = (LeaseHeldError, CountsError, FileNotFoundError)


class Killed(BaseException):
    """SIGKILL: nothing this driver does from now on has an effect."""


SPEC = RunSpec(spec={"images": "/store", "engine": "openvino"}, bundle="b" * 64, base="base", predictions=True, features=None)


class Listed:
    """The work of one driver: a store that was listed when its command began, and parts of two rows."""

    def __init__(self, outputs: "Outputs", unlucky: int | None) -> None:
        self._outputs, self._unlucky = outputs, unlucky
        self._published, self._objects = read_pointer(outputs.output), outputs.objects

    def plan(self, state: OutputState) -> RunInput:
        """The store, listed again if another run was published since."""
        if list(state.pointer) != self._published:
            self._objects = self._outputs.objects
        return RunInput(manifest(self._objects), 0, 0.0)

    def process(self, runs: Sequence[Run], rows: pa.Table) -> WorkStats:
        """Stage parts."""
        stage(runs, rows, self._unlucky)
        return WorkStats()

    def promotion_check(self, *_: object) -> Promotion:
        """There is no condition."""
        return Promotion()


class Driver(threading.Thread):
    """One command, in a thread that stops before each thing it does to the output."""

    def __init__(self, path: Path, work: "Listed", run_id: str) -> None:
        super().__init__(daemon=True)
        self._turn, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._target, self._run_id = Target(Stepped(path, self), SPEC, work), run_id
        self.inside = False
        self.next = ""
        self.killed = False
        self.over = False
        self.ended_with: BaseException | dict | None = None
        self.start()
        self._stopped.acquire()

    def run(self) -> None:
        try:
            (self.ended_with,) = commit.run_to_publication([self._target], self._run_id, began=time.monotonic())
        except BaseException as error:
            self.ended_with = error
        self.over = True
        self._stopped.release()

    def wait_for_turn(self, does: str) -> None:
        """Called by the driver before it does something."""
        self.next = does
        self._stopped.release()
        self._turn.acquire()
        if self.killed:
            raise Killed

    def go_on(self, steps: int = 1_000_000) -> None:
        """Let it do so many things, or all."""
        while steps and not self.over:
            self._turn.release()
            self._stopped.acquire()
            steps -= 1

    def go_on_until(self, does: str) -> None:
        """Let it go on until it is about to do this."""
        while self.next != does:
            assert not self.over, f"it ended before {does}: {self.ended_with!r}"
            self.go_on(1)

    def kill(self) -> None:
        """It dies where it stands; what it would do on its way out is not done."""
        self.killed = True
        self.go_on()


class Stepped(LocalLocation):
    """A real folder, asked step by step by one driver."""

    def __init__(self, path: Path, driver: Driver) -> None:
        super().__init__(path)
        object.__setattr__(self, "driver", driver)

    def join(self, *names: str) -> "Stepped":
        return Stepped(self.path.joinpath(*names), self.driver)


def _stepping(name: str):
    real = getattr(LocalLocation, name)

    @functools.wraps(real)
    def step(self, *arguments, **options):
        if self.driver.inside:
            return real(self, *arguments, **options)
        self.driver.wait_for_turn(f"{name} {self.path.name}")
        self.driver.inside = True
        try:
            return real(self, *arguments, **options)
        finally:
            self.driver.inside = False

    return step


for _name in ("read", "write", "create", "swap", "remove", "unlink", "delete", "names", "exists"):
    setattr(Stepped, _name, _stepping(_name))


class Outputs(RuleBasedStateMachine):
    """An output, the store it is of, and whoever is at work on it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_800_000_000.0
        clock = types.SimpleNamespace(time=lambda: self.now, sleep=lambda _: None, strftime=time.strftime, gmtime=time.gmtime)
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(lease, "time", clock)
        self._patch.setattr(lease.Lease, "HEARTBEAT", 1e6)  # everybody is a sleeper
        # Python 3.11 lets one Run at a time read its manifest, and one of these may be asleep at it.
        self._patch.setattr(Run.__dict__["manifest"], "lock", contextlib.nullcontext(), raising=False)
        self._patch.setattr(os, "fsync", lambda _: None)  # nothing here is about a loss of power
        for room in (runs_module, receipts, publish):
            self._patch.setattr(room, "READS_AT_ONCE", 1)
        self._patch.setattr(publish, "ROWS_PER_FILE", ROWS_PER_FILE)
        # Of two parts that hold the same object the later one would win, if there were no plan.
        names = iter(range(10**9, 0, -1))
        descending = types.SimpleNamespace(uuid4=lambda: types.SimpleNamespace(hex=f"{next(names):012d}"))
        self._patch.setattr(parts, "uuid", descending)
        self._folder = tempfile.mkdtemp(prefix="tlbatch-outputs-")
        self.output = LocalLocation(Path(self._folder, "out"))
        self.drivers: list[Driver] = []
        self.begun = 0
        self.objects = 5
        #: Every table a reader has seen: its bytes must stay.
        self.seen: dict[str, dict[str, str]] = {}

    # What happens.

    @initialize()
    def first_command(self) -> None:
        self.command(True)

    @rule(steady=st.booleans())
    @precondition(lambda self: len(self.at_work()) < 3)
    def command(self, steady: bool) -> None:
        """Somebody, or the schedule, runs the command. What is not `steady` has bad luck with one image."""
        self.begun += 1
        begun = self.begun
        work = Listed(self, None if steady else begun % self.objects)
        self.drivers.append(Driver(self.output.path, work, f"run-{begun:03d}"))

    @rule(data=st.data(), steps=st.integers(1, 25))
    @precondition(lambda self: self.at_work())
    def goes_on(self, data: st.DataObject, steps: int) -> None:
        data.draw(st.sampled_from(self.at_work())).go_on(steps)

    @rule(data=st.data())
    @precondition(lambda self: self.at_work())
    def goes_on_to_its_end(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.at_work())).go_on()

    @rule(data=st.data())
    @precondition(lambda self: self.at_work())
    def dies(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.at_work())).kill()

    @rule()
    def an_hour_passes_and_nobody_renews(self) -> None:
        self.now += 3600.0

    @rule()
    def the_store_grows(self) -> None:
        self.objects += 1

    @rule()
    def somebody_tidies_up(self) -> None:
        with contextlib.suppress(LeaseHeldError, OutputError):
            gc(self.output.url, older_than=-1e9, remove=True)

    def at_work(self) -> list[Driver]:
        """Drivers that are not over: one that nobody lets go on is asleep."""
        return [driver for driver in self.drivers if not driver.over]

    # What must hold.

    @invariant()
    def a_reader_sees_a_whole_table_that_never_changes(self) -> None:
        latest = self.output.path / schema.LATEST
        if not latest.exists():
            return
        (entry,) = unseal(latest.read_bytes())["runs"]
        run = self.output.path / "runs" / entry["run_id"]
        report = unseal((run / schema.REPORT).read_bytes())
        assert counts_digest(report) == entry["books_sha256"]
        digests = {name: sha256((run / name).read_bytes()) for name in report["files"]}
        assert digests == {name: facts["sha256"] for name, facts in report["files"].items()}
        assert self.seen.setdefault(entry["run_id"], digests) == digests
        assert keys_of(run) == manifest(json.loads((run / schema.RUN).read_text())["objects"])["key"].to_pylist()

    @invariant()
    def whoever_ended_without_a_report_said_why(self) -> None:
        for driver in self.drivers:
            if driver.over and not isinstance(driver.ended_with, dict):
                assert isinstance(driver.ended_with, (Killed, *KNOWN)), repr(driver.ended_with)

    def teardown(self) -> None:
        try:
            self._the_next_command_is_right()
        finally:
            for driver in self.at_work():
                driver.kill()
            self._patch.undo()
            shutil.rmtree(self._folder)

    def _the_next_command_is_right(self) -> None:
        """Whatever happened: run it again, and once more for what the store gained meanwhile; then the sleepers wake up."""
        sleepers = self.at_work()
        self.an_hour_passes_and_nobody_renews()
        for _ in range(2):
            self.command(True)
            self.drivers[-1].go_on()
            assert isinstance(self.drivers[-1].ended_with, dict), repr(self.drivers[-1].ended_with)
        self._the_table_is_the_stores()
        for driver in sleepers:
            driver.go_on()
            self.whoever_ended_without_a_report_said_why()
        self._the_table_is_the_stores()

    def _the_table_is_the_stores(self) -> None:
        self.a_reader_sees_a_whole_table_that_never_changes()
        (entry,) = read_pointer(self.output)
        assert keys_of(self.output.path / "runs" / entry["run_id"]) == manifest(self.objects)["key"].to_pylist()
        assert verify(self.output.url)["ok"], verify(self.output.url)["differences"]


def stage(runs: Sequence[Run], left: pa.Table, unlucky: int | None) -> None:
    """The work of a driver's actors: parts of two rows. An unlucky image is a row in errors, and fails for now only."""
    rows, groups = left["row"].to_pylist(), ReceiptGroups(runs[0], size=2)
    for start in range(0, len(rows), ROWS_PER_PART):
        part = rows[start : start + ROWS_PER_PART]
        table = outcome(part, (unlucky,) if unlucky in part else ())
        number = table.column_names.index("transient")
        final = table.set_column(number, "transient", pc.if_else(pc.is_valid(table["kind"]), False, None))
        groups.add(stage_part(runs[0].staged, final))
    groups.write()


def keys_of(run: Path) -> list[str]:
    """The keys of both tables of a published run, in order."""
    tables = [from_parquet(path.read_bytes(), ["key"]) for path in run.glob("*/part-*.parquet")]
    return sorted(pa.concat_tables(tables)["key"].to_pylist())


@pytest.fixture
def night():
    """An evening on which somebody has just run the command; whatever follows, the next command must be right."""
    night = Outputs()
    night.first_command()
    yield night
    night.teardown()


def test_a_part_that_is_staged_while_others_publish_changes_nothing(night):
    """A sleeper stages one part more, and an heir publishes the run that another one is publishing: from the same parts."""
    (late,) = night.drivers
    while "write 000000000000-" not in late.next:  # about to stage its first part
        late.go_on(1)
    night.an_hour_passes_and_nobody_renews()
    night.command(False)
    first = night.drivers[-1]
    first.go_on_until("swap latest.json")
    night.an_hour_passes_and_nobody_renews()
    late.go_on()
    assert isinstance(late.ended_with, LeaseHeldError)
    night.command(True)
    night.drivers[-1].go_on_until("swap latest.json")
    first.go_on()
    night.a_reader_sees_a_whole_table_that_never_changes()
    assert isinstance(first.ended_with, dict)


def test_a_listing_from_before_another_run_published_is_made_again(night):
    (sleeper,) = night.drivers
    night.the_store_grows()
    night.command(True)
    night.drivers[-1].go_on()
    sleeper.go_on()
    night._the_table_is_the_stores()


def test_a_run_whose_manifest_was_tidied_away_never_began(night):
    (sleeper,) = night.drivers
    sleeper.go_on_until("write run.json")
    night.an_hour_passes_and_nobody_renews()
    night.somebody_tidies_up()
    sleeper.go_on()
    assert isinstance(sleeper.ended_with, FileNotFoundError)


TestOutputs = Outputs.TestCase
TestOutputs.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=30,
    deadline=None,
    derandomize=EXAMPLES <= 100,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
