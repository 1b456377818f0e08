"""A request -> whether it may enter: to this machine only, with the token, and sent by a page of this application.

Another page in the same browser can send requests here, and a name of the Internet can be made to point to this machine (DNS
rebinding). So the token is in a cookie that only this application's own pages send, the Host is checked, and of a request that
changes something the Origin.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: The parameter of the address that is printed, by which a browser gets its cookie.
TOKEN = "token"  # noqa: S105 - a name
_SAFE_METHODS = ("GET", "HEAD")
_POLICY = "; ".join(
    [
        "default-src 'none'",
        *(f"{what}-src 'self'" for what in ("img", "style", "script", "connect")),
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    ]
)
_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Doors:
    """ASGI middleware that refuses what may not enter, and adds the headers of a page that loads nothing from elsewhere.

    Args:
        app: what answers the other requests.
        port: the port that the application listens on.
        token: what a browser must know.
    """

    def __init__(self, app: ASGIApp, port: int, token: str) -> None:
        self._app, self._token = app, token
        self._hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        self._cookie = f"tlbatch-{port}"  # cookies of one host are those of all its ports

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        answer = self._refusal(scope) or self._greeting(scope) or self._app
        await answer(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if host not in self._hosts:
            return _refused(421, "This address is not the one that tlbatch printed.")
        origin = headers.get("origin")
        if (origin is None and scope["method"] not in _SAFE_METHODS) or origin not in (None, f"http://{host}"):
            return _refused(403, "This was sent by a page of another site.")
        if not (self._knows(self._token_of_cookie(headers)) or self._knows(_token_of_address(scope))):
            return _refused(403, "Open the whole address that tlbatch printed; it has a token at its end.")
        return None

    def _greeting(self, scope: Scope) -> Response | None:
        """For an address with the token: the same address without it, and the cookie."""
        if scope["method"] != "GET" or not self._knows(_token_of_address(scope)):
            return None
        rest = urlencode([pair for pair in parse_qsl(scope["query_string"].decode("latin-1")) if pair[0] != TOKEN])
        answer = RedirectResponse(f"/{scope['path'].lstrip('/')}" + (f"?{rest}" if rest else ""), 303)
        answer.set_cookie(self._cookie, self._token, httponly=True, samesite="lax")
        return answer

    def _knows(self, token: str) -> bool:
        return secrets.compare_digest(token.encode("utf-8", "replace"), self._token.encode())

    def _token_of_cookie(self, headers: Headers) -> str:
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(self._cookie)
        except CookieError:
            return ""
        return str(found.value) if found else ""


def _token_of_address(scope: Scope) -> str:
    found: str = dict(parse_qsl(scope["query_string"].decode("latin-1"))).get(TOKEN, "")
    return found


def _refused(status: int, why: str) -> Response:
    return PlainTextResponse(f"{why}\n", status)
