"""Counts of running work -> progress on stderr: one line per stage in a terminal, otherwise one line every 30 seconds."""

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

from tlbatch.output.progress import Watcher
from tlbatch.report.console import status_lines

_LOG_SECONDS, _LOOK_SECONDS = 30.0, 2.0


@contextmanager
def watching(what: str, quiet: bool = False) -> Iterator[Watcher | None]:
    """Show the progress of the block.

    The watcher takes the content of `progress.json`, or counts of the listing (`stage` is list), of publishing (publish) or of
    fitting a head (fit).

    Args:
        what: name of the longest stage, such as "classifying".
        quiet: show nothing, and yield None.
    """
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _progress() as progress:
            yield _Lines(progress, what)
    else:
        yield _Log(what)


def _progress() -> Progress:
    columns = (TextColumn("{task.description:<11}"), BarColumn(bar_width=8), TextColumn("{task.fields[text]}"))
    return Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4)


class _Lines:
    """One terminal line per stage: the finished stages and the running one."""

    def __init__(self, progress: Progress, what: str) -> None:
        self._progress, self._what = progress, what
        self._starting: TaskID | None = progress.add_task("starting", total=None, text="")
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, numbers: Mapping[str, Any]) -> None:
        if self._starting is not None:
            self._progress.remove_task(self._starting)
            self._starting = None
        name = _name(numbers, self._what)
        if name not in self._tasks:
            for task in self._tasks.values():
                self._progress.update(task, total=1, completed=1)
            self._tasks[name] = self._progress.add_task(name, total=None, text="")
        done, total = _done(numbers)
        self._progress.update(self._tasks[name], total=total or None, completed=done if total else 0, text=in_words(numbers))


class _Log:
    """A line of text with the time, every `_LOG_SECONDS`."""

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._clock = what, clock
        self._printed = clock()

    def __call__(self, numbers: Mapping[str, Any]) -> None:
        now = self._clock()
        if now - self._printed >= _LOG_SECONDS:
            self._printed = now
            print(f"{time.strftime('%H:%M:%S')} {_name(numbers, self._what)}: {in_words(numbers)}", file=sys.stderr, flush=True)


def _name(numbers: Mapping[str, Any], what: str) -> str:
    return {"list": "listing", "publish": "publishing", "fit": "fitting"}.get(numbers.get("stage", ""), what)


def _done(numbers: Mapping[str, Any]) -> tuple[int, int]:
    """The amount done and the total; the total is 0 if it is unknown."""
    if numbers.get("stage") == "list":
        return 0, 0
    if numbers.get("stage") in ("publish", "fit"):
        return numbers["done"], numbers["of"]
    return numbers["predicted"] + numbers["failed"], numbers["listed"]


def in_words(numbers: Mapping[str, Any]) -> str:
    """The progress of a stage as text. With ten million images a terminal line still fits in 80 columns."""
    if numbers.get("stage") == "list":
        return f"{numbers['objects']:,} objects, {numbers['objects'] / max(numbers['seconds'], 1e-3):,.0f}/s"
    done, total = _done(numbers)
    if numbers.get("stage") in ("publish", "fit"):
        return f"{done:,} of {total:,} {'files' if numbers['stage'] == 'publish' else 'fits'}"
    text = f"{done:,} of {total:,}, {numbers['failed']:,} failed"
    if numbers["images_per_second"]:
        text += f", {numbers['images_per_second']:,.0f}/s"
    return text + (f", {_duration(numbers['seconds_left'])} left" if numbers["seconds_left"] else "")


def _duration(seconds: int) -> str:
    if seconds < 100:
        return f"{seconds} s"
    return f"{seconds // 60} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def follow(read: Callable[[], Mapping[str, Any]], sleep: Callable[[float], None] = time.sleep) -> Mapping[str, Any]:
    """Show the status of an output until no run is active.

    In a terminal the lines are rewritten every two seconds. Elsewhere one line for the active run is printed every 30 seconds.

    Args:
        read: reads the status of the output.
        sleep: waits for a number of seconds.

    Returns:
        The last status.
    """
    console = Console(stderr=True, highlight=False, markup=False)
    found = read()
    printed = -_LOG_SECONDS
    with Live(console=console, transient=True, auto_refresh=False) if console.is_terminal else _nothing() as live:
        while found["lease"]:
            lines = status_lines(found)
            if live is not None:
                live.update(Text("\n".join(lines[1 - console.height :])), refresh=True)
            elif time.monotonic() - printed >= _LOG_SECONDS:
                printed = time.monotonic()
                active = [line for line in lines if line.startswith(found["lease"]["run_id"])] or lines[-1:]
                print(time.strftime("%H:%M:%S"), active[-1], file=sys.stderr, flush=True)
            sleep(_LOOK_SECONDS)
            found = read()
    return found


@contextmanager
def _nothing() -> Iterator[None]:
    yield None
