"""A URL or path -> its storage location; and copies of remote folders on this machine."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec

from tlbatch.errors import ConfigError, StoreError
from tlbatch.storage.local import LocalLocation
from tlbatch.storage.location import Location
from tlbatch.storage.remote import RemoteLocation

log = logging.getLogger(__name__)

T = TypeVar("T")


def resolve(url: str, options: Mapping[str, Any] | None = None) -> Location:
    """The place a URL or path names.

    Args:
        url: a local path, `file://…`, or any URL fsspec knows (`s3://bucket/prefix`).
        options: fsspec's `storage_options` (endpoint, region); never secrets, which come from the environment.

    Raises:
        ConfigError: a URL of an unknown protocol, or one with a password in it.
    """
    if "://" not in url:
        return LocalLocation(Path(os.path.abspath(os.path.expanduser(url))))
    parts = urlsplit(url)
    if parts.scheme == "file":
        return LocalLocation(Path(os.path.abspath(url.removeprefix("file://"))))
    if parts.password or (parts.username and parts.scheme in ("s3", "s3a", "gs", "az")):
        raise ConfigError(f"The {parts.scheme}:// URL carries a credential; take it out and set it in the environment instead.")
    if parts.scheme not in fsspec.available_protocols():
        raise ConfigError(f"No storage speaks {parts.scheme}:// here ({url}); use a path, s3:// or another fsspec protocol.")
    try:
        fsspec.get_filesystem_class(parts.scheme)
    except ImportError as error:
        raise ConfigError(f"{parts.scheme}:// needs another package: {error}.") from None
    return RemoteLocation(url.rstrip("/"), dict(options or {}))


def require_folder(location: Location) -> None:
    """Raises StoreError where there is nothing at `place`, with the one sentence a person needs."""
    try:
        found = location.exists()
    except PermissionError as error:
        raise StoreError(f"The store {location.url} may not be read: {error}.") from None
    if not found:
        bucket = location.lacks_bucket() if isinstance(location, RemoteLocation) else None
        missing = f"there is no bucket {bucket!r}" if bucket else "there is nothing under this name"
        raise StoreError(f"The store {location.url} does not exist: {missing}.")


def local_copy(location: Location, names: Mapping[str, str], cache: Path) -> Path:
    """A folder on this machine that holds the files `names` (name -> sha256) of `place`.

    A local place is used where it lies. A remote one is downloaded once a machine into `cache`, whose name its caller
    chose from the contents: a second worker finds it finished or makes its own and loses the rename.

    Raises:
        ConfigError: others may write where the caches are, and so into what is about to be loaded.
    """
    if isinstance(location, LocalLocation):
        return location.path
    cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = cache.parent.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ConfigError(f"{cache.parent} can be written by others: remove it, or let TMPDIR name another folder.")
    if cache.is_dir():
        return cache
    with tempfile.TemporaryDirectory(dir=cache.parent, prefix=".download-") as temporary:
        for name in names:
            target = Path(temporary, "files", name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(location.join(*name.split("/")).read())
        try:
            Path(temporary, "files").rename(cache)
        except OSError:
            if not cache.is_dir():
                raise
    return cache
