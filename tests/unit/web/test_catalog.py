"""Filters, orders and pages of a table, against the same in plain Python."""

import random

import pytest
from support.tables import publish_images

from tlbatch.output.rows import RowFiles
from tlbatch.output.run import read_table_runs
from tlbatch.storage.resolve import resolve
from tlbatch.web.catalog import BARS, Catalog, Cursor, Truth, Wanted

LABELS = ("cat", "dog", "eel")
ORDERS = {
    "stored": lambda row: row["place"],
    "unsure": lambda row: (row["score"], row["place"]),
    "sure": lambda row: (-row["score"], row["place"]),
    "margin": lambda row: (row["top_scores"][0] - row["top_scores"][1], row["place"]),
}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A catalog of 90 images, some of them of a second run, and what is in it, by place. Many scores are equal."""
    output = resolve(str(tmp_path_factory.mktemp("catalog") / "out"))
    chance = random.Random(3)

    def image() -> dict:
        score = chance.randint(8, 16) / 16
        # Binary fractions: the sum and the difference are exact.
        scores = [score, (1 - score) / chance.choice([1, 2])]
        return {"score": score, "top_scores": scores, "label": chance.choice(LABELS), "abstained": chance.random() < 0.2}

    first = {f"{folder}/{number:02d}.jpg": image() for folder in ("a", "a b", "é", "z") for number in range(24)}
    second = {key: image() for key in chance.sample(sorted(first), 9)} | {"b/new.jpg": image()}
    removed = [key for key in chance.sample(sorted(first), 10) if key not in second][:6]
    publish_images(output, "r1", first, rows_per_file=20)
    publish_images(output, "r2", second, removed=removed, rows_per_file=4)
    runs = read_table_runs(output)
    files = RowFiles(runs, "predictions")
    rows = [{"key": key, "place": place, "run": "r1", **first[key]} for place, key in enumerate(sorted(first))]
    rows += [{"key": key, "place": len(first) + place, "run": "r2", **second[key]} for place, key in enumerate(sorted(second))]
    hidden = {*second, *removed}
    return Catalog(runs, files), [row for row in rows if row["run"] == "r2" or row["key"] not in hidden]


def passes(row, wanted, truths) -> bool:
    truth = truths.get(row["place"])
    known = {
        "": True,
        "wrong": truth is not None and truth.label != row["label"],
        "right": truth is not None and truth.label == row["label"],
        "labelled": truth is not None,
        "unlabelled": truth is None,
        "corrected": truth is not None and truth.corrected,
    }
    return (
        wanted.label in ("", row["label"])
        and wanted.low <= row["score"] <= wanted.high
        and (row["abstained"] or not wanted.abstained)
        and wanted.run in ("", row["run"])
        and row["key"].startswith(wanted.folder)
        and known[wanted.known]
    )


def all_pages(catalog, wanted, most, **options) -> list[int]:
    found, after = [], None
    while page := catalog.page(wanted, after, most=most, **options):
        found += [one.place for one in page]
        after = Cursor.read(str(page[-1].cursor))
    return found


@pytest.mark.parametrize("order", ORDERS)
def test_pages_follow_each_other_without_a_gap(table, order):
    catalog, rows = table
    wanted = [row["place"] for row in sorted(rows, key=ORDERS[order])]
    assert len(wanted) == catalog.images == 96 + 1 - 6
    assert all_pages(catalog, Wanted(order=order), 7) == wanted
    assert all_pages(catalog, Wanted(order=order), 1_000) == wanted
    middle = catalog.cursor(Wanted(order=order), wanted[40])
    before = catalog.page(Wanted(order=order), middle, most=5, backwards=True)
    assert [one.place for one in before] == wanted[35:40][::-1]


FILTERS = [
    {},
    {"label": "dog"},
    {"label": "no such label"},
    {"low": 0.75},
    {"low": 0.625, "high": 0.75, "label": "eel"},
    {"abstained": True},
    {"run": "r2"},
    {"run": "r1", "folder": "a/"},
    {"run": "no such run"},
    {"folder": "a"},
    {"folder": "a b/1"},
    {"folder": "é/"},
    {"folder": "zz"},
    *({"known": known} for known in ("wrong", "right", "labelled", "unlabelled", "corrected")),
    {"known": "wrong", "label": "cat", "folder": "a"},
]


@pytest.mark.parametrize("asked", FILTERS, ids=str)
def test_a_filter_passes_what_it_should(table, asked):
    catalog, rows = table
    chance = random.Random(5)
    truths = {row["place"]: Truth(chance.choice([*LABELS, "owl"]), chance.random() < 0.5) for row in chance.sample(rows, 30)}
    catalog.learn(truths)
    wanted = Wanted(**asked)
    passing = [row for row in rows if passes(row, wanted, truths)]
    assert all_pages(catalog, wanted, 10) == [row["place"] for row in sorted(passing, key=ORDERS["unsure"])]
    facets = catalog.facets(wanted)
    assert facets.images == len(passing)
    of_labels = [row["label"] for row in rows if passes(row, wanted.model_copy(update={"label": ""}), truths)]
    assert facets.labels == {label: of_labels.count(label) for label in set(of_labels)}
    of_scores = [row["score"] for row in rows if passes(row, wanted.model_copy(update={"low": 0, "high": 1}), truths)]
    assert sum(facets.bars) == len(of_scores)
    assert facets.bars[BARS - 1] == sum(score * BARS >= BARS - 1 for score in of_scores)
    catalog.learn(dict.fromkeys(truths))
    assert catalog.facets(Wanted(known="labelled")).images == 0
    assert catalog.known_labels == set()


def test_a_folder_of_many_pieces_is_found_too(table, monkeypatch):
    catalog, rows = table
    monkeypatch.setattr("tlbatch.web.catalog._MOST_RANGES", 0)
    catalog._ranges.cache_clear()
    wanted = Wanted(folder="a b/")
    assert {one.place for one in catalog.page(wanted)} == {row["place"] for row in rows if passes(row, wanted, {})}
    catalog._ranges.cache_clear()


def test_an_address_says_what_is_not_usual():
    wanted = Wanted(label="a&b", low=0.25, order="margin")
    assert wanted.query() == {"label": "a&b", "low": "0.25", "order": "margin"}
    assert wanted.query(label="", low=0.0, order="unsure") == {}
    assert Wanted.model_validate(wanted.query(abstained=True)) == wanted.model_copy(update={"abstained": True})


def test_rows_with_one_score_and_tables_without_rows(tmp_path):
    output = resolve(str(tmp_path / "out"))
    publish_images(output, "r1", {"x": {"kind": "empty", "stage": "read", "message": "", "attempts": 1}})
    runs = read_table_runs(output)
    empty = Catalog(runs, RowFiles(runs, "predictions"))
    assert (empty.images, empty.page(Wanted()), empty.facets(Wanted()).images) == (0, [], 0)
    one = {"top_labels": ["cat"], "score": 0.5, "top_scores": [0.5]}
    publish_images(output, "r2", {"a": one, "b": {**one, "score": 0.875, "top_scores": [0.875]}, "c": {"score": 0.75}})
    runs = read_table_runs(output)
    catalog = Catalog(runs, RowFiles(runs, "predictions"))
    found = catalog.page(Wanted(order="margin"))
    assert [one.cursor.value for one in found] == [0.0, 0.5, 0.75]
