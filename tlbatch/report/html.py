"""Facts and a template -> one HTML page that needs no network and runs nothing but its own script.

Names, labels and messages come from a store and are text here, whatever they look like; if they were not, the page's policy
would still let none of them load or run anything.
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
    """One image on a page: `data` is a data URL, None where it cannot be shown any more."""

    key: str
    label: str
    score: float
    why: str
    data: str | None


def thumbnails_of(rows: pd.DataFrame, why: str, pictures: Mapping[tuple[str, str], str]) -> list[Thumbnail]:
    """Rows of a table with the pictures that could be had, by uri and key."""
    columns = zip(*(rows[name] for name in ("uri", "key", "label", "score")), strict=True)
    return [Thumbnail(key, label, float(score), why, pictures.get((uri, key))) for uri, key, label, score in columns]


def render(template: str, title: str, script: str | None = None, **facts: Any) -> bytes:
    """A page.

    Args:
        template: its file in `templates/`.
        title: of the page.
        script: its script's file there, if it has one.
        **facts: what the template speaks of.
    """
    code = Markup((_TEMPLATES / script).read_text()) if script else None  # noqa: S704 - our own file
    scripts = "" if code is None else f"; script-src 'sha256-{_digest(code.strip())}'"
    facts |= {
        "title": title,
        "policy": f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'{scripts}",
        "style": Markup((_TEMPLATES / "style.css").read_text()),  # noqa: S704 - our own file
        "script": None if code is None else code.strip(),
    }
    # Half of a surrogate pair is no character that a page could hold.
    return _environment().get_template(template).render(facts).encode("utf-8", "replace")


def _digest(code: str) -> str:
    return base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()


@cache
def _environment() -> Environment:
    found = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    found.filters["exact"] = _exact
    return found


def _exact(text: str) -> Markup:
    """Text as an attribute that a script reads back to the character: a page's reader takes a bare CR for a line feed."""
    return escape(text).replace("\r", Markup("&#13;"))
