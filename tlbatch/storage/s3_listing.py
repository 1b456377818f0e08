"""A prefix of an S3 bucket -> the objects below it, in columns, and which of them are in an archive.

obstore lists without storage classes, and s3fs spends 100 us on each object (`benchmarks/stores.py`). Here a page is requested
with botocore's signature and connections, and its columns are cut out of the XML. Retries are up to the caller.
"""

from __future__ import annotations

import contextlib
import html
import queue
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import unquote_plus
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.exceptions import ClientError
from botocore.httpsession import URLLib3Session
from botocore.utils import get_environ_proxies

from tlbatch.errors import CredentialsError
from tlbatch.storage.location import EVERYTHING, LISTED, UNREADABLE, WalkRules

#: Folders listed concurrently, also the number at which the search for folders stops; and the most levels of that search.
LISTERS, _LEVELS = 16, 4
#: Part of the name of a bucket of S3 Express, which lists in no order.
_DIRECTORY_BUCKET = "--x-s3"
#: Pages of a folder that are put together, and how many of these wait in the queue to the consumer.
_PAGES_AT_ONCE, _PAGES_WAITING = 8, 8

#: Storage classes whose objects must be restored before they can be read. GLACIER_IR can be read. Tiers of
#: INTELLIGENT_TIERING are not in the listing; a GET finds them.
ARCHIVES = frozenset({"GLACIER", "DEEP_ARCHIVE"})
_ARCHIVES = pa.array(sorted(ARCHIVES))

#: Calls a function with retries.
Ask = Callable[[Callable[[], Any]], Any]


class Endpoint(NamedTuple):
    """How to reach a bucket.

    Attributes:
        url: its address.
        region: the region of its signatures.
        aws: whether it is Amazon's own: its listings can say which archived objects are restored, and are in order.
        certificates: a file of certificates, or True for the usual ones.
        timeout: seconds for connecting, and without data.
        credentials: gives botocore's frozen credentials; None for anonymous requests.
        head: gives the headers of an object by its key.
        headers: of every request.
    """

    url: str
    region: str
    aws: bool
    certificates: str | bool
    timeout: tuple[float, float]
    credentials: Callable[[], Any] | None
    head: Callable[[str], Mapping[str, Any]]
    headers: Mapping[str, str] = MappingProxyType({})


class Lane(NamedTuple):
    """A part of a folder: its keys behind `after` (empty: from the first one on), up to and with `last` (None: to the end)."""

    folder: str
    after: str = ""
    last: str | None = None

    def own(self, objects: pa.RecordBatch) -> pa.RecordBatch:
        """The objects that belong to the lane, on whatever page a server sends them."""
        mine = pc.greater(objects["key"], self.after)
        return objects.filter(mine if self.last is None else pc.and_(mine, pc.less_equal(objects["key"], self.last)))


class ListedPage(NamedTuple):
    """A page of a listing: its objects as `LISTED`, the folders on its level, and the token of the next page, if any."""

    objects: pa.RecordBatch
    folders: Sequence[str]
    token: str | None


def walk(endpoint: Endpoint, root: str, ask: Ask, rules: WalkRules = EVERYTHING) -> Iterator[pa.RecordBatch]:
    """Every object below a prefix, page by page; several folders, and parts of large ones, are listed concurrently.

    Args:
        endpoint: the bucket.
        root: the prefix with its trailing slash; empty for the whole bucket.
        ask: calls a function with retries.
        rules: which folders are skipped, as whole keys, and where folders are cut. A folder that is met while another one is
            listed is not skipped.
    """
    pages = _Pages(endpoint)
    folders, loose = _folders(pages, root, ask, rules)
    yield from loose
    # Pages; at the end of a folder None, or its name if it may not be listed.
    found: queue.Queue[pa.RecordBatch | BaseException | str | None] = queue.Queue(_PAGES_WAITING)
    given_up = threading.Event()

    def list_lane(lane: Lane) -> None:
        try:
            for objects in _pages_of(lane, pages, ask):
                found.put(objects)
                if given_up.is_set():
                    break
            found.put(None)
        except BaseException as error:  # raised again by the consumer of the pages, unless it is the folder's own
            found.put(lane.folder if _is_refusal(error) and lane.folder != root else error)

    bounds = rules.bounds if _lists_in_order(endpoint) else ()
    lanes = [lane for folder in folders for lane in _lanes(folder, bounds)]
    with ThreadPoolExecutor(LISTERS, thread_name_prefix="tlbatch-list") as pool:
        listing = [pool.submit(list_lane, lane) for lane in lanes]
        left, refused = len(lanes), set[str]()
        try:
            while left:
                page = found.get()
                if isinstance(page, BaseException):
                    raise page
                if isinstance(page, str) and page not in refused:
                    refused.add(page)
                    rules.passed(page, UNREADABLE)
                if page is None or isinstance(page, str):
                    left -= 1
                else:
                    yield page
        finally:
            given_up.set()
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in listing):  # some may be waiting for room in the queue
                with contextlib.suppress(queue.Empty):
                    found.get(timeout=0.1)
            pages.close()


def _folders(pages: _Pages, root: str, ask: Ask, rules: WalkRules) -> tuple[list[str], list[pa.RecordBatch]]:
    """Folders that can be listed concurrently, and the objects above them, found level by level."""
    folders, loose = [root], list[pa.RecordBatch]()
    for _ in range(_LEVELS):
        if len(folders) >= LISTERS:
            break
        below: list[str] = []
        for folder in folders:
            try:
                objects, names, token = ask(partial(pages.page, folder, "", one_level=True))
            except PermissionError as error:
                if folder == root or not _is_refusal(error):
                    raise
                rules.passed(folder, UNREADABLE)
                continue
            if token is not None:
                below.append(folder)  # its first level does not fit on one page: it is listed as one folder
                continue
            below += [name for name in names if not rules.skips(name)]
            loose.append(objects)
        if below == folders:
            break
        folders = below
    return folders, loose


def _lists_in_order(endpoint: Endpoint) -> bool:
    """Whether keys come in the order of their bytes for sure: some servers sort folder by folder, `a/b` before `a-b`."""
    return endpoint.aws and _DIRECTORY_BUCKET not in endpoint.url


def _lanes(folder: str, bounds: Sequence[str]) -> list[Lane]:
    """A folder, cut behind each bound that lies in it."""
    inside = [bound for bound in bounds if bound.startswith(folder)]
    return [Lane(folder, *ends) for ends in zip(["", *inside], [*inside, None], strict=True)]


def _pages_of(lane: Lane, pages: _Pages, ask: Ask) -> Iterator[pa.RecordBatch]:
    """The objects of a lane, whose folder lists its keys in their order."""
    token: str | None = ""
    found: list[pa.RecordBatch] = []
    while token is not None:
        try:
            objects, _, token = ask(partial(pages.page, lane.folder, token, after=lane.after))
        except PermissionError:
            yield from found
            raise
        found.append(lane.own(objects) if lane.after or lane.last else objects)
        if lane.last is not None and objects.num_rows and objects["key"][-1].as_py() > lane.last:
            break
        if len(found) == _PAGES_AT_ONCE:
            yield pa.concat_batches(found)
            found = []
    if found:
        yield pa.concat_batches(found)


def _is_refusal(error: BaseException) -> bool:
    """Whether a prefix may not be listed; missing credentials concern all of them."""
    return isinstance(error, PermissionError) and not isinstance(error, CredentialsError)


def is_restored(head: Callable[[], Mapping[str, Any]]) -> bool:
    """Whether an archived object can be read for a while; if the store does not say so, it cannot.

    Args:
        head: requests the object's headers.
    """
    try:
        return 'ongoing-request="false"' in str(head().get("Restore", ""))
    except (OSError, ClientError):
        return False


class _Pages:
    """The pages of one bucket's listings; safe to use from many threads."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._session = URLLib3Session(
            verify=endpoint.certificates,
            proxies=get_environ_proxies(endpoint.url),
            timeout=endpoint.timeout,
            max_pool_connections=LISTERS,
        )
        self._wants_restored = False
        # Pages are parsed one at a time: threads that take Python's lock from each other spend as much time on that.
        self._parsing = threading.Lock()

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def page(self, prefix: str, token: str, *, one_level: bool = False, after: str = "") -> ListedPage:
        """A page of a prefix, the first one if `token` is empty; with `one_level` only the objects directly below it.

        The first page begins behind the key `after`, or before it if the server does not know this.
        """
        asked = {"list-type": "2", "prefix": prefix, "encoding-type": "url"}
        asked |= {"continuation-token": token} if token else {"start-after": after} if after else {}
        asked |= {"delimiter": "/"} if one_level else {}
        body, columns = self._ask(asked)
        if columns.archived and self._endpoint.aws and not self._wants_restored:
            self._wants_restored = True  # asked only where it matters: other servers need not know this header
            body, columns = self._ask(asked)
        archived = columns.archived
        if not self._endpoint.aws:
            archived = [row for row in archived if not is_restored(partial(self._endpoint.head, columns.keys[row].as_py()))]
        following = None
        if _text(body, "IsTruncated") == "true":
            following = html.unescape(_text(body, "NextContinuationToken"))
            if not following:
                raise OSError("the listing is truncated and has no token to continue")
        folders = _folders_on(body) if one_level else ()
        return ListedPage(columns.batch(archived), folders, following)

    def _ask(self, asked: Mapping[str, str]) -> tuple[bytes, _Columns]:
        body = self._get(asked)
        with self._parsing:
            return body, _columns(body)

    def _get(self, asked: Mapping[str, str]) -> bytes:
        restored = {"x-amz-optional-object-attributes": "RestoreStatus"} if self._wants_restored else {}
        headers = {**self._endpoint.headers, **restored}
        request = AWSRequest("GET", self._endpoint.url, headers=headers, params=dict(asked))
        if self._endpoint.credentials is not None:
            S3SigV4Auth(self._endpoint.credentials(), "s3", self._endpoint.region).add_auth(request)
        answer = self._session.send(request.prepare())
        body: bytes = answer.content
        end = body[-64:].rstrip()
        if answer.status_code == 200 and end.endswith(b"</ListBucketResult>"):
            return body
        if answer.status_code == 200 and not end.endswith(b"</Error>"):
            raise OSError("the answer ends before the end of the listing")
        found = {"Code": _text(body, "Code") or str(answer.status_code), "Message": _text(body, "Message")}
        raise ClientError({"Error": found}, "ListObjectsV2")


class _Columns(NamedTuple):
    """The objects of a page; `archived` are the numbers of those that must be restored before they can be read."""

    keys: pa.Array
    sizes: pa.Array
    etags: pa.Array
    archived: Sequence[int]

    def batch(self, archived: Sequence[int]) -> pa.RecordBatch:
        """The objects as `LISTED`."""
        flags = np.zeros(len(self.keys), bool)
        flags[np.asarray(archived, np.int64)] = True
        return pa.RecordBatch.from_arrays([self.keys, self.sizes, self.etags, pa.array(flags)], schema=LISTED)


_ESCAPES = (b"%", b"+", b"&")
_QUOTE = b"&quot;"
_FOLDER = re.compile(rb"<CommonPrefixes>\s*<Prefix>([^<]*)</Prefix>")


def _columns(body: bytes) -> _Columns:
    """The objects of a page; as a tree, which takes many times as long, unless every object has each field once."""
    page = _Elements(body)
    found = [page.values(name) for name in (b"Key", b"Size", b"ETag", b"StorageClass")]
    objects = len(page.named(b"Contents>"))
    if any(len(starts) != objects for starts, _ in found) or len(page.named(b"RestoreStatus")):
        return _columns_of_tree(body)
    found[2] = page.inside(_QUOTE, *found[2])
    keys, sizes, etags, classes = (page.texts(*ends) for ends in found)
    if not pc.all(pc.utf8_is_digit(sizes), min_count=0).as_py():
        return _columns_of_tree(body)
    archived = np.flatnonzero(pc.is_in(classes, _ARCHIVES).to_numpy(zero_copy_only=False)).tolist()
    return _Columns(_plain_keys(keys, body), pc.cast(sizes, pa.int64()), _etags(etags), archived)


class _Elements:
    """The elements of a page that hold text, found by comparing whole columns of bytes, eight at a time."""

    def __init__(self, body: bytes) -> None:
        self._body = body + bytes(8)
        self._words = np.ndarray(len(body) + 1, "<u8", self._body, strides=(1,))  # the eight bytes from each byte on
        self._opens = np.flatnonzero(np.frombuffer(body, np.uint8) == ord("<"))
        self._names = self._words[self._opens + 1]

    def named(self, name: bytes) -> np.ndarray:
        """(n,) int: the numbers of those `<` behind which a name follows."""
        found = np.flatnonzero(_begin(self._names, name[:8]))
        for place in range(8, len(name), 8):
            places = np.minimum(self._opens[found] + 1 + place, len(self._words) - 1)
            found = found[_begin(self._words[places], name[place : place + 8])]
        return found

    def values(self, name: bytes) -> tuple[np.ndarray, np.ndarray]:
        """(n,) int: where the text of each element of a name starts, and where it ends."""
        found = self.named(name + b">")
        found = found[found + 1 < len(self._opens)]
        # Behind the text of anything but plain text, as of a comment, comes something else than the end of the element.
        found = found[_begin(self._names[found + 1], b"/")]
        return self._opens[found] + len(name) + 2, self._opens[found + 1]

    def inside(self, mark: bytes, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where texts start and end without the marks around them, of at most eight bytes; as before unless all have them."""
        around = [self._words[starts], self._words[np.maximum(ends - len(mark), 0)]]
        if np.any(ends - starts < 2 * len(mark)) or not all(_begin(words, mark).all() for words in around):
            return starts, ends
        return starts + len(mark), ends - len(mark)

    def texts(self, starts: np.ndarray, ends: np.ndarray) -> pa.StringArray:
        """The bytes between starts and ends as an array of text; raises OSError if they are none."""
        bounds = np.stack([starts, ends], axis=1).astype(np.int32).ravel()
        both = max(0, len(bounds) - 1)  # the texts, and between any two of them what is left out
        buffers = [None, pa.py_buffer(bounds), pa.py_buffer(self._body)]
        pieces = pa.Array.from_buffers(pa.binary(), both, buffers)
        found = pieces.take(pa.array(np.arange(0, both, 2))).view(pa.string())
        try:
            found.validate(full=True)
        except pa.ArrowInvalid:
            raise OSError("the listing is not UTF-8") from None
        return found


def _begin(words: np.ndarray, text: bytes) -> np.ndarray:
    """(n,) bool: which of (n,) uint64 words, their first byte the lowest, begin with a text of at most eight bytes."""
    mask = np.uint64((1 << 8 * len(text)) - 1)
    found: np.ndarray = (words & mask) == np.uint64(int.from_bytes(text, "little"))
    return found


def _plain_keys(keys: pa.StringArray, body: bytes) -> pa.Array:
    """The keys as text; most have no character that is written in another way."""
    text = memoryview(keys.buffers()[2] or b"").tobytes()
    if not any(escape in text for escape in _ESCAPES):
        return keys
    decode = _decoder(body)
    return pa.array([decode(key.encode()) for key in keys.to_pylist()], pa.string())


def _folders_on(body: bytes) -> list[str]:
    decode = _decoder(body)
    return [decode(name) for name in _FOLDER.findall(body)]


def _columns_of_tree(body: bytes) -> _Columns:
    try:
        tree = ElementTree.fromstring(body)  # noqa: S314  # as botocore does; expat limits how far entities expand
    except ElementTree.ParseError as error:
        raise OSError(f"the listing is not XML: {error}") from None
    in_url = _in_url(body)
    rows, archived = list[tuple[str, int, str]](), []
    for element in tree:
        if _name(element) != "Contents":
            continue
        text = {_name(field): field.text or "" for field in element.iter()}
        if text.get("StorageClass") in ARCHIVES and text.get("IsRestoreInProgress") != "false":
            archived.append(len(rows))
        try:
            rows.append((unquote_plus(text["Key"]) if in_url else text["Key"], int(text["Size"]), _etag(text.get("ETag", ""))))
        except (KeyError, ValueError):
            raise OSError("the listing has an object without a key or a size") from None
    columns = zip(*rows, strict=True) if rows else ((), (), ())
    keys, sizes, etags = (pa.array(one, field.type) for one, field in zip(columns, LISTED, strict=False))
    return _Columns(keys, sizes, etags, archived)


def _name(element: ElementTree.Element) -> str:
    """An element's name without its namespace, which some servers leave out."""
    return element.tag.rsplit("}", 1)[-1]


def _text(body: bytes, name: str) -> str:
    found = re.search(rb"<%b>([^<]*)</" % name.encode(), body)
    return found[1].decode(errors="replace").strip() if found else ""


def _in_url(body: bytes) -> bool:
    """Whether keys are written as in a URL, which lets XML hold any character; some servers ignore that wish."""
    return _text(body, "EncodingType") == "url"


def _decoder(body: bytes) -> Callable[[bytes], str]:
    in_url = _in_url(body)

    def decode(key: bytes) -> str:
        text = key.decode()
        return unquote_plus(text) if in_url else html.unescape(text)

    return decode


def _etags(texts: pa.StringArray) -> pa.Array:
    """Etags without quotation marks."""
    text = memoryview(texts.buffers()[2] or b"").tobytes()
    if b'"' in text or b"&" in text:
        texts = pa.array([_etag(text) for text in texts.to_pylist()], pa.string())
    return texts


def _etag(text: str) -> str:
    """An etag without quotation marks."""
    return html.unescape(text).replace('"', "")
