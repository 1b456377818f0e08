"""A published run -> an object for notebooks: its counts, its report page below the cell, and images of a label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

import pandas as pd

from tlbatch.config import ReportConfig
from tlbatch.errors import OutputError, closest
from tlbatch.output.run import read_report
from tlbatch.output.table import read_groups, read_published, require_published
from tlbatch.report.html import render, thumbnails_of
from tlbatch.report.run_report import write_report
from tlbatch.report.summary import SURE, UNSURE
from tlbatch.report.thumbnails import load_thumbnails
from tlbatch.schema import to_frame
from tlbatch.storage.resolve import resolve

_SIDE = 224


@dataclass(frozen=True)
class Page:
    """HTML that a notebook shows in a sandboxed frame, without access to the notebook or a network."""

    html: str = field(repr=False)
    height: int = 640

    def _repr_html_(self) -> str:
        """The HTML that Jupyter displays."""
        frame = 'sandbox="allow-scripts" style="border: 0; width: 100%"'
        return f'<iframe title="tlbatch" srcdoc="{escape(self.html)}" height="{self.height}" {frame}></iframe>'


@dataclass(frozen=True)
class Report:
    """The report of a published run.

    Attributes:
        output: the output folder.
        result: what `classify` returned, or for a loaded report the content of `report.json`.
        verdict: good, doubtful or bad.
        sentence: the reason for the verdict.
        url: URL of `report.html`.
        storage_options: fsspec's options for the output.
    """

    output: str
    result: Mapping[str, Any] = field(repr=False)
    verdict: str
    sentence: str
    url: str
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def predictions(self) -> pd.DataFrame:
        """The table, one row per image."""
        return to_frame(read_published(self.output, "predictions", None, self.storage_options))

    def show(self, label: str | None = None, n: int = 12, *, order: str = SURE) -> Page:
        """Show images of a label.

        Args:
            label: the predicted label; None for all labels.
            n: number of images.
            order: "most certain" or "least certain" first.

        Raises:
            OutputError: the table has no such label.
            ValueError: the order is unknown.
        """
        if order not in (SURE, UNSURE):
            raise ValueError(f"order: write {SURE!r} or {UNSURE!r}; found {order!r}")
        runs = require_published(resolve(self.output, self.storage_options))
        best: pd.DataFrame | None = None
        labels: set[str] = set()
        for piece in read_groups(runs, "predictions", ["uri", "key", "label", "score"]):
            frame = to_frame(piece)
            labels |= set(frame["label"].unique())
            rows = frame if label is None else frame[frame["label"] == label]
            best = rows if best is None else pd.concat([best, rows])
            best = best.nlargest(n, "score") if order == SURE else best.nsmallest(n, "score")
        if best is None or best.empty:
            raise OutputError(f"No image of {self.output} has the label {label!r}{closest(str(label), labels)}.")
        names = list(zip(best["uri"], best["key"], strict=True))
        pictures = load_thumbnails(runs, names, self.storage_options, side=_SIDE)
        thumbnails = thumbnails_of(best, order, pictures)
        html = render("thumbnails.html", label or "all labels", thumbnails=thumbnails).decode()
        return Page(html, 190 + 210 * ((len(thumbnails) - 1) // 5))

    def _repr_html_(self) -> str:
        """The HTML that Jupyter displays: the whole page."""
        return Page(resolve(self.url, self.storage_options).read().decode(), 900)._repr_html_()


def load_report(
    output: str, *, labels: str | None = None, split: str | None = None, storage_options: Mapping[str, Any] | None = None
) -> Report:
    """The report of an output's newest published run; its `report.html` is written again.

    Args:
        output: the output folder or URL.
        labels: a labels file: CSV or Parquet with `key` (or `uri`), `label` and optionally `split`.
        split: only this part of the labels file.
        storage_options: fsspec's options for both.

    Raises:
        OutputError: nothing is published there.
        LabelsError: the labels file cannot be used.
    """
    options = dict(storage_options or {})
    written = write_report(ReportConfig(output=output, labels=labels, split=split, storage_options=options))
    newest = require_published(resolve(output, options))[-1]
    return Report(output, read_report(newest), written["verdict"], written["sentence"], written["report"], options)
