"""Pictures to review -> one HTML page without a network: each with what the model said and a field for what it is.

Keys and labels come from a store and are escaped; the page's policy lets it load nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import NamedTuple


class Picture(NamedTuple):
    """One image to review: `data` is a data URL, None where it cannot be read any more."""

    key: str
    label: str
    score: float
    why: str
    data: str | None


_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.4 system-ui, sans-serif; margin: 1rem; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem; }
figure { margin: 0; padding: .5rem; border: 1px solid #8886; border-radius: .4rem; }
figure img, figure .none { display: block; width: 100%; height: 9rem; object-fit: contain; background: #8882; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; }
label { display: block; margin-top: .3rem; }
input { width: 100%; box-sizing: border-box; font: inherit; }
header { position: sticky; top: 0; background: Canvas; padding: .5rem 0; z-index: 1; }
button { font: inherit; padding: .3rem .8rem; }
"""

_SCRIPT = """
const quoted = text => /[",\\r\\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
const fields = [...document.querySelectorAll('input')];
const count = () => {
  document.querySelector('output').textContent = fields.filter(field => field.value.trim()).length + ' of ' + fields.length;
};
document.addEventListener('input', count);
document.querySelector('button').addEventListener('click', () => {
  const rows = fields.filter(field => field.value.trim()).map(
    field => quoted(KEYS[Number(field.dataset.number)]) + ',' + quoted(field.value.trim()));
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob(['key,label\\n' + rows.map(row => row + '\\n').join('')], {type: 'text/csv'}));
  link.download = 'labels.csv';
  link.click();
});
count();
"""


def make_sheet(title: str, pictures: Sequence[Picture], labels: Sequence[str]) -> bytes:
    """The contact sheet as HTML; its button saves what was filled in as a labels file for `train --labels`."""
    figures = "".join(_figure(number, picture) for number, picture in enumerate(pictures))
    options = "".join(f'<option value="{escape(label)}">' for label in labels)
    keys = json.dumps([picture.key for picture in pictures]).replace("<", "\\u003c")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f'<meta http-equiv=Content-Security-Policy content="{policy}">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
        f"<header><h1>{escape(title)}</h1><button type=button>Save labels.csv</button> <output></output> labelled</header>"
        f"<datalist id=labels>{options}</datalist><main>{figures}</main>"
        f"<script>const KEYS = {keys};{_SCRIPT}</script>"
    )
    return page.encode()


def _figure(number: int, picture: Picture) -> str:
    name = escape(picture.key)
    image = f'<img src="{picture.data}" alt="{name}">' if picture.data else "<div class=none>cannot be read any more</div>"
    said = f"{escape(picture.label)} {picture.score:.3f} · {escape(picture.why)}"
    field = f'<input list=labels data-number={number} placeholder="{escape(picture.label)}?">'
    return f"<figure>{image}<figcaption>{name}<br>{said}</figcaption><label>It is {field}</label></figure>"
