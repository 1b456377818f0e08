"""The few pictures worth a look: which they are, the page that shows them, and the labels file that training takes up."""

import base64
import csv
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from support.command import run_cli
from support.pictures import COLORS, encoded, noisy, write_store
from support.shards import tar_of

import tlbatch
from tlbatch.commands.review import ReviewSelection
from tlbatch.errors import ErrorKind, Failure, OutputError
from tlbatch.images.decode import thumbnail
from tlbatch.report.html import Thumbnail
from tlbatch.report.sheet import make_labelling_page

pytestmark = pytest.mark.usefixtures("ray_here")


@pytest.fixture(scope="module")
def reviewed(bundle_url, tmp_path_factory) -> tuple[Path, Path]:
    """A store with features: 60 pictures, a shard, ten near-duplicates, and one that nobody can read."""
    folder = tmp_path_factory.mktemp("review")
    store = write_store(folder / "store", 20)
    for number in range(10):
        picture = Image.open(store / "red" / "0003.jpg")
        picture.save(store / "red" / f"again{number}.jpg", quality=85 + number)
    (store / "red" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    members = {f"in-tar/{number}.jpg": encoded(noisy(COLORS["blue"], 900 + number)) for number in range(5)}
    (store / "more.tar").write_bytes(tar_of(members))
    settings = {"features": True, "max_failed_ratio": 1.0}
    tlbatch.classify(images=str(store), bundle=bundle_url, output=str(folder / "out"), **settings)
    return store, folder / "out"


def rows_of(path: Path | str) -> list[dict]:
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def test_the_least_certain_come_first_and_a_few_by_chance(reviewed, tmp_path):
    _, output = reviewed
    result = tlbatch.review(output=str(output), budget=20, to=str(tmp_path / "r"), near_duplicate=1.0)
    rows = rows_of(result["labels"])
    assert result["images"] == len(rows) == len({row["key"] for row in rows}) == 20
    assert result["why"] == {"uncertain": 18, "control": 2}
    table = tlbatch.read_predictions(str(output))
    margins = table["top_scores"].map(lambda scores: scores[0] - scores[1])
    uncertain = {row["key"] for row in rows if row["why"] == "uncertain"}
    control = {row["key"] for row in rows if row["why"] == "control"}
    expected = [key for key in table["key"][np.argsort(margins, kind="stable")] if key not in control][:18]
    assert uncertain == set(expected)
    assert all(row["label"] == "" and row["suggested"] for row in rows)


def test_near_duplicates_appear_once(photos, bundle_url, tmp_path):
    """Forty photographs, and six copies of one as another program would have saved them."""
    store = tmp_path / "store"
    store.mkdir()
    chosen = sorted(photos.glob("*.JPEG"))[:40]
    for path in chosen:
        (store / path.name).write_bytes(path.read_bytes())
    for number in range(6):
        Image.open(chosen[7]).convert("RGB").save(store / f"again{number}.jpg", quality=85 + 2 * number)
    tlbatch.classify(images=str(store), bundle=bundle_url, output=str(tmp_path / "out"), features=True)
    result = tlbatch.review(output=str(tmp_path / "out"), budget=46, to=str(tmp_path / "r"))
    keys = {row["key"] for row in rows_of(result["labels"])}
    assert len([key for key in keys if key == chosen[7].name or "again" in key]) == 1
    assert result["images"] == len(keys) == 40, "no two of the photographs are the same picture"
    assert result["near_duplicates"] >= 6


def test_what_is_new_or_changed_since_the_run_before_is_looked_at(reviewed, bundle_url, tmp_path):
    store, _ = reviewed
    shutil.copytree(store, tmp_path / "store", copy_function=shutil.copy2)
    out = tmp_path / "out"
    tlbatch.classify(images=str(tmp_path / "store"), bundle=bundle_url, output=str(out), max_failed_ratio=1.0)
    (tmp_path / "store" / "green" / "new.jpg").write_bytes(encoded(noisy(COLORS["green"], 777)))
    (tmp_path / "store" / "green" / "0001.jpg").write_bytes(encoded(noisy(COLORS["green"], 778)))
    tlbatch.classify(images=str(tmp_path / "store"), bundle=bundle_url, output=str(out), max_failed_ratio=1.0)
    result = tlbatch.review(output=str(out), budget=10, to=str(tmp_path / "r"))
    changed = {row["key"] for row in rows_of(result["labels"]) if row["why"] == "changed"}
    assert changed == {"green/new.jpg", "green/0001.jpg"}
    assert result["near_duplicates"] is None, "there are no features to tell"
    assert result["images"] == 10


def test_what_is_labelled_already_is_not_chosen_again_and_training_takes_it_up(reviewed, tmp_path):
    """Two rounds as a person goes them: look, fill in, train on both files, look again."""
    _, output = reviewed
    settings = {"output": str(output), "near_duplicate": 1.0}
    first = tlbatch.review(budget=50, to=str(tmp_path / "first"), **settings)
    frame = pd.DataFrame(rows_of(first["labels"]))
    frame["label"] = [key.split("/")[0] if "/" in key and "tar" not in key else "blue" for key in frame["key"]]
    frame.to_csv(first["labels"], index=False)
    second = tlbatch.review(budget=20, to=str(tmp_path / "second"), labels=first["labels"], **settings)
    keys = {row["key"] for row in rows_of(second["labels"])}
    assert not keys & set(frame["key"])
    table = tlbatch.read_predictions(str(output), ["uri", "key"])
    more = table[table["key"].isin(keys)].drop(columns="key")
    more = more[~more["uri"].str.endswith(".tar")].assign(label=lambda rows: rows["uri"].str.split("/").str[-2])
    more.to_csv(tmp_path / "more.csv", index=False)
    both = [first["labels"], str(tmp_path / "more.csv")]
    trained = tlbatch.train(features=str(output), labels=both, bundle=str(tmp_path / "b"), epochs=50)
    assert sum(trained["images"].values()) == first["images"] + len(more)


def test_labels_that_somebody_filled_in_are_not_overwritten(reviewed, tmp_path):
    _, output = reviewed
    settings = {"output": str(output), "budget": 5, "to": str(tmp_path / "r")}
    path = Path(tlbatch.review(**settings)["labels"])
    tlbatch.review(**settings)
    path.write_text(path.read_text().replace(",,", ",red,", 1))
    with pytest.raises(OutputError, match="contains labels and would be overwritten"):
        tlbatch.review(**settings)


def test_the_sheet_has_a_small_picture_of_each_also_out_of_a_shard(reviewed, tmp_path):
    _, output = reviewed
    result = tlbatch.review(output=str(output), budget=75, to=str(tmp_path / "r"), near_duplicate=1.0)
    page = Path(result["sheet"]).read_text()
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)" alt="([^"]+)"', page)
    assert len(found) == result["images"] == 75
    assert result["unreadable"] == 0
    assert {name for _, name in found} >= {f"in-tar/{number}.jpg" for number in range(5)}
    for data, _ in found:
        assert max(Image.open(io.BytesIO(base64.b64decode(data))).size) == 224


def test_pictures_that_are_gone_are_said_to_be(reviewed, bundle_url, tmp_path):
    store = write_store(tmp_path / "store", 3)
    tlbatch.classify(images=str(store), bundle=bundle_url, output=str(tmp_path / "out"))
    (store / "red" / "0000.jpg").unlink()
    result = tlbatch.review(output=str(tmp_path / "out"), budget=9, to=str(tmp_path / "r"))
    assert result["unreadable"] == 1
    assert "no longer readable" in Path(result["sheet"]).read_text()


def test_names_from_a_store_are_text_in_the_sheet():
    markup = "<b title=x>\"'</script><script>2</script>.jpg"
    page = make_labelling_page("t", [Thumbnail(markup, markup, 0.5, "uncertain", None)], [markup], [markup]).decode()
    assert "<b title=x" not in page
    assert page.count("<script>") == page.count("</script>") == 1
    assert "default-src &#39;none&#39;" in page


def test_what_is_filled_in_on_the_sheet_is_saved_as_a_labels_file(tmp_path, browser):
    """In a real browser, by the page's own button."""
    evil = 'comma, "quote"\r\n</script>.jpg'
    keys = ("a.jpg", evil, "c.jpg")
    pictures = [Thumbnail(key, "cat", 0.5, "uncertain", None) for key in keys]
    sheet = make_labelling_page("t", pictures, [f"s/{key}" for key in keys], ["cat", "dog"])
    (tmp_path / "sheet.html").write_bytes(sheet)
    page = browser.new_page()
    page.goto((tmp_path / "sheet.html").as_uri())
    page.locator("input").nth(0).fill("dog")
    page.locator("input").nth(1).fill('cat, or "dog"')
    assert page.locator("output").inner_text() == "2 of 3"
    with page.expect_download() as caught:
        page.get_by_role("button", name="Save labels.csv").click()
    assert caught.value.suggested_filename == "labels.csv"
    with open(caught.value.path(), newline="") as saved:
        assert list(csv.reader(saved)) == [
            ["uri", "key", "label"],
            ["s/a.jpg", "a.jpg", "dog"],
            [f"s/{evil}", evil, 'cat, or "dog"'],
        ]
    page.close()


def test_a_row_that_looks_like_a_chosen_one_is_skipped():
    vectors = {0: np.array([1.0, 0.0]), 1: np.array([0.99, 0.1411]), 2: np.array([0.0, 1.0])}
    picked = ReviewSelection(vectors, 0.95)
    picked.take("uncertain", [0, 1, 2, 3], 3)
    assert list(picked.rows) == [0, 2, 3]
    assert picked.duplicates == 1


@pytest.mark.parametrize(("size", "small"), [((400, 100), (224, 56)), ((30, 60), (112, 224))])
def test_a_thumbnail_keeps_the_shape_of_the_picture(size, small):
    assert Image.open(io.BytesIO(thumbnail(encoded(noisy((9, 9, 9), 0, size))))).size == small


def test_a_thumbnail_of_no_picture_is_a_failure():
    assert isinstance(thumbnail(b"nothing"), Failure)
    assert thumbnail(b"").kind == ErrorKind.EMPTY


def test_the_command_as_a_person_sees_it(reviewed, tmp_path):
    _, output = reviewed
    done = run_cli("review", output, "--budget", "10", "--to", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    assert "10 images: 9 uncertain, 1 control" in done.stdout
    assert "near-duplicates left out" in done.stdout
    assert run_cli("review", tmp_path / "nowhere").returncode == 2
