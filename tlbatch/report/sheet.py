"""Thumbnails of images to review -> a labelling page: each image with its predicted label and a field for the true label."""

from __future__ import annotations

from collections.abc import Sequence

from tlbatch.report.html import Thumbnail, render


def make_labelling_page(title: str, thumbnails: Sequence[Thumbnail], labels: Sequence[str]) -> bytes:
    """The labelling page as HTML. Its button saves the entered labels as a labels file for `train --labels`."""
    return render("sheet.html", title, "sheet.js", thumbnails=list(thumbnails), labels=list(labels))
