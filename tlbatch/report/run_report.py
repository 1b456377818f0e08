"""A run's folder -> `report.html` in it: whether to trust the run, and the pictures that matter.

Reads the table once in pieces, the few images that are shown, and with a labels file the rows of labelled images.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import pandas as pd

from tlbatch import schema
from tlbatch.config import ReportConfig
from tlbatch.errors import ErrorKind, OutputError, StoreUnavailableError
from tlbatch.output.documents import ReportDocument
from tlbatch.output.progress import read_history
from tlbatch.output.run import OutputState, Run, read_output, read_report, run_at
from tlbatch.report import charts
from tlbatch.report.diagnostics import Diagnostics, diagnose
from tlbatch.report.evaluate import gives_many_labels, read_truth
from tlbatch.report.html import Thumbnail, render, thumbnails_of
from tlbatch.report.summary import NEAR, SURE, UNSURE, TableSummary, summarize
from tlbatch.report.thumbnails import Name, load_thumbnails
from tlbatch.report.verdict import BAD, DOUBTFUL, GOOD, Verdict, judge_run
from tlbatch.storage.resolve import resolve

log = logging.getLogger(__name__)

#: Pixels of a picture's longer side, labels in the gallery, pictures in the confusion matrix, bytes of shards that are read.
#: With them a page has at most 416 pictures of some 6 kB.
_SIDE, _GALLERY_LABELS, _CELL_PICTURES, _SHARD_BYTES = 144, 12, 200, 256 << 20
#: A confusion matrix of more labels would be a wall.
_MATRIX_LABELS = 20
_TONES = {GOOD: "All is well", DOUBTFUL: "Worth a look", BAD: "Not published"}


def write_report(config: ReportConfig) -> dict[str, Any]:
    """Write the report of a run.

    Args:
        config: an output, of which the newest published run is taken, or a run's folder; perhaps a labels file.

    Returns:
        `report`, where it is; `run_id`; `verdict`, its tone (good, doubtful, bad), and `sentence`; `odd`, what is.

    Raises:
        OutputError: nothing is published, or the run has not ended.
        LabelsError: the labels file cannot be used.
    """
    state, runs = _find(config)
    run = runs[-1]
    told = _PageFacts.of(state, runs, config)
    target = run.location.join(schema.REPORT_PAGE)
    target.write(told.page())
    tone, sentence, odd = told.verdict
    return {"report": target.url, "run_id": run.run_id, "verdict": tone, "sentence": sentence, "odd": list(odd)}


def write_report_after(result: Mapping[str, Any], storage_options: Mapping[str, Any]) -> dict[str, Any]:
    """Write the reports of what a command has done, whatever else becomes of them: its table is published already.

    Returns:
        The result, with `report`, where the page is, for each table that has one.
    """
    if "tables" in result:
        tables = {name: write_report_after(one, storage_options) for name, one in result["tables"].items()}
        return {**result, "tables": tables}
    url = f"{result['output']}/{schema.RUNS}/{result['run_id']}"
    options = dict(storage_options)
    try:
        page = resolve(url, options).join(schema.REPORT_PAGE)
        if result.get("already_done") and page.exists():
            return {**result, "report": page.url}
        return {**result, "report": write_report(ReportConfig(output=url, storage_options=options))["report"]}
    except (Exception, KeyboardInterrupt) as error:  # a page must not fail a night that is published
        log.warning("the run is published, but its %s could not be written: %r", schema.REPORT_PAGE, error)
        log.debug("why", exc_info=True)
        return dict(result)


def _find(config: ReportConfig) -> tuple[OutputState, list[Run]]:
    """An output, and the runs that make up the table of the report, the oldest first."""
    named = run_at(config.output, config.storage_options)
    if named is None:
        state = read_output(resolve(config.output, config.storage_options))
        if not state.pointer:
            raise OutputError(f"Nothing is published at {state.output.url}: it has no {schema.LATEST}.")
        return state, state.table
    output, run = named
    if not run.location.join(schema.REPORT).exists():
        raise OutputError(f"Run {run.run_id} has not ended; `tlbatch status {output.url}` shows its progress.")
    state = read_output(output)
    return state, state.table_after(run)


class _PageFacts(NamedTuple):
    """Everything that the page shows."""

    runs: Sequence[Run]
    report: ReportDocument
    verdict: Verdict
    now: TableSummary
    before: TableSummary | None
    truth: Diagnostics | None
    split: str | None
    pictures: Mapping[Name, str]
    #: Why there are none.
    unread: str | None

    @classmethod
    def of(cls, state: OutputState, runs: Sequence[Run], config: ReportConfig) -> _PageFacts:
        run = runs[-1]
        classified = bool(run.facts["spec"]["predictions"])
        now = summarize(runs, predictions=classified, threshold=_threshold(run))
        previous = state.previous(run) if classified else None
        before = None
        if previous is not None:
            before = summarize(state.table_after(previous), predictions=True, pictures=False)
        facts = read_report(run)
        truth = None
        if config.labels is not None:
            truth = diagnose(runs, read_truth(runs, config.labels, config.split, config.storage_options))
        names = _names(_gallery(now)) + (_names(_cell_rows(truth)) if truth else [])
        unread, pictures = None, {}
        try:
            pictures = load_thumbnails(runs, names, config.storage_options, side=_SIDE, shard_bytes=_SHARD_BYTES)
        except (OSError, StoreUnavailableError) as error:  # all else on the page is known without an image
            unread = f"There are no pictures, as the images cannot be read now: {error}"
        verdict = judge_run(facts, now.side, before.side if before else None)
        return cls(runs, facts, verdict, now, before, truth, config.split, pictures, unread)

    def page(self) -> bytes:
        run = self.runs[-1]
        output = self.report["output"]
        gallery = self._in_gallery()
        return render(
            "report.html",
            f"{output.rstrip('/').rsplit('/', 1)[-1]}: {self.now.images or self.report['predicted']:,} images",
            "report.js",
            run_id=run.run_id,
            began=run.facts["began"].replace("T", " ").replace("Z", " UTC"),
            of_runs=len(self.runs),
            url=run.location.url,
            version=version("tlbatch"),
            verdict=self.verdict,
            tones=_TONES,
            books=self._books(),
            told=self._sentences(),
            charts=self._charts(run),
            more_labels=max(0, len(self.now.labels) - charts.MOST_LABELS),
            truth=self.truth,
            split=self.split,
            **self._confusion(),
            gallery=gallery,
            pictures=sum(len(group) for _, reasons in gallery for _, group in reasons),
            reasons=[why for why in (SURE, UNSURE, NEAR) if (self.now.shown["why"] == why).any()],
            unshown_labels=max(0, len(self.now.labels) - len(gallery)),
            kinds=self._kinds(),
            bottleneck=self.report.get("bottleneck"),
        )

    def _books(self) -> list[tuple[str, str]]:
        facts = self.report
        found = [(name, f"{facts[name]:,}") for name in ("listed", "predicted", "failed")]
        if self.now.abstained:
            found.append(("abstained", f"{self.now.abstained:,}"))
        if len(self.runs) > 1:
            found.append(("in the table", f"{self.now.images:,}"))
        found.append(("passed over", f"{facts['skipped']:,}"))
        return [*found, ("seconds", f"{facts['seconds']:,.1f}"), ("images a second", f"{facts['images_per_second']:,.0f}")]

    def _sentences(self) -> list[str]:
        facts, run = self.report, self.runs[-1].facts
        bundle = run.get("bundle_url", facts["bundle"])
        found = [f"Images of {run['spec']['images']}, by the bundle {bundle} on {facts['engine']}."]
        if facts.get("counts"):
            found.append("The store: " + ", ".join(f"{count:,} {kind}" for kind, count in facts["counts"].items()) + ".")
        if gives_many_labels(self.runs):
            found.append("An image may have several labels and counts for each; pictures stand with the best one.")
        if self.unread:
            found.append(self.unread)
        return found

    def _charts(self, run: Run) -> dict[str, Any]:
        found = {"stages": charts.stages_chart(self.report["stage_seconds"])}
        before = self.before
        if self.now.images:
            scores = before.scores.tolist() if before else None
            found["labels"] = charts.labels_chart(self.now.labels, before.labels if before else None)
            found["scores"] = charts.scores_chart(self.now.scores.tolist(), scores, self.now.edges, _threshold(run))
        history = read_history(run)
        if len(history) > 2:
            found["throughput"] = charts.throughput_chart(history)
        if self.truth and self.truth.curves:
            found["curves"] = charts.curves_chart(self.truth.curves)
        if self.truth and self.truth.reliability is not None:
            found["reliability"] = charts.reliability_chart(self.truth.reliability)
        return found

    def _in_gallery(self) -> list[tuple[str, list[tuple[str, list[Thumbnail]]]]]:
        """Of each label, the most common first, and of each reason its pictures."""
        rows = _gallery(self.now)
        found = []
        for label in dict.fromkeys(rows["label"]):
            own = rows[rows["label"] == label]
            reasons = [(why, self._shots(own[own["why"] == why], why)) for why in dict.fromkeys(own["why"])]
            found.append((label, reasons))
        return found

    def _shots(self, rows: pd.DataFrame, why: str) -> list[Thumbnail]:
        return thumbnails_of(rows, why, self.pictures)

    def _confusion(self) -> dict[str, Any]:
        """The matrix, and the pictures that its cells open."""
        if self.truth is None or not _has_matrix(self.truth):
            return {"matrix": None, "cells": []}
        labels = self.truth.metrics["labels"]
        shown = dict(list(_cell_rows(self.truth).groupby(["truth", "label"], sort=False)))
        rows, cells = [], []
        for row, (label, counts) in enumerate(zip(labels, self.truth.metrics["confusion"], strict=True)):
            line = []
            for column, (predicted, count) in enumerate(zip(labels, counts, strict=True)):
                name = f"cell-{row}-{column}" if (label, predicted) in shown else None
                said = f"{count:,} images of {label}, taken for {predicted}"
                line.append({"name": name, "count": f"{count:,}", "right": label == predicted, "said": said})
                if name:
                    shots = self._shots(shown[label, predicted], "")
                    cells.append({"name": name, "said": said, "shots": shots})
            rows.append({"label": label, "cells": line})
        return {"matrix": {"columns": labels, "rows": rows}, "cells": cells}

    def _kinds(self) -> list[dict[str, Any]]:
        examples = self.now.examples
        return [
            {
                "name": kind,
                "count": count,
                "advice": ErrorKind(kind).advice,
                "examples": examples[examples["kind"] == kind].to_dict("records"),
            }
            for kind, count in self.now.errors.most_common()
        ]


def _threshold(run: Run) -> float | None:
    """Below which score the run's bundle abstains."""
    value = run.facts.get("abstain_threshold")
    return None if value is None else float(value)


def _gallery(found: TableSummary) -> pd.DataFrame:
    """The images of the gallery, by label, the most common first."""
    common = {label: rank for rank, (label, _) in enumerate(found.labels.most_common(_GALLERY_LABELS))}
    rows = found.shown[found.shown["label"].isin(common)]
    return rows.assign(rank=rows["label"].map(common)).sort_values("rank", kind="stable")


def _has_matrix(truth: Diagnostics) -> bool:
    return bool(truth.metrics["confusion"]) and len(truth.metrics["labels"]) <= _MATRIX_LABELS


def _cell_rows(truth: Diagnostics) -> pd.DataFrame:
    """The images that cells of the matrix open: the first of every cell, then the second, as far as the page has room."""
    rows = truth.cells if _has_matrix(truth) else truth.cells.head(0)
    turn = rows.groupby(["truth", "label"]).cumcount()
    return rows.assign(turn=turn).sort_values("turn", kind="stable").head(_CELL_PICTURES)


def _names(rows: pd.DataFrame) -> list[Name]:
    return list(zip(rows["uri"], rows["key"], strict=True))
