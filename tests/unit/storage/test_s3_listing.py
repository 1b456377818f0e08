"""A page of a listing becomes columns, whoever wrote the XML; objects in an archive are known, and so are restored ones."""

from urllib.parse import quote

import pyarrow as pa
import pytest
from botocore.exceptions import ClientError
from hypothesis import given, settings
from hypothesis import strategies as st

from tlbatch.errors import CredentialsError
from tlbatch.storage import s3_listing
from tlbatch.storage.location import WalkRules
from tlbatch.storage.s3_listing import Endpoint


def entry(key, size=1, kind="STANDARD", etag="&quot;e&quot;", more=""):
    storage = f"<StorageClass>{kind}</StorageClass>" if kind else ""
    return f"<Contents><Key>{key}</Key><ETag>{etag}</ETag><Size>{size}</Size>{storage}{more}</Contents>"


def page(*entries, token="", folders=(), encoding="url"):
    parts = [f"<IsTruncated>{'true' if token else 'false'}</IsTruncated>", *entries]
    parts += [f"<EncodingType>{encoding}</EncodingType>"] if encoding else []
    parts += [f"<NextContinuationToken>{token}</NextContinuationToken>"] if token else []
    parts += [f"<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes>" for folder in folders]
    return f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{"".join(parts)}</ListBucketResult>'.encode()


class Server:
    """Answers from pages by prefix and token, and keeps what was asked."""

    def __init__(self, pages):
        self.pages, self.asked = pages, []

    def __call__(self, pages, asked):
        self.asked.append((asked["prefix"], asked.get("continuation-token", ""), pages._wants_restored))
        answer = self.pages[asked["prefix"], asked.get("continuation-token", "")]
        if isinstance(answer, Exception):
            raise answer
        return answer(pages._wants_restored) if callable(answer) else answer


def walked(monkeypatch, pages, *, aws=False, restored=(), rules=None):
    server = Server(pages)

    def get(pages, asked):
        return server(pages, asked)

    monkeypatch.setattr(s3_listing._Pages, "_get", get)
    headers = {key: {"Restore": 'ongoing-request="false", expiry-date="later"'} for key in restored}
    endpoint = Endpoint("http://host/b", "r", aws, True, (1, 1), None, lambda key: headers.get(key, {}))
    batches = s3_listing.walk(endpoint, "", lambda ask: ask(), *([] if rules is None else [rules]))
    return pa.Table.from_batches(batches).sort_by("key").to_pylist(), server.asked


def test_keys_sizes_and_etags(monkeypatch):
    first = page(entry("a%2Bb%20c.jpg"), entry("d+e.jpg", 2), entry("f.jpg", 3, etag="&#34;x-2&#34;"), token="t&amp;1")
    monkeypatch.setattr(s3_listing, "_LEVELS", 0)
    rows, asked = walked(monkeypatch, {("", ""): first, ("", "t&1"): page(entry("g.jpg", 4, etag=""))})
    found = [(row["key"], row["size"], row["etag"], row["archived"]) for row in rows]
    assert found == [
        ("a+b c.jpg", 1, "e", False),
        ("d e.jpg", 2, "e", False),
        ("f.jpg", 3, "x-2", False),
        ("g.jpg", 4, "", False),
    ]
    assert [token for _, token, _ in asked] == ["", "t&1"]


def test_a_server_that_ignores_the_encoding_or_leaves_out_fields(monkeypatch):
    monkeypatch.setattr(s3_listing, "_LEVELS", 0)
    plain = page(entry("a+b &amp; c.jpg"), entry("d%20.jpg"), encoding="")
    assert [row["key"] for row in walked(monkeypatch, {("", ""): plain})[0]] == ["a+b & c.jpg", "d%20.jpg"]
    odd = page(entry("a%20b.jpg", kind=""), entry("c.jpg", 7, "GLACIER"))
    rows, _ = walked(monkeypatch, {("", ""): odd})
    assert [(row["key"], row["size"], row["archived"]) for row in rows] == [("a b.jpg", 1, False), ("c.jpg", 7, True)]
    assert walked(monkeypatch, {("", ""): page()})[0] == []


def test_keys_in_another_form_of_xml_are_whole(monkeypatch):
    monkeypatch.setattr(s3_listing, "_LEVELS", 0)
    forms = {"<![CDATA[a/b & c.jpg]]>": "a/b & c.jpg", "a/b<!-- no text -->c.jpg": "a/bc.jpg"}
    for form, key in forms.items():
        assert [row["key"] for row in walked(monkeypatch, {("", ""): page(entry(form), encoding="")})[0]] == [key]


ARCHIVE = [entry("0.jpg"), entry("1.jpg", 1, "GLACIER"), entry("2.jpg", 1, "DEEP_ARCHIVE"), entry("3.jpg", 1, "GLACIER_IR")]


def test_amazon_is_asked_for_restored_objects_only_where_some_are_archived(monkeypatch):
    status = "<RestoreStatus><IsRestoreInProgress>{}</IsRestoreInProgress></RestoreStatus>"
    more = entry("4.jpg", 1, "GLACIER", more=status.format("false")) + entry("5.jpg", 1, "GLACIER", more=status.format("true"))
    pages = {("a/", ""): page(entry("a/0.jpg")), ("b/", ""): lambda wants: page(*ARCHIVE, *([more] if wants else []))}
    monkeypatch.setattr(s3_listing, "LISTERS", 2)
    pages["", ""] = page(folders=["a/", "b/"])
    rows, asked = walked(monkeypatch, pages, aws=True)
    assert [row["key"] for row in rows if row["archived"]] == ["1.jpg", "2.jpg", "5.jpg"]
    assert [one for one in asked if one[2]] == [("b/", "", True)]


def test_other_servers_are_asked_for_the_headers_of_archived_objects(monkeypatch):
    monkeypatch.setattr(s3_listing, "_LEVELS", 0)
    rows, asked = walked(monkeypatch, {("", ""): page(*ARCHIVE)}, restored=["2.jpg"])
    assert [row["key"] for row in rows if row["archived"]] == ["1.jpg"]
    assert len(asked) == 1


@pytest.mark.parametrize("listers", [2, 16], ids=["while listing", "while looking for folders"])
def test_a_prefix_that_may_not_be_listed_is_skipped_and_an_excluded_one_is_not_asked_for(monkeypatch, listers):
    monkeypatch.setattr(s3_listing, "LISTERS", listers)
    pages = {("", ""): page(entry("0.jpg"), folders=["a/", "b/", "c/"]), ("a/", ""): page(entry("a/1.jpg"))}
    pages["b/", ""] = PermissionError("denied")
    passed = []
    rules = WalkRules(lambda folder: folder == "c/", lambda *what: passed.append(what))
    rows, asked = walked(monkeypatch, pages, rules=rules)
    assert [row["key"] for row in rows] == ["0.jpg", "a/1.jpg"]
    assert passed == [("b/", "folder that cannot be opened")]
    assert "c/" not in [prefix for prefix, _, _ in asked]
    for error in (PermissionError("denied"), CredentialsError("expired")):
        with pytest.raises(PermissionError):
            walked(monkeypatch, {("", ""): error})
    pages["b/", ""] = CredentialsError("expired")
    with pytest.raises(CredentialsError):
        walked(monkeypatch, pages)


KEYS = st.lists(st.text("ab/é🐱", min_size=1, max_size=3), unique=True, max_size=14)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(keys=KEYS, bounds=KEYS, size=st.integers(1, 4), aws=st.booleans())
def test_however_a_bucket_is_cut_each_key_comes_once(keys, bounds, size, aws):
    """Other servers than Amazon's may send keys in another order, and know no `start-after`."""
    ordered = sorted(keys) if aws else keys
    asked = []

    def get(_, query):
        asked.append(query)
        below = [key for key in ordered if key.startswith(query["prefix"])]
        if "delimiter" in query:
            return page(token="more")  # its first level does not fit on one page
        if aws:
            below = [key for key in below if key > query.get("continuation-token", query.get("start-after", ""))]
            return page(*(entry(quote(key)) for key in below[:size]), token=below[size - 1] if below[size:] else "")
        start = int(query.get("continuation-token", 0))
        more = str(start + size) if below[start + size :] else ""
        return page(*(entry(quote(key)) for key in below[start : start + size]), token=more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3_listing._Pages, "_get", get)
        endpoint = Endpoint("http://host/b", "r", aws, True, (1, 1), None, lambda _: {})
        rules = WalkRules(bounds=sorted(bounds))
        batches = list(s3_listing.walk(endpoint, "", lambda ask: ask(), rules))
    assert sorted(key for batch in batches for key in batch["key"].to_pylist()) == sorted(keys)
    lanes = len(bounds) + 1 if aws else 1
    assert len(asked) <= 1 + len(keys) // size + 2 * lanes, "no lane goes far beyond its end"


def test_a_bucket_without_an_order_is_not_cut(monkeypatch):
    asked = []
    monkeypatch.setattr(s3_listing._Pages, "_get", lambda _, query: asked.append(query) or page(entry("b"), entry("a")))
    endpoint = Endpoint("https://images--use1-az4--x-s3.s3express-use1-az4.host", "r", True, True, (1, 1), None, lambda _: {})
    (batch,) = s3_listing.walk(endpoint, "", lambda ask: ask(), WalkRules(bounds=["a", "b"]))
    assert batch["key"].to_pylist() == ["b", "a"]
    assert all("start-after" not in query for query in asked)


def walked_in_parts(monkeypatch, get, bounds):
    """The keys of a bucket of Amazon's that is cut at some keys, in the order of the walk, and what the walk passed."""
    monkeypatch.setattr(s3_listing._Pages, "_get", get)
    monkeypatch.setattr(s3_listing, "_LEVELS", 1)
    passed = []
    rules = WalkRules(passed=lambda *what: passed.append(what), bounds=bounds)
    endpoint = Endpoint("http://host/b", "r", True, True, (1, 1), None, lambda _: {})
    batches = list(s3_listing.walk(endpoint, "", lambda ask: ask(), rules))
    return [key for batch in batches for key in batch["key"].to_pylist()], passed


def test_a_part_of_a_folder_that_may_not_be_listed_is_told_once(monkeypatch):
    def get(_, query):
        if query["prefix"] == "b/":
            raise PermissionError("denied")
        return page(entry("0.jpg"), folders=["b/"] if "delimiter" in query else [])

    keys, passed = walked_in_parts(monkeypatch, get, ["b/1", "b/2"])
    assert keys == ["0.jpg"]
    assert passed == [("b/", "folder that cannot be opened")]


def test_a_folder_that_may_be_listed_only_in_part_is_told(monkeypatch):
    """A policy changed meanwhile: what is not listed must not be taken for deleted."""

    def get(_, query):
        if "delimiter" in query:
            return page(folders=["d/"])
        if query.get("start-after"):
            raise PermissionError("denied")
        return page(entry("d/0"), entry("d/1"), entry("d/2"))

    keys, passed = walked_in_parts(monkeypatch, get, ["d/1", "d/2"])
    assert keys == ["d/0", "d/1"]
    assert passed == [("d/", "folder that cannot be opened")]


@pytest.mark.parametrize(
    ("status", "body", "error", "sentence"),
    [
        (200, page(entry("a"))[:-9], OSError, "ends before the end"),
        (200, b"<Error><Code>SlowDown</Code><Message>later</Message></Error>", ClientError, "SlowDown"),
        (403, b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>", ClientError, "AccessDenied"),
        (502, b"Bad gateway", ClientError, "502"),
        (200, page(entry("a", "&amp;")), OSError, "without a key or a size"),
        (200, page("<Contents><Key>a</Key></Contents>"), OSError, "without a key or a size"),
        (200, page("<Contents><Key>a</Contents>"), OSError, "is not XML"),
        (200, page().replace(b">false<", b">true<"), OSError, "no token to continue"),
    ],
)
def test_a_bad_answer_is_an_error(monkeypatch, status, body, error, sentence):
    answer = type("Answer", (), {"status_code": status, "content": body})
    monkeypatch.setattr(s3_listing.URLLib3Session, "send", lambda *_: answer)
    endpoint = Endpoint("http://host/b", "r", False, True, (1, 1), None, lambda _: {})
    with pytest.raises(error, match=sentence):
        list(s3_listing.walk(endpoint, "", lambda ask: ask()))
