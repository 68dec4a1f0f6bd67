"""Means of a harvest's activations over groups of its tokens, a piece of them in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from graphlens.analysis.arrays import Array
from graphlens.analysis.harvest_labels import Labels, labelled
from graphlens.errors import InputError, checked_number, is_one_of
from graphlens.file.harvest_files import DOCUMENTS, POSITIONS

if TYPE_CHECKING:
    from graphlens.analysis.harvest import Harvest

Doubles: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
# The group that each token of a shard belongs to, integers [tokens] from 0; less than 0 for none.
Groups: TypeAlias = Callable[[int], Array]
PIECE_BYTES = 16_000_000  # bytes of float64 that are held at once


def pieces(harvest: Harvest, hook: str, groups: Groups) -> Iterator[tuple[Doubles, Ints, Ints]]:
    """The activations of the tokens that belong to a group, in order, a piece at a time.

    Args:
        harvest: The harvest.
        hook: The hook point.
        groups: See ``Groups``.

    Yields:
        float64 [n, width], the group of each token, int64 [n], and its document, int64 [n].

    Raises:
        InputKeyError: The hook point was not harvested.
        InputError: An activation is NaN or infinite.
    """
    harvest[hook]  # raises where it was not harvested
    width = harvest.plan.width(hook)
    rows = max(1, PIECE_BYTES // (8 * max(width, 1)))
    for index in range(len(harvest.plan.shards)):
        shard, group = harvest.shard(index), groups(index)
        places = np.flatnonzero(group >= 0)
        for first in range(0, len(places), rows):
            some = places[first : first + rows]
            values = shard[hook][some].reshape(len(some), width).astype(np.float64)
            wrong = np.flatnonzero(~np.isfinite(values).all(1))
            if len(wrong):
                place = int(harvest.starts[index] + some[wrong[0]])
                raise InputError(
                    f"{hook!r}: the activation of token {place:,} is NaN or infinite. Look at what the model gives for "
                    "it, or leave its document out (label None)."
                )
            yield values, group[some].astype(np.int64), shard[DOCUMENTS][some].astype(np.int64)


def grouped_means(harvest: Harvest, hook: str, groups: Groups, count: int) -> tuple[Doubles, Ints]:
    """The mean activation of each group of tokens.

    Args:
        harvest: The harvest.
        hook: The hook point.
        groups: See ``Groups``.
        count: How many groups there are.

    Returns:
        float64 [count, width], NaN of a group without tokens, and the tokens of each group, int64 [count].

    Raises:
        InputError: An activation is NaN or infinite.
    """
    sums, counts = np.zeros((count, harvest.plan.width(hook))), np.zeros(count, np.int64)
    for values, group, _ in pieces(harvest, hook, groups):
        order = np.argsort(group, kind="stable")
        present, firsts = np.unique(group[order], return_index=True)
        sums[present] += np.add.reduceat(values[order], firsts, axis=0)
        counts += np.bincount(group, minlength=count)
    means = np.full_like(sums, np.nan)
    np.divide(sums, counts[:, None], out=means, where=counts[:, None] > 0)
    return means, counts


def all_tokens(harvest: Harvest) -> Groups:
    """All tokens in one group.

    Args:
        harvest: The harvest.
    """
    return lambda index: np.zeros(harvest.plan.shards[index][3], np.int64)


def by_position(harvest: Harvest) -> tuple[Groups, int]:
    """Tokens grouped by their place in the row that was run, and how many places there are.

    Args:
        harvest: The harvest.
    """
    most = max((int(harvest.shard(i)[POSITIONS].max(initial=-1)) for i in range(len(harvest.plan.shards))), default=-1)
    return lambda index: harvest.shard(index)[POSITIONS], most + 1


def mean(harvest: Harvest, hook: str, labels: Labels | None, by: str | None) -> Array:
    """See ``Harvest.mean``."""
    groups: Groups
    if labels is not None:
        groups, count = labelled(harvest, labels, "document" if by is None else by).of_shard, 2
    elif not is_one_of(by, (None, "position")):
        raise InputError(f"by={by!r}: a mean is over all tokens (None), or that of each 'position'.")
    elif by is None and not harvest.plan.written and "mean" in harvest.reduced.get(hook, {}):
        return harvest.reduced[hook]["mean"]
    else:
        harvest[hook]  # raises where it was not harvested, before its positions are read
        groups, count = (all_tokens(harvest), 1) if by is None else by_position(harvest)
    shape = harvest[hook].shape[1:]
    means, counts = grouped_means(harvest, hook, groups, count)
    if labels is not None and not counts[1]:
        raise InputError("no token of this harvest has the label True: there is nothing to take the mean of.")
    found = means.astype(np.float32).reshape(count, *shape)
    return found if by == "position" and labels is None else np.asarray(found[-1])


def direction(harvest: Harvest, labels: Labels, hook: str, by: str, unit: bool) -> Array:
    """See ``Harvest.direction``."""
    unit, shape = checked_number(unit, "unit", bool), harvest[hook].shape[1:]
    (false, true), counts = grouped_means(harvest, hook, labelled(harvest, labels, by).of_shard, 2)
    if not counts.all():
        raise InputError(f"no token of this harvest has the label {bool(counts[0])}: there is nothing to compare with.")
    found = true - false
    if unit:
        if not found.any():
            raise InputError(f"{hook!r}: both kinds have the same mean, and 0 has no direction.")
        found /= np.linalg.norm(found)
    return np.asarray(found.astype(np.float32).reshape(shape))
