"""Corrections of several people at once, in one labels file."""

import threading

import pytest

from tlbatch.errors import LabelsError
from tlbatch.images.label_files import read_labels
from tlbatch.storage.resolve import resolve
from tlbatch.web.corrections import Corrections


@pytest.fixture
def file(tmp_path):
    return resolve(str(tmp_path / "corrections.csv"))


def test_a_correction_is_a_row_until_it_is_taken_back(file):
    corrections = Corrections(file)
    assert corrections.read() == {}
    assert corrections.put(("/s/a.jpg", "a.jpg"), None) is None
    assert not file.exists(), "nothing was corrected"
    assert corrections.put(("/s/a.jpg", "a.jpg"), "cat") is None
    assert corrections.put(("/s/b.jpg", "b.jpg"), "dog") is None
    assert corrections.put(("/s/a.jpg", "a.jpg"), "dog") == "cat"
    (name, newest), *_ = reversed(corrections.read().items())
    assert (name, newest.label, newest.by != "", newest.at[10]) == (("/s/a.jpg", "a.jpg"), "dog", True, "T")
    assert corrections.put(("/s/a.jpg", "a.jpg"), None) == "dog"
    assert list(corrections.read()) == [("/s/b.jpg", "b.jpg")]


def test_names_are_text(file):
    odd = ('/s/a,b\n"c".jpg', "=1+1\r\n'é")
    Corrections(file).put(odd, 'la"bel,\n')
    assert {name: one.label for name, one in Corrections(file).read().items()} == {odd: 'la"bel,\n'}


def test_train_and_evaluate_read_it(file):
    Corrections(file).put(("s3://b/x.tar", "x/1.jpg"), "cat")
    (row,) = read_labels([file]).rows
    assert (row.uri, row.key, row.label) == ("s3://b/x.tar", "x/1.jpg", "cat")


def test_of_many_writers_at_once_none_loses_a_correction(file):
    def correct(writer: int) -> None:
        own = Corrections(file)
        for number in range(15):
            own.put(("/s", f"{writer}-{number}"), f"label {number}")

    threads = [threading.Thread(target=correct, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Corrections(file).read()) == 60


@pytest.mark.parametrize("text", ["key,label\na,b\n", "uri,key,label,by,at\na,b\n", "\x00\x01"])
def test_a_file_of_another_kind_is_left_alone(file, text):
    file.write(text.encode())
    for work in (Corrections(file).read, lambda: Corrections(file).put(("a", "a"), "b")):
        with pytest.raises(LabelsError, match="is not a file of corrections"):
            work()
    assert file.read() == text.encode()
