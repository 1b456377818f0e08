"""Labels files, or folders named after classes -> pairs of an image name and a label."""

from __future__ import annotations

import json
import logging
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.csv as pacsv

from tlbatch.errors import LabelsError
from tlbatch.schema import from_parquet
from tlbatch.storage.location import Location

log = logging.getLogger(__name__)

#: Classes that a message names.
_NAMED = 10
#: In a file in which an image may have several labels: this image has none.
NO_LABEL = "-"


@dataclass(frozen=True)
class Labels:
    """Labelled images; an image with several labels is in several pairs.

    Attributes:
        column: the manifest column that the names refer to, key or uri.
        pairs: name and label of each row.
        splits: the split of each pair, if the file has a column `split`.
        source: the file or store that the labels come from, for messages.
        from_folders: whether they are names of folders.
    """

    column: str
    pairs: tuple[tuple[str, str], ...]
    splits: tuple[str | None, ...] | None = None
    source: str = ""
    from_folders: bool = False

    def of_split(self, split: str) -> Labels:
        """Return only the pairs of one split; raises LabelsError if there are none."""
        if self.splits is None:
            raise LabelsError(f"The labels file {self.source} has no column split, so it cannot select split {split!r}.")
        kept = tuple(pair for pair, part in zip(self.pairs, self.splits, strict=True) if part == split)
        if not kept:
            known = ", ".join(sorted(set(filter(None, self.splits))))
            raise LabelsError(f"The labels file {self.source} has no images of split {split!r}; its splits are {known}.")
        return Labels(self.column, kept, None, self.source)


def read_all_labels(locations: Iterable[Location], *, many: bool = False) -> Labels:
    """Read several files as one; a later file overrides the labels of an earlier file, image by image.

    Raises:
        LabelsError: as in `read_labels`; or one file has keys and another has uris.
    """
    files = [read_labels(location, many=many) for location in locations]
    if len({file.column for file in files}) > 1:
        raise LabelsError(
            f"The labels files {' and '.join(file.source for file in files)} mix keys and uris; use one of the two in all."
        )
    last = {name: number for number, file in enumerate(files) for name, _ in file.pairs}
    kept = [
        (pair, file.splits[at] if file.splits else None)
        for number, file in enumerate(files)
        for at, pair in enumerate(file.pairs)
        if last[pair[0]] == number
    ]
    splits = tuple(split for _, split in kept) if any(file.splits for file in files) else None
    return Labels(files[0].column, tuple(pair for pair, _ in kept), splits, ", ".join(file.source for file in files))


def read_labels(location: Location, *, many: bool = False) -> Labels:
    """Read a CSV or Parquet file with the columns `key` (or `uri`), `label` and optionally `split`.

    Args:
        location: the file.
        many: whether an image may have several labels, one row for each, or none, written `-`.

    Raises:
        LabelsError: the file does not exist, cannot be parsed, lacks a column, or gives one image two labels.
    """
    table = _read_table(location)
    column = next((name for name in ("key", "uri") if name in table.column_names), None)
    found = ", ".join(table.column_names)
    if column is None:
        raise LabelsError(f"The labels file {location.url} has no column key (or uri); its columns are {found}.")
    if "label" not in table.column_names:
        raise LabelsError(f"The labels file {location.url} has no column label; its columns are {found}.")
    table = table.filter(pa.compute.is_valid(table["label"]))
    if not table.num_rows:
        raise LabelsError(f"The labels file {location.url} has no row with a label.")
    pairs = tuple(zip(table[column].to_pylist(), table["label"].to_pylist(), strict=True))
    if not many and len(dict(pairs)) != len(set(pairs)):
        name = next(name for name, label in pairs if dict(pairs)[name] != label)
        raise LabelsError(f"The labels file {location.url} gives {name!r} two labels.")
    splits: tuple[str | None, ...] | None = tuple(table["split"].to_pylist()) if "split" in table.column_names else None
    return Labels(column, pairs, splits, location.url)


def _read_table(location: Location) -> pa.Table:
    try:
        data = location.read()
    except (FileNotFoundError, IsADirectoryError):
        raise LabelsError(f"There is no labels file at {location.url}.") from None
    except PermissionError as error:
        raise LabelsError(f"No permission to read the labels file {location.url}: {error}.") from None
    try:
        if data.startswith(b"PAR1"):
            table = from_parquet(data)
        else:
            # All columns are text, because a label "01" is not the number 1. Only an empty label counts as missing.
            text = pacsv.ConvertOptions(
                column_types=dict.fromkeys(("key", "uri", "label", "split"), pa.string()),
                null_values=[""],
                strings_can_be_null=True,
            )
            table = pacsv.read_csv(pa.BufferReader(data), convert_options=text)
    except pa.ArrowInvalid as error:
        raise LabelsError(f"The labels file {location.url} is neither CSV nor Parquet: {str(error).splitlines()[0]}.") from None
    wanted = [name for name in ("key", "uri", "label", "split") if name in table.column_names]
    for name in wanted:
        table = table.set_column(table.column_names.index(name), name, table[name].cast(pa.string()))
    return table


def read_classes(location: Location) -> list[str]:
    """Read the classes of a model in the order of its outputs: lines of text, a CSV or Parquet with `label`, or JSON.

    JSON may be a list, or an object from name to number, like `class_indices` of Keras's generators.

    Raises:
        LabelsError: the file does not exist, cannot be parsed, or names a class twice.
    """
    if location.url.endswith((".csv", ".parquet")):
        table = _read_table(location)
        if "label" not in table.column_names:
            found = ", ".join(table.column_names)
            raise LabelsError(f"The labels file {location.url} has no column label; its columns are {found}.")
        classes = table["label"].to_pylist()
    else:
        classes = _classes_of_text(location)
    twice = next((name for name in classes if classes.count(name) > 1), None)
    if twice is not None or len(classes) < 2 or not all(isinstance(name, str) and name for name in classes):
        found = f"it has {twice!r} twice" if twice is not None else f"it has {len(classes)} names"
        raise LabelsError(f"The labels file {location.url} must name each class once, and at least two classes: {found}.")
    return list(classes)


def _classes_of_text(location: Location) -> list[str]:
    try:
        text = location.read().decode()
        if not location.url.endswith(".json"):
            return [line.strip() for line in text.splitlines() if line.strip()]
        found = json.loads(text)
        return sorted(found, key=found.__getitem__) if isinstance(found, dict) else list(found)
    except (FileNotFoundError, IsADirectoryError):
        raise LabelsError(f"There is no labels file at {location.url}.") from None
    except (ValueError, TypeError) as error:
        raise LabelsError(f"The labels file {location.url} cannot be parsed: {error}.") from None


def with_names_of(names: Iterable[str], labels: Labels) -> Labels:
    """The labels with names as the store writes them: macOS decomposes accents, keyboards compose them."""
    known = set(names)
    strangers = {name for name, _ in labels.pairs if name not in known}
    if labels.column != "key" or not strangers:
        return labels
    by_form = {unicodedata.normalize("NFC", name): name for name in known if not name.isascii()}
    renamed = {name: by_form.get(unicodedata.normalize("NFC", name), name) for name in strangers}
    return replace(labels, pairs=tuple((renamed.get(name, name), label) for name, label in labels.pairs))


#: Names of folders that are parts of a data set, in lower case, and the parts.
_PARTS = {
    **dict.fromkeys(("train", "training", "train_set"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "test_set"), "test"),
}


def labels_from_folders(keys: list[str], store: str) -> Labels:
    """Use the first folder of each key as its label: `cats/1.jpg` has the label `cats`.

    If all first folders are parts of a data set, such as train, val and test, they give the parts, and the second folders the
    labels.

    Raises:
        LabelsError: no key has a folder; or there are only folders of parts without folders of classes.
    """
    firsts = sorted({key.split("/", 1)[0] for key in keys if "/" in key})
    if firsts and all(name.lower() in _PARTS for name in firsts):
        return _labels_below_parts(keys, firsts, store)
    pairs = tuple((key, key.split("/", 1)[0]) for key in keys if "/" in key)
    if not pairs:
        raise LabelsError(
            f"{store} has no folders named after classes, and no labels file was given: "
            "sort the images into folders or use --labels."
        )
    return Labels("key", pairs, None, store, from_folders=True)


def _labels_below_parts(keys: list[str], folders: list[str], store: str) -> Labels:
    names, labelled = " and ".join(folders), [key for key in keys if key.count("/") > 1]
    if not labelled:
        raise LabelsError(
            f"The folders {names} of {store} look like the parts of a data set and not like classes, and have no folders of "
            "classes: use --labels."
        )
    pairs = tuple((key, key.split("/")[1]) for key in labelled)
    splits = tuple(_PARTS[key.split("/")[0].lower()] for key in labelled)
    classes = sorted({label for _, label in pairs})
    without = sum("/" in key for key in keys) - len(labelled)
    log.warning(
        "The folders %s of %s are taken as parts of the data set, and the folders below them as the classes: %s%s%s",
        *(names, store, ", ".join(classes[:_NAMED]), ", …" if len(classes) > _NAMED else ""),
        f"; {without} images lie in no class and are left out" if without else "",
    )
    return Labels("key", pairs, splits if len(folders) > 1 else None, store, from_folders=True)
