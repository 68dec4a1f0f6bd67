"""Which tokens of a corpus lie in which row, batch and shard of a harvest: all of it follows from lengths and options."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from graphlens.errors import InputError

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
TooLong = Literal["split", "cut", "refuse"]
STEP = 16  # rows are padded to a multiple of it, so that a run meets few lengths
PADDING = -1  # the document of padding in a packed row that is not full


@dataclass(frozen=True)
class Layout:
    """How documents become rows that are run, and which of their positions are kept.

    Attributes:
        context: The most tokens of a row.
        bos: The id in front of each document, and of each row that begins inside one; None for none.
        own_bos: The id by which a document's own BOS token is known, where its first token is one; None for none.
        pad: The id that fills rows.
        pack: Whether rows are filled with document after document; else each document has rows of its own.
        too_long: What happens to a document that does not fit a row: "split", "cut" or "refuse".
        keep_bos: Whether positions of BOS tokens are kept.
        keep_pad: Whether positions of padding are kept; rows are then filled to ``context``.
        last_only: Whether the last token of each document alone is kept.
        batch_tokens: The most tokens of a run, padding included. A row longer than that is run alone.
        shard_tokens: The most tokens that are run for a shard. A row longer than that is a shard of its own.
    """

    context: int
    bos: int | None = None
    own_bos: int | None = None
    pad: int = 0
    pack: bool = False
    too_long: TooLong = "split"
    keep_bos: bool = True
    keep_pad: bool = False
    last_only: bool = False
    batch_tokens: int = 2048
    shard_tokens: int = 65_536

    @property
    def room(self) -> int:
        """How many tokens of a document fit a row."""
        return self.context - (self.bos is not None)

    def rows(self, lengths: Ints) -> tuple[Ints, Ints]:
        """The rows that documents become.

        Args:
            lengths: int64 [documents], tokens of each without BOS. Documents of none get no row.

        Returns:
            (segments int64 [s, 5]: document, first token in the whole corpus, count, 1 if it begins its document,
            1 if it ends it;
            rows int64 [r + 1]: the first segment of each row, and their number at the end).

        Raises:
            InputError: A document is too long, and ``too_long`` is "refuse".
        """
        starts = np.concatenate([[0], np.cumsum(lengths)])
        front, free = int(self.bos is not None), 0
        if self.too_long == "refuse" and lengths.max(initial=0) > self.room:
            document = int(np.argmax(lengths > self.room))
            raise InputError(
                f"document {document} has {lengths[document] + front:,} tokens, and a row holds {self.context:,}: split it or "
                "cut it (too_long='split' or 'cut'), or raise context."
            )
        if self.too_long == "cut":
            lengths = np.minimum(lengths, self.room)
        if not self.pack:
            return self._apart(lengths, starts)
        segments, rows, count = array("q"), array("q"), 0  # flat: a corpus may have millions of documents
        for document, length in enumerate(lengths.tolist()):
            done, begins = 0, int(starts[document])
            while done < length:
                if free <= front:
                    rows.append(count)
                    free = self.context
                some = min(length - done, free - front)
                segments.extend((document, begins + done, some, int(not done), int(done + some == length)))
                count, done, free = count + 1, done + some, free - some - front
        rows.append(count)
        return np.asarray(segments, np.int64).reshape(-1, 5), np.asarray(rows, np.int64)

    def _apart(self, lengths: Ints, starts: Ints) -> tuple[Ints, Ints]:
        """``rows`` where each document has rows of its own: each segment is a row."""
        parts = -(-lengths // self.room)
        documents = np.repeat(np.arange(len(lengths)), parts)
        part = np.arange(len(documents)) - np.repeat(np.cumsum(parts) - parts, parts)
        counts = np.minimum(lengths[documents] - part * self.room, self.room)
        first, last = part == 0, part == parts[documents] - 1
        segments = np.stack([documents, starts[documents] + part * self.room, counts, first, last], 1)
        return segments.astype(np.int64), np.arange(len(documents) + 1, dtype=np.int64)


@dataclass(frozen=True)
class Row:
    """One row as it is run.

    Attributes:
        tokens: int64 [p], BOS tokens included, padding not.
        documents: int64 [p], the document that each is of.
        kept: bool [p], whether its activation is kept.
    """

    tokens: Ints
    documents: Ints
    kept: Bools


@dataclass(frozen=True)
class Batch:
    """One run of a shard.

    Attributes:
        tokens: int64 [b, p].
        source: int64 [n], which of the b * p positions are kept.
        target: int64 [n], where each goes in the shard.
    """

    tokens: Ints
    source: Ints
    target: Ints


@dataclass(frozen=True)
class Shard:
    """What is run for a shard, and what of it is kept.

    Attributes:
        batches: The runs, in order.
        tokens: int32 [n], what is kept.
        documents: int64 [n], the document of each; of padding, that of its row, or -1 where the row has several.
        positions: int32 [n], the place of each in the row that was run, from 0.
    """

    batches: Sequence[Batch]
    tokens: npt.NDArray[np.int32]
    documents: Ints
    positions: npt.NDArray[np.int32]


class Laid:
    """A corpus laid out in rows.

    Args:
        layout: How.
        ids: int32 [tokens], all documents, one after the other, without BOS tokens.
        segments: See ``Layout.rows``.
        rows: See there.
    """

    def __init__(self, layout: Layout, ids: npt.NDArray[np.int32], segments: Ints, rows: Ints) -> None:
        self.layout, self._ids, self._segments, self._rows = layout, ids, segments, rows

    def __len__(self) -> int:
        return len(self._rows) - 1

    @property
    def lengths(self) -> Ints:
        """int64 [rows], the tokens of each row, BOS tokens included."""
        front = int(self.layout.bos is not None)
        ends = np.concatenate([[0], np.cumsum(self._segments[:, 2] + front)])
        found: Ints = np.diff(ends[self._rows])
        return found

    @property
    def kept(self) -> Ints:
        """int64 [rows], how many positions of each row are kept."""
        layout = self.layout
        if layout.last_only:
            each = self._segments[:, 4]
        else:
            front = int(layout.bos is not None)
            each = self._segments[:, 2] + front
            if not layout.keep_bos:
                own = (self._ids[self._segments[:, 1]] == layout.own_bos) & (self._segments[:, 3] == 1)
                each = each - front - own
        found: Ints = np.diff(np.concatenate([[0], np.cumsum(each)])[self._rows])
        return found + (layout.context - self.lengths) if layout.keep_pad else found

    def shards(self) -> Ints:
        """int64 [shards, 4]: the first row of each, the row behind its last, its first token of the harvest, and its tokens."""
        found: list[tuple[int, int, int, int]] = []
        first = ran = kept = done = 0
        for row, (length, count) in enumerate(zip(self.lengths.tolist(), self.kept.tolist(), strict=True)):
            if row > first and ran + length > self.layout.shard_tokens:
                found.append((first, row, done, kept))
                first, ran, done, kept = row, 0, done + kept, 0
            ran, kept = ran + length, kept + count
        if len(self):
            found.append((first, len(self), done, kept))
        return np.asarray(found, np.int64).reshape(-1, 4)

    def row(self, number: int) -> Row:
        """One row, padding left out.

        Args:
            number: Its place.
        """
        layout = self.layout
        front, tokens, documents, kept = ([] if layout.bos is None else [layout.bos]), [], [], []
        for document, start, count, begins, ends in self._segments[
            self._rows[number] : self._rows[number + 1]
        ].tolist():
            own = [*front, *self._ids[start : start + count].tolist()]
            tokens += own
            documents += [document] * len(own)
            if layout.last_only:
                kept += [False] * (len(own) - 1) + [bool(ends)]
            else:
                beginning = 0 if layout.keep_bos else len(front)
                if not layout.keep_bos and begins and own[len(front)] == layout.own_bos:
                    beginning += 1
                kept += [False] * beginning + [True] * (len(own) - beginning)
        return Row(np.asarray(tokens, np.int64), np.asarray(documents, np.int64), np.asarray(kept, bool))

    def shard(self, first: int, last: int) -> Shard:
        """What is run for the rows of a shard, and what of it is kept.

        Args:
            first: The first row.
            last: The row behind the last.
        """
        rows = [self._filled(self.row(number)) for number in range(first, last)]
        places = np.concatenate([[0], np.cumsum([int(row.kept.sum()) for row in rows])])
        batches = []
        for members in self._batches([len(row.tokens) for row in rows]):
            width = min(-(-max(len(rows[member].tokens) for member in members) // STEP) * STEP, self.layout.context)
            tokens = np.full((len(members), width), self.layout.pad, np.int64)
            source, target = [], []
            for line, member in enumerate(members):
                row = rows[member]
                tokens[line, : len(row.tokens)] = row.tokens
                source.append(line * width + np.flatnonzero(row.kept))
                target.append(np.arange(places[member], places[member + 1]))
            batches.append(Batch(tokens, np.concatenate(source), np.concatenate(target)))
        everything = [(row.tokens[row.kept], row.documents[row.kept], np.flatnonzero(row.kept)) for row in rows]
        kept, documents, positions = (np.concatenate(column) for column in zip(*everything, strict=True))
        return Shard(batches, kept.astype(np.int32), documents, positions.astype(np.int32))

    def _filled(self, row: Row) -> Row:
        """A row with its padding, where that is kept."""
        missing = self.layout.context - len(row.tokens)
        if not self.layout.keep_pad or not missing:
            return row
        owners = np.unique(row.documents)
        owner = int(owners[0]) if len(owners) == 1 else PADDING
        return Row(
            np.concatenate([row.tokens, np.full(missing, self.layout.pad, np.int64)]),
            np.concatenate([row.documents, np.full(missing, owner, np.int64)]),
            np.concatenate([row.kept, np.ones(missing, bool)]),
        )

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Rows of a shard that are run together: the longest first, so that little of a run is padding."""
        waiting: list[int] = []
        width = 0
        for row in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
            if waiting and (len(waiting) + 1) * width > self.layout.batch_tokens:
                yield waiting
                waiting = []
            if not waiting:
                width = min(-(-lengths[row] // STEP) * STEP, self.layout.context)
            waiting.append(row)
        if waiting:
            yield waiting
