"""What the clients of obstore share: settings from storage options, timeouts, requests, and which keys they can name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tlbatch.errors import ChangedError, ConfigError, closest

#: Timeouts in seconds without data, and for connecting. The connection is closed as well, so that a retry opens a new one.
REQUEST_SECONDS, CONNECT_SECONDS = 20.0, 5.0
_WHOLE_SECONDS = 1800.0


class Address(NamedTuple):
    """Bucket (or container) and key of an object or a folder, and the settings of the bucket's client."""

    bucket: str
    key: str
    settings: dict[str, Any]


def split(url: str) -> tuple[str, str]:
    """Bucket and key of a URL."""
    bucket, _, key = url.partition("://")[2].partition("/")
    return bucket, key


def as_settings(protocol: str, options: Mapping[str, Any], known: Mapping[str, str | None]) -> dict[str, Any]:
    """Options under the names that obstore's client has for them.

    Args:
        protocol: of the store.
        options: the options.
        known: the name of each option that there is; None: it is accepted and not needed.

    Raises:
        ConfigError: there is no such option.
    """
    for name in options:
        if name not in known:
            raise ConfigError(
                f"storage_options: {protocol}:// has no option {name!r}{closest(name, known)}; it has {', '.join(known)}."
            )
    return {new: options[name] for name, new in known.items() if new and options.get(name) is not None}


def can_name(key: str) -> bool:
    """Whether obstore can represent this key, for which it is a path and no text. It takes off a slash at either end."""
    return key == "" or all(part not in ("", ".", "..") and part.isprintable() for part in key.split("/"))


def get_options(start: int, end: int | None, etag: str | None) -> dict[str, Any]:
    """What `obstore.get` takes for the bytes from `start` to `end`, and for one version only."""
    options: dict[str, Any] = {"if_match": f'"{plain_etag(etag)}"'} if etag else {}
    if end is not None:
        options["range"] = (start, end)
    elif start:
        options["range"] = {"offset": start}
    return options


def require_version(key: str, found: str, etag: str | None) -> None:
    """Raises ChangedError if an answer is of another version than `etag`: many servers do not look at `If-Match` of a GET."""
    if etag and found and plain_etag(found) != plain_etag(etag):
        raise ChangedError(
            f"{key} was replaced after it was listed: its etag is {plain_etag(found)} and not {plain_etag(etag)}"
        )


def plain_etag(etag: str) -> str:
    """An etag without the quotation marks that HTTP puts around it, and many lists as well."""
    return etag.removeprefix("W/").strip('"')


def client_options(*, plain_http: bool) -> Any:
    """Timeouts of obstore's clients; plain HTTP only where the address says so."""
    return {
        "allow_http": plain_http,
        "read_timeout": f"{REQUEST_SECONDS:.0f}s",  # without data; a slow body may take longer in total
        "timeout": f"{_WHOLE_SECONDS:.0f}s",
        "connect_timeout": f"{CONNECT_SECONDS:.0f}s",
    }
