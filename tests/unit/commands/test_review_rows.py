"""The rows to review are those that the whole table in memory would give, and its names are not kept."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tables import publish_images

from tlbatch.commands import review as command
from tlbatch.commands.read import read_predictions
from tlbatch.config import ReviewConfig
from tlbatch.images.labels import LabelRow, Labels
from tlbatch.output.rows import RowFiles
from tlbatch.output.run import read_output
from tlbatch.output.table import current_of, read_table
from tlbatch.report import reviewed
from tlbatch.report.reviewed import read_reviewed
from tlbatch.schema import to_frame
from tlbatch.storage.resolve import resolve

SCORES = st.sampled_from([[0.75, 0.25], [0.5, 0.5], [0.625, 0.25], [1.0, 0.0], [0.875, 0.125]])
IMAGE = st.fixed_dictionaries(
    {
        "label": st.sampled_from(["cat", "dog", "cow"]),
        "top_scores": SCORES,
        "etag": st.sampled_from(["e", "f", None]),
        "kind": st.sampled_from([None, None, None, "empty"]),
    }
)
NIGHT = st.dictionaries(st.sampled_from("abcdefghij"), IMAGE, min_size=1)


def publish(folder: str, nights, *, alone: bool):
    output = resolve(str(Path(folder) / "out"))
    for number, images in enumerate(nights):
        rows = {key: {**image, "score": image["top_scores"][0]} for key, image in images.items()}
        publish_images(output, f"n{number}", rows, alone=alone and number == len(nights) - 1)
    return output


def by_hand(output, labelled: str) -> tuple[pd.DataFrame, list[float], list[bool]]:
    """The table without labelled images, its margins, and what is new or changed in it."""
    table = read_predictions(output.url, ["uri", "key", "etag", "label", "score", "top_scores"])
    table = table[~table["key"].isin(list(labelled))].reset_index(drop=True)
    scores = table["top_scores"].tolist()
    one_score = any(len(values) < 2 for values in scores)
    margins = (table["score"] - 0.5).abs() if one_score else [values[0] - values[1] for values in scores]
    state = read_output(output)
    before = state.previous(state.newest)
    if before is None:
        return table, list(margins), [False] * len(table)
    old = to_frame(read_table(state.table_after(before), "predictions", ["uri", "key", "etag"])).fillna("none")
    known = set(old.itertuples(index=False, name=None))
    new = table[["uri", "key", "etag"]].fillna("none")
    return table, list(margins), [row not in known for row in new.itertuples(index=False, name=None)]


@settings(deadline=None, max_examples=25, derandomize=True)
@given(nights=st.lists(NIGHT, min_size=1, max_size=3), alone=st.booleans(), labelled=st.sampled_from(["", "ab", "abcdefghij"]))
def test_margins_and_changes_are_those_of_the_whole_table(nights, alone, labelled):
    with TemporaryDirectory() as folder:
        output = publish(folder, nights, alone=alone)
        state = read_output(output)
        previous = state.previous(state.newest)
        labels = Labels(files=(tuple(LabelRow(None, key, "cat") for key in labelled),)) if labelled else None
        found = read_reviewed(state.table, state.table_after(previous) if previous else [], labels)
        table, margins, changed = by_hand(output, labelled)
        assert found.margins.tolist() == margins
        assert found.changed.tolist() == changed
        assert found.labels == set(table["label"])
        rows = RowFiles(state.table, "predictions").take(found.rows, ["uri", "key"])
        assert rows["key"].to_pylist() == table["key"].tolist()


def test_a_few_rows_are_in_memory_at_a_time(tmp_path, monkeypatch):
    output = resolve(str(tmp_path / "out"))
    publish_images(output, "n0", {f"{number:03d}": {} for number in range(120)})
    publish_images(output, "n1", {f"{number:03d}": {"etag": "new"} for number in range(60)})
    most = []
    monkeypatch.setattr(reviewed, "current_of", lambda rows: most.append(sum(map(len, rows))) or current_of(rows))
    runs = read_output(output).table
    found = read_reviewed(runs, runs[:1], None)
    assert int(found.changed.sum()) == 60
    assert max(most) < 80, "a file of each run, and the manifest of the second one"


def test_with_one_score_for_some_image_the_distance_from_a_half_counts(tmp_path):
    output = publish(str(tmp_path), [{"a": {"top_scores": [0.75, 0.25]}, "b": {"top_scores": [0.625]}}], alone=False)
    assert read_reviewed(read_output(output).table, [], None).margins.tolist() == [0.25, 0.125]


@settings(deadline=None, max_examples=200, derandomize=True)
@given(values=st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), max_size=30), most=st.integers(0, 40))
def test_the_smallest_are_in_the_order_of_a_stable_sort(values, most):
    given = np.array(values, np.float32)
    assert command._smallest(given, most).tolist() == np.argsort(given, kind="stable")[:most].tolist()


@pytest.mark.parametrize("budget", [3, 10, 40])
def test_the_chosen_rows_are_those_of_the_whole_table(tmp_path, budget):
    random = np.random.default_rng(7)
    scores = np.round(random.uniform(0.5, 1, 60), 1)
    first = {f"{number:03d}": {"top_scores": [score, 1 - score]} for number, score in enumerate(scores)}
    second = {key: {"top_scores": [0.75, 0.25], "etag": etag} for key, etag in (("003", "new"), ("017", "e"), ("100", "e"))}
    output = publish(str(tmp_path), [first, second], alone=False)
    config = ReviewConfig(output=output.url, budget=budget, to=str(tmp_path / "to"), seed=5)
    state = read_output(output)
    found = read_reviewed(state.table, state.table_after(state.previous(state.newest)), None)
    chosen, duplicates = command._choose(config, state.table, found, None)
    table, margins, changed = by_hand(output, "")
    assert changed == [key in ("003", "100") for key in table["key"]]
    random = np.random.default_rng(5)
    wanted: dict[int, str] = {}
    for why, order, most in (
        ("changed", random.permutation(np.flatnonzero(changed)), int(0.2 * budget)),
        ("control", random.permutation(len(table)), int(0.1 * budget)),
        ("uncertain", np.argsort(margins, kind="stable"), budget),
    ):
        for row in [row for row in order.tolist() if row not in wanted][: min(most, budget - len(wanted))]:
            wanted[row] = why
    expected = table.iloc[list(wanted)].assign(why=list(wanted.values())).sort_values("score", kind="stable")
    pd.testing.assert_frame_equal(chosen, expected[chosen.columns])
    assert duplicates is None
