"""An array that lies in shards, read as if it were one: by place, slice, places or mask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from graphlens.analysis.arrays import Array
from graphlens.errors import InputIndexError

# Which tokens are read: a place, a slice, places, or one bool for each token.
Key: TypeAlias = "int | slice | Sequence[int] | npt.NDArray[np.integer[Any]] | npt.NDArray[np.bool_]"


class Sharded(Protocol):
    """What has arrays in shards."""

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """int64 [shards + 1], the first row of each, and the number of all."""

    def shard(self, index: int) -> Mapping[str, Array]:
        """The arrays of one shard."""


class Column:
    """One array of a harvest over all its tokens, read where it is asked for.

    Args:
        source: The shards.
        name: A hook point, or "tokens", "documents" or "positions".
        shape: The axes of one token's entry.
        dtype: The dtype.

    Attributes:
        name: See above.
        shape: All axes, tokens first.
        dtype: See above; bfloat16 is that of the package ml_dtypes.
    """

    def __init__(self, source: Sharded, name: str, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> None:
        self._source, self.name, self.dtype = source, name, dtype
        self.shape = (int(source.starts[-1]), *shape)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def __repr__(self) -> str:
        return f"Column({self.name!r}, {list(self.shape)}, {self.dtype})"

    def __getitem__(self, key: Key | tuple[Any, ...]) -> Array:
        """The entries of some tokens.

        Args:
            key: A token's place, a slice, or an array of places or of bools; behind it, in a tuple, how each entry is indexed.

        Returns:
            [*shape] for one place, else [tokens, *shape]. A stretch inside one shard is a read-only view of the file.

        Raises:
            InputIndexError: A place is outside the harvest.
        """
        if isinstance(key, tuple):
            found = self[key[0]] if key else self[:]
            inner = key[1:] if isinstance(key[0], (int, np.integer)) else (slice(None), *key[1:])
            return np.asarray(found[inner])
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1:
                return self._stretch(start, max(stop, start))
            return self._at(np.arange(start, stop, step))
        places = np.asarray(key)
        if places.dtype == bool:
            if places.shape != (len(self),):
                raise InputIndexError(f"{self.name}: a mask has one entry for each of the {len(self):,} tokens.")
            return self._at(np.flatnonzero(places))
        if places.size == 0:
            places = places.astype(np.int64)
        if places.dtype.kind not in "iu" or places.ndim > 1:
            raise InputIndexError(
                f"{self.name}: index it with a whole number, a slice, or one axis of either or of bools."
            )
        where = np.atleast_1d(places).astype(np.int64)
        where = np.where(where < 0, where + len(self), where)
        if where.size and (where.min() < 0 or where.max() >= len(self)):
            raise InputIndexError(f"{self.name}: there are {len(self):,} tokens, and {key!r:.60} is outside.")
        found = self._at(where)
        return found if places.ndim else found[0]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        return np.asarray(self[:], dtype)

    def _stretch(self, start: int, stop: int) -> Array:
        """The entries of neighbouring tokens."""
        parts = [self._source.shard(shard)[self.name][first:last] for shard, first, last in self._spans(start, stop)]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty((0, *self.shape[1:]), self.dtype)

    def _at(self, places: npt.NDArray[np.int64]) -> Array:
        """The entries of tokens anywhere."""
        found = np.empty((len(places), *self.shape[1:]), self.dtype)
        shards = self._shards(places)
        for shard in np.unique(shards):
            mine = np.flatnonzero(shards == shard)
            found[mine] = self._source.shard(int(shard))[self.name][places[mine] - self._source.starts[shard]]
        return found

    def _shards(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The shard that each token lies in."""
        return np.searchsorted(self._source.starts, places, side="right").astype(np.int64) - 1

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The parts of a stretch of tokens: (shard, first token in it, the one behind the last)."""
        starts = self._source.starts
        while start < stop:
            index = int(self._shards(np.asarray([start]))[0])
            base, end = int(starts[index]), min(int(starts[index + 1]), stop)
            yield index, start - base, end - base
            start = end
