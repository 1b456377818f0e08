"""Numbers of work under way -> a line a stage in a terminal, or a line every half minute where there is none; on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from tlbatch.report.console import status_lines

Watcher = Callable[[Mapping[str, Any]], None]

_LOG_SECONDS, _LOOK_SECONDS = 30.0, 2.0


@contextmanager
def watching(what: str, quiet: bool = False) -> Iterator[Watcher | None]:
    """Say how far the block is; `what` is the name of the stage that takes the time, as in "classifying".

    The watcher takes the numbers of `progress.json`, of the listing (`stage` is list) and of publishing (publish).
    """
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _progress() as progress:
            yield _Lines(progress, what)
    else:
        yield _Log(what)


def _progress() -> Progress:
    columns = (TextColumn("{task.description:<11}"), BarColumn(bar_width=8), TextColumn("{task.fields[said]}"))
    return Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4)


class _Lines:
    """A line a stage: those that are done, and the one at work."""

    def __init__(self, progress: Progress, what: str) -> None:
        self._progress, self._what = progress, what
        self._starting: TaskID | None = progress.add_task("starting", total=None, said="")
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, numbers: Mapping[str, Any]) -> None:
        if self._starting is not None:
            self._progress.remove_task(self._starting)
            self._starting = None
        name = _name(numbers, self._what)
        if name not in self._tasks:
            for task in self._tasks.values():
                self._progress.update(task, total=1, completed=1)
            self._tasks[name] = self._progress.add_task(name, total=None, said="")
        done, total = _done(numbers)
        self._progress.update(self._tasks[name], total=total or None, completed=done if total else 0, said=in_words(numbers))


class _Log:
    """A line of text now and then, with the time."""

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._clock = what, clock
        self._said = clock()

    def __call__(self, numbers: Mapping[str, Any]) -> None:
        now = self._clock()
        if now - self._said >= _LOG_SECONDS:
            self._said = now
            print(f"{time.strftime('%H:%M:%S')} {_name(numbers, self._what)}: {in_words(numbers)}", file=sys.stderr, flush=True)


def _name(numbers: Mapping[str, Any], what: str) -> str:
    return {"list": "listing", "publish": "publishing"}.get(numbers.get("stage", ""), what)


def _done(numbers: Mapping[str, Any]) -> tuple[int, int]:
    """How much of how much is done; of 0 where nobody knows."""
    if numbers.get("stage") == "list":
        return 0, 0
    if numbers.get("stage") == "publish":
        return numbers["files"], numbers["of"]
    return numbers["predicted"] + numbers["failed"], numbers["listed"]


def in_words(numbers: Mapping[str, Any]) -> str:
    """How far a stage is, in words that leave a line of ten million images within eighty columns."""
    if numbers.get("stage") == "list":
        return f"{numbers['objects']:,} objects, {numbers['objects'] / max(numbers['seconds'], 1e-3):,.0f}/s"
    done, total = _done(numbers)
    if numbers.get("stage") == "publish":
        return f"{done:,} of {total:,} files"
    said = f"{done:,} of {total:,}, {numbers['failed']:,} failed"
    if numbers["images_per_second"]:
        said += f", {numbers['images_per_second']:,.0f}/s"
    return said + (f", {_duration(numbers['seconds_left'])} left" if numbers["seconds_left"] else "")


def _duration(seconds: int) -> str:
    if seconds < 100:
        return f"{seconds} s"
    return f"{seconds // 60} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def follow(read: Callable[[], Mapping[str, Any]], sleep: Callable[[float], None] = time.sleep) -> Mapping[str, Any]:
    """Say how an output stands until nobody is at work there; returns how it stood then.

    In a terminal the lines are renewed every two seconds; elsewhere a line for the run at work is printed every half minute.
    """
    console = Console(stderr=True, highlight=False, markup=False)
    found = read()
    said = -_LOG_SECONDS
    with Live(console=console, transient=True, auto_refresh=False) if console.is_terminal else _nothing() as live:
        while found["lease"]:
            lines = status_lines(found)
            if live is not None:
                live.update(Text("\n".join(lines[1 - console.height :])), refresh=True)
            elif time.monotonic() - said >= _LOG_SECONDS:
                said = time.monotonic()
                at_work = [line for line in lines if line.startswith(found["lease"]["run_id"])] or lines[-1:]
                print(time.strftime("%H:%M:%S"), at_work[-1], file=sys.stderr, flush=True)
            sleep(_LOOK_SECONDS)
            found = read()
    return found


@contextmanager
def _nothing() -> Iterator[None]:
    yield None
