"""Labels files and lists of classes: CSV, Parquet, JSON or lines of text -> labels of images, or the classes of a model."""

from __future__ import annotations

import codecs
import csv
import io
import json
import logging
import re
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from tlbatch.errors import LabelsError, line_of
from tlbatch.images.labels import NO_LABEL, WITHDRAWN, LabelRow, Labels
from tlbatch.schema import from_parquet
from tlbatch.storage.location import Location

log = logging.getLogger(__name__)

_COLUMNS = ("uri", "key", "label", "split")
#: The columns that a user may name.
_NAMED = ("key", "label")
#: What others call the columns.
_OTHER_NAMES = {
    **dict.fromkeys(("key", "filename", "file_name", "file", "image", "image_id", "path", "id"), "key"),
    **dict.fromkeys(("label", "class", "class_name", "category", "breed", "target"), "label"),
}


def read_labels(locations: Sequence[Location], *, many: bool = False, columns: Sequence[str] = ()) -> Labels:
    """Read CSV or Parquet files with the columns `key` or `uri` or both, `label` and optionally `split`.

    Args:
        locations: the files; a later one overrides the labels of an earlier one, image by image.
        many: whether an image may have several labels, one row for each, or none, written `-`.
        columns: the columns of the names of images and of the labels, if they are called otherwise.

    Raises:
        LabelsError: a file does not exist, cannot be parsed, lacks a column or has it twice, or gives one name two labels.
    """
    files = tuple(_read_rows(location, columns, many=many) for location in locations)
    return Labels(files, ", ".join(location.url for location in locations), many)


def _read_rows(location: Location, columns: Sequence[str], *, many: bool) -> tuple[LabelRow, ...]:
    table = _read_table(location, columns)
    found = ", ".join(table.column_names)
    advice = f"its columns are {found}; --labels-columns NAME,LABEL says which ones are meant"
    if not {"key", "uri"} & set(table.column_names):
        raise LabelsError(f"The labels file {location.url} has no column key (or uri); {advice}.")
    if "label" not in table.column_names:
        raise LabelsError(f"The labels file {location.url} has no column label; {advice}.")
    missing = [None] * table.num_rows
    cells = [table[name].to_pylist() if name in table.column_names else missing for name in _COLUMNS]
    rows = tuple(_row(*(value or None for value in values)) for values in zip(*cells, strict=True))
    if not any(row.label for row in rows):
        raise LabelsError(f"The labels file {location.url} has no row with a label.")
    nameless = sum(row.label is not None and row.uri is None and row.key is None for row in rows)
    if nameless:
        log.warning("%d rows of %s have a label and no name of an image, and are left out", nameless, location.url)
    rows = tuple(row for row in rows if row.uri is not None or row.key is not None)
    if many:
        return rows
    _require_one_label(rows, location)
    return tuple(row._replace(label=WITHDRAWN) if row.label == NO_LABEL else row for row in rows)


def _row(uri: str | None, key: str | None, label: str | None, split: str | None) -> LabelRow:
    """A row; the words that are no classes may be written with capitals and spaces around them."""
    word = (label or "").strip().casefold()
    return LabelRow(uri, key, word if word in (WITHDRAWN, NO_LABEL) else label, split)


def _require_one_label(rows: Sequence[LabelRow], location: Location) -> None:
    label_of: dict[tuple[str | None, str | None], str] = {}
    for row in rows:
        if row.label is not None and label_of.setdefault((row.uri, row.key), row.label) != row.label:
            raise LabelsError(f"The labels file {location.url} gives {row.name} two labels.")


def _read_table(location: Location, columns: Sequence[str] = ()) -> pa.Table:
    """The columns of a labels file, as text and under tlbatch's names."""
    try:
        data = location.read()
    except (FileNotFoundError, IsADirectoryError):
        raise LabelsError(f"There is no labels file at {location.url}.") from None
    except PermissionError as error:
        raise LabelsError(f"No permission to read the labels file {location.url}: {error}.") from None
    try:
        table = from_parquet(data) if data.startswith(b"PAR1") else _parse_csv(decoded_text(data, location), columns)
    except (pa.ArrowException, csv.Error) as error:
        raise LabelsError(f"The labels file {location.url} is neither CSV nor Parquet: {line_of(error)}.") from None
    if columns:
        table = table.rename_columns(_told_names(table.column_names, columns, location))
    table = table.rename_columns(_usual_names(table.column_names, location))
    twice = next((name for name in _COLUMNS if table.column_names.count(name) > 1), None)
    if twice:
        raise LabelsError(f"The labels file {location.url} has the column {twice} twice; keep one of them.")
    for name in set(_COLUMNS) & set(table.column_names):
        table = table.set_column(table.column_names.index(name), name, table[name].cast(pa.string()))
    return table


def decoded_text(data: bytes, location: Location) -> str:
    """The text of a file: UTF-8, UTF-16 with a byte order mark, or else Windows-1252, which is logged."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        log.warning("%s is not in UTF-8 and is read as Windows-1252", location.url)
        return data.decode("cp1252", errors="replace")


def _parse_csv(text: str, columns: Sequence[str] = ()) -> pa.Table:
    """CSV with commas, semicolons or tabs. All columns are text: a label "01" is not the number 1."""
    known = {delimiter: {name.lower() for name in _header(text, delimiter)} for delimiter in ",;\t"}
    wanted = {*_COLUMNS, *_OTHER_NAMES, *(name.lower() for name in columns)}
    delimiter = max(known, key=lambda one: len(wanted & known[one]))
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    header = next(rows, [])
    values = [row for row in rows if row]
    odd = next((number for number, row in enumerate(values, 1) if len(row) != len(header)), None)
    if odd is not None:
        raise csv.Error(f"row {odd} has {len(values[odd - 1])} columns instead of {len(header)}")
    cells = zip(*values, strict=True) if values else [()] * len(header)
    return pa.Table.from_arrays([pa.array(column, pa.string()) for column in cells], names=header)


def _header(text: str, delimiter: str) -> list[str]:
    return next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True), [])


def _told_names(found: Sequence[str], columns: Sequence[str], location: Location) -> list[str]:
    """The columns with those that the user named as the key and the label; others of these names get out of their way."""
    missing = [name for name in columns if name not in found]
    if missing or len(set(columns)) != len(_NAMED):
        raise LabelsError(
            "labels_columns: write the column of names and the column of labels, as in id,breed; the columns of "
            f"{location.url} are {', '.join(found)}."
        )
    ours = dict(zip(columns, _NAMED, strict=True))
    return [ours.get(name, f"{name} of the file" if name in (*_NAMED, "uri") else name) for name in found]


def _usual_names(found: Sequence[str], location: Location) -> list[str]:
    """The columns with tlbatch's names for those that are called otherwise, if only one column can be meant."""
    names = list(found)
    for ours in ("key", "label"):
        others = [name for name in names if _OTHER_NAMES.get(name.lower()) == ours]
        if ours in names or (ours == "key" and "uri" in names) or len(others) != 1:
            continue
        log.warning("The column %s of %s is taken as the %s", others[0], location.url, ours)
        names[names.index(others[0])] = ours
    return names


def read_classes(location: Location) -> list[str]:
    """Read the classes of a model in the order of its outputs: lines of text, a CSV or Parquet with `label`, or JSON.

    Lines may be numbered, as Teachable Machine writes them, and a CSV may be one column without a header. JSON may be a list,
    or an object from name to number, like `class_indices` of Keras's generators, or from number to name, like `id2label`.

    Raises:
        LabelsError: the file does not exist, cannot be parsed, or names a class twice.
    """
    if location.url.endswith((".csv", ".parquet")):
        table = _read_table(location)
        if "label" in table.column_names:
            classes = _by_index(table, location)["label"].to_pylist()
        elif table.num_columns == 1 and location.url.endswith(".csv"):
            classes = [row[0] for row in csv.reader(io.StringIO(decoded_text(location.read(), location))) if row]
        else:
            found = ", ".join(table.column_names)
            raise LabelsError(f"The labels file {location.url} has no column label; its columns are {found}.")
    else:
        classes = _classes_of_text(location)
    twice = next((name for name in classes if classes.count(name) > 1), None)
    if twice is not None or len(classes) < 2 or not all(isinstance(name, str) and name for name in classes):
        found = f"it has {twice!r} twice" if twice is not None else f"it has {len(classes)} names"
        raise LabelsError(f"The labels file {location.url} must name each class once, and at least two classes: {found}.")
    return list(classes)


def _by_index(table: pa.Table, location: Location) -> pa.Table:
    """The rows in the order of a column `index`, if there is one."""
    if table.column_names.count("index") != 1:
        return table
    try:
        return table.take(pc.sort_indices(table["index"].cast(pa.int64())))
    except pa.ArrowException as error:
        raise LabelsError(f"The column index of {location.url} must hold numbers: {line_of(error)}.") from None


def _without_numbers(lines: list[str]) -> list[str]:
    """Lines without their numbers, in the order of these, if they are numbered from 0 or 1 without a gap."""
    numbered = [re.fullmatch(r"(\d+)[\s:.)]\s*(.+)", line) for line in lines]
    by_number = {int(match[1]): match[2] for match in numbered if match is not None}
    if len(by_number) != len(lines) or set(by_number) not in (set(range(len(lines))), set(range(1, len(lines) + 1))):
        return lines
    return [by_number[number] for number in sorted(by_number)]


def _classes_of_text(location: Location) -> list[str]:
    try:
        text = decoded_text(location.read(), location)
        if not location.url.endswith(".json"):
            return _without_numbers([line.strip() for line in text.splitlines() if line.strip()])
        found = json.loads(text)
        if not isinstance(found, dict):
            return list(found)
        if all(isinstance(name, str) for name in found.values()):
            return [found[number] for number in sorted(found, key=int)]
        return sorted(found, key=found.__getitem__)
    except (FileNotFoundError, IsADirectoryError):
        raise LabelsError(f"There is no labels file at {location.url}.") from None
    except (ValueError, TypeError) as error:
        raise LabelsError(f"The labels file {location.url} cannot be parsed: {error}.") from None
