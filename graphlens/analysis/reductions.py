"""Statistics of activations that arrive in pieces: each is added, pieces are merged, and the end is one array or two."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from graphlens.analysis.arrays import Array
from graphlens.errors import InputError, InputTypeError, checked_number, is_one_of
from graphlens.file.manifest import Json

State = dict[str, Array]
"""What a statistic keeps of the activations so far: arrays by name."""
Floats = npt.NDArray[np.float32]


class Reduction(ABC):
    """A statistic over all tokens of a harvest, each number of an activation by itself.

    Its state after a piece depends on that piece and on those before it alone, and merging is done in the order of pieces: so the
    same pieces give the same bits.
    """

    kind: ClassVar[str]

    def spec(self) -> dict[str, Json]:
        """Its kind and options, as JSON."""
        return {"kind": self.kind, **asdict(self)}  # type: ignore[call-overload]  # each of them is a dataclass

    @abstractmethod
    def _start(self, width: int) -> State:
        """The state before the first token of activations of ``width`` numbers."""

    @abstractmethod
    def _of(self, values: Floats, first: Array) -> State:
        """The state of one piece.

        Args:
            values: float32 [n, width], n > 0.
            first: int64 [n], the place of each token in the harvest.
        """

    @abstractmethod
    def _merge(self, one: State, other: State) -> State:
        """The state of two pieces, the earlier one first."""

    @abstractmethod
    def _finish(self, state: State, shape: Sequence[int]) -> dict[str, Array]:
        """What users get, by name.

        Args:
            state: The state of all.
            shape: The axes of an activation.
        """


class _Counted(Reduction):
    """A statistic whose state holds how many tokens it is of."""

    def _merge(self, one: State, other: State) -> State:
        if not one["count"][0] or not other["count"][0]:
            return other if not one["count"][0] else one
        return self._joined(one, other)

    @abstractmethod
    def _joined(self, one: State, other: State) -> State:
        """``_merge`` where neither is of no token."""


def _moments(values: Floats) -> State:
    """Count, mean and summed squared deviation of one piece, float64."""
    mean = values.mean(0, dtype=np.float64)
    apart = values - mean.astype(np.float32)
    # The rounding of the mean to float32 is taken out again.
    slip = apart.mean(0, dtype=np.float64)
    squares = np.einsum("nw,nw->w", apart, apart, dtype=np.float64) - len(values) * slip**2
    return {"count": np.asarray([len(values)], np.int64), "mean": mean, "squares": np.maximum(squares, 0)}


def _merged_mean(one: State, other: State) -> tuple[Array, float, Array]:
    """(the mean of both, the weight of the distance between the two in squares, that distance)."""
    mine, theirs = int(one["count"][0]), int(other["count"][0])
    apart: Array = other["mean"] - one["mean"]
    mean: Array = one["mean"] + apart * (theirs / (mine + theirs))
    return mean, mine * theirs / (mine + theirs), apart


@dataclass(frozen=True)
class Mean(_Counted):
    """The mean. Float64 sums, float32 result."""

    kind: ClassVar[str] = "mean"

    def _start(self, width: int) -> State:
        return {"count": np.zeros(1, np.int64), "mean": np.zeros(width)}

    def _of(self, values: Floats, first: Array) -> State:
        return {"count": np.asarray([len(values)], np.int64), "mean": values.mean(0, dtype=np.float64)}

    def _joined(self, one: State, other: State) -> State:
        return {"count": one["count"] + other["count"], "mean": _merged_mean(one, other)[0]}

    def _finish(self, state: State, shape: Sequence[int]) -> dict[str, Array]:
        return {"mean": state["mean"].astype(np.float32).reshape(shape)}


@dataclass(frozen=True)
class Variance(_Counted):
    """The mean, and the variance: the mean squared deviation from it."""

    kind: ClassVar[str] = "variance"

    def _start(self, width: int) -> State:
        return {"count": np.zeros(1, np.int64), "mean": np.zeros(width), "squares": np.zeros(width)}

    def _of(self, values: Floats, first: Array) -> State:
        return _moments(values)

    def _joined(self, one: State, other: State) -> State:
        mean, weight, apart = _merged_mean(one, other)
        squares = one["squares"] + other["squares"] + weight * apart**2
        return {"count": one["count"] + other["count"], "mean": mean, "squares": squares}

    def _finish(self, state: State, shape: Sequence[int]) -> dict[str, Array]:
        variance = state["squares"] / max(int(state["count"][0]), 1)
        return {
            "mean": state["mean"].astype(np.float32).reshape(shape),
            "variance": variance.astype(np.float32).reshape(shape),
        }


@dataclass(frozen=True)
class Covariance(_Counted):
    """The mean, and the covariance matrix of all numbers of an activation: [width, width] after its axes are joined."""

    kind: ClassVar[str] = "covariance"

    def _start(self, width: int) -> State:
        return {"count": np.zeros(1, np.int64), "mean": np.zeros(width), "products": np.zeros((width, width))}

    def _of(self, values: Floats, first: Array) -> State:
        mean = values.mean(0, dtype=np.float64)
        apart = values - mean.astype(np.float32)
        slip = apart.mean(0, dtype=np.float64)
        products = (apart.T @ apart).astype(np.float64) - len(values) * np.outer(slip, slip)
        return {"count": np.asarray([len(values)], np.int64), "mean": mean, "products": products}

    def _joined(self, one: State, other: State) -> State:
        mean, weight, apart = _merged_mean(one, other)
        products = one["products"] + other["products"] + weight * np.outer(apart, apart)
        return {"count": one["count"] + other["count"], "mean": mean, "products": products}

    def _finish(self, state: State, shape: Sequence[int]) -> dict[str, Array]:
        covariance = state["products"] / max(int(state["count"][0]), 1)
        return {
            "mean": state["mean"].astype(np.float32).reshape(shape),
            "covariance": covariance.astype(np.float32),
        }


_STEPS = 6  # bits of a number's fraction that tell its bucket: 64 buckets for each power of two
_LEAST, _MOST = -24, 24  # powers of two: smaller numbers count as 0, larger ones as the largest
_SIDE = (_MOST - _LEAST) << _STEPS  # buckets of positive numbers


@dataclass(frozen=True)
class Quantiles(Reduction):
    """Quantiles of each number of an activation, within 1 %: counts in 64 buckets for each power of two.

    The result for q is the middle of the bucket that holds the value which at least a share q of the tokens do not exceed.
    Numbers below 2^-24 count as 0, those above 2^24 as 2^24.

    Args:
        q: The quantiles, 0 to 1.
    """

    q: tuple[float, ...] = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
    kind: ClassVar[str] = "quantiles"

    def __post_init__(self) -> None:
        given = [self.q] if isinstance(self.q, (int, float)) else list(self.q)
        object.__setattr__(self, "q", tuple(checked_number(one, "q", float, 0, 1) for one in given))
        if not self.q:
            raise InputError("Quantiles: name one quantile at least.")

    def _start(self, width: int) -> State:
        return {"counts": np.zeros((width, 2 * _SIDE + 1), np.int64)}

    def _of(self, values: Floats, first: Array) -> State:
        if np.isnan(values).any():
            raise InputError(
                "an activation is not a number (NaN), and has no quantiles. Look at the model's output first."
            )
        width = values.shape[1]
        bits = np.abs(values).view(np.int32) >> (23 - _STEPS)
        above = bits - ((127 + _LEAST) << _STEPS)  # 0 for 2^-24
        place = np.where(above < 0, 0, np.minimum(above, _SIDE - 1) + 1)
        bucket = np.where(values < 0, _SIDE - place, _SIDE + place)
        flat = (np.arange(width) * (2 * _SIDE + 1) + bucket).reshape(-1)
        return {"counts": np.bincount(flat, minlength=width * (2 * _SIDE + 1)).reshape(width, -1).astype(np.int64)}

    def _merge(self, one: State, other: State) -> State:
        return {"counts": one["counts"] + other["counts"]}

    def _finish(self, state: State, shape: Sequence[int]) -> dict[str, Array]:
        counts = state["counts"].cumsum(1)
        total = counts[:, -1:]
        edges = _edges()
        found = []
        for q in self.q:
            wanted = np.maximum(np.ceil(q * total), 1)
            found.append(edges[np.minimum((counts < wanted).sum(1), 2 * _SIDE)])
        return {"quantiles": np.asarray(found, np.float32).reshape(len(self.q), *shape)}


def _edges() -> npt.NDArray[np.float64]:
    """The number that each bucket stands for."""
    exponent, step = np.divmod(np.arange(_SIDE), 1 << _STEPS)
    positive = 2.0 ** (exponent + _LEAST) * (1 + (step + 0.5) / (1 << _STEPS))
    return np.concatenate([-positive[::-1], [0.0], positive])


@dataclass(frozen=True)
class Top(Reduction):
    """The tokens at which each number of an activation is largest. Of equal ones the earlier tokens count.

    Args:
        k: How many.
    """

    k: int = 10
    kind: ClassVar[str] = "top"

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", checked_number(self.k, "k", least=1))

    def _start(self, width: int) -> State:
        return {
            "values": np.full((self.k, width), -np.inf, np.float32),
            "tokens": np.full((self.k, width), -1, np.int64),
        }

    def _of(self, values: Floats, first: Array) -> State:
        count, width = values.shape
        if count < self.k:
            return self._best(
                np.concatenate([values, np.full((self.k - count, width), -np.inf, np.float32)]),
                np.broadcast_to(np.concatenate([first, np.full(self.k - count, -1)])[:, None], (self.k, width)),
            )
        # Value and place in one number, so that no two are equal and equal values have one order.
        keys = (_ordered(values) << 31) | (count - 1 - np.arange(count))[:, None]
        best = np.argpartition(keys, count - self.k, axis=0)[count - self.k :]
        return self._best(np.take_along_axis(values, best, 0), first[best])

    def _merge(self, one: State, other: State) -> State:
        return self._best(
            np.concatenate([one["values"], other["values"]]), np.concatenate([one["tokens"], other["tokens"]])
        )

    def _best(self, values: Array, tokens: Array) -> State:
        """The k largest, the largest first; of equal ones the earlier token, and no token last."""
        late = np.where(tokens < 0, np.iinfo(np.int64).max, tokens)
        order = np.lexsort((late, -_ordered(values)), axis=0)[: self.k]
        return {
            "values": np.take_along_axis(values, order, 0),
            "tokens": np.ascontiguousarray(np.take_along_axis(tokens, order, 0)),
        }

    def _finish(self, state: State, shape: Sequence[int]) -> dict[str, Array]:
        return {
            "top_values": state["values"].reshape(self.k, *shape),
            "top_tokens": state["tokens"].reshape(self.k, *shape),
        }


def _ordered(values: Array) -> npt.NDArray[np.int64]:
    """Float32 numbers as integers in the same order; both zeros are one, NaN is the largest."""
    bits = (values + np.float32(0)).view(np.int32).astype(np.int64)  # -0.0 + 0 is 0.0
    found = np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    return np.where(np.isnan(values), 0x7FFFFFFF, found)


KINDS: Mapping[str, type[Reduction]] = {kind.kind: kind for kind in (Mean, Variance, Covariance, Quantiles, Top)}


def reductions(given: Iterable[object] | object) -> tuple[Reduction, ...]:
    """What a user asked for as objects.

    Args:
        given: Words ("mean", "variance", "covariance", "quantiles", "top") and objects of these kinds, or one of them.

    Raises:
        InputError: For anything else, and for a kind that is asked for twice.
    """
    items = [given] if isinstance(given, (str, Reduction)) or not isinstance(given, Iterable) else list(given)
    found: list[Reduction] = []
    for item in items:
        if isinstance(item, Reduction):
            found.append(item)
        elif isinstance(item, str) and is_one_of(item, KINDS):
            found.append(KINDS[item]())
        else:
            raise InputTypeError(
                f"reduce: {item!r:.80} is no statistic. There are {', '.join(map(repr, KINDS))}, Quantiles(q) and Top(k)."
            )
    kinds = [item.kind for item in found]
    twice = next((kind for kind in kinds if kinds.count(kind) > 1), None)
    if twice is not None:
        raise InputError(f"reduce names {twice!r} twice.")
    return tuple(found)


def reduction_of(spec: Mapping[str, Json]) -> Reduction:
    """The statistic that ``Reduction.spec`` described.

    Args:
        spec: Its kind and options.

    Raises:
        InputError: There is no such kind.
    """
    options = dict(spec)
    kind = options.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"this harvest computes {kind!r}, which this graphlens does not know. Update it.")
    return KINDS[kind](**options)


class Statistics:
    """Several statistics of several hook points, added up in pieces.

    Args:
        kinds: The statistics.
        widths: Hook point -> the numbers of an activation.
    """

    def __init__(self, kinds: Sequence[Reduction], widths: Mapping[str, int]) -> None:
        self._kinds, self._widths = kinds, widths
        self.states = {(name, kind.kind): kind._start(width) for name, width in widths.items() for kind in kinds}

    def add(self, name: str, values: Floats, places: Array) -> None:
        """Counts the activations of some tokens.

        Args:
            name: The hook point.
            values: float32 [n, width].
            places: int64 [n], the place of each token in the harvest.
        """
        if len(values):
            for kind in self._kinds:
                self.states[name, kind.kind] = kind._merge(self.states[name, kind.kind], kind._of(values, places))

    def merge(self, arrays: Mapping[str, Array]) -> None:
        """Counts what another of the same kind found of later tokens.

        Args:
            arrays: Its ``arrays()``.
        """
        for name, kind, state in self._parts(arrays):
            self.states[name, kind.kind] = kind._merge(self.states[name, kind.kind], state)

    def restore(self, arrays: Mapping[str, Array]) -> None:
        """Goes on from a state.

        Args:
            arrays: What ``arrays()`` gave.
        """
        for name, kind, state in self._parts(arrays):
            self.states[name, kind.kind] = state

    def _parts(self, arrays: Mapping[str, Array]) -> Iterable[tuple[str, Reduction, State]]:
        for name in self._widths:
            for kind in self._kinds:
                yield name, kind, {key: arrays[f"{name}:{kind.kind}:{key}"] for key in self.states[name, kind.kind]}

    def arrays(self) -> dict[str, Array]:
        """All states as arrays by name."""
        return {
            f"{name}:{kind}:{key}": array for (name, kind), state in self.states.items() for key, array in state.items()
        }

    def results(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Array]]:
        """What users get: hook point -> statistic -> array.

        Args:
            shapes: Hook point -> the axes of an activation.
        """
        return {
            name: {
                key: array
                for kind in self._kinds
                for key, array in kind._finish(self.states[name, kind.kind], shapes[name]).items()
            }
            for name in self._widths
        }
