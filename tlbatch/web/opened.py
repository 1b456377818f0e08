"""An output -> what the pages show of its table, as it was published at one moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tlbatch import schema
from tlbatch.errors import LabelsError, OutputError
from tlbatch.images.label_files import read_labels
from tlbatch.images.labels import ImageName, LabelRow, Labels
from tlbatch.output.rows import RowFiles
from tlbatch.output.run import OutputState, Run, read_output, read_pointer
from tlbatch.output.table import pieces_of_parts, require_published
from tlbatch.storage.location import Location
from tlbatch.web.catalog import SHOWN, Catalog, Truth
from tlbatch.web.corrections import Corrections
from tlbatch.web.pictures import PictureCache, Pictures

#: What the page of an image shows beside what a gallery shows.
_ALL = (*SHOWN, "label", "score", "top_labels", "top_scores", "abstained", "bundle")
_OF_ERRORS = ("uri", "key", "etag", schema.INDEX, "stage", "kind", "message", "attempts", "transient")
#: Runs of which the page of an image tells.
_HISTORY = 30


@dataclass(frozen=True)
class ErrorRows:
    """The images of a table that failed: the places of their rows, by kind, the most common kind first."""

    files: RowFiles
    by_kind: Mapping[str, np.ndarray]

    @property
    def images(self) -> int:
        """How many there are."""
        return sum(map(len, self.by_kind.values()))


@dataclass(frozen=True)
class Opened:
    """A published table at one moment. Its files do not change, so it can be shown after another table was published.

    Attributes:
        state: the output's runs and its pointer.
        files: the files of the predictions.
        catalog: its images by filter and order.
        errors: its images that failed.
        pictures: reads their pictures.
        given: what the labels file says of images, by place.
    """

    state: OutputState
    files: RowFiles
    catalog: Catalog
    errors: ErrorRows
    pictures: Pictures
    given: Mapping[int, Truth]

    @classmethod
    def of(
        cls,
        output: Location,
        options: Mapping[str, Any],
        labels: Location | None,
        corrections: Corrections,
        cache: PictureCache,
    ) -> Opened:
        """Open the published table of an output.

        Raises:
            OutputError: nothing is published, or the table has no predictions.
            LabelsError: a labels file cannot be used.
        """
        state = read_output(output)
        runs = state.table or require_published(output)
        if not all(run.facts["spec"]["predictions"] for run in runs):
            raise OutputError(f"The table at {output.url} has features only; `tlbatch rescore` gives it predictions.")
        files = RowFiles(runs, "predictions")
        catalog = Catalog(runs, files)
        given, corrected = _truths(runs, files, labels, corrections)
        catalog.learn(given | corrected)
        return cls(state, files, catalog, _errors_of(runs), Pictures(runs, options, cache), given)

    @property
    def runs(self) -> list[Run]:
        """The runs that make up the table, the oldest first."""
        return self.state.table

    @property
    def classes(self) -> list[str]:
        """The labels that the table, the labels file and the corrections have, sorted."""
        return sorted({*self.catalog.labels, *self.catalog.known_labels})

    def learn(self, place: int, label: str) -> None:
        """Take a correction of an image; an empty one takes it back."""
        self.catalog.learn({place: Truth(label, True) if label else self.given.get(place)})

    def is_current(self) -> bool:
        """Whether no other table was published since."""
        return list(read_pointer(self.state.output)) == list(self.state.pointer)

    def place(self, run_id: str, number: int, files: RowFiles | None = None) -> int | None:
        """The place of a row by its run and its number there; None if there is no such row."""
        starts = (files or self.files).starts
        for run, start, end in zip(self.runs, starts, starts[1:], strict=False):
            if run.run_id == run_id and 0 <= number < end - start:
                return start + number
        return None

    def address(self, place: int, files: RowFiles | None = None) -> tuple[str, int]:
        """The run of a row, and its number there: it names the row for as long as the run exists."""
        starts = (files or self.files).starts
        run = int(np.searchsorted(starts, place, side="right")) - 1
        return self.runs[run].run_id, place - starts[run]

    def tiles(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """What a gallery shows of the rows at some places, in their order."""
        if not self.pictures.in_shards:  # then only the key, as the rows may be in as many row groups
            return self._named(self.files.take(places, ["key"]), places, self.files)
        rows = self._named(self.files.take(places, SHOWN), places, self.files)
        self.pictures.expect(rows)
        return rows

    def row(self, place: int) -> dict[str, Any]:
        """Everything that the table has of the row at a place."""
        return self._named(self.files.take([place], _ALL), [place], self.files)[0]

    def picture_row(self, place: int) -> dict[str, Any]:
        """What names the picture of the row at a place."""
        return self._named(self.files.take([place], SHOWN), [place], self.files)[0]

    def error_rows(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of failed images at some places of the errors, in their order."""
        return self._named(self.errors.files.take(places, _OF_ERRORS), places, self.errors.files)

    def _named(self, rows: pa.Table, places: Sequence[int], files: RowFiles) -> list[dict[str, Any]]:
        addresses = [self.address(place, files) for place in places]
        return [
            {**row, "place": place, "run_id": run_id, "number": number}
            for row, place, (run_id, number) in zip(rows.to_pylist(), places, addresses, strict=True)
        ]

    def history(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What the newest runs, published or replaced, found for an image: `run_id`, and `label` and `score`, or `kind`."""
        where = (pc.field("uri") == row["uri"]) & (pc.field("key") == row["key"])
        found = []
        runs = [run for run in reversed(self.state.runs) if run.finished() and run.facts["spec"]["predictions"]][:_HISTORY]
        for run in runs:
            for folder, columns in (("predictions", ["label", "score", schema.INDEX]), ("errors", ["kind", schema.INDEX])):
                for piece in pieces_of_parts(run, folder, columns, where):
                    same = [one for one in piece.to_pylist() if one[schema.INDEX] in (None, row[schema.INDEX])]
                    found += [{"run_id": run.run_id, "began": run.facts["began"], **one} for one in same]
        return found


def _errors_of(runs: Sequence[Run]) -> ErrorRows:
    files = RowFiles(runs, "errors")
    by_kind: dict[str, list[int]] = {}
    for piece in files.current(["kind"]):
        for place, kind in zip(piece["place"].to_pylist(), piece["kind"].to_pylist(), strict=True):
            by_kind.setdefault(kind, []).append(place)
    common = sorted(by_kind.items(), key=lambda one: (-len(one[1]), one[0]))
    return ErrorRows(files, {kind: np.array(places) for kind, places in common})


def _truths(
    runs: Sequence[Run], files: RowFiles, labels: Location | None, corrections: Corrections
) -> tuple[dict[int, Truth], dict[int, Truth]]:
    """What the labels file, and what the corrections say of the table's images, by place."""
    many = bool(runs[-1].facts.get("multi_label"))
    given = read_labels([labels], many=many) if labels is not None else Labels((), many=many)
    rows = tuple(LabelRow(uri, key, one.label) for (uri, key), one in corrections.read().items())
    corrected = Labels((rows,), corrections.location.url, many)
    both = Labels((*given.files, rows), many=many)
    if not both.rows:
        return {}, {}
    named = pa.concat_tables(both.named(piece) for piece in files.current(["uri", "key", "label"])).to_pylist()
    images = {name_of(row): row for row in named}

    def truths(of: Labels, is_correction: bool) -> dict[int, Truth]:
        found = of.of_images(list(images)).labels
        pairs = [(images[name], names) for name, names in found.items() if names]
        return {row["place"]: _truth(names, row["label"], is_correction) for row, names in pairs}

    known = truths(given, False)
    if given.rows and not known:
        raise LabelsError(f"No image of {given.source} is in the table; the first one is {given.rows[0].name}.")
    return known, truths(corrected, True)


def _truth(names: Sequence[str], predicted: str, corrected: bool) -> Truth:
    """Of several labels of an image, the predicted one if it is one of them."""
    return Truth(predicted if predicted in names else names[0], corrected)


def name_of(row: Mapping[str, Any]) -> ImageName:
    """The image of a row."""
    return row["uri"], row["key"]
