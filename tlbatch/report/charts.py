"""Numbers -> SVG charts that take their colors and font from the page.

Matplotlib draws in placeholder colors, which are replaced by the page's CSS variables: one chart serves light and dark mode.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tlbatch.report.diagnostics import Curve

#: Placeholder color that Matplotlib draws with -> CSS variable of the page.
_COLORS = {"#0a0b01": "var(--ink)", "#0a0b02": "var(--faint)", "#0a0b03": "var(--now)", "#0a0b04": "var(--before)"}
_INK, _FAINT, _NOW, _BEFORE = _COLORS
_SERIES = [f"#0a0b1{number}" for number in range(8)]
_COLORS |= {color: f"var(--series-{number})" for number, color in enumerate(_SERIES)}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _FAINT,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "text.parse_math": False,
}
_WIDTH = 5.2
#: Most labels that the label chart shows; the others have no bar.
MOST_LABELS = 20


class _Chart:
    """A figure with one pair of axes, and its SVG."""

    def __init__(self, name: str, height: float = 2.6) -> None:
        self._name = name
        self._context = rc_context(_STYLE | {"svg.hashsalt": name})
        self._height = height

    def __enter__(self) -> Axes:
        self._context.__enter__()
        self._figure = Figure(figsize=(_WIDTH, self._height), layout="constrained")
        self.svg = Markup()
        return self._figure.subplots()

    def __exit__(self, *error: object) -> None:
        try:
            buffer = io.StringIO()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=r"Glyph \d+")  # the browser's fonts draw the text
                self._figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        finally:
            self._context.__exit__(None, None, None)
        self.svg = _inline(buffer.getvalue(), self._name)


def _inline(svg: str, name: str) -> Markup:
    """An SVG file as an element of a page: without its XML header, as wide as its container, with a name for screen readers."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Matplotlib numbers its ids per figure (`patch_1`); on a page with several charts they would not be unique.
    svg = re.sub(r' id="[A-Za-z.]+(?:2d)?_\d+"', "", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px; font-family: inherit", svg)
    for color, variable in _COLORS.items():
        svg = svg.replace(color, variable)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(name)}" class="chart"', 1))  # noqa: S704 - Matplotlib escapes text


def labels_chart(now: Mapping[str, int], before: Mapping[str, int] | None) -> Markup:
    """Share of images by label, the most common label first, next to the previous run."""
    names = sorted(now, key=lambda label: -now[label])[:MOST_LABELS]
    chart = _Chart("Share of images by label", 0.9 + 0.34 * max(2, len(names)))
    with chart as axes:
        rows = np.arange(len(names))
        height = 0.38 if before else 0.6
        _bars(axes, rows - (height / 2 if before else 0), now, names, height, _NOW, "this run")
        if before:
            _bars(axes, rows + height / 2, before, names, height, _BEFORE, "previous run")
            axes.legend(loc="lower right", fontsize=9)
        axes.set_yticks(rows, [_short(name) for name in names])
        _style_horizontal_bars(axes, "% of images")
    return chart.svg


def _style_horizontal_bars(axes: Axes, unit: str) -> None:
    """Put the first bar on top and leave room for the numbers beside the bars."""
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.spines["left"].set_visible(False)
    axes.tick_params(left=False)
    axes.margins(x=0.12)


def _bars(
    axes: Axes, rows: np.ndarray, counts: Mapping[str, int], names: Sequence[str], height: float, color: str, legend: str
) -> None:
    total = sum(counts.values()) or 1
    shares = [100 * counts.get(name, 0) / total for name in names]
    bars = axes.barh(rows, shares, height, color=color, label=legend)
    axes.bar_label(bars, [f"{share:.1f}" for share in shares], padding=3, fontsize=8, color=_INK)


def scores_chart(now: Sequence[int], before: Sequence[int] | None, edges: np.ndarray, threshold: float | None) -> Markup:
    """Share of images by score, next to the previous run."""
    chart = _Chart("Share of images by score")
    with chart as axes:
        axes.stairs(_percent(now), edges, fill=True, color=_NOW, label="this run")
        if before is not None and any(before):
            axes.stairs(_percent(before), edges, color=_BEFORE, linewidth=1.8, label="previous run")
        if threshold is not None:
            axes.axvline(threshold, color=_INK, linestyle="--", linewidth=1, label="below: abstained")
        if axes.get_legend_handles_labels()[1][1:]:
            axes.legend(loc="upper left", fontsize=9)
        axes.set_xlabel("score")
        axes.set_ylabel("% of images")
        axes.set_xlim(0, 1)
    return chart.svg


def _percent(counts: Sequence[int]) -> np.ndarray:
    values = np.array(counts, np.float64)
    share: np.ndarray = 100 * values / (values.sum() or 1)
    return share


def throughput_chart(history: Sequence[Sequence[float]]) -> Markup:
    """Images per second over time.

    Args:
        history: [seconds since the epoch, images done], in order of time.
    """
    chart = _Chart("Images per second over time")
    with chart as axes:
        at, done = np.array(history, np.float64).T
        rates = np.diff(done) / np.maximum(np.diff(at), 1e-3)
        axes.stairs(np.maximum(rates, 0), at - at[0], fill=True, color=_NOW)
        axes.set_xlabel("seconds since the first image was requested")
        axes.set_ylabel("images per second")
        axes.set_ylim(bottom=0)
    return chart.svg


def stages_chart(seconds: Mapping[str, float]) -> Markup:
    """Seconds in each stage, summed over all workers."""
    chart = _Chart("Seconds in each stage", 0.7 + 0.3 * max(2, len(seconds)))
    with chart as axes:
        bars = axes.barh(list(seconds), list(seconds.values()), 0.6, color=_NOW)
        axes.bar_label(bars, [f"{value:,.1f}" for value in seconds.values()], padding=3, fontsize=8, color=_INK)
        _style_horizontal_bars(axes, "seconds, summed over all workers")
    return chart.svg


def curves_chart(curves: Sequence[Curve]) -> Markup:
    """Precision against recall for up to eight labels."""
    chart = _Chart("Precision against recall", 3.2)
    with chart as axes:
        for curve, color in zip(curves, _SERIES, strict=False):
            points = np.linspace(0, len(curve.recall) - 1, min(len(curve.recall), 200)).astype(int)
            name = f"{curve.average:.2f} {_short(curve.label)}"
            axes.plot(curve.recall[points], curve.precision[points], color=color, linewidth=1.6, label=name)
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.02))
        axes.grid(visible=True)
        axes.legend(loc="lower left", fontsize=9, title="average precision", title_fontsize=9)
    return chart.svg


def reliability_chart(bins: pd.DataFrame) -> Markup:
    """Share of correct predictions by score; on the diagonal the two are equal. A larger dot stands for more images.

    Args:
        bins: as `Diagnostics.reliability`.
    """
    chart = _Chart("Share of correct predictions by score", 3.2)
    with chart as axes:
        axes.plot([0, 1], [0, 1], color=_FAINT, linestyle="--", linewidth=1)
        axes.plot(bins["score"], bins["correct"], color=_NOW, linewidth=1.4)
        axes.scatter(bins["score"], bins["correct"], 20 + 180 * bins["images"] / bins["images"].max(), color=_NOW)
        axes.set(xlabel="score", ylabel="share of correct predictions", xlim=(0, 1.04), ylim=(0, 1.08))
        axes.grid(visible=True)
    return chart.svg


def _short(name: str) -> str:
    return name if len(name) <= 28 else name[:27] + "…"
