"""Requests -> pages: the gallery, one image, the images that failed; and the corrections that a person makes there."""

from __future__ import annotations

import logging
import textwrap
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from tlbatch.errors import ErrorKind, Failure, TlbatchError
from tlbatch.output.rows import RowFiles
from tlbatch.web.catalog import BARS, PAGE, Cursor, Listed, Wanted
from tlbatch.web.corrections import Corrections
from tlbatch.web.opened import Opened, name_of

log = logging.getLogger(__name__)

_HERE = Path(__file__).parent
#: Bytes of a form, and characters of a label.
_MOST_OF_A_FORM, _MOST_OF_A_LABEL = 16_384, 500
#: Seconds after which the output is asked again whether another table was published.
_ASKED_EVERY = 10.0
#: Labels that have a key of the keyboard.
_KEYS = 9
#: Seconds for which a browser keeps a picture: it is one of a version of an image.
_KEPT = "private, max-age=86400"
_NOTHING = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 160 160"><rect width="160" height="160" fill="#8883"/>{}</svg>'
_LINE = '<text x="80" y="{}" text-anchor="middle" font-family="sans-serif" font-size="13" fill="#888">{}</text>'


class Application:
    """What answers the requests.

    Args:
        title: what the pages are about.
        reopen: opens the table as it is published now.
        corrections: where corrections go.
    """

    def __init__(self, title: str, reopen: Callable[[], Opened], corrections: Corrections) -> None:
        self._title, self._reopen, self._corrections = title, reopen, corrections
        self._opened = reopen()
        self._opening = threading.Lock()
        self._asked, self._is_current = time.monotonic(), True

    @property
    def images(self) -> int:
        """How many images the table has."""
        return self._opened.catalog.images

    def asgi(self) -> Starlette:
        """The application as a server takes it."""
        small = "/small/{folder}/{run_id}/{number:int}"
        routes = [
            Route("/", self._gallery),
            Route("/tiles", self._tiles),
            Route("/facets", self._facets),
            Route("/image/{run_id}/{number:int}", self._image),
            Route("/errors", self._errors),
            Route(small, self._small),
            Route("/whole/{run_id}/{number:int}", self._whole),
            Route("/label", self._label, methods=["POST"]),
            Route("/reload", self._reload, methods=["POST"]),
            Mount("/static", StaticFiles(directory=_HERE / "static")),
        ]
        handlers: Mapping[Any, Any] = {HTTPException: self._refuse, TlbatchError: self._apologize, OSError: self._apologize}
        return Starlette(routes=routes, exception_handlers=handlers)

    def _gallery(self, request: Request) -> Response:
        """The images of a filter, and the filter."""
        wanted, opened = _wanted(request), self._opened
        return self._page(
            "gallery.html",
            wanted=wanted,
            runs=[run.run_id for run in reversed(opened.runs)],
            images=opened.catalog.images,
            **self._tiles_of(opened, wanted, None),
        )

    def _tiles(self, request: Request) -> Response:
        """More images, behind those that a page has."""
        return _rendered("tiles.html", **self._tiles_of(self._opened, _wanted(request), _cursor(request)))

    def _tiles_of(self, opened: Opened, wanted: Wanted, after: Cursor | None) -> dict[str, Any]:
        listed = opened.catalog.page(wanted, after, most=PAGE + 1)
        rows = opened.tiles([one.place for one in listed[:PAGE]])
        tiles = [self._tile(opened, one, row, wanted) for one, row in zip(listed, rows, strict=False)]
        more = f"/tiles?{urlencode({**wanted.query(), 'after': listed[PAGE - 1].cursor})}" if len(listed) > PAGE else None
        return {"tiles": tiles, "more": more}

    def _tile(self, opened: Opened, one: Listed, row: Mapping[str, Any], wanted: Wanted) -> dict[str, Any]:
        address = f"{row['run_id']}/{row['number']}"
        return {
            **row,
            "address": address,
            "label": one.label,
            "score": one.score,
            "truth": opened.catalog.truth(one.place),
            "url": f"/image/{address}?{urlencode(wanted.query())}",
        }

    def _facets(self, request: Request) -> Response:
        """The labels and the scores of a filter's images, each a link to a narrower one."""
        wanted = _wanted(request)
        facets = self._opened.catalog.facets(wanted)
        most = max([*facets.bars, 1])
        bars = [
            {
                "count": count,
                "height": 0 if not count else max(2.0, 60 * count / most),
                "low": bar / BARS,
                "high": (bar + 1) / BARS,
                "url": f"/?{urlencode(wanted.query(low=bar / BARS, high=(bar + 1) / BARS))}",
                "chosen": wanted.low <= bar / BARS and (bar + 1) / BARS <= wanted.high,
            }
            for bar, count in enumerate(facets.bars)
        ]
        labels = [
            {"name": name, "count": count, "url": f"/?{urlencode(wanted.query(label='' if name == wanted.label else name))}"}
            for name, count in facets.labels.items()
        ]
        everything = f"/?{urlencode(wanted.query(low=0.0, high=1.0))}"
        return _rendered(
            "facets.html",
            wanted=wanted,
            bars=bars,
            labels=labels,
            images=facets.images,
            everything=everything,
            width=100 / BARS,
        )

    def _image(self, request: Request) -> Response:
        """One image: the picture, its scores, what was found before, and its neighbours in the order of the filter."""
        opened, wanted = self._opened, _wanted(request)
        place = self._place(request, opened.files)
        row = opened.row(place)
        cursor = opened.catalog.cursor(wanted, place)
        if cursor is None:
            raise HTTPException(404, "A newer run has replaced this row.")
        beside = partial(opened.catalog.page, wanted, cursor, most=1)
        return self._page(
            "image.html",
            row=row,
            address=f"{row['run_id']}/{row['number']}",
            scores=list(zip(row["top_labels"], row["top_scores"], strict=True)),
            truth=opened.catalog.truth(place),
            history=opened.history(row),
            back=f"/?{urlencode(wanted.query())}",
            before=self._link(opened, beside(backwards=True), wanted),
            behind=self._link(opened, beside(), wanted),
        )

    def _link(self, opened: Opened, found: Sequence[Listed], wanted: Wanted) -> str | None:
        if not found:
            return None
        run_id, number = opened.address(found[0].place)
        return f"/image/{run_id}/{number}?{urlencode(wanted.query())}"

    def _errors(self, request: Request) -> Response:
        """The images that failed, by reason."""
        opened = self._opened
        counts = {kind: len(places) for kind, places in opened.errors.by_kind.items()}
        kind = request.query_params.get("kind") or next(iter(counts), "")
        if kind and kind not in counts:
            raise HTTPException(400, "kind: no image of the table failed for such a reason.")
        after = _number(request.query_params.get("after", "-1"))
        places = opened.errors.by_kind.get(kind, ())
        shown = [int(place) for place in places if place > after][: PAGE + 1]
        rows = opened.error_rows(shown[:PAGE])
        more = f"/errors?{urlencode({'kind': kind, 'after': shown[PAGE - 1]})}" if len(shown) > PAGE else None
        advice = ErrorKind(kind).advice if kind else ""
        return self._page("errors.html", counts=counts, kind=kind, advice=advice, rows=rows, more=more)

    def _small(self, request: Request) -> Response:
        """A small picture, or a drawing that says why there is none."""
        opened, folder = self._opened, request.path_params["folder"]
        if folder == "errors":
            row = opened.error_rows([self._place(request, opened.errors.files)])[0]
            # What a decoder refused, or died of, is not given to a decoder again.
            picture = Failure(row["stage"], row["kind"], row["message"])
            return _picture(opened.pictures.small(row) if row["stage"] == "read" and row["transient"] else picture)
        return _picture(opened.pictures.small(opened.picture_row(self._place(request, opened.files))))

    def _whole(self, request: Request) -> Response:
        """The picture of an image as large as it is."""
        opened = self._opened
        return _picture(opened.pictures.whole(opened.picture_row(self._place(request, opened.files))))

    async def _label(self, request: Request) -> Response:
        """Give an image a label, or take it back with an empty one; answers with what the label was before."""
        form = await _form(request)
        return await run_in_threadpool(self._correct, form)

    def _correct(self, form: Mapping[str, str]) -> Response:
        opened, label = self._opened, form.get("label", "").strip()
        run_id, _, number = form.get("address", "").partition("/")
        place = opened.place(run_id, _number(number))
        if place is None or len(label) > _MOST_OF_A_LABEL:
            raise HTTPException(404, "There is no such image, or no such label.")
        row = opened.row(place)
        before = self._corrections.put(name_of(row), label or None)
        opened.learn(place, label)
        answer = _rendered("truth.html", truth=opened.catalog.truth(place), predicted=row["label"])
        answer.headers["X-Before"] = urlencode({"label": before or ""})
        return answer

    async def _reload(self, _: Request) -> Response:
        """Open the table as it is published now."""
        await run_in_threadpool(self._open_again)
        return RedirectResponse("/", 303)

    def _open_again(self) -> None:
        with self._opening:
            if not self._opened.is_current():
                self._opened = self._reopen()
            self._asked, self._is_current = time.monotonic(), True

    def _place(self, request: Request, files: RowFiles) -> int:
        place = self._opened.place(request.path_params["run_id"], request.path_params["number"], files)
        if place is None:
            raise HTTPException(404, "The table has no such image.")
        return place

    def _page(self, template: str, **facts: Any) -> Response:
        now = time.monotonic()
        if now - self._asked > _ASKED_EVERY:
            self._asked, self._is_current = now, self._opened.is_current()
        classes = self._opened.classes
        return _rendered(
            template,
            title=self._title,
            failed=self._opened.errors.images,
            is_current=self._is_current,
            classes=classes,
            keys=list(enumerate(classes[:_KEYS], 1)),
            corrections=self._corrections.location.url,
            **facts,
        )

    def _refuse(self, _: Request, error: Exception) -> Response:
        status, sentence = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, str(error))
        return _rendered("message.html", status, title=self._title, sentence=sentence)

    def _apologize(self, _: Request, error: Exception) -> Response:
        log.debug("Traceback:", exc_info=error)
        return _rendered("message.html", 500, title=self._title, sentence=str(error))


def _wanted(request: Request) -> Wanted:
    """The filter of an address; raises HTTPException if it is none."""
    given = {name: value for name, value in request.query_params.items() if value}
    try:
        return Wanted.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise HTTPException(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}.") from None


def _cursor(request: Request) -> Cursor | None:
    text = request.query_params.get("after")
    try:
        return Cursor.read(text) if text else None
    except ValueError:
        raise HTTPException(400, "after: this is no place in an order.") from None


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise HTTPException(400, "This is no number.") from None


async def _form(request: Request) -> dict[str, str]:
    """The fields of a small form."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > _MOST_OF_A_FORM:
            raise HTTPException(413, "The form is too large.")
    return dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True))


def _picture(picture: bytes | Failure) -> Response:
    if isinstance(picture, bytes):
        return Response(picture, media_type="image/jpeg", headers={"Cache-Control": _KEPT})
    lines = [str(picture.kind).replace("_", " "), *_wrapped(picture.message)]
    texts = "".join(_LINE.format(50 + 20 * number, escape(line)) for number, line in enumerate(lines))
    return Response(_NOTHING.format(texts), media_type="image/svg+xml")


def _wrapped(text: str, width: int = 24, most: int = 4) -> list[str]:
    return textwrap.wrap(text, width, max_lines=most, placeholder=" …")


def _rendered(template: str, status: int = 200, **facts: Any) -> Response:
    # A lone surrogate cannot be encoded in UTF-8.
    page = _environment().get_template(template).render(facts).encode("utf-8", "replace")
    return HTMLResponse(page, status)


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
