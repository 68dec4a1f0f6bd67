"""What a user says of a harvest's documents or tokens, True, False or nothing, as one number for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from graphlens.analysis.arrays import ArrayInput, as_array
from graphlens.errors import InputError, InputTypeError, is_one_of
from graphlens.file.harvest_files import DOCUMENTS, POSITIONS, TOKENS
from graphlens.file.harvest_layout import PADDING

if TYPE_CHECKING:
    from graphlens.analysis.harvest import Harvest

Ints: TypeAlias = npt.NDArray[np.int64]
Marks: TypeAlias = npt.NDArray[np.int8]
UNSAID = -1  # the mark of what no label is of


@dataclass(frozen=True, eq=False)
class Record:
    """One document of a harvest, as a function that labels it sees it.

    Attributes:
        document: Its place in the corpus.
        tokens: int32 [n], the ids of those of its tokens that were kept.
        positions: int32 [n], the place of each in the row that was run.
    """

    document: int
    tokens: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]


Said: TypeAlias = "ArrayInput | Sequence[bool | None]"
# One for each document or token; by document or token; or what a function says of each document. None leaves out.
Labels: TypeAlias = "Said | Mapping[int, bool | None] | Callable[[Record], Said | None]"


@dataclass(frozen=True, eq=False)
class Labelled:
    """The tokens of a harvest with their labels.

    Attributes:
        harvest: The harvest.
        by: "document" or "token": what a mark is of.
        marks: int8, one for each document or token: 1 for True, 0 for False, -1 where nothing was said.
    """

    harvest: Harvest
    by: str
    marks: Marks

    def of_shard(self, index: int) -> Marks:
        """int8 [tokens of a shard], the mark of each token.

        Args:
            index: Which shard.
        """
        documents = self.harvest.shard(index)[DOCUMENTS]
        start = int(self.harvest.starts[index])
        found = self.marks[documents] if self.by == "document" else self.marks[start : start + len(documents)]
        # Padding behind several documents is of none.
        return np.where(documents == PADDING, np.int8(UNSAID), found)

    def by_document(self) -> Ints:
        """int64 [2, documents]: how many tokens of each document are labelled False, and how many True."""
        found = np.zeros((2, self.harvest.n_documents), np.int64)
        for index in range(len(self.harvest.plan.shards)):
            documents, marks = self.harvest.shard(index)[DOCUMENTS], self.of_shard(index)
            for kind in (0, 1):
                found[kind] += np.bincount(documents[marks == kind], minlength=found.shape[1])
        return found


def labelled(harvest: Harvest, labels: Labels, by: str) -> Labelled:
    """What a user gave as labels, read.

    Args:
        harvest: The harvest.
        labels: True, False or None for each document or token: an array or list, a mapping from document or token (others are
            left out), or a function of each document's Record, which gives one label or, by token, one for each of its tokens.
        by: "document" or "token".

    Raises:
        InputError: There are not as many labels as documents or tokens, or they are something else than True and False.
    """
    if not is_one_of(by, ("document", "token")):
        raise InputError(f"by={by!r}: a label is of a 'document' or a 'token'.")
    count = harvest.n_documents if by == "document" else len(harvest)
    if isinstance(labels, Mapping):
        return Labelled(harvest, by, _of_mapping(labels, by, count))
    if callable(labels):
        marks = np.full(count, UNSAID, np.int8)
        for start, record in records(harvest):
            said, where = labels(record), f" of document {record.document}"
            if by == "document":
                marks[record.document] = _one(said, f"the label{where}")
            elif said is not None:
                marks[start : start + len(record.tokens)] = _many(said, len(record.tokens), by, where)
        return Labelled(harvest, by, marks)
    return Labelled(harvest, by, _many(labels, count, by))


def records(harvest: Harvest) -> Iterator[tuple[int, Record]]:
    """Every document that has tokens, in order, with the place of its first one; a shard at a time is read.

    Args:
        harvest: The harvest.
    """
    names = (DOCUMENTS, TOKENS, POSITIONS)
    parts: list[list[npt.NDArray[np.int64]]] = []  # of the document that is being read: it may go on in the next shard
    start = place = 0
    current = PADDING

    def made() -> tuple[int, Record]:
        tokens, positions = (np.concatenate(arrays).astype(np.int32) for arrays in zip(*parts, strict=True))
        return start, Record(current, tokens, positions)

    for index in range(len(harvest.plan.shards)):
        documents, tokens, positions = (harvest.shard(index)[name] for name in names)
        edges = [0, *(np.flatnonzero(np.diff(documents)) + 1).tolist(), len(documents)]
        for first, last in pairwise(edges):
            if first == last:
                continue
            if int(documents[first]) != current:
                if parts and current != PADDING:
                    yield made()
                current, start, parts = int(documents[first]), place, []
            parts.append([tokens[first:last], positions[first:last]])
            place += last - first
    if parts and current != PADDING:
        yield made()


def _of_mapping(labels: Mapping[int, bool | None], by: str, count: int) -> Marks:
    marks = np.full(count, UNSAID, np.int8)
    for key, said in labels.items():
        if isinstance(key, bool) or not isinstance(key, int | np.integer) or not 0 <= key < count:
            raise InputError(f"labels name the {by} {key!r:.60}: there are {count:,}, counted from 0.")
        marks[key] = _one(said, f"the label of {by} {key}")
    return marks


def _one(said: object, what: str) -> int:
    """The mark of one label."""
    if said is None:
        return UNSAID
    plain = said.item() if getattr(said, "ndim", None) == 0 and hasattr(said, "item") else said
    if plain is None or not isinstance(plain, bool | int) or plain not in (0, 1):
        raise InputTypeError(f"{what} is {said!r:.60}: a label is True or False, or None for what is to be left out.")
    return int(plain)


def _many(labels: object, count: int, of: str, where: str = "") -> Marks:
    """The marks of an array or list, of all documents or tokens, or those that ``where`` says."""
    given = as_array(cast("ArrayInput", labels))
    if given.dtype == object and given.shape == (count,):
        return np.asarray(
            [_one(said, f"the label of {of} {place}{where}") for place, said in enumerate(given)], np.int8
        )
    if given.dtype.kind in "iu" and np.isin(given, (0, 1)).all():
        given = given.astype(bool)
    if given.dtype.kind == "f" and np.isnan(given).any():
        raise InputError(f"labels hold NaN: a label is True or False, and None leaves a {of} out.")
    if given.dtype != bool or given.shape != (count,):
        raise InputError(
            f"labels are True or False for each of the {count:,} {of}s{where}, not {given.dtype} {list(given.shape)}. "
            "Of several kinds, compare one with the others: labels == kind."
        )
    return given.astype(np.int8)
