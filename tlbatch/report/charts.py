"""Numbers -> charts as SVG that take their colours and font from the page they stand in.

Matplotlib draws in marker colours, which become the page's CSS variables: one chart serves light and dark.
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

#: What Matplotlib is told -> what stands in the page.
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
#: Labels with a bar of their own.
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
                warnings.filterwarnings("ignore", message=r"Glyph \d+")  # the page's fonts draw the text, not Matplotlib's
                self._figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        finally:
            self._context.__exit__(None, None, None)
        self.svg = _inline(buffer.getvalue(), self._name)


def _inline(svg: str, name: str) -> Markup:
    """An SVG file as a part of a page: without its head, of the page's width, with a name for who does not see it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Matplotlib names things by their place in the figure (`patch_1`): in one page each chart needs names of its own.
    svg = re.sub(r' id="[A-Za-z.]+(?:2d)?_\d+"', "", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px; font-family: inherit", svg)
    for color, variable in _COLORS.items():
        svg = svg.replace(color, variable)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(name)}" class="chart"', 1))  # noqa: S704 - Matplotlib escapes text


def labels_chart(now: Mapping[str, int], before: Mapping[str, int] | None) -> Markup:
    """Share of the images of each label, the most common first, beside the run before."""
    names = sorted(now, key=lambda label: -now[label])[:MOST_LABELS]
    chart = _Chart("Share of the images by label", 0.9 + 0.34 * max(2, len(names)))
    with chart as axes:
        rows = np.arange(len(names))
        wide = 0.38 if before else 0.6
        _bars(axes, rows - (wide / 2 if before else 0), now, names, wide, _NOW, "this run")
        if before:
            _bars(axes, rows + wide / 2, before, names, wide, _BEFORE, "the run before")
            axes.legend(loc="lower right", fontsize=9)
        axes.set_yticks(rows, [_short(name) for name in names])
        _lay_rows(axes, "% of the images")
    return chart.svg


def _lay_rows(axes: Axes, unit: str) -> None:
    """Bars that lie below each other, the first on top, with room for their numbers."""
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.spines["left"].set_visible(False)
    axes.tick_params(left=False)
    axes.margins(x=0.12)


def _bars(
    axes: Axes, rows: np.ndarray, counts: Mapping[str, int], names: Sequence[str], wide: float, color: str, who: str
) -> None:
    total = sum(counts.values()) or 1
    shares = [100 * counts.get(name, 0) / total for name in names]
    bars = axes.barh(rows, shares, wide, color=color, label=who)
    axes.bar_label(bars, [f"{share:.1f}" for share in shares], padding=3, fontsize=8, color=_INK)


def scores_chart(now: Sequence[int], before: Sequence[int] | None, edges: np.ndarray, threshold: float | None) -> Markup:
    """Share of the images by score, beside the run before."""
    chart = _Chart("Share of the images by score")
    with chart as axes:
        axes.stairs(_percent(now), edges, fill=True, color=_NOW, label="this run")
        if before is not None and any(before):
            axes.stairs(_percent(before), edges, color=_BEFORE, linewidth=1.8, label="the run before")
        if threshold is not None:
            axes.axvline(threshold, color=_INK, linestyle="--", linewidth=1, label="below: abstained")
        if axes.get_legend_handles_labels()[1][1:]:
            axes.legend(loc="upper left", fontsize=9)
        axes.set_xlabel("score")
        axes.set_ylabel("% of the images")
        axes.set_xlim(0, 1)
    return chart.svg


def _percent(counts: Sequence[int]) -> np.ndarray:
    values = np.array(counts, np.float64)
    share: np.ndarray = 100 * values / (values.sum() or 1)
    return share


def throughput_chart(history: Sequence[Sequence[float]]) -> Markup:
    """Images a second over time.

    Args:
        history: [seconds since the epoch, images done], in order.
    """
    chart = _Chart("Images a second over time")
    with chart as axes:
        at, done = np.array(history, np.float64).T
        rates = np.diff(done) / np.maximum(np.diff(at), 1e-3)
        axes.stairs(np.maximum(rates, 0), at - at[0], fill=True, color=_NOW)
        axes.set_xlabel("seconds since the first image was asked for")
        axes.set_ylabel("images a second")
        axes.set_ylim(bottom=0)
    return chart.svg


def stages_chart(seconds: Mapping[str, float]) -> Markup:
    """Seconds in each stage, summed over all that worked on it."""
    chart = _Chart("Seconds in each stage", 0.7 + 0.3 * max(2, len(seconds)))
    with chart as axes:
        bars = axes.barh(list(seconds), list(seconds.values()), 0.6, color=_NOW)
        axes.bar_label(bars, [f"{value:,.1f}" for value in seconds.values()], padding=3, fontsize=8, color=_INK)
        _lay_rows(axes, "seconds, summed over all workers")
    return chart.svg


def curves_chart(curves: Sequence[Curve]) -> Markup:
    """Precision against recall of up to eight labels."""
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
    """The share of right answers by score: on the diagonal scores are honest. The larger a dot, the more images."""
    chart = _Chart("Share of right answers by score", 3.2)
    with chart as axes:
        axes.plot([0, 1], [0, 1], color=_FAINT, linestyle="--", linewidth=1)
        axes.plot(bins["score"], bins["right"], color=_NOW, linewidth=1.4)
        axes.scatter(bins["score"], bins["right"], 20 + 180 * bins["images"] / bins["images"].max(), color=_NOW)
        axes.set(xlabel="score", ylabel="share of right answers", xlim=(0, 1.04), ylim=(0, 1.08))
        axes.grid(visible=True)
    return chart.svg


def _short(name: str) -> str:
    return name if len(name) <= 28 else name[:27] + "…"
