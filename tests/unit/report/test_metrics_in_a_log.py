"""What `train` and `evaluate` print where there is no terminal, in 80 columns: whole numbers and whole names."""

import pytest

from tlbatch.report.console import show_metrics


@pytest.mark.parametrize("count", [2, 6, 40])
@pytest.mark.parametrize("name", ["c", "golden retriever ", "a name that is longer than a line of a log " * 3])
def test_numbers_and_names_are_whole(count, name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    labels = [f"{name}{number}" for number in range(count)]
    facts = {"precision": 1 / 3, "recall": 1 / 3, "f1": 1 / 3, "images": 1_000_000}
    show_metrics(
        {
            "accuracy": 0.5,
            "images": 100,
            "labels": labels,
            "confusion": [[1000] * count] * count,
            "by_class": dict.fromkeys(labels, facts),
        }
    )
    said = capsys.readouterr().out
    assert "…" not in said
    assert said.count("0.333") == 3 * count
    assert max(map(len, said.splitlines())) <= 80
    assert ("1,000 " in said) == (count == 2 and len(name) < 5), "the matrix is there where it fits"
