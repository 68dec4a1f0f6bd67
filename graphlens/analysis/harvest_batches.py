"""Shuffled batches of arrays that lie in shards: long stretches are read, and their rows scattered in a buffer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from graphlens.analysis.arrays import Array
from graphlens.analysis.harvest_column import Sharded
from graphlens.errors import checked_number

_STRETCH = 256_000  # bytes that are read at once, about
_PARTS = 64  # stretches that a buffer holds at least, so that it mixes tokens from everywhere


def batches(
    source: Sharded,
    columns: Mapping[str, tuple[tuple[int, ...], np.dtype[np.generic]]],
    size: int,
    seed: int | None,
    drop_last: bool,
    buffer_bytes: int,
) -> Iterator[dict[str, Array]]:
    """All rows once, in batches; see ``Harvest.batches``.

    Args:
        source: The shards.
        columns: Array -> (the axes of a row, its dtype).
        size: Rows of a batch.
        seed: Decides the order; None keeps it.
        drop_last: See there.
        buffer_bytes: See there.

    Yields:
        Array -> [size, ...].
    """
    size = checked_number(size, "size", least=1)
    row = sum(dtype.itemsize * int(np.prod(shape, dtype=np.int64)) for shape, dtype in columns.values())
    held = max(checked_number(buffer_bytes, "buffer_bytes", least=1) // max(row, 1), size)
    length = max(1, min(_STRETCH // max(row, 1), held // _PARTS))
    stretches = _stretches(source.starts, length)
    random = None if seed is None else np.random.default_rng(checked_number(seed, "seed", least=0))
    if random is not None:
        stretches = stretches[random.permutation(len(stretches))]
    return _batches(source, columns, size, drop_last, held, stretches, random)


def _stretches(starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
    """int64 [n, 3]: shard, first row in it, the row behind the last, of stretches that cover all rows in order."""
    found = []
    for shard, count in enumerate(np.diff(starts).tolist()):
        firsts = np.arange(0, count, length)
        found.append(np.stack([np.full(len(firsts), shard), firsts, np.minimum(firsts + length, count)], 1))
    return np.concatenate(found).astype(np.int64) if found else np.zeros((0, 3), np.int64)


def _batches(
    source: Sharded,
    columns: Mapping[str, tuple[tuple[int, ...], np.dtype[np.generic]]],
    size: int,
    drop_last: bool,
    held: int,
    stretches: npt.NDArray[np.int64],
    random: np.random.Generator | None,
) -> Iterator[dict[str, Array]]:
    counts = stretches[:, 2] - stretches[:, 1]
    ends = np.cumsum(counts)
    most = int(min(held + counts.max(initial=0), ends[-1] if len(ends) else 0)) + size
    # One buffer for all: fresh memory for each would cost as much as filling it.
    buffer = {name: np.empty((most, *shape), dtype) for name, (shape, dtype) in columns.items()}
    left = at = 0
    while at < len(stretches):
        before = int(ends[at - 1]) if at else 0
        until = max(at + 1, int(np.searchsorted(ends, before + held, side="right")))
        for name, array in buffer.items():
            _fill(array[left:], source, name, stretches[at:until])
        count, at = left + int(ends[until - 1]) - before, until
        order = np.arange(count) if random is None else random.permutation(count)
        whole = count // size * size
        for first in range(0, whole, size):
            # Clipping lets NumPy write into the batch at once; every place is inside.
            yield {name: np.take(array, order[first : first + size], 0, mode="clip") for name, array in buffer.items()}
        left = count - whole
        for array in buffer.values():
            array[:left] = array[order[whole:]]
    if left and not drop_last:
        yield {name: array[:left].copy() for name, array in buffer.items()}


def _fill(room: Array, source: Sharded, name: str, stretches: npt.NDArray[np.int64]) -> None:
    """Copies stretches of an array, one behind the other."""
    done = 0
    for shard, first, last in stretches.tolist():
        room[done : done + last - first] = source.shard(shard)[name][first:last]
        done += last - first
