"""A run, from a notebook: what it counted, its page where the cell is, and pictures of a label when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

import pandas as pd

from tlbatch.config import ReportConfig
from tlbatch.errors import OutputError, closest
from tlbatch.output.run import read_report
from tlbatch.output.table import read_groups, read_predictions, require_published
from tlbatch.report.html import render, thumbnails_of
from tlbatch.report.run_report import write_report
from tlbatch.report.summary import SURE, UNSURE
from tlbatch.report.thumbnails import load_thumbnails
from tlbatch.storage.resolve import resolve

_SIDE = 224


@dataclass(frozen=True)
class Page:
    """HTML that a notebook shows in a frame of its own, which can reach neither the notebook nor a network."""

    html: str = field(repr=False)
    height: int = 640

    def _repr_html_(self) -> str:
        """What Jupyter asks for."""
        frame = 'sandbox="allow-scripts" style="border: 0; width: 100%"'
        return f'<iframe title="tlbatch" srcdoc="{escape(self.html)}" height="{self.height}" {frame}></iframe>'


@dataclass(frozen=True)
class Report:
    """What a published run says of itself.

    Attributes:
        output: the output folder.
        result: what `classify` returned, or of a report that is loaded what `report.json` says.
        verdict: good, doubtful or bad.
        sentence: why.
        url: where `report.html` is.
        storage_options: fsspec's options for it.
    """

    output: str
    result: Mapping[str, Any] = field(repr=False)
    verdict: str
    sentence: str
    url: str
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def predictions(self) -> pd.DataFrame:
        """The table, one row an image."""
        return read_predictions(self.output, storage_options=self.storage_options)

    def show(self, label: str | None = None, n: int = 12, *, order: str = SURE) -> Page:
        """Pictures of a label.

        Args:
            label: whose; of every label where none is given.
            n: how many.
            order: "most certain" or "least certain" ones first.

        Raises:
            OutputError: the table has no such label.
            ValueError: there is no such order.
        """
        if order not in (SURE, UNSURE):
            raise ValueError(f"order: write {SURE!r} or {UNSURE!r}; found {order!r}")
        runs = require_published(resolve(self.output, self.storage_options))
        best: pd.DataFrame | None = None
        labels: set[str] = set()
        for piece in read_groups(runs, "predictions", ["uri", "key", "label", "score"]):
            frame = piece.to_pandas()
            labels |= set(frame["label"].unique())
            own = frame if label is None else frame[frame["label"] == label]
            best = own if best is None else pd.concat([best, own])
            best = best.nlargest(n, "score") if order == SURE else best.nsmallest(n, "score")
        if best is None or best.empty:
            raise OutputError(f"No image of {self.output} has the label {label!r}{closest(str(label), labels)}.")
        names = list(zip(best["uri"], best["key"], strict=True))
        small = load_thumbnails(runs, names, self.storage_options, side=_SIDE)
        shots = thumbnails_of(best, order, small)
        return Page(render("shots.html", label or "every label", shots=shots).decode(), 190 + 210 * ((len(shots) - 1) // 5))

    def _repr_html_(self) -> str:
        """What Jupyter asks for: the whole page."""
        return Page(resolve(self.url, self.storage_options).read().decode(), 900)._repr_html_()


def load_report(
    output: str, *, labels: str | None = None, split: str | None = None, storage_options: Mapping[str, Any] | None = None
) -> Report:
    """The report of an output's newest published run, written anew.

    Args:
        output: the output folder or URL.
        labels: a labels file: CSV or Parquet with `key` (or `uri`), `label` and perhaps `split`.
        split: only this part of it.
        storage_options: fsspec's options for both.

    Raises:
        OutputError: nothing is published there.
        LabelsError: the labels file cannot be used.
    """
    options = dict(storage_options or {})
    told = write_report(ReportConfig(output=output, labels=labels, split=split, storage_options=options))
    newest = require_published(resolve(output, options))[-1]
    return Report(output, read_report(newest), told["verdict"], told["sentence"], told["report"], options)
