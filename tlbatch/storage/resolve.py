"""A URL or path -> its storage location; a remote folder -> a copy on this machine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import fsspec
from botocore.exceptions import ParamValidationError
from botocore.handlers import validate_bucket_name

from tlbatch.errors import ConfigError, StoreError
from tlbatch.storage.clouds import PROTOCOLS as CLOUDS
from tlbatch.storage.clouds import CloudLocation
from tlbatch.storage.local import LocalLocation
from tlbatch.storage.location import Location
from tlbatch.storage.remote import RemoteLocation

#: Locations that are not on a disk of this machine.
REMOTE = (RemoteLocation, CloudLocation)


def resolve(url: str, options: Mapping[str, Any] | None = None) -> Location:
    """Return the location of a URL or path.

    Args:
        url: a local path, `file://…`, or any URL fsspec knows (`s3://bucket/prefix`).
        options: fsspec's `storage_options` (endpoint, region), or under an address those of all that is below it. Secrets are
            not allowed; they come from the environment.

    Raises:
        ConfigError: the protocol is unknown, the URL contains a credential, or has no bucket of a possible name.
    """
    if "://" not in url:
        return LocalLocation(Path(os.path.abspath(os.path.expanduser(url))))
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ConfigError(f"{url} is not a URL: {error}.") from None
    if parts.scheme == "file":
        return LocalLocation(_path_of(url))
    if parts.password or (parts.username and parts.scheme in ("s3", "s3a", "gs", "gcs", "az", "azure")):
        raise ConfigError(f"The {parts.scheme}:// URL contains a credential; remove it and set it in the environment instead.")
    if parts.scheme in CLOUDS:
        return CloudLocation(url.rstrip("/"), _options_for(url, options or {}))
    if parts.scheme not in fsspec.available_protocols():
        raise ConfigError(f"Unknown protocol {parts.scheme}:// in {url}; use a path, s3:// or another fsspec protocol.")
    try:
        fsspec.get_filesystem_class(parts.scheme)
    except ImportError as error:
        raise ConfigError(f"{parts.scheme}:// needs an additional package: {error}.") from None
    if parts.scheme in ("s3", "s3a"):
        _require_bucket(url)
    return RemoteLocation(url.rstrip("/"), _options_for(url, options or {}))


def _require_bucket(url: str) -> None:
    """Raises ConfigError if the bucket of a URL has a name that no bucket of S3 can have."""
    name = url.partition("://")[2].partition("/")[0]
    try:
        validate_bucket_name({"Bucket": name})
    except ParamValidationError:
        raise ConfigError(f"{url}: {name!r} cannot be the name of a bucket.") from None


def _options_for(url: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a URL: those without an address, then those under an address above it; the longest one counts most."""
    found = {name: value for name, value in options.items() if "://" not in name}
    for above in sorted((name for name in options if "://" in name), key=len):
        if f"{url.rstrip('/')}/".startswith(f"{above.rstrip('/')}/"):
            found |= options[above]
    return found


def _path_of(url: str) -> Path:
    """The path of a `file://` URL. Escapes such as `%20` are decoded, unless a file has them in its name."""
    written = Path(os.path.abspath("/" + url.removeprefix("file://").removeprefix("localhost/").removeprefix("/")))
    decoded = Path(os.path.abspath(unquote(str(written))))
    return written if written == decoded or os.path.lexists(written) else decoded


def require_folder(location: Location) -> None:
    """Raise StoreError if nothing exists at `location`, with a message that says what is missing."""
    try:
        found = location.exists()
    except PermissionError as error:
        raise not_permitted(location, error) from None
    if not found:
        bucket = location.lacks_bucket() if isinstance(location, REMOTE) else None
        missing = f"there is no bucket {bucket!r}" if bucket else "nothing is stored under this name"
        raise StoreError(f"The store {location.url} does not exist: {missing}.")


class _Addressed(Protocol):
    @property
    def url(self) -> str: ...


def not_permitted(store: _Addressed, error: PermissionError) -> StoreError:
    """The error about a store that may not be read; it says if anybody may list it, but not with these credentials."""
    public = ""
    if isinstance(store, REMOTE) and store.is_public():
        bucket = "/".join(store.url.split("/", 3)[:3])
        public = f" It answers without credentials: add --set 'storage_options={{\"{bucket}\": {{anon: true}}}}'."
    return StoreError(f"No permission to read the store {store.url}: {error}.{public}")


def local_copy(location: Location, names: Mapping[str, str], cache: Path) -> Path:
    """Return a folder on this machine that contains the files `names` (name -> sha256) of `location`.

    A local folder is used in place. A remote folder is downloaded once for each machine into `cache`, whose name the caller
    derives from the contents. A second worker finds the finished copy, or downloads its own copy and discards it if the other
    worker renames first.

    Raises:
        ConfigError: other users can write to the folder of the caches, and could replace the files that are about to be loaded.
    """
    if isinstance(location, LocalLocation):
        return location.path
    cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = cache.parent.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ConfigError(f"Other users can write to {cache.parent}; remove it, or set TMPDIR to another folder.")
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
