"""A run's folder -> its `report.html`: whether to trust the run, sample images, failures and speed.

Reads the table once in pieces, the images that are shown and, with a labels file, the rows of the labelled images.
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
from tlbatch.report.evaluate import gives_many_labels, read_true_labels
from tlbatch.report.html import Thumbnail, render, thumbnails_of
from tlbatch.report.summary import NEAR, SURE, UNSURE, TableSummary, summarize
from tlbatch.report.thumbnails import Name, load_thumbnails
from tlbatch.report.verdict import BAD, DOUBTFUL, GOOD, Verdict, judge_run, white_levels_sentence
from tlbatch.storage.resolve import resolve

log = logging.getLogger(__name__)

#: Pixels of a thumbnail's longer side, labels in the gallery, thumbnails in the confusion matrix, bytes read from shards.
#: With these limits a page has at most 416 thumbnails of about 6 kB.
_SIDE, _GALLERY_LABELS, _CELL_THUMBNAILS, _SHARD_BYTES = 144, 12, 200, 256 << 20
#: Most labels of a confusion matrix that fits on the page.
_MATRIX_LABELS = 20
_TONES = {GOOD: "No problem found", DOUBTFUL: "Check this run", BAD: "Not published"}


def write_report(config: ReportConfig) -> dict[str, Any]:
    """Write the report of a run.

    Args:
        config: an output, whose newest published run is taken, or a run's folder; optionally a labels file.

    Returns:
        `report`, the URL of the page; `run_id`; `verdict` (good, doubtful or bad); `sentence`, the reason; `odd`, a sentence
        per unusual finding.

    Raises:
        OutputError: nothing is published, or the run is not complete.
        LabelsError: the labels file cannot be used.
    """
    state, runs = _find(config)
    run = runs[-1]
    facts = _PageFacts.of(state, runs, config)
    target = run.location.join(schema.REPORT_PAGE)
    target.write(facts.page())
    tone, sentence, odd = facts.verdict
    return {"report": target.url, "run_id": run.run_id, "verdict": tone, "sentence": sentence, "odd": list(odd)}


def write_report_after(result: Mapping[str, Any], storage_options: Mapping[str, Any]) -> dict[str, Any]:
    """Write the report of each table that a command has published. A failure is only logged, because the table is published.

    Returns:
        The result, with `report`, the URL of the page, for each table that has a page.
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
    except (Exception, KeyboardInterrupt) as error:  # a missing page must not fail a published run
        log.warning("The run is published, but its %s could not be written: %r", schema.REPORT_PAGE, error)
        log.debug("Traceback:", exc_info=True)
        return dict(result)


def _find(config: ReportConfig) -> tuple[OutputState, list[Run]]:
    """An output, and the runs that form the table of the report, the oldest first."""
    named = run_at(config.output, config.storage_options)
    if named is None:
        state = read_output(resolve(config.output, config.storage_options))
        if not state.pointer:
            raise OutputError(f"Nothing is published at {state.output.url}: it has no {schema.LATEST}.")
        return state, state.table
    output, run = named
    if not run.location.join(schema.REPORT).exists():
        raise OutputError(f"Run {run.run_id} is not complete; `tlbatch status {output.url}` shows its progress.")
    state = read_output(output)
    return state, state.table_after(run)


class _PageFacts(NamedTuple):
    """The facts that the page shows."""

    runs: Sequence[Run]
    report: ReportDocument
    verdict: Verdict
    now: TableSummary
    before: TableSummary | None
    diagnostics: Diagnostics | None
    split: str | None
    pictures: Mapping[Name, str]
    #: Why there are no pictures; None if there are.
    unread: str | None

    @classmethod
    def of(cls, state: OutputState, runs: Sequence[Run], config: ReportConfig) -> _PageFacts:
        run = runs[-1]
        classified = bool(run.facts["spec"]["predictions"])
        previous = state.previous(run) if classified else None
        earlier = state.table_after(previous) if previous else []
        now, before = summarize(runs, earlier, predictions=classified, threshold=_threshold(run))
        report = read_report(run)
        diagnostics = None
        if config.labels is not None:
            diagnostics = diagnose(runs, read_true_labels(runs, config.labels, config.split, config.storage_options))
        names = _names(_gallery(now)) + (_names(_cell_rows(diagnostics)) if diagnostics else [])
        unread, pictures = None, {}
        try:
            pictures = load_thumbnails(runs, names, config.storage_options, side=_SIDE, shard_bytes=_SHARD_BYTES)
        except (OSError, StoreUnavailableError) as error:  # the rest of the page does not need the images
            unread = f"No images are shown, because they cannot be read: {error}"
        verdict = judge_run(report, now.side, before.side if previous else None)
        return cls(runs, report, verdict, now, before if previous else None, diagnostics, config.split, pictures, unread)

    def page(self) -> bytes:
        run = self.runs[-1]
        output = self.report["output"]
        groups = self._gallery_groups()
        return render(
            "report.html",
            f"{output.rstrip('/').rsplit('/', 1)[-1]}: {self.now.images or self.report['predicted']:,} images",
            "report.js",
            run_id=run.run_id,
            started=run.facts["began"].replace("T", " ").replace("Z", " UTC"),
            table_runs=len(self.runs),
            url=run.location.url,
            version=version("tlbatch"),
            verdict=self.verdict,
            tones=_TONES,
            counts=self._counts(),
            sentences=self._sentences(),
            charts=self._charts(run),
            more_labels=max(0, len(self.now.labels) - charts.MOST_LABELS),
            diagnostics=self.diagnostics,
            split=self.split,
            **self._confusion(),
            gallery=groups,
            gallery_images=sum(len(group) for _, reasons in groups for _, group in reasons),
            reasons=[why for why in (SURE, UNSURE, NEAR) if (self.now.shown["why"] == why).any()],
            unshown_labels=max(0, len(self.now.labels) - len(groups)),
            kinds=self._kinds(),
            bottleneck=self.report.get("bottleneck"),
        )

    def _counts(self) -> list[tuple[str, str]]:
        report = self.report
        found = [(name, f"{report[name]:,}") for name in ("listed", "predicted", "failed")]
        if self.now.abstained:
            found.append(("abstained", f"{self.now.abstained:,}"))
        if len(self.runs) > 1:
            found.append(("in the table", f"{self.now.images:,}"))
        found.append(("skipped", f"{report['skipped']:,}"))
        return [*found, ("seconds", f"{report['seconds']:,.1f}"), ("images per second", f"{report['images_per_second']:,.0f}")]

    def _sentences(self) -> list[str]:
        report, run = self.report, self.runs[-1].facts
        bundle = run.get("bundle_url", report["bundle"])
        found = [f"Images: {run['spec']['images']}{_listed_by(report)}. Bundle: {bundle}. Engine: {report['engine']}."]
        if report.get("counts"):
            states = ", ".join(f"{count:,} {state}" for state, count in report["counts"].items())
            found.append(f"Objects in the store compared with the table: {states}.")
        skipped = {"Skipped objects": report.get("skipped_by_kind"), "Skipped in shards": report.get("skipped_in_shards")}
        for what, kinds in skipped.items():
            if kinds:
                found.append(f"{what} by kind: {', '.join(f'{count:,} {kind}' for kind, count in kinds.items())}.")
        if report.get("left"):
            folders = ", ".join(f"{count:,} from {folder or 'the top folder'}" for folder, count in report["left"].items())
            found.append(f"Left the table because the store no longer has them: {folders}.")
        if report.get("unreadable"):
            found.append(f"Folders that could not be opened, and whose images are missing: {', '.join(report['unreadable'])}.")
        if report.get("table"):
            table = report["table"]
            found.append(
                f"Failures of this run that the table did not have: {report['failed_new']:,}. The whole table has "
                f"{table['failed']:,} failed of {table['listed']:,} images."
            )
        if gives_many_labels(self.runs):
            found.append("An image may have several labels and counts once for each; it is shown under its best label.")
        if report.get("white_levels"):
            found.append(f"{white_levels_sentence(report['white_levels'])}.")
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
        if self.diagnostics and self.diagnostics.curves:
            found["curves"] = charts.curves_chart(self.diagnostics.curves)
        if self.diagnostics and self.diagnostics.reliability is not None:
            found["reliability"] = charts.reliability_chart(self.diagnostics.reliability)
        return found

    def _gallery_groups(self) -> list[tuple[str, list[tuple[str, list[Thumbnail]]]]]:
        """For each label, the most common first, the thumbnails by reason."""
        rows = _gallery(self.now)
        found = []
        for label in dict.fromkeys(rows["label"]):
            of_label = rows[rows["label"] == label]
            reasons = [(why, self._thumbnails(of_label[of_label["why"] == why], why)) for why in dict.fromkeys(of_label["why"])]
            found.append((label, reasons))
        return found

    def _thumbnails(self, rows: pd.DataFrame, why: str) -> list[Thumbnail]:
        return thumbnails_of(rows, why, self.pictures)

    def _confusion(self) -> dict[str, Any]:
        """The confusion matrix, and the thumbnails that its cells open."""
        if self.diagnostics is None or not _has_matrix(self.diagnostics):
            return {"matrix": None, "cells": []}
        labels = self.diagnostics.metrics["labels"]
        shown = dict(list(_cell_rows(self.diagnostics).groupby(["true_label", "label"], sort=False)))
        rows, cells = [], []
        for row, (label, counts) in enumerate(zip(labels, self.diagnostics.metrics["confusion"], strict=True)):
            line = []
            for column, (predicted, count) in enumerate(zip(labels, counts, strict=True)):
                name = f"cell-{row}-{column}" if (label, predicted) in shown else None
                title = f"{count:,} images of {label}, predicted as {predicted}"
                line.append({"name": name, "count": f"{count:,}", "correct": label == predicted, "title": title})
                if name:
                    cells.append({"name": name, "title": title, "thumbnails": self._thumbnails(shown[label, predicted], "")})
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


def _listed_by(report: ReportDocument) -> str:
    """What was read in place of a listing, in brackets; empty if the store was listed."""
    found = report.get("inventory")
    return f" (its inventory of {found['created']}, with {found['objects']:,} objects)" if found else ""


def _threshold(run: Run) -> float | None:
    """The score below which the run's bundle abstains; None if it never abstains."""
    value = run.facts.get("abstain_threshold")
    return None if value is None else float(value)


def _gallery(found: TableSummary) -> pd.DataFrame:
    """The images of the gallery, by label, the most common first."""
    common = {label: rank for rank, (label, _) in enumerate(found.labels.most_common(_GALLERY_LABELS))}
    rows = found.shown[found.shown["label"].isin(common)]
    return rows.assign(rank=rows["label"].map(common)).sort_values("rank", kind="stable")


def _has_matrix(diagnostics: Diagnostics) -> bool:
    return bool(diagnostics.metrics["confusion"]) and len(diagnostics.metrics["labels"]) <= _MATRIX_LABELS


def _cell_rows(diagnostics: Diagnostics) -> pd.DataFrame:
    """The images that the cells of the matrix open: the first image of every cell, then the second, up to the page's limit."""
    rows = diagnostics.cells if _has_matrix(diagnostics) else diagnostics.cells.head(0)
    turn = rows.groupby(["true_label", "label"]).cumcount()
    return rows.assign(turn=turn).sort_values("turn", kind="stable").head(_CELL_THUMBNAILS)


def _names(rows: pd.DataFrame) -> list[Name]:
    return list(zip(rows["uri"], rows["key"], strict=True))
