"""Facts and a template -> one HTML page that needs no network and runs only its own script.

Names, labels and messages come from a store and are escaped as text. If escaping failed, the page's content security policy
would still stop them from loading or running anything.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

_TEMPLATES = Path(__file__).with_name("templates")


class Thumbnail(NamedTuple):
    """One image on a page; `data` is a data URL, or None if the image can no longer be read."""

    key: str
    label: str
    score: float
    why: str
    data: str | None


def thumbnails_of(rows: pd.DataFrame, why: str, pictures: Mapping[tuple[str, str], str]) -> list[Thumbnail]:
    """Rows of a table as thumbnails.

    Args:
        rows: with `uri, key, label, score`.
        why: why these images are shown.
        pictures: data URLs of the readable images, by uri and key.
    """
    columns = zip(*(rows[name] for name in ("uri", "key", "label", "score")), strict=True)
    return [Thumbnail(key, label, float(score), why, pictures.get((uri, key))) for uri, key, label, score in columns]


def render(template: str, title: str, script: str | None = None, **facts: Any) -> bytes:
    """Render a page as HTML.

    Args:
        template: file name in `templates/`.
        title: title of the page.
        script: file name of the page's script in `templates/`, if it has one.
        **facts: variables of the template.
    """
    code = Markup((_TEMPLATES / script).read_text()) if script else None  # noqa: S704 - our own file
    scripts = "" if code is None else f"; script-src 'sha256-{_digest(code.strip())}'"
    facts |= {
        "title": title,
        "policy": f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'{scripts}",
        "style": Markup((_TEMPLATES / "style.css").read_text()),  # noqa: S704 - our own file
        "script": None if code is None else code.strip(),
    }
    # A lone surrogate cannot be encoded in UTF-8.
    return _environment().get_template(template).render(facts).encode("utf-8", "replace")


def _digest(code: str) -> str:
    return base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["exact"] = _exact
    return environment


def _exact(text: str) -> Markup:
    """Text as an attribute value that a script reads back unchanged: HTML parsers replace a bare CR with a line feed."""
    return escape(text).replace("\r", Markup("&#13;"))
