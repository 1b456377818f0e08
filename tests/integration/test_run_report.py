"""The page that people open first: what it says, what it shows, and that nothing in a store can make it do anything."""

import json
import shutil
import tarfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.command import run_cli
from support.pictures import COLORS, encoded, noisy, write_store

import tlbatch
from tlbatch import schema
from tlbatch.config import ReportConfig
from tlbatch.errors import LabelsError, OutputError
from tlbatch.output.progress import read_history
from tlbatch.output.run import read_output, read_table_runs
from tlbatch.report.charts import curves_chart, labels_chart, throughput_chart
from tlbatch.report.diagnostics import Curve
from tlbatch.report.run_report import write_report, write_report_after
from tlbatch.report.summary import NEAR, SURE, UNSURE, summarize
from tlbatch.report.thumbnails import load_thumbnails
from tlbatch.storage.resolve import resolve

pytestmark = pytest.mark.usefixtures("ray_here")

MARKUP = "<b title=x>bold.jpg"


@pytest.fixture(scope="module")
def classified(bundle_url, tmp_path_factory) -> tuple[Path, Path, Path]:
    """Two nights of a store with a shard, images that fail, a hostile name; and a labels file that is wrong about some."""
    folder = tmp_path_factory.mktemp("report")
    store = write_store(folder / "store", 20)
    (store / "red" / MARKUP).write_bytes(encoded(noisy(COLORS["red"], 500)))
    (store / "red" / f"broken{MARKUP}").write_bytes(b"<script>3</script>")
    (store / "red" / "cut.jpg").write_bytes(encoded(noisy(COLORS["red"], 501))[:300])
    with tarfile.open(store / "more.tar", "w") as tar:
        for number in range(5):
            data = encoded(noisy(COLORS["blue"], 900 + number))
            info = tarfile.TarInfo(f"in-tar/{number}.jpg")
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    settings = {"images": str(store), "bundle": bundle_url, "output": str(folder / "out"), "max_failed_ratio": 1.0}
    tlbatch.classify(**settings)
    (store / "green" / "new.jpg").write_bytes(encoded(noisy(COLORS["green"], 777)))
    tlbatch.classify(**settings, incremental=True)
    table = tlbatch.read_predictions(str(folder / "out"))
    labels = [label if number % 10 else "blue" for number, label in enumerate(table["label"])]
    pd.DataFrame({"key": table["key"], "label": labels}).to_csv(folder / "labels.csv", index=False)
    return store, folder / "out", folder / "labels.csv"


@pytest.fixture(scope="module")
def page_file(classified) -> Path:
    _, output, labels = classified
    return Path(write_report(ReportConfig(output=str(output), labels=str(labels)))["report"])


def test_the_page_says_what_a_person_wants_to_know(classified, page_file):
    _, output, _ = classified
    page = page_file.read_text()
    assert page_file == output / "runs" / read_output(resolve(str(output))).newest.run_id / "report.html"
    for words in (
        "Complete:",
        "<dt>in the table</dt><dd>67</dd>",
        "1 new",
        "Seconds in each stage",
        "Confusion",
        "Precision and recall",
    ):
        assert words in page, words
    for kind in ("not_an_image", "truncated"):
        assert f"1 {kind}" in page
    assert "These files are not images, despite their names." in page
    assert page.count("data:image/jpeg;base64,") > 40


def test_a_summary_counts_what_the_table_holds_and_shows_the_extremes(classified):
    _, output, _ = classified
    table = tlbatch.read_predictions(str(output))
    found, _ = summarize(read_table_runs(resolve(str(output))), predictions=True, threshold=0.9)
    assert found.images == len(table) == found.scores.sum()
    assert dict(found.labels) == table["label"].value_counts().to_dict()
    assert dict(found.errors) == {"not_an_image": 1, "truncated": 1}
    for label, own in table.groupby("label"):
        shown = found.shown[found.shown["label"] == label]
        by_reason = {why: sorted(group["score"]) for why, group in shown.groupby("why")}
        assert by_reason[SURE] == sorted(own["score"].nlargest(6))
        assert by_reason[UNSURE] == sorted(own["score"].nsmallest(6))
        assert by_reason[NEAR] == sorted(own.loc[(own["score"] - 0.9).abs().nsmallest(6).index, "score"])


def test_an_object_is_shown_once_though_two_nights_have_it(classified):
    _, output, _ = classified
    runs = read_table_runs(resolve(str(output)))
    assert len(runs) == 2
    found, _ = summarize(runs, predictions=True)
    names = found.shown[found.shown["why"] == SURE][["uri", "key"]]
    assert not names.duplicated().any()


def test_pictures_are_of_the_images_also_out_of_a_shard_and_gone_ones_are_missing(classified, tmp_path):
    store, output, _ = classified
    runs = read_table_runs(resolve(str(output)))
    names = [(str(store / "red" / "0001.jpg"), "red/0001.jpg"), (str(store / "more.tar"), "in-tar/3.jpg")]
    found = load_thumbnails(runs, [*names, ("/nowhere.jpg", "nowhere.jpg")], {}, side=64)
    assert set(found) == set(names)
    assert set(load_thumbnails(runs, names, {}, side=64, shard_bytes=1)) == set(names[:1]), "the fourth image is too far in"
    assert set(load_thumbnails(runs, names, {}, side=64, shard_bytes=1_000_000)) == set(names)


def test_names_and_messages_of_a_store_are_text(page_file):
    page = page_file.read_text()
    assert "<b title=x" not in page
    assert "<script>3" not in page
    assert "&lt;b title=x&gt;bold.jpg" in page
    assert page.count("<script>") == 1


def test_a_label_is_text_in_a_chart_and_no_formula():
    svg = labels_chart({MARKUP: 3, "$x^2$": 2, "</svg><script>1</script>": 1}, None)
    assert "<b title" not in svg
    assert "<script" not in svg
    assert "$x^2$" in svg


def test_a_chart_takes_its_colours_from_the_page_and_is_the_same_every_time():
    first, again = (throughput_chart([[0.0, 0], [2.0, 100], [4.0, 300]]) for _ in range(2))
    assert first == again
    assert "var(--now)" in first
    assert "#0a0b" not in first
    assert 'role="img"' in first


def test_in_a_browser_it_loads_nothing_and_runs_only_its_own_script(page_file, browser):
    page, asked, said = opened(browser, page_file)
    assert asked == [page_file.as_uri()]
    assert said == []
    blocked = "() => { const one = document.createElement('script'); one.textContent = 'window.ran = 1';"
    assert page.evaluate(f"{blocked} document.body.append(one); return window.ran; }}") is None
    page.close()


def opened(browser, file: Path, **options):
    """A page, the addresses it asked for, and what it said in the console."""
    page = browser.new_page(**options)
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url) if not request.url.startswith("data:") else None)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.goto(file.as_uri())
    return page, asked, said


def test_filters_work_by_click_and_by_keyboard(page_file, browser):
    page, _, said = opened(browser, page_file)
    everything = page.locator(".gallery figure")
    shown = page.locator(".gallery figure:visible")
    assert shown.count() == everything.count() > 20
    page.get_by_label("least certain").check()
    assert set(shown.evaluate_all("all => all.map(one => one.dataset.why)")) == {"least certain"}
    page.get_by_label("least certain").press("ArrowUp")
    assert set(shown.evaluate_all("all => all.map(one => one.dataset.why)")) == {"most certain"}
    page.locator("#filters select").select_option("green")
    assert set(shown.evaluate_all("all => all.map(one => one.dataset.label)")) == {"green"}
    assert page.locator(".gallery .group:visible").count() == 1
    assert page.locator("#filters output").inner_text() == f"{shown.count()} images"
    assert said == []
    page.close()


def test_a_cell_of_the_matrix_opens_its_pictures_by_click_and_by_keyboard(page_file, browser):
    page, _, said = opened(browser, page_file)
    cell = page.get_by_role("button", name="images of blue, predicted as red")
    pictures = page.locator(".cell:visible figure")
    assert pictures.count() == 0
    cell.click()
    assert cell.get_attribute("aria-expanded") == "true"
    assert pictures.count() == int(cell.inner_text()) == 2
    other = page.get_by_role("button", name="images of green, predicted as green")
    other.focus()
    page.keyboard.press("Enter")
    assert cell.get_attribute("aria-expanded") == "false"
    assert pictures.count() == 6
    page.keyboard.press("Escape")
    assert pictures.count() == 0
    assert said == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_serious_stands_in_the_way_of_anybody(page_file, browser, scheme, width):
    from axe_playwright_python.sync_playwright import Axe

    page, _, _ = opened(browser, page_file, viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=True)
    page.get_by_role("button", name="images of blue, predicted as red").click()
    found = Axe().run(page).response["violations"]
    assert [(one["id"], one["nodes"][0]["html"][:200]) for one in found if one["impact"] in ("serious", "critical")] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_on_paper_it_is_whole_and_has_no_buttons_to_press(page_file, browser):
    page, _, _ = opened(browser, page_file)
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.locator(".filters").is_visible()
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert ink == "rgb(29, 35, 41)", "paper is white, whatever the screen was"
    assert page.pdf().startswith(b"%PDF")
    page.close()


@pytest.mark.sampled(1)
def test_the_command_writes_it_and_says_where(bundle_url, store, tmp_path):
    command = ["classify", "--images", store, "--bundle", bundle_url, "--output", tmp_path / "out", "--json"]
    done = run_cli(*command, "--set", "report=true")
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert result["report"] == f"{result['output']}/runs/{result['run_id']}/report.html"
    assert "there is no previous run" in Path(result["report"]).read_text()
    assert tlbatch.verify(str(tmp_path / "out"))["ok"]
    assert tlbatch.gc(str(tmp_path / "out"), older_than=0)["leftovers"] == []
    again = run_cli("report", tmp_path / "out")
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == result["report"]


def test_a_page_that_cannot_be_written_does_not_fail_the_night(caplog):
    result = {"output": "/nowhere", "run_id": "x", "listed": 1}
    assert write_report_after(result, {}) == result
    assert "could not be written" in caplog.text


@pytest.mark.sampled(1)
def test_a_run_of_features_has_a_page_without_labels(bundle_url, store, tmp_path):
    tlbatch.extract(images=str(store), bundle=bundle_url, output=str(tmp_path / "out"))
    written = write_report(ReportConfig(output=str(tmp_path / "out")))
    page = Path(written["report"]).read_text()
    assert written["verdict"] == "good"
    assert "Sample images" not in page
    assert "Seconds in each stage" in page


def test_of_an_older_run_it_tells_what_was_then(classified):
    _, output, _ = classified
    first = read_table_runs(resolve(str(output)))[0]
    written = write_report(ReportConfig(output=first.location.url))
    assert written["run_id"] == first.run_id
    assert "<dt>predicted</dt><dd>66</dd>" in Path(written["report"]).read_text()


def test_where_there_is_nothing_to_tell_of_it_is_one_sentence(tmp_path, classified):
    with pytest.raises(OutputError, match="Nothing is published"):
        write_report(ReportConfig(output=str(tmp_path)))
    (tmp_path / "labels.csv").write_text("key,label\nnowhere.jpg,red\n")
    with pytest.raises(LabelsError, match=r"is in the table; the first one is 'nowhere\.jpg'"):
        write_report(ReportConfig(output=str(classified[1]), labels=str(tmp_path / "labels.csv")))


def test_a_run_that_has_not_ended_has_no_report(classified, tmp_path):
    shutil.copytree(classified[1], tmp_path / "out")
    run = read_table_runs(resolve(str(tmp_path / "out")))[0]
    run.location.join(schema.REPORT).delete()
    with pytest.raises(OutputError, match="is not complete"):
        write_report(ReportConfig(output=run.location.url))


@pytest.mark.sampled(1)
def test_what_has_moved_since_the_run_before_stands_on_top(bundle_url, tmp_path):
    store = write_store(tmp_path / "store", 40)
    settings = {"images": str(store), "bundle": bundle_url, "output": str(tmp_path / "out")}
    tlbatch.classify(**settings)
    shutil.rmtree(store / "red")
    tlbatch.classify(**settings)
    written = write_report(ReportConfig(output=str(tmp_path / "out")))
    assert written["verdict"] == "doubtful"
    assert "the labels have shifted: red was 33.3% of the images and is now 0.0%" in written["sentence"]
    assert written["sentence"] in Path(written["report"]).read_text()


def test_the_progress_file_keeps_a_history_that_does_not_grow_for_ever(bundle_url, store, tmp_path):
    from tlbatch.output.progress import heartbeat

    tlbatch.classify(images=str(store), bundle=bundle_url, output=str(tmp_path / "out"))
    run = read_table_runs(resolve(str(tmp_path / "out")))[0]
    history = read_history(run)
    assert history[-1][1] == 60
    assert abs(history[-1][0] - time.time()) < 600
    numbers = json.loads(run.location.join(schema.PROGRESS).read())
    long = [[float(second), second] for second in range(240)]
    run.location.join(schema.PROGRESS).write(json.dumps({**numbers, "history": long}).encode())
    with heartbeat([run], None):
        pass
    assert len(read_history(run)) == 121


def test_a_page_that_was_missed_is_written_by_the_next_command(classified, bundle_url, tmp_path):
    shutil.copytree(classified[1], tmp_path / "out")
    run = read_table_runs(resolve(str(tmp_path / "out")))[-1]
    run.location.join(schema.REPORT_PAGE).delete()
    done = {"output": str(tmp_path / "out"), "run_id": run.run_id, "already_done": True}
    assert write_report_after(done, {})["report"] == run.location.join(schema.REPORT_PAGE).url
    written = Path(run.location.join(schema.REPORT_PAGE).url).stat().st_mtime_ns
    write_report_after(done, {})
    assert Path(run.location.join(schema.REPORT_PAGE).url).stat().st_mtime_ns == written


@pytest.mark.sampled(1)
def test_a_night_after_a_rollback_is_held_against_the_table_it_adds_to(classified, bundle_url, tmp_path):
    store, _, _ = classified
    settings = {"images": str(store), "bundle": bundle_url, "output": str(tmp_path / "out"), "max_failed_ratio": 1.0}
    first = tlbatch.classify(**settings)["run_id"]
    tlbatch.classify(**settings, top_k=1)
    tlbatch.rollback(str(tmp_path / "out"), first)
    shutil.copytree(store, tmp_path / "store")
    tlbatch.classify(**{**settings, "include": "*.jpg"}, incremental=True)
    state = read_output(resolve(str(tmp_path / "out")))
    newest = state.newest
    assert [one["run_id"] for one in newest.on] == [first]
    assert state.previous(newest).run_id == first


def test_without_the_images_all_else_is_told(classified, bundle_url, tmp_path):
    shutil.copytree(classified[0], tmp_path / "store")
    tlbatch.classify(images=str(tmp_path / "store"), bundle=bundle_url, output=str(tmp_path / "out"), max_failed_ratio=1.0)
    shutil.rmtree(tmp_path / "store")
    written = write_report(ReportConfig(output=str(tmp_path / "out")))
    page = Path(written["report"]).read_text()
    assert page.count("no longer readable") > 20
    assert "Seconds in each stage" in page


def test_labels_of_any_script_and_of_any_first_character_have_a_bar_and_a_curve():
    names = ["猫", "_background", "🙂 good", "x" * 80]
    chart = labels_chart(dict.fromkeys(names, 3), dict.fromkeys(names, 2))
    one = Curve("_background", np.array([1.0, 0.5]), np.array([0.5, 1.0]), 0.75)
    for name in names[:3]:
        assert name in chart
    assert "_background" in curves_chart([one, one._replace(label="猫")])


@pytest.mark.sampled(1)
def test_where_an_image_has_several_labels_each_is_counted_and_the_truth_is_a_table(store, weights, tmp_path):
    keys = sorted(str(path.relative_to(store)) for path in store.rglob("*.jpg"))
    rows = [(key, label) for key in keys for label in (key.split("/")[0], "any")]
    pd.DataFrame([*rows, ("nowhere.jpg", "any")], columns=["key", "label"]).to_csv(tmp_path / "labels.csv", index=False)
    pd.DataFrame(rows, columns=["key", "label"]).to_csv(tmp_path / "train.csv", index=False)
    tlbatch.train(
        images=str(store),
        labels=str(tmp_path / "train.csv"),
        multi_label=True,
        size=96,
        weights=weights,
        bundle=str(tmp_path / "many"),
        epochs=12,
        learning_rate=0.01,
    )
    tlbatch.classify(images=str(store), bundle=str(tmp_path / "many"), output=str(tmp_path / "out"))
    found, _ = summarize(read_table_runs(resolve(str(tmp_path / "out"))), predictions=True)
    given = tlbatch.read_predictions(str(tmp_path / "out"))["top_labels"].explode().value_counts()
    assert dict(found.labels) == given.to_dict()
    written = write_report(ReportConfig(output=str(tmp_path / "out"), labels=str(tmp_path / "labels.csv")))
    page = Path(written["report"]).read_text()
    assert "An image may have several labels" in page
    assert "1 missing" in page


def test_a_labels_file_of_images_that_all_failed_is_measured_as_nothing(classified, tmp_path):
    (tmp_path / "labels.csv").write_text("key,label\nred/cut.jpg,red\n,blue\n")
    written = write_report(ReportConfig(output=str(classified[1]), labels=str(tmp_path / "labels.csv")))
    assert "1 failed" in Path(written["report"]).read_text()
    assert tlbatch.evaluate(str(classified[1]), str(tmp_path / "labels.csv"))["failed"] == 1
