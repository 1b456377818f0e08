"""Thumbnails of images to review -> a labelling page: each image with its predicted label and a field for the true label."""

from __future__ import annotations

from collections.abc import Sequence

from tlbatch.images.labels import WITHDRAWN
from tlbatch.report.html import Thumbnail, render


def make_labelling_page(title: str, thumbnails: Sequence[Thumbnail], uris: Sequence[str], labels: Sequence[str]) -> bytes:
    """The labelling page as HTML. Its button saves the entered labels as a labels file for `train --labels`.

    Args:
        title: the heading.
        thumbnails: the images.
        uris: the address of each image.
        labels: the labels that the fields suggest.
    """
    images = list(zip(uris, thumbnails, strict=True))
    return render("sheet.html", title, "sheet.js", images=images, labels=list(labels), withdrawn=WITHDRAWN)
