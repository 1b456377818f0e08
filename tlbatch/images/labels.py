"""Labels of images that are named by address, by key or by both -> the labels of the images of a store."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from tlbatch.errors import LabelsError

log = logging.getLogger(__name__)

#: uri and key; they name an image everywhere.
ImageName = tuple[str, str]

#: If an image may have several labels: this image has none.
NO_LABEL = "-"
#: Takes back the labels that earlier files give to an image.
WITHDRAWN = "withdrawn"
#: Classes and images that a message names.
_NAMED = 10


class LabelRow(NamedTuple):
    """A row of a labels file. It names an image by `uri`, by `key` or by both; `label` is None if the cell is empty."""

    uri: str | None
    key: str | None
    label: str | None
    split: str | None = None

    @property
    def name(self) -> str:
        """The image, for a message."""
        return " of ".join(repr(one) for one in (self.key, self.uri) if one is not None)


@dataclass(frozen=True)
class Labelled:
    """The labels of the images of a store or table.

    Attributes:
        labels: the labels of each labelled image, in the order of the labels files.
        splits: the part of each labelled image; None if no file gives parts.
        missing: the names in the labels files that no image has, each with its last label.
        withdrawn: the images whose labels were taken back.
        unanswered: images with an empty cell, which keep the label of another file, or have none.
        moved: images for which a later file gives another part than an earlier one.
        by_uri: whether labels files name every image by address.
    """

    labels: Mapping[ImageName, tuple[str, ...]]
    splits: Mapping[ImageName, str] | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    withdrawn: frozenset[ImageName] = frozenset()
    unanswered: int = 0
    moved: int = 0
    by_uri: bool = False

    @property
    def classes(self) -> set[str]:
        """Every label of an image, or of a name that no image has."""
        return {label for names in self.labels.values() for label in names} | set(self.missing.values()) - {WITHDRAWN, NO_LABEL}


@dataclass(frozen=True)
class Labels:
    """The rows of labels files. A later file overrides an earlier one, image by image.

    Attributes:
        files: the rows of each file.
        source: the files or the store that the labels come from, for messages.
        many: whether an image may have any number of labels, one row for each.
        class_depth: which folder of a key is the label, from 1; 0 if the labels are not names of folders.
    """

    files: tuple[tuple[LabelRow, ...], ...]
    source: str = ""
    many: bool = False
    class_depth: int = 0

    @cached_property
    def rows(self) -> tuple[LabelRow, ...]:
        """The rows with a label of all files."""
        return tuple(row for file in self.files for row in file if row.label is not None)

    @property
    def has_splits(self) -> bool:
        """Whether some row gives the part of its image."""
        return any(row.split is not None for row in self.rows)

    @cached_property
    def uris(self) -> pa.Array:
        """The addresses in rows without a key."""
        return pa.array({row.uri for row in self.rows if row.key is None}, pa.string())

    @cached_property
    def keys(self) -> pa.Array:
        """The keys in all rows, in each form in which a store may have them."""
        return pa.array({form for row in self.rows if row.key is not None for form in _forms(row.key)}, pa.string())

    def named(self, table: pa.Table) -> pa.Table:
        """The rows of a table with `uri` and `key` that these labels may belong to."""
        return table.filter(pc.or_(pc.is_in(table["uri"], self.uris), pc.is_in(table["key"], self.keys)))

    def shards(self, manifest: pa.Table) -> pa.Table:
        """The shards of a manifest of shards that may contain a labelled image."""
        if any(row.uri is None for row in self.rows):
            return manifest
        return manifest.filter(pc.is_in(manifest["uri"], pa.array({row.uri for row in self.rows}, pa.string())))

    def of_split(self, split: str) -> Labels:
        """Return only the rows of one part; raises LabelsError if there are none."""
        if not self.has_splits:
            raise LabelsError(f"The labels file {self.source} has no column split, so it cannot select split {split!r}.")
        kept = tuple(tuple(row for row in file if row.split == split) for file in self.files)
        if not any(kept):
            known = ", ".join(sorted({row.split for row in self.rows if row.split}))
            raise LabelsError(f"The labels file {self.source} has no images of split {split!r}; its splits are {known}.")
        return replace(self, files=kept)

    def fitted_to(self, keys: pa.Array | pa.ChunkedArray) -> Labels:
        """These labels with keys of a store in place of their own, if none of their own is a key of the store.

        A name fits a key that is equal but for the suffix of the key and for folders before either of them: `pets/1` fits
        `1.jpg`. It has to fit one key only, no other name may fit that key, and half of the names have to fit one. What is
        replaced is logged.

        Args:
            keys: of all images of the store.
        """
        names = {_plain_form(row.key) for row in self.rows if row.key is not None}
        if self.class_depth or not names or pc.any(pc.is_in(keys, self.keys)).as_py():
            return self
        fits = _fits(names, {_plain_form(key): key for key in keys.to_pylist()})
        if 2 * len(fits) < len(names):
            return self
        name, key = next(iter(fits.items()))
        log.warning(
            "No name of %s is a key of the store; %d of %d fit but for folders before them or the suffix (the first: %s is %s)",
            *(self.source, len(fits), len(names), name, key),
        )
        files = tuple(
            tuple(row if row.key is None else row._replace(key=fits.get(_plain_form(row.key), row.key)) for row in file)
            for file in self.files
        )
        return replace(self, files=files)

    def of_images(self, images: Sequence[ImageName]) -> Labelled:
        """Give each image its labels.

        Raises:
            LabelsError: a name fits several images, or one file gives an image two labels although it may have only one.
        """
        return _Join(self, images).labelled()


def _plain_form(key: str) -> str:
    """A key in the form by which labels find it: macOS decomposes accents, and older versions kept `./` before tar members."""
    return unicodedata.normalize("NFC", key).removeprefix("./")


def _forms(key: str) -> set[str]:
    """All keys with the same plain form, and the key itself."""
    plain = _plain_form(key)
    forms = {plain, unicodedata.normalize("NFD", plain)}
    return {key} | forms | {f"./{form}" for form in forms}


def _fits(names: set[str], known: Mapping[str, str]) -> dict[str, str]:
    """Names, and the one key that each fits but for folders before either and the suffix of the key."""
    whole: dict[str, set[str]] = defaultdict(set)
    ends: dict[str, set[str]] = defaultdict(set)
    for form in known:
        for base in {form, re.sub(r"\.[^./]+$", "", form)} - {""}:
            whole[base].add(form)
            for end in _ends(base):
                ends[end].add(form)
    found = {name: {*ends[name], *(form for end in _ends(name) for form in whole[end])} for name in sorted(names)}
    fitting = Counter(form for forms in found.values() for form in forms)
    only = {name: next(iter(forms)) for name, forms in found.items() if len(forms) == 1}
    return {name: known[form] for name, form in only.items() if fitting[form] == 1}


def _ends(path: str) -> list[str]:
    """A path without its first folder, without its first two, and so on; the path itself first."""
    folders = path.split("/")
    return ["/".join(folders[start:]) for start in range(len(folders))]


class _Join:
    """The images of a store by each of their names, and the labels that they get, file by file."""

    def __init__(self, labels: Labels, images: Sequence[ImageName]) -> None:
        self._labels, self._images = labels, images
        self._by_name, self._by_uri, self._by_key, self._by_form = (defaultdict[object, list[int]](list) for _ in range(4))
        for place, (uri, key) in enumerate(images):
            self._by_name[uri, key].append(place)
            self._by_uri[uri].append(place)
            self._by_key[key].append(place)
            self._by_form[_plain_form(key)].append(place)

    def labelled(self) -> Labelled:
        """Look up every row."""
        given: dict[int, tuple[str, ...]] = {}
        splits: dict[int, str] = {}
        unanswered, moved = set(), set()
        strangers: dict[str, str] = {}
        several: dict[str, list[int]] = {}
        for rows in self._labels.files:
            of_file: dict[int, list[str]] = defaultdict(list)
            for row in rows:
                places = self._places(row)
                if row.label is None:
                    unanswered |= set(places)
                elif len(places) == 1:
                    of_file[places[0]].append(row.label)
                    if row.split is not None:
                        moved |= {places[0]} if splits.get(places[0], row.split) != row.split else set()
                        splits[places[0]] = row.split
                elif places:
                    several[row.name] = places
                else:
                    strangers[row.name] = row.label
            given.update({place: self._one_or_many(place, names) for place, names in of_file.items()})
        self._require_one_image(several)
        withdrawn = frozenset(self._images[place] for place, names in given.items() if WITHDRAWN in names)
        left = {self._images[place]: names for place, names in given.items() if WITHDRAWN not in names}
        parts = {self._images[place]: part for place, part in splits.items()} if self._labels.has_splits else None
        by_uri = not self._labels.class_depth and all(row.uri is not None for row in self._labels.rows)
        return Labelled(left, parts, strangers, withdrawn, len(unanswered), len(moved), by_uri)

    def _places(self, row: LabelRow) -> list[int]:
        """The images that a row names."""
        if row.key is None:
            return self._by_uri.get(row.uri, [])
        exact = self._by_key.get(row.key, []) if row.uri is None else self._by_name.get((row.uri, row.key), [])
        if exact:
            return exact
        return [place for place in self._by_form.get(_plain_form(row.key), []) if row.uri in (None, self._images[place][0])]

    def _one_or_many(self, place: int, names: Iterable[str]) -> tuple[str, ...]:
        """The labels that one file gives to an image."""
        different = tuple(dict.fromkeys(names))
        if not self._labels.many and len(different) > 1:
            raise LabelsError(f"The labels file {self._labels.source} gives {self._images[place][1]!r} two labels.")
        return tuple(name for name in different if name != NO_LABEL)

    def _require_one_image(self, several: Mapping[str, Sequence[int]]) -> None:
        if not several:
            return
        name, places = next(iter(several.items()))
        uris = sorted({self._images[place][0] for place in places})
        found = f"fits {len(places)} images: in " + " and ".join(uris[:2]) + (", …" if len(uris) > 2 else "")
        advice = (
            "Name each image by uri and key, in two columns."
            if len({self._images[place] for place in places}) > 1
            else "Images that share uri and key cannot be told apart; give them different names or leave them out."
        )
        raise LabelsError(f"{len(several)} names in {self._labels.source} fit several images each; {name} {found}. {advice}")


def warn_of_spelling(labels: Iterable[str], source: str) -> None:
    """Log labels that are equal but for case, spaces at the ends or Unicode form, with the number of images of each.

    Args:
        labels: the label of each image.
        source: where they come from.
    """
    counts = Counter(labels)
    alike = defaultdict(list)
    for label in sorted(counts):
        alike[unicodedata.normalize("NFC", label).strip().casefold()].append(label)
    for names in [names for names in alike.values() if len(names) > 1][:_NAMED]:
        log.warning(
            "%s has the classes %s, which differ only in case, spaces or Unicode form; each is a class of its own",
            *(source, " and ".join(f"{name!r} ({counts[name]} images)" for name in names)),
        )


def names_of(table: pa.Table) -> list[ImageName]:
    """The name of the image of each row."""
    return list(zip(table["uri"].to_pylist(), table["key"].to_pylist(), strict=True))


def in_short(names: Sequence[str]) -> str:
    """The first names of many, for a message."""
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")


#: Names of folders that are parts of a data set: a first word, and often a second one.
_PART_NAMES = {"train": "train(?:ing)?", "validation": "val|valid|validation|dev|eval", "test": "test(?:ing)?"}
_PARTS = {part: re.compile(f"(?i)(?:{words})(?:[-_ ]?(?:set|data|images|split))?") for part, words in _PART_NAMES.items()}


def _part_of(folder: str) -> str | None:
    """The part of a data set that a folder's name means; None for other names."""
    return next((part for part, pattern in _PARTS.items() if pattern.fullmatch(folder)), None)


def labels_from_folders(images: Sequence[ImageName], store: str) -> Labels:
    """Use the first folder of each key as its label: `cats/1.jpg` has the label `cats`.

    If all first folders are parts of a data set, such as train, val and test, they give the parts, and the second folders the
    labels.

    Raises:
        LabelsError: no key has a folder; or there are only folders of parts without folders of classes.
    """
    firsts = sorted({key.split("/", 1)[0] for _, key in images if "/" in key})
    if firsts and all(map(_part_of, firsts)):
        return _labels_below_parts(images, firsts, store)
    rows = tuple(LabelRow(uri, key, key.split("/", 1)[0]) for uri, key in images if "/" in key)
    if not rows:
        raise LabelsError(
            f"{store} has no folders named after classes, and no labels file was given: "
            "sort the images into folders or use --labels."
        )
    return Labels((rows,), store, class_depth=1)


def _labels_below_parts(images: Sequence[ImageName], folders: Sequence[str], store: str) -> Labels:
    names = " and ".join(folders)
    rows = tuple(_row_below_part(*image, several=len(folders) > 1) for image in images if image[1].count("/") > 1)
    if not rows:
        raise LabelsError(
            f"The folders {names} of {store} look like the parts of a data set and not like classes, and have no folders of "
            "classes: use --labels."
        )
    classes = sorted({str(row.label) for row in rows})
    without = sum("/" in key for _, key in images) - len(rows)
    log.warning(
        "The folders %s of %s are taken as parts of the data set, and the folders below them as the classes: %s%s",
        *(names, store, in_short(classes)),
        f"; {without} images lie in no class and are left out" if without else "",
    )
    return Labels((rows,), store, class_depth=2)


def _row_below_part(uri: str, key: str, *, several: bool) -> LabelRow:
    part, label, _ = key.split("/", 2)
    return LabelRow(uri, key, label, _part_of(part) if several else None)
