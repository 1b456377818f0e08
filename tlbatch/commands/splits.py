"""Classes and features of labelled images -> the part of each image: train, validation or test."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence

import numpy as np

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
_TRAIN, _VALIDATION, _TEST = range(len(SPLITS))
#: Fewest images of a class: one each for training, early stopping and testing.
FEWEST = len(SPLITS)
#: Cosine of standardised features from which images are near-copies, and how many images are compared in pairs.
_NEAR, _MOST_COMPARED, _FEWEST_FEATURES, _BLOCK, _LEAST = 0.97, 10_000, 32, 1024, 1e-6


def split_classes(
    classes: np.ndarray, validation: float, test: float, seed: int, sizes: np.ndarray | None = None
) -> np.ndarray:
    """(n,) part numbers, in the order of `SPLITS`.

    Args:
        classes: (n,) class numbers; each class has at least three pictures.
        validation: share of each class for validation.
        test: share of each class for testing.
        seed: seed of the shuffling.
        sizes: (n,) how many images each picture has, by default one.
    """
    random = np.random.default_rng(seed)
    sizes = np.ones(len(classes), np.int64) if sizes is None else sizes
    part_of = np.zeros(len(classes), np.int64)
    for label in np.unique(classes):
        members = random.permutation(np.flatnonzero(classes == label))
        members = _large_last(members, sizes, test * sizes[members].sum() / 2)
        for_test = min(max(1, round(test * len(members))), len(members) - 2)
        for_validation = min(max(1, round(validation * len(members))), len(members) - for_test - 1)
        part_of[members[:for_test]] = _TEST
        part_of[members[for_test : for_test + for_validation]] = _VALIDATION
    return part_of


def split_pictures(classes: np.ndarray, values: np.ndarray, validation: float, test: float, seed: int) -> np.ndarray:
    """(n,) part numbers as in `split_classes`, with all copies and near-copies of a picture in one part.

    If a class has fewer than three different pictures, its near-copies count as pictures of their own; if that is not enough,
    the copies of all pictures do. Both are logged.

    Args:
        classes: (n,) class numbers, or (n, C) with 1 where an image has a label.
        values: (n, F) features.
        validation: share of each class for validation.
        test: share of each class for testing.
        seed: seed of the shuffling.
    """
    for what, find in (("near-copies", find_near_copies), ("copies", find_copies)):
        pictures = find(values)
        firsts, of_image = np.unique(pictures, return_inverse=True)
        if len(firsts) == len(values) or enough_pictures(classes, pictures, FEWEST):
            return split_classes(_strata(classes[firsts]), validation, test, seed, np.bincount(of_image))[of_image]
        log.warning("A class has fewer than %d different pictures, so %s of them are in several parts", FEWEST, what)
    return split_classes(_strata(classes), validation, test, seed)


def enough_pictures(classes: np.ndarray, pictures: np.ndarray, least: int) -> bool:
    """Whether every class has at least so many pictures, each of which counts for the class of its first image.

    Args:
        classes: (n,) class numbers, or (n, C) with 1 where an image has a label.
        pictures: (n,) of `find_copies` or `find_near_copies`.
        least: the number.
    """
    firsts = np.unique(pictures)
    strata, counts = np.unique(_strata(classes[firsts]), return_counts=True)
    hidden = classes.ndim == 1 and len(strata) < len(np.unique(classes))
    return not hidden and len(firsts) >= least and not (strata[counts < least] >= 0).any()


def fold_pictures(classes: np.ndarray, pictures: np.ndarray, count: int) -> np.ndarray:
    """(n,) fold numbers: the pictures of each class are dealt out in turn, and all copies of a picture are in one fold.

    Args:
        classes: (n,) class numbers, or (n, C) with 1 where an image has a label.
        pictures: (n,) of `find_near_copies`.
        count: the number of folds.
    """
    random = np.random.default_rng(0)  # the folds, and so the head, are the same whatever the seed
    firsts, of_image = np.unique(pictures, return_inverse=True)
    strata = _strata(classes[firsts])
    folds, dealt = np.zeros(len(firsts), np.int64), 0
    for label in np.unique(strata):
        members = random.permutation(np.flatnonzero(strata == label))
        folds[members] = (dealt + np.arange(len(members))) % count
        dealt += len(members)
    return folds[of_image]


def complete_parts(
    part_of: np.ndarray, classes: np.ndarray, pictures: np.ndarray, validation: float, test: float, seed: int
) -> np.ndarray:
    """Given parts with those that have no image drawn from the training images, class by class.

    Args:
        part_of: (n,) the given part of each image.
        classes: (n,) class numbers, or (n, C) with 1 where an image has a label.
        pictures: (n,) of `find_near_copies`. Images of one picture are drawn together, and those of a picture that is in a
            given part only if their class has no others.
        validation: share of each class for validation.
        test: share of each class for testing.
        seed: seed of the shuffling.
    """
    random = np.random.default_rng(seed)
    part_of, strata = part_of.copy(), _strata(classes)
    is_first = pictures == np.arange(len(pictures))
    sizes = np.bincount(pictures, minlength=len(pictures))
    for part, share in ((_TEST, test), (_VALIDATION, validation)):
        if (part_of == part).any():
            continue
        free = is_first & ~np.isin(pictures, pictures[part_of != _TRAIN])
        for label in np.unique(strata):
            own = (strata == label) & (part_of == _TRAIN)
            members = random.permutation(np.flatnonzero(own & free if (own & free).any() else own))
            members = _large_last(members, sizes, share * sizes[members].sum() / 2)
            drawn = members[: max(0, min(max(1, round(share * len(members))), len(members) - 1))]
            part_of[np.isin(pictures, pictures[drawn]) & (part_of == _TRAIN)] = part
    return part_of


def separate_copies(part_of: np.ndarray, pictures: np.ndarray, keys: Sequence[str]) -> np.ndarray:
    """Given parts with the copies of a picture in the part that is used last: test, or else validation. Logs how many moved."""
    last = np.zeros(len(part_of), np.int64)
    np.maximum.at(last, pictures, part_of)
    separated: np.ndarray = last[pictures]
    moved = np.flatnonzero(separated != part_of)
    if len(moved):
        copy = keys[int(moved[0])]
        other = keys[int(np.flatnonzero((pictures == pictures[moved[0]]) & (part_of != part_of[moved[0]]))[0])]
        log.warning(
            "%d labelled images are copies of pictures in another part (the first: %s, of %s); each picture counts in one part",
            *(len(moved), copy, other),
        )
    return separated


def find_copies(values: np.ndarray) -> np.ndarray:
    """(n,) for each image the number of the first image with the same features: copies of a picture have equal ones.

    Features that are one number throughout say nothing; each such image is a picture of its own.

    Args:
        values: (n, F) features.
    """
    first: dict[bytes, int] = {}
    found = np.arange(len(values))
    for number in np.flatnonzero((values != values[:, :1]).any(axis=1)):
        digest = hashlib.blake2b(np.ascontiguousarray(values[number]).tobytes(), digest_size=16).digest()
        found[number] = first.setdefault(digest, int(number))
    return found


def find_near_copies(values: np.ndarray) -> np.ndarray:
    """(n,) for each image the number of the first image of its group: copies, and images with nearly the same features.

    They are resized or recompressed copies, or photographs of a series. Images are near if the cosine of their standardised
    features is at least 0.97, and near images of near images are in one group. Above 10,000 different images only copies are
    found, because all pairs are compared; and with fewer than 32 features, whose cosines say little.

    Args:
        values: (n, F) features.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    copies = find_copies(values)
    firsts = np.unique(copies)
    firsts = firsts[(values[firsts] != values[firsts, :1]).any(axis=1)]
    if not 2 <= len(firsts) <= _MOST_COMPARED or values.shape[1] < _FEWEST_FEATURES:
        return copies
    scaled = values[firsts] - values[firsts].mean(axis=0)
    scaled /= np.maximum(scaled.std(axis=0), _LEAST)
    scaled /= np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), _LEAST)
    numbers = group = np.arange(len(firsts))
    for start in range(0, len(firsts), _BLOCK):
        rows, others = np.nonzero(scaled[start : start + _BLOCK] @ scaled.T >= _NEAR)
        links = np.concatenate([numbers, rows + start]), np.concatenate([group, others])
        graph = coo_matrix((np.ones(len(links[0]), np.int8), links), shape=(len(firsts), len(firsts)))
        _, first_of, of_image = np.unique(
            connected_components(graph, directed=False)[1], return_index=True, return_inverse=True
        )
        group = first_of[of_image]
    near = np.arange(len(values))
    near[firsts] = firsts[group]
    found: np.ndarray = near[copies]
    return found


def tell_of_near_copies(part_of: np.ndarray, pictures: np.ndarray, keys: Sequence[str]) -> None:
    """Log how many images are near-copies of one in another given part: the measured accuracy is too high for new pictures."""
    numbers = np.arange(len(part_of))
    apart = numbers[part_of != part_of[pictures]]
    if len(apart):
        log.warning(
            "%d labelled images are nearly the same as pictures in another part (the first: %s and %s); the measured accuracy "
            "counts them as new",
            *(len(apart), keys[int(apart[0])], keys[int(pictures[apart[0]])]),
        )


def _large_last(members: np.ndarray, sizes: np.ndarray, most: float) -> np.ndarray:
    """Pictures in their order, with those of more than `most` images at the end, the largest last, where training takes them.

    Where all images are alike, as on a base with random weights, most of them may be one group of near-copies: drawn for
    testing, it would leave little to train on.
    """
    is_large = sizes[members] > max(1.0, most)
    large = members[is_large]
    return np.concatenate([members[~is_large], large[np.argsort(sizes[large], kind="stable")]])


def _strata(classes: np.ndarray) -> np.ndarray:
    """(n,) groups for the split: an image's class, or its rarest label. Small groups and unlabelled images form one group."""
    if classes.ndim == 1:
        return classes
    rarity = np.argsort(classes.sum(axis=0), kind="stable")
    first = np.argmax(classes[:, rarity], axis=1)
    strata = np.where(classes.any(axis=1), rarity[first], -1)
    numbers, counts = np.unique(strata, return_counts=True)
    return np.where(np.isin(strata, numbers[counts < FEWEST]), -1, strata)
