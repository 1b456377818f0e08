"""A published table -> its images by filter and order, a page at a time.

What filters and orders need of each image is in memory, some 15 bytes, in DuckDB. The rest of a row is read where it lies when
a page shows it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field

from tlbatch import schema
from tlbatch.output.rows import RowFiles
from tlbatch.output.run import Run

#: Images of a page, and bars of the chart of scores.
PAGE, BARS = 60, 20
#: The most memory of DuckDB.
_MEMORY = "400MB"
#: More ranges of rows than this become a list of rows.
_MOST_RANGES = 200
_LAST = chr(0x10FFFF)

Order = Literal["stored", "unsure", "sure", "margin"]
Known = Literal["", "wrong", "right", "labelled", "unlabelled", "corrected"]
#: Order -> the expression by which images are sorted; the place decides between equal ones.
_ORDERS: Mapping[str, str] = {"stored": "0", "unsure": "score", "sure": "-score", "margin": "margin"}
#: What is known of an image -> the condition on it.
_KNOWN: Mapping[str, str] = {
    "wrong": "place in (select place from known where code is distinct from images.label)",
    "right": "place in (select place from known where code = images.label)",
    "labelled": "place in (select place from known)",
    "unlabelled": "place not in (select place from known)",
    "corrected": "place in (select place from known where corrected)",
}


class Wanted(BaseModel):
    """Which images a page shows and in which order, as its address says it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    label: str = ""
    low: float = Field(default=0.0, ge=0, le=1)
    high: float = Field(default=1.0, ge=0, le=1)
    abstained: bool = False
    run: str = ""
    folder: str = ""
    known: Known = ""
    order: Order = "unsure"

    def query(self, **changes: Any) -> dict[str, str]:
        """The parts of an address that say this, with changes; what is as by default is left out."""
        default = Wanted()
        changed = self.model_copy(update=changes)
        given = {
            name: getattr(changed, name) for name in Wanted.model_fields if getattr(changed, name) != getattr(default, name)
        }
        return {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in given.items()}


class Cursor(NamedTuple):
    """Where in an order a page begins: behind an image, by the number that sorts it and its place."""

    value: float
    place: int

    @classmethod
    def read(cls, text: str) -> Cursor:
        """Raises ValueError if it is none."""
        value, _, place = text.partition(":")
        return cls(float(value), int(place))

    def __str__(self) -> str:
        return f"{self.value!r}:{self.place}"


class Listed(NamedTuple):
    """An image of a page."""

    place: int
    label: str
    score: float
    cursor: Cursor


class Facets(NamedTuple):
    """How the images of a filter are distributed.

    Attributes:
        labels: label -> images, the most common first, of whichever label.
        bars: images by score, `BARS` equal parts of 0 to 1, of whichever score.
        images: how many pass the whole filter.
    """

    labels: Mapping[str, int]
    bars: Sequence[int]
    images: int


class Truth(NamedTuple):
    """What is known of an image: its label, and whether it comes from a correction."""

    label: str
    corrected: bool


class Catalog:
    """The images of a table, which may be asked from many threads.

    Args:
        runs: the runs that make up the table, the oldest first.
        files: the files of their predictions.
    """

    def __init__(self, runs: Sequence[Run], files: RowFiles) -> None:
        self._files = files
        self._run_ids = [run.run_id for run in runs]
        self._database = duckdb.connect(config={"memory_limit": _MEMORY, "autoload_known_extensions": "false"})
        self._database.execute(
            "create table images (place uinteger, label usmallint, score float, margin float, abstained bool)"
        )
        self._database.execute("create table known (place uinteger, code usmallint, corrected bool)")
        self._writing = threading.Lock()
        self._truths: dict[int, Truth] = {}
        self.labels: list[str] = []
        for piece in _narrow(files, self.labels):
            self._database.from_arrow(piece).insert_into("images")
        self._codes = {label: code for code, label in enumerate(self.labels)}
        self._ranges = lru_cache(32)(self._ranges_of)
        self.images: int = self._ask("select count(*) from images")[0][0]

    def page(self, wanted: Wanted, after: Cursor | None = None, *, most: int = PAGE, backwards: bool = False) -> list[Listed]:
        """The next images in the order that is wanted; `backwards` those before, the nearest first."""
        order, sign = _ORDERS[wanted.order], "<" if backwards else ">"
        conditions, given = self._conditions(wanted)
        if after is not None:
            conditions.append(f"({order} {sign} ?::float or ({order} = ?::float and place {sign} ?))")
            given += [after.value, after.value, after.place]
        way = "desc" if backwards else "asc"
        rows = self._ask(
            f"select place, label, score, {order} as value from images {_where(conditions)} "  # noqa: S608  # of this module
            f"order by value {way}, place {way} limit {most}",
            given,
        )
        return [Listed(place, self.labels[label], score, Cursor(float(value), place)) for place, label, score, value in rows]

    def facets(self, wanted: Wanted) -> Facets:
        """How the images that are wanted are distributed over labels and scores."""
        conditions, given = self._conditions(wanted.model_copy(update={"label": ""}))
        counted = self._ask(
            f"select label, count(*) as images from images {_where(conditions)} group by label order by images desc, label",  # noqa: S608
            given,
        )
        labels = {self.labels[label]: count for label, count in counted}
        conditions, given = self._conditions(wanted.model_copy(update={"low": 0.0, "high": 1.0}))
        bar = f"least({BARS - 1}, floor(score * {BARS}))::int"
        bars = dict(self._ask(f"select {bar} as bar, count(*) from images {_where(conditions)} group by bar", given))  # noqa: S608
        images = labels.get(wanted.label, 0) if wanted.label else sum(labels.values())
        return Facets(labels, [bars.get(number, 0) for number in range(BARS)], images)

    def cursor(self, wanted: Wanted, place: int) -> Cursor | None:
        """Where an image stands in an order; None if it is not in the table."""
        found = self._ask(f"select {_ORDERS[wanted.order]} from images where place = ?", [place])  # noqa: S608  # of this module
        return Cursor(float(found[0][0]), place) if found else None

    @property
    def known_labels(self) -> set[str]:
        """The labels of what is known."""
        return {truth.label for truth in list(self._truths.values())}

    def truth(self, place: int) -> Truth | None:
        """What is known of an image."""
        return self._truths.get(place)

    def learn(self, truths: Mapping[int, Truth | None]) -> None:
        """Take what is known of images, by place; None takes it back."""
        known = [(place, truth) for place, truth in truths.items() if truth]
        new = {
            "place": pa.array([place for place, _ in known], pa.uint32()),
            "code": pa.array([self._codes.get(truth.label) for _, truth in known], pa.uint16()),
            "corrected": pa.array([truth.corrected for _, truth in known], pa.bool_()),
        }
        with self._writing:
            cursor = self._database.cursor()
            cursor.begin()
            cursor.execute("delete from known where place in (select unnest(?::uinteger[]))", [list(truths)])
            cursor.from_arrow(pa.table(new)).insert_into("known")
            cursor.commit()
            for place, truth in truths.items():
                if truth is None:
                    self._truths.pop(place, None)
                else:
                    self._truths[place] = truth

    def _ask(self, query: str, given: Sequence[Any] = ()) -> list[Any]:
        return self._database.cursor().execute(query, list(given)).fetchall()

    def _conditions(self, wanted: Wanted) -> tuple[list[str], list[Any]]:
        """What must hold of an image that is wanted, as SQL with values apart."""
        found: list[tuple[str, Sequence[Any]]] = []
        if wanted.label:
            found.append(("label = ?", [self._codes.get(wanted.label, -1)]))
        if wanted.low > 0 or wanted.high < 1:
            found.append(("score >= ?::float and score <= ?::float", [wanted.low, wanted.high]))
        if wanted.abstained:
            found.append(("abstained", []))
        if wanted.run:
            number = self._run_ids.index(wanted.run) if wanted.run in self._run_ids else None
            limits = (0, 0) if number is None else self._files.starts[number : number + 2]
            found.append(("place >= ? and place < ?", list(limits)))
        if wanted.folder:
            found.append(self._ranges(wanted.folder))
        if wanted.known:
            found.append((_KNOWN[wanted.known], []))
        return [condition for condition, _ in found], [value for _, values in found for value in values]

    def _ranges_of(self, folder: str) -> tuple[str, list[Any]]:
        """The condition that a key begins with a text, on the places of such keys."""
        ranges = list(_joined(_places(self._files, folder)))
        if len(ranges) <= _MOST_RANGES:
            between = " or ".join(["place >= ? and place < ?"] * len(ranges)) or "false"
            return f"({between})", [limit for one in ranges for limit in one]
        rows = np.concatenate([np.arange(*one, dtype=np.uint32) for one in ranges])
        return "place in (select unnest(?::uinteger[]))", [rows.tolist()]


def _where(conditions: Sequence[str]) -> str:
    return f"where {' and '.join(conditions)}" if conditions else ""


def _narrow(files: RowFiles, labels: list[str]) -> Iterator[pa.Table]:
    """Of each current row its place and what filters and orders need, a piece at a time; new labels are added to a list."""
    codes: dict[str, int] = {}
    for piece in files.current(["label", "score", "top_scores", "abstained"]):
        found = piece["label"].combine_chunks().dictionary_encode()
        own = [codes.setdefault(label, len(codes)) for label in found.dictionary.to_pylist()]
        labels[:] = codes
        narrow = {
            "place": piece["place"].cast(pa.uint32()),
            "label": pa.array(np.array(own, np.uint16)).take(found.indices),
            "score": piece["score"],
            "margin": pa.array(_margins(piece)),
            "abstained": piece["abstained"],
        }
        yield pa.table(narrow)


def _margins(piece: pa.Table) -> np.ndarray:
    """(n,) float32: how much the best score is above the second; of a row with one score, how far it is from a half."""
    scores = piece["top_scores"].combine_chunks()
    best = piece["score"].to_numpy()
    if not len(scores):
        return np.zeros(0, np.float32)
    starts, lengths = scores.offsets.to_numpy()[:-1], pc.list_value_length(scores).to_numpy()
    several = lengths > 1
    flat = np.append(scores.values.to_numpy(), np.float32(0))
    second = flat[np.where(several, starts + 1, len(flat) - 1)]
    found: np.ndarray = np.where(several, best - second, 2 * np.abs(best - np.float32(0.5))).astype(np.float32)
    return found


def _places(files: RowFiles, folder: str) -> Iterator[tuple[int, int]]:
    """Half-open ranges of the places of keys that begin with a text."""
    for first, found in files.holding("key", folder, folder + _LAST):
        if isinstance(found, int):
            yield first, first + found
            continue
        inside = np.concatenate([[0], pc.starts_with(found, folder).to_numpy().astype(np.int8), [0]])
        edges = np.flatnonzero(np.diff(inside)) + first
        yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _joined(ranges: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ranges, of which those that follow another without a gap are one."""
    before: tuple[int, int] | None = None
    for one in ranges:
        if before is not None and before[1] == one[0]:
            before = (before[0], one[1])
            continue
        if before is not None:
            yield before
        before = one
    if before is not None:
        yield before


#: What a page reads of the rows that it shows.
SHOWN = ("uri", "key", "etag", schema.INDEX, "width", "height")
