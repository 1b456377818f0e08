"""Pictures to review -> one page: each with what the model said and a field for what it is."""

from __future__ import annotations

from collections.abc import Sequence

from tlbatch.report.html import Thumbnail, render


def make_sheet(title: str, shots: Sequence[Thumbnail], labels: Sequence[str]) -> bytes:
    """The contact sheet as HTML; its button saves what was filled in as a labels file for `train --labels`."""
    return render("sheet.html", title, "sheet.js", shots=list(shots), labels=list(labels))
