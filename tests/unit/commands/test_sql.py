"""The views of a table in DuckDB: the rows that a reader gets, wherever the output lies, and sentences about wrong queries."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.command import run_cli
from support.tables import publish_images

import tlbatch
from tlbatch.commands.sql import sql
from tlbatch.config import SqlConfig
from tlbatch.errors import ConfigError, OutputError
from tlbatch.storage.resolve import resolve

IMAGE = st.fixed_dictionaries({"score": st.sampled_from([0.25, 1.0]), "kind": st.sampled_from([None, None, "empty"])})
NIGHT = st.tuples(st.dictionaries(st.sampled_from("abcdefgh"), IMAGE, min_size=1), st.sets(st.sampled_from("ij")))


def asked(output, query: str) -> list[tuple]:
    return list(map(tuple, sql(SqlConfig(output=output.url, query=query))["rows"]))


@settings(deadline=None, max_examples=20, derandomize=True)
@given(nights=st.lists(NIGHT, max_size=3))
def test_views_have_the_current_rows(nights):
    with TemporaryDirectory() as folder:
        output = resolve(str(Path(folder) / "it's [a] *table?"))
        publish_images(output, "n0", {key: {"score": 0.5} for key in "jihgfedcba"})
        for number, (images, removed) in enumerate(nights, 1):
            publish_images(output, f"n{number}", images, removed=sorted(removed))
        for name, read in (("predictions", tlbatch.read_predictions), ("errors", tlbatch.read_errors)):
            expected = read(output.url, ["key", "run_id"]).sort_values("key").itertuples(index=False, name=None)
            assert asked(output, f"select key, run_id from {name} order by key") == list(expected)


def test_the_printed_statements_are_all_that_duckdb_needs(tmp_path):
    output = resolve(str(tmp_path / "out"))
    publish_images(output, "n0", {"a": {"score": 0.5}, "b": {"score": 0.5}})
    publish_images(output, "n1", {"b": {"kind": "empty"}})
    printed = run_cli("sql", output.url)
    assert printed.returncode == 0, printed.stderr
    with duckdb.connect() as connection:
        connection.execute(printed.stdout)
        assert connection.execute("select key from predictions").fetchall() == [("a",)]
        assert connection.execute("select key, kind from errors").fetchall() == [("b", "empty")]


def test_an_answer_is_csv_or_json(tmp_path):
    output = resolve(str(tmp_path / "out"))
    publish_images(output, "n0", {"a,b": {"score": 0.5}})
    query = "select key, score, date '2026-11-29' as day, null as nothing, 1e400::double as much from predictions"
    printed = run_cli("sql", output.url, "--query", query)
    assert list(csv.reader(io.StringIO(printed.stdout))) == [
        ["key", "score", "day", "nothing", "much"],
        ["a,b", "0.5", "2026-11-29", "", "Infinity"],
    ]
    found = json.loads(run_cli("sql", output.url, "--json", "--query", query).stdout)
    assert found["rows"] == [["a,b", 0.5, "2026-11-29", None, "Infinity"]]


@pytest.mark.parametrize(
    ("query", "said"),
    [("selec 1", "query: Parser Error: syntax error"), ("select * from other", "Table with name other does not exist")],
)
def test_a_wrong_query_is_a_sentence(tmp_path, query, said):
    output = resolve(str(tmp_path / "out"))
    publish_images(output, "n0", {"a": {"score": 0.5}})
    with pytest.raises(ConfigError, match=said):
        asked(output, query)


def test_without_a_table_or_duckdb_there_is_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(OutputError, match="Nothing is published"):
        asked(resolve(str(tmp_path / "none")), "select 1")
    output = resolve(str(tmp_path / "out"))
    publish_images(output, "n0", {"a": {"score": 0.5}})
    monkeypatch.setitem(sys.modules, "duckdb", None)
    assert "create or replace view predictions" in sql(SqlConfig(output=output.url))["views"]
    with pytest.raises(ConfigError, match=r"install tlbatch\[sql\]"):
        asked(output, "select 1")
