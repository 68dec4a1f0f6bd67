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
    left = {name: np.empty((0, *shape), dtype) for name, (shape, dtype) in columns.items()}
    ends = np.cumsum(stretches[:, 2] - stretches[:, 1])
    at = 0
    while at < len(stretches):
        before = int(ends[at - 1]) if at else 0
        until = max(at + 1, int(np.searchsorted(ends, before + held, side="right")))
        left = _filled(source, columns, left, stretches[at:until], int(ends[until - 1]) - before, random)
        at = until
        whole = len(next(iter(left.values()))) // size * size
        for first in range(0, whole, size):
            yield {name: array[first : first + size] for name, array in left.items()}
        left = {name: array[whole:].copy() for name, array in left.items()}
    if not drop_last and len(next(iter(left.values()))):
        yield left


def _filled(
    source: Sharded,
    columns: Mapping[str, tuple[tuple[int, ...], np.dtype[np.generic]]],
    left: Mapping[str, Array],
    stretches: npt.NDArray[np.int64],
    count: int,
    random: np.random.Generator | None,
) -> dict[str, Array]:
    """What was left of the last buffer, and the rows of some stretches behind it, mixed."""
    old = len(next(iter(left.values())))
    order = np.arange(old, old + count) if random is None else old + random.permutation(count)
    found = {}
    for name, (shape, dtype) in columns.items():
        array = np.empty((old + count, *shape), dtype)
        array[:old] = left[name]
        done = 0
        for shard, first, last in stretches.tolist():
            part = source.shard(shard)[name][first:last]
            if random is None:
                array[old + done : old + done + len(part)] = part
            else:
                array[order[done : done + len(part)]] = part
            done += len(part)
        found[name] = array
    return found
