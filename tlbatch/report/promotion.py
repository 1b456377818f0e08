"""The conditions of `promote_if` -> whether a complete run may be published."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tlbatch.errors import ConfigError
from tlbatch.output.commit import Promotion
from tlbatch.output.documents import ReportDocument
from tlbatch.output.run import OutputState, Run
from tlbatch.report.compare import compare_tables


class Condition(NamedTuple):
    """One part of `promote_if`: a number of `compare`, an operator and a limit."""

    name: str
    operator: str
    value: float

    def holds(self, measured: float) -> bool:
        """Whether the measured number meets the condition."""
        return _OPERATORS[self.operator](measured, self.value)


_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": lambda one, other: one <= other,
    ">=": lambda one, other: one >= other,
    "<": lambda one, other: one < other,
    ">": lambda one, other: one > other,
}
_NAMES = ("psi", "psi_scores", "psi_labels", "psi_features", "agreement")


def parse_conditions(text: str) -> list[Condition]:
    """Parse conditions such as `psi<0.2 and agreement>0.9`.

    Raises:
        ConfigError: the text cannot be parsed.
    """
    found = []
    for part in re.split(r"\s+and\s+", text.strip()):
        match = re.fullmatch(r"(\w+)\s*(<=|>=|<|>)\s*(\d*\.?\d+)", part.strip())
        if match is None or match[1] not in _NAMES:
            raise ConfigError(
                f"promote_if: write conditions as `psi<0.2 and agreement>0.9`, of {', '.join(_NAMES)}; found {part!r}."
            )
        found.append(Condition(match[1], match[2], float(match[3])))
    return list(found)


def check_promotion(state: OutputState, run: Run, report: ReportDocument, conditions: Sequence[Condition]) -> Promotion:
    """Compare a complete run, whose report may not be written yet, with the current table.

    Returns:
        The result of `compare` (None if nothing is published yet), and a sentence for each condition that does not hold.
    """
    table = state.table
    if not table:
        return Promotion(checked=True)
    measured = compare_tables(table, state.table_after(run), most=0, unwritten={run.run_id: report})
    broken = []
    for condition in conditions:
        value = measured.get(condition.name)
        if value is None:
            broken.append(f"{condition.name} is unknown, because one of the runs has no features")
        elif not condition.holds(value):
            broken.append(f"{condition.name} is {value:.4f} and not {condition.operator} {condition.value:g}")
    return Promotion(measured, broken, checked=True)
