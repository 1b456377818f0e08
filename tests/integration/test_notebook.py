"""What a notebook gets: a report that shows itself, pictures on demand, and the table in three forms."""

import re

import pandas as pd
import pyarrow as pa
import pytest
from support.pictures import write_store

import tlbatch
from tlbatch.errors import ConfigError, OutputError

pytestmark = pytest.mark.usefixtures("ray_here")


@pytest.fixture(scope="module")
def told(bundle_url, tmp_path_factory):
    """A run of two nights."""
    folder = tmp_path_factory.mktemp("notebook")
    store = write_store(folder / "store", 20)
    settings = {"images": str(store), "bundle": bundle_url, "output": str(folder / "out"), "incremental": True}
    tlbatch.run(**settings)
    (store / "red" / "0001.jpg").unlink()
    write_store(store, 3, first=50)
    return tlbatch.run(**settings)


def test_a_run_is_a_report_that_shows_itself(told):
    assert (told.verdict, told.result["listed"]) == ("good", 9)
    assert "nothing unusual" in told.sentence
    shown = told._repr_html_()
    assert shown.startswith('<iframe title="tlbatch" srcdoc="&lt;!doctype html&gt;')
    assert 'sandbox="allow-scripts"' in shown
    assert len(told.predictions) == 68


def test_pictures_of_a_label_the_surest_first(told):
    page = told.show("red", n=4)
    keys = re.findall(r"</b><bdi>(.*?)</bdi>", page.html)
    table = told.predictions
    assert keys == table[table["label"] == "red"].nlargest(4, "score")["key"].tolist()
    assert page.html.count("data:image/jpeg;base64,") == 4
    doubtful = re.findall(r"</b><bdi>(.*?)</bdi>", told.show(n=3, order="least certain").html)
    assert doubtful == table.nsmallest(3, "score")["key"].tolist()
    assert "srcdoc" in page._repr_html_()


def test_what_there_is_not_is_said(told):
    with pytest.raises(OutputError, match="has the label 'rde'; did you mean 'red'"):
        told.show("rde")
    with pytest.raises(ValueError, match="order: write 'most certain' or 'least certain'"):
        told.show("red", order="best")
    with pytest.raises(OutputError, match="a report is about one table"):
        tlbatch.run(images="/a", bundle=["/b", "/c"], output="/d")


def test_a_report_can_be_had_again_with_the_truth(told, tmp_path):
    table = told.predictions
    table[["key", "label"]].to_csv(tmp_path / "labels.csv", index=False)
    again = tlbatch.load_report(told.output, labels=str(tmp_path / "labels.csv"))
    assert again.result == told.result
    assert "100.00 % of 68 labelled images are predicted correctly" in again._repr_html_()


def test_the_table_comes_in_three_forms_which_are_equal(told):
    columns = ["key", "label", "score"]
    frame = tlbatch.read_predictions(told.output, columns)
    table = tlbatch.read_predictions(told.output, columns, format="arrow")
    rows = tlbatch.read_predictions(told.output, columns, format="ray")
    assert isinstance(frame, pd.DataFrame)
    assert isinstance(table, pa.Table)
    assert type(rows).__module__.startswith("ray.data")
    pd.testing.assert_frame_equal(table.to_pandas(), frame)
    by_key = rows.to_pandas().sort_values("key", ignore_index=True)
    pd.testing.assert_frame_equal(by_key, frame.sort_values("key", ignore_index=True), check_dtype=False)
    assert not by_key["key"].eq("red/0001.jpg").any()
    red = tlbatch.read_predictions(told.output, columns, format="ray", filters=[("label", "=", "red")])
    assert red.count() == (frame["label"] == "red").sum() > 0
    with pytest.raises(ConfigError, match="format: write pandas, arrow, batches or ray; found 'csv'"):
        tlbatch.read_predictions(told.output, format="csv")
