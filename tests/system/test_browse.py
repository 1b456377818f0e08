"""`tlbatch browse` as a person uses it: a real server, a real browser; and as a stranger would misuse it."""

from __future__ import annotations

import contextlib
import csv
import http.client
import http.cookiejar
import io
import json
import re
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import psutil
import pytest
from PIL import Image
from support.command import run_cli
from support.paths import TLBATCH
from support.pictures import COLORS, encoded, noisy, write_store
from support.s3_server import BUCKET, environment, options
from support.shards import tar_of
from support.tables import publish_images

from tlbatch.config import BrowseConfig
from tlbatch.errors import ConfigError, LabelsError, OutputError
from tlbatch.storage.resolve import resolve
from tlbatch.web import application
from tlbatch.web.serve import serving

ODD = "<img src=x onerror=alert(1)>&'\".jpg"


@pytest.fixture(scope="module")
def output(tmp_path_factory, bundle_url):
    """A table of 60 loose pictures, four in a tar, one with a name that is HTML; and one that is broken, one that is empty."""
    folder = tmp_path_factory.mktemp("browse")
    store = write_store(folder / "store", 20)
    (store / ODD).write_bytes(encoded(noisy(COLORS["red"], 99)))
    (store / "broken.jpg").write_bytes(b"no image")
    (store / "empty.jpg").write_bytes(b"")
    members = {f"in/{number}.jpg": encoded(noisy(COLORS["green"], 200 + number)) for number in range(4)}
    (store / "shard.tar").write_bytes(tar_of(members))
    done = run_cli("classify", "--images", store, "--bundle", bundle_url, "--output", folder / "out", "--max-failed-ratio", "1")
    assert done.returncode == 0, done.stderr
    rows = [(f"{label}/{number:04d}.jpg", label) for label in COLORS for number in range(20)]
    rows[:2] = [(rows[0][0], "green"), (rows[1][0], "blue")]  # two of the pictures are labelled otherwise
    (folder / "labels.csv").write_text("key,label\n" + "".join(f"{key},{label}\n" for key, label in rows))
    return folder / "out"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Client:
    """A browser's part of HTTP: it keeps the cookie."""

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        self.base, self.host = f"http://{parts.netloc}", parts.netloc
        self._opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()))
        self.first = self.get(url)

    def get(self, path: str) -> str:
        return self.bytes(path).decode()

    def bytes(self, path: str) -> bytes:
        with self._opener.open(path if path.startswith("http") else self.base + path) as answer:
            self.kind = answer.headers["Content-Type"].partition(";")[0]
            return answer.read()

    def post(self, path: str, **form: str) -> str:
        request = urllib.request.Request(self.base + path, urllib.parse.urlencode(form).encode(), {"Origin": self.base})
        with self._opener.open(request) as answer:
            return answer.read().decode()

    def status(self, path: str) -> int:
        try:
            self.get(path)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code
        return 200


@contextlib.contextmanager
def served(output, tmp_path, **settings):
    """A client of an output that is served from this process."""
    config = {"output": str(output), "corrections": str(tmp_path / "corrections.csv"), **settings}
    with serving(BrowseConfig.model_validate(config)) as server:
        yield Client(server.url)


def addresses_in(page: str) -> list[str]:
    return re.findall(r'data-address="([^"]+)"', page)


def test_every_image_is_shown_once_and_has_a_picture(output, tmp_path):
    with served(output, tmp_path) as client:
        assert "<b>3</b>" not in client.first
        more = re.search(r'hx-get="(/tiles[^"]+)"', client.first)[1].replace("&amp;", "&")
        shown = addresses_in(client.first) + addresses_in(client.get(more))
        assert len(shown) == len(set(shown)) == 65
        for address in shown:
            picture = Image.open(io.BytesIO(client.bytes(f"/small/predictions/{address}")))
            assert (client.kind, max(picture.size)) == ("image/jpeg", 256)
        page = client.get(f"/image/{shown[0]}")
        assert Image.open(io.BytesIO(client.bytes(f"/whole/{shown[0]}"))).size == (120, 90)
        assert page.count("<meter") == 3
        facets = client.get("/facets?label=green")
        assert ">24 images<" in facets
        assert 'aria-current="true">green <span>24</span>' in facets
        assert ">4 images<" in client.get("/facets?folder=in/")


def test_what_failed_is_shown_with_its_reason(output, tmp_path):
    with served(output, tmp_path) as client:
        page = client.get("/errors?kind=not_an_image")
        assert "not an image <span>1</span>" in page
        assert "empty.jpg" in client.get("/errors")
        address = re.search(r'src="(/small/errors/[^"]+)"', page)[1]
        assert "not an image" in client.get(address)
        assert client.kind == "image/svg+xml"
        assert client.status("/errors?kind=nothing") == 400


def test_a_picture_that_changed_or_is_gone_says_so(tmp_path, bundle_url):
    picture = tmp_path / "a.jpg"
    picture.write_bytes(encoded(noisy(COLORS["red"], 1)))
    publish_images(resolve(str(tmp_path / "out")), "r1", {"a.jpg": {"uri": str(picture), "etag": "0-0-0-0"}, "b.jpg": {}})
    with served(tmp_path / "out", tmp_path) as client:
        for address, reason in zip(addresses_in(client.get("/?order=stored")), ("changed", "not found"), strict=True):
            assert reason in client.get(f"/small/predictions/{address}")
            assert reason in client.get(f"/whole/{address}")


def test_names_are_text_everywhere(output, tmp_path):
    with served(output, tmp_path) as client:
        page = client.get("/?" + urllib.parse.urlencode({"folder": ODD}))
        (address,) = addresses_in(page)
        for text in (page, client.get(f"/image/{address}")):
            assert "<img src=x" not in text
            assert "&lt;img src=x onerror=alert(1)&gt;" in text
        client.post("/label", address=address, label="<script>alert(1)</script>")
        page = client.get("/?known=corrected")
        assert "<script>alert" not in page
        assert addresses_in(page) == [address]


def send(host: str, method: str, path: str, **headers: str) -> tuple[int, http.client.HTTPMessage]:
    """A request exactly as it is given."""
    connection = http.client.HTTPConnection(host)
    connection.putrequest(method, path, skip_host=True)
    for name, value in {"Host": host, "Content-Length": "0", **headers}.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status, answer.headers


def test_nobody_enters_without_the_token_or_from_elsewhere(output, tmp_path):
    with serving(BrowseConfig(output=str(output), corrections=str(tmp_path / "c.csv"))) as server:
        parts = urllib.parse.urlsplit(server.url)
        host, token = parts.netloc, parts.query.removeprefix("token=")
        assert len(token) == 32
        listening = [one.laddr.ip for one in psutil.Process().net_connections() if one.laddr.port == parts.port]
        assert set(listening) == {"127.0.0.1"}
        for path in ("/", "/facets", "/errors", "/static/browse.css", "/?token=", f"/?token={token[:-1]}"):
            assert send(host, "GET", path)[0] == 403
        status, headers = send(host, "GET", f"/?token={token}&label=red")
        assert (status, headers["Location"]) == (303, "/?label=red")
        assert send(host, "GET", f"//elsewhere.example?token={token}")[1]["Location"] == "/elsewhere.example"
        assert {"HttpOnly", "SameSite=lax"} < set(headers["Set-Cookie"].split("; "))
        cookie = headers["Set-Cookie"].partition(";")[0]
        status, headers = send(host, "GET", "/", Cookie=cookie)
        assert status == 200
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; ")
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert (headers["X-Content-Type-Options"], headers["Referrer-Policy"]) == ("nosniff", "no-referrer")
        assert send(host, "GET", "/", Cookie="tlbatch=x; ;;=")[0] == 403
        # A name that leads here, as with DNS rebinding; a page of another site; and one that hides where it is from.
        assert send(host, "GET", "/", Host="elsewhere.example", Cookie=cookie)[0] == 421
        assert send(host, "GET", "/", Origin="http://elsewhere.example", Cookie=cookie)[0] == 403
        for origin in ({}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"}, {"Origin": f"https://{host}"}):
            assert send(host, "POST", "/label", Cookie=cookie, **origin)[0] == 403
        assert send(host, "POST", "/reload", Cookie=cookie, Origin=f"http://{host}")[0] == 303
        assert send(host, "GET", "/reload", Cookie=cookie)[0] == 405


def test_only_rows_of_the_table_are_read(output, tmp_path):
    with served(output, tmp_path) as client:
        run_id = addresses_in(client.first)[0].partition("/")[0]
        for path in (
            f"/small/predictions/{run_id}/65",
            f"/small/predictions/{run_id}/-1",
            f"/small/features/{run_id}/66",
            f"/small/errors/{run_id}/2",
            "/small/predictions/another-run/0",
            f"/small/predictions/{run_id}/..%2f..%2flatest.json",
            "/whole/..%2f..%2fetc/0",
            f"/whole/{run_id}/99999999999999999999999",
            "/static/../serve.py",
            "/static/%2e%2e/serve.py",
            "/etc/passwd",
            f"/image/{run_id}/65",
        ):
            assert client.status(path) == 404, path
        for path in ("?low=x", "?low=2", "?order=;drop", "?known=no", "tiles?after=x", "tiles?after=1:x", "errors?after=x"):
            assert client.status(f"/{path}") == 400, path
        assert addresses_in(client.get("/?" + urllib.parse.urlencode({"label": "' or 1=1 --"}))) == []
        for form in ({"address": "x/0"}, {"address": f"{run_id}/65"}, {"address": f"{run_id}/0", "label": "x" * 501}):
            with pytest.raises(urllib.error.HTTPError) as refused:
                client.post("/label", **{"label": "red", **form})
            assert refused.value.code == 404
            refused.value.close()
        with pytest.raises(urllib.error.HTTPError) as refused:
            client.post("/label", address=f"{run_id}/0", label="x" * 20_000)
        assert refused.value.code == 413
        refused.value.close()
        assert not (tmp_path / "corrections.csv").exists()


def corrections_in(path: Path) -> list[dict]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_of_two_browsers_at_once_none_loses_a_correction(output, tmp_path):
    with served(output, tmp_path) as client:
        shown = addresses_in(client.first)

        def correct(own: list[str]) -> None:
            for address in own:
                client.post("/label", address=address, label="red")

        threads = [threading.Thread(target=correct, args=(shown[start::3],)) for start in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(corrections_in(tmp_path / "corrections.csv")) == len(shown) == 60
        client.post("/label", address=shown[0], label="")
        assert len(corrections_in(tmp_path / "corrections.csv")) == 59
    with served(output, tmp_path) as client:
        assert ">59 images<" in client.get("/facets?known=corrected"), "they are there when it is opened again"


def test_labels_are_compared_with_what_was_predicted(output, tmp_path):
    with served(output, tmp_path, labels=str(output.parent / "labels.csv")) as client:
        page = client.get("/?known=wrong")
        assert sorted(re.findall(r'class="wrong">labelled (\w+)', page)) == ["blue", "green"]
        assert ">58 images<" in client.get("/facets?known=right")
        first = addresses_in(page)[0]
        client.post("/label", address=first, label="red")
        assert len(addresses_in(client.get("/?known=wrong"))) == 1
        client.post("/label", address=first, label="")
        assert len(addresses_in(client.get("/?known=wrong"))) == 2, "the labels file holds again"


def test_a_table_that_is_published_meanwhile(tmp_path, monkeypatch):
    output = resolve(str(tmp_path / "out"))
    publish_images(output, "r1", {"a.jpg": {}, "b.jpg": {"score": 0.75}})
    with served(tmp_path / "out", tmp_path) as client:
        assert "newer table" not in client.first
        monkeypatch.setattr(application, "_ASKED_EVERY", 0.0)
        publish_images(output, "r2", {"b.jpg": {"label": "dog"}, "c.jpg": {}})
        page = client.get("/")
        assert "A newer table was published" in page
        assert len(addresses_in(page)) == 2, "the table before stays whole"
        assert "newer table" not in client.post("/reload")
        page = client.get("/?order=stored")
        assert addresses_in(page) == ["r1/0", "r2/0", "r2/1"]
        assert client.status("/image/r1/1") == 404, "another row has replaced it"
        history = client.get("/image/r2/0")
        assert history.index("<td>dog</td>") < history.index("<td>cat</td>")
        assert addresses_in(client.get("/?run=r2")) == ["r2/0", "r2/1"]


def test_a_table_without_images(tmp_path):
    publish_images(resolve(str(tmp_path / "out")), "r1", {})
    with served(tmp_path / "out", tmp_path) as client:
        assert "The table has no images" in client.first
        assert "0 images" in client.get("/facets")
        assert "No image failed" in client.get("/errors")


def test_what_cannot_be_shown_is_a_sentence(output, tmp_path):
    def refused(**settings) -> str:
        with pytest.raises((OutputError, LabelsError, ConfigError)) as error, served(tmp_path / "out", tmp_path, **settings):
            pass
        return str(error.value)

    assert "Nothing is published" in refused()
    publish_images(resolve(str(tmp_path / "out")), "r1", {"a.jpg": {}})
    (tmp_path / "labels.csv").write_text("key,label\nanother.jpg,cat\n")
    assert "No image of" in refused(labels=str(tmp_path / "labels.csv"))
    assert "is not a file of corrections" in refused(corrections=str(tmp_path / "labels.csv"))
    with served(tmp_path / "out", tmp_path) as client:
        assert "cannot be used" in refused(port=int(client.host.rpartition(":")[2]))


def test_a_bucket_is_shown_and_nothing_is_written_there(s3_server, bundle_url, tmp_path):
    reach = options(s3_server.endpoint)
    folder = resolve(f"s3://{BUCKET}/browse", reach)
    for path in write_store(tmp_path / "store", 3).rglob("*.jpg"):
        folder.join("images", path.parent.name, path.name).write(path.read_bytes())
    url = folder.join("out").url
    command = ["classify", "--images", folder.join("images").url, "--bundle", bundle_url, "--output", url]
    done = run_cli(*command, **environment(s3_server.endpoint))
    assert done.returncode == 0, done.stderr
    before = sorted((one.key, one.written) for one in folder.contents())
    with served(url, tmp_path, storage_options=reach) as client:
        shown = addresses_in(client.first)
        assert len(shown) == 9
        assert Image.open(io.BytesIO(client.bytes(f"/small/predictions/{shown[4]}"))).size == (256, 192)
        assert f"s3://{BUCKET}/browse/images/" in client.get(f"/image/{shown[4]}")
        client.post("/label", address=shown[4], label="red")
    assert sorted((one.key, one.written) for one in folder.contents()) == before
    (row,) = corrections_in(tmp_path / "corrections.csv")
    assert row["uri"].startswith("s3://")


def test_the_command_prints_an_address_and_ends_with_a_signal(output, tmp_path):
    command = [TLBATCH, "browse", str(output), "--json", "--corrections", str(tmp_path / "c.csv")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            client = Client(running.stderr.readline().strip())
            assert len(addresses_in(client.first)) == 60
            running.terminate()  # as Ctrl-C, which a process behind `nohup` ignores
            printed, said = running.communicate(timeout=60)
        finally:
            running.kill()
    assert (running.returncode, said) == (0, "")
    assert json.loads(printed) == {"images": 65, "corrections": str(tmp_path / "c.csv")}
    nothing = run_cli("browse", tmp_path / "nothing")
    assert (nothing.returncode, nothing.stdout) == (2, "")
    assert nothing.stderr.startswith("tlbatch: Nothing is published")


@pytest.fixture
def page(browser, output, tmp_path, request):
    """A page of a browser that shows the output; whatever it complains of, or asks elsewhere, fails the test."""
    complaints, settings = [], getattr(request, "param", {})
    config = {"output": str(output), "corrections": str(tmp_path / "c.csv"), "labels": str(output.parent / "labels.csv")}
    with serving(BrowseConfig.model_validate(config)) as server, contextlib.closing(browser.new_context(**settings)) as context:
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda one: one.url.startswith(server.url.partition("?")[0]) or complaints.append(one.url))
        page.goto(server.url)
        page.wait_for_selector(".scores")
        yield page
    assert complaints == []


def focused(page) -> str | None:
    return page.evaluate("document.activeElement.dataset.address ?? document.activeElement.tagName")


def until(holds) -> None:
    """Wait until something holds. Playwright's own waiting evaluates texts, which the pages forbid."""
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_story_by_keyboard(page, tmp_path):
    file = tmp_path / "c.csv"
    page.select_option("select[name=known]", "wrong")
    page.wait_for_url("**/?known=wrong")
    page.wait_for_selector(".scores >> text=2 images")
    page.wait_for_load_state()
    assert page.locator("a.tile").count() == 2
    page.locator("#main").focus()
    page.keyboard.press("ArrowRight")
    first = focused(page)
    page.keyboard.press("1")  # blue
    page.wait_for_selector(".corrected >> text=is blue")
    until(lambda: focused(page) not in (first, "BODY"))
    assert [row["label"] for row in corrections_in(file)] == ["blue"]
    page.keyboard.press("3")
    page.wait_for_selector(".corrected >> text=is red")
    assert [row["label"] for row in corrections_in(file)] == ["blue", "red"]
    page.keyboard.press("u")
    until(lambda: page.locator(".corrected").count() == 1)
    page.keyboard.press("u")
    until(lambda: page.locator(".corrected").count() == 0)
    assert corrections_in(file) == []
    assert focused(page) == first
    page.keyboard.press("u")
    assert page.text_content("#said") == "Nothing to take back."
    page.keyboard.press("Enter")
    page.wait_for_selector(".one")
    page.wait_for_load_state()  # the keys work when the script has run
    assert page.url.endswith("?known=wrong")
    page.keyboard.press("ArrowRight")
    page.wait_for_url(lambda url: f"/{first}?" not in url)
    page.keyboard.press("2")  # green
    page.wait_for_selector(".corrected >> text=is green")
    page.keyboard.press("ArrowLeft")
    page.wait_for_url(lambda url: f"/{first}?" in url)
    page.fill("input[name=label]", "violet")
    page.keyboard.press("Enter")
    page.wait_for_selector(".corrected >> text=is violet")
    assert sorted(row["label"] for row in corrections_in(file)) == ["green", "violet"]
    page.locator("#main").focus()
    page.keyboard.press("Escape")
    page.wait_for_selector("#tiles")
    page.wait_for_load_state()
    page.keyboard.press("?")
    assert page.locator("dialog").is_visible()
    assert "violet" in page.inner_text("dialog")
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    page.keyboard.type("green/")
    page.keyboard.press("Enter")
    page.wait_for_url("**/?known=wrong&folder=green%2F")


def test_scrolling_shows_all_and_a_bar_is_a_filter(page):
    assert page.locator("a.tile").count() == 60
    page.locator(".more").scroll_into_view_if_needed()
    until(lambda: page.locator("a.tile").count() == 65)
    assert page.locator(".more").count() == 0
    bars = page.locator(".scores a[aria-label]")
    assert bars.count() == 20
    full = next(bar for bar in bars.all() if not bar.get_attribute("aria-label").startswith("0 "))
    count = int(full.get_attribute("aria-label").split()[0])
    full.click()
    page.wait_for_url("**/?low=*")
    page.wait_for_selector(f".scores >> text=/^{count} image/")
    page.go_back()
    page.wait_for_selector(".scores >> text=65 images")
    assert page.input_value("input[name=low]") == "0"


@pytest.mark.parametrize(("scheme", "width"), [("light", 390), ("dark", 1280)])
@pytest.mark.parametrize("page", [{"bypass_csp": True}], indirect=True, ids=[""])  # for axe's own script
def test_pages_are_accessible_and_fit(page, scheme, width):
    from axe_playwright_python.sync_playwright import Axe

    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    base = page.url.partition("?")[0]
    first = page.locator("a.tile").first.get_attribute("href")
    for path, ready in (("", ".scores"), (first[1:], ".one"), ("errors", ".tile"), ("?label=none", ".nothing")):
        page.goto(base + path)
        page.wait_for_selector(ready)
        found = Axe().run(page, options={"rules": {"region": {"enabled": True}}})
        assert found.violations_count == 0, found.generate_report()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.keyboard.press("?")
    assert Axe().run(page).violations_count == 0
