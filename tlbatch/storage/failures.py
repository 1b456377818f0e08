"""Exceptions of botocore, aiohttp and obstore -> an OSError with a message of one line that names the location."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from botocore import exceptions as botocore_errors

from tlbatch.errors import (
    ArchivedError,
    ChangedError,
    ConfigError,
    CredentialsError,
    RefusedError,
    ThrottledError,
    UsageError,
    closest,
    line_of,
)

_NO_CREDENTIALS = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"}
    | {"TokenRefreshRequired", "RequestTimeTooSkewed", "NoCredentialsError", "UnauthenticatedError", "DefaultCredentialsError"}
    | {"AuthenticationFailed", "InvalidAuthenticationInfo", "NoAuthenticationInformation"}
)
# 409 is in none of them: another request is at work on the same key, and the same request may succeed a moment later.
_KINDS: tuple[tuple[frozenset[str], type[OSError]], ...] = (
    (_NO_CREDENTIALS, CredentialsError),
    # A range beyond the end: the object is shorter than it was listed.
    (frozenset({"PreconditionFailed", "412", "InvalidRange", "416"}), ChangedError),
    (
        frozenset(
            {"SlowDown", "ServiceUnavailable", "Throttling", "TooManyRequests", "RequestLimitExceeded", "ServerBusy"}
            | {"503", "429"}
        ),
        ThrottledError,
    ),
    (frozenset({"NoSuchKey", "NoSuchBucket", "BlobNotFound", "ContainerNotFound", "404", "410"}), FileNotFoundError),
    (frozenset({"InvalidObjectState", "BlobArchived"}), ArchivedError),
    (frozenset({"AccessDenied", "AllAccessDisabled", "Forbidden", "401", "403"}), PermissionError),
    (frozenset({"InvalidArgument", "InvalidRequest", "MethodNotAllowed", "NotImplemented", "400", "405", "501"}), RefusedError),
    (frozenset({"RequestTimeout", "ConnectTimeoutError", "ReadTimeoutError"}), TimeoutError),
)


_KNOWN_CODES = frozenset().union(*(codes for codes, _ in _KINDS))


@contextmanager
def as_oserror(url: str) -> Iterator[None]:
    """Turn exceptions of botocore, aiohttp and obstore into an OSError with a message of one line that names the location."""
    try:
        yield
    except _OUR_ERRORS:
        raise
    except Exception as error:
        code = error_code(error)
        if isinstance(error, OSError) and (not code or str(error).startswith(url)):
            raise
        raise _kind(error, code)(f"{url}: {_sentence(error, code)}") from error


def _kind(error: Exception, code: str) -> type[OSError]:
    for codes, kind in _KINDS:
        if code in codes:
            return kind
    for known in (FileNotFoundError, PermissionError, FileExistsError):
        if isinstance(error, known):
            return known
    return TimeoutError if "timed out" in str(error) else OSError


_OUR_ERRORS = (ThrottledError, ChangedError, ArchivedError, CredentialsError, RefusedError, UsageError)


@contextmanager
def as_config_error(protocol: str, known: Iterable[str]) -> Iterator[None]:
    """While a client is created: turn what storage options or the environment have wrong into a ConfigError.

    Such an error would otherwise look like a store that does not answer, for which a command waits.

    Args:
        protocol: of the store.
        known: the names of its options, for a suggestion.
    """
    try:
        yield
    except _NETWORK:
        raise
    except _MISTAKES as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown:
            raise ConfigError(
                f"storage_options: {protocol}:// has no option {unknown[1]!r}{closest(unknown[1], known)}."
            ) from None
        reason = _sentence(error, "").rstrip(".")
        raise ConfigError(f"{protocol}:// does not work with these storage_options and this environment: {reason}.") from None


_MISTAKES = (TypeError, ValueError, KeyError, AttributeError, ImportError, botocore_errors.BotoCoreError)
#: Errors of looking credentials up over the network.
_NETWORK = (
    OSError,
    botocore_errors.HTTPClientError,
    botocore_errors.ConnectionError,
    botocore_errors.CredentialRetrievalError,
    botocore_errors.MetadataRetrievalError,
    botocore_errors.TokenRetrievalError,
)


def error_code(error: BaseException | None) -> str:
    """The S3 error code or HTTP status of an exception or its causes; an empty string if there is none."""
    while error is not None:
        answer = getattr(error, "response", None)
        if isinstance(answer, dict) and "Error" in answer:
            return str(answer["Error"].get("Code", ""))
        status = getattr(error, "status", None)  # aiohttp's
        if isinstance(status, int):
            return str(status)
        searches = (r"<Code>(\w+)</Code>", r"(?:error response|status code):? (\d{3})")
        found = [code[1] for code in (re.search(one, str(error)) for one in searches) if code]
        if found:  # of a code that is not known the status still tells the kind
            return next((code for code in found if code in _KNOWN_CODES), found[0])
        if type(error).__name__ in _ERROR_CLASS_NAMES:
            return type(error).__name__
        error = error.__cause__
    return ""


_ERROR_CLASS_NAMES = frozenset(
    {"NoCredentialsError", "UnauthenticatedError", "DefaultCredentialsError", "ConnectTimeoutError", "ReadTimeoutError"}
)


def _sentence(error: Exception, code: str) -> str:
    if code in ("NoCredentialsError", "UnauthenticatedError", "DefaultCredentialsError"):
        return (
            "there are no credentials; set them in the environment, or storage_options={anon: true} for a public bucket "
            "({token: anon} on gs://)"
        )
    text = str(error)
    message = re.search(r"<Message>(.*?)</Message>", text, re.DOTALL)
    if message:
        return f"{code}: {message.group(1).splitlines()[0]}"
    request = re.search(r"Error performing (\w+) (\w+://[^/\s]+)\S* in \S+ - (.*)", text)
    if request:
        method, host, reason = request.groups()
        return f"{method} {host}: {reason.replace('error sending request', 'the connection failed')[:300]}"
    first = line_of(error)
    return f"{code}: {first}" if code and code not in first else first
