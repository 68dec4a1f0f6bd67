"""Calling Python hooks: what may be given as hooks, how one is called, and what it may return."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from graphlens.analysis.arrays import Array, Border
from graphlens.errors import HookResultError, InputError
from graphlens.file.names import CHOSEN_EXPERTS, split_name
from graphlens.runtime.types import Callback

if TYPE_CHECKING:
    from graphlens.model.hooks import HookPoint

# Called as ``function(activation, hook=HookPoint)``; the activation is the user's kind of array, and None keeps it.
HookFunction = Callable[..., Any]
HookName = str | Callable[[str], bool]
Hooks = Iterable[tuple[HookName, HookFunction]] | None


class Chosen(str):
    """The name of a hook point that a function chose: in runs that do not pass it, a hook there just does not fire."""


def pairs(hooks: Hooks) -> list[tuple[HookName, HookFunction]]:
    """What a user gave as hooks, as a list of pairs.

    Args:
        hooks: (hook name or function name -> bool, function) pairs, in a list, a generator or another iterable; None for none.

    Raises:
        InputError: For something else.
    """
    wanted = "hooks are a list of (hook name, function) pairs"
    if hooks is None:
        return []
    if isinstance(hooks, Mapping):
        raise InputError(f"{wanted}, not a dict: pass list(hooks.items()).")
    if isinstance(hooks, str) or not isinstance(hooks, Iterable):
        raise InputError(f"{wanted}, not {hooks!r}.")
    found = []
    for pair in hooks:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InputError(f"{wanted}, and {pair!r} among them is no pair.")
        name, function = pair
        if not isinstance(name, str) and not callable(name):
            raise InputError(f"{wanted}: {name!r} is neither a name nor a function name -> bool.")
        found.append((name, function))
    return found


def chained(
    point: HookPoint,
    functions: Sequence[HookFunction],
    border: Border[Any],
    count: int,
    learned: list[str] | None = None,
) -> Callback:
    """One function activation -> activation that calls the hooks at a hook point, one after the other.

    Args:
        point: The hook point.
        functions: The hooks, in the order in which they are called.
        border: How activations cross to the user.
        count: How many ids there are, of tokens or of experts: others are refused at a hook point of ids.
        learned: Takes the description of every hook that returned what requires a gradient.

    Returns:
        The function. It raises HookResultError for what a hook returns that is no array of the activation's shape and
        dtype or holds ids that are no tokens, and whatever a hook raises.
    """

    def run(activation: Array) -> Array:
        array, shape, dtype = activation, activation.shape, activation.dtype  # before a hook can change them in place
        value = border.to_user(activation)
        for function in functions:
            result = function(value, hook=point)
            if result is not None:
                value = result
            if learned is not None and border.wants_gradient(value):
                learned.append(_described(function, point))
            array = _checked(border, value, shape, dtype, point, function)
            if array.dtype.kind == "i" and array.size and not 0 <= array.min() <= array.max() < count:
                bad = int(array.min() if array.min() < 0 else array.max())
                what = "expert" if is_expert(point.name) else "token id"
                raise HookResultError(
                    f"{_described(function, point)} returned the {what} {bad}: ids go from 0 to {count - 1}."
                )
        return np.asarray(array)

    return run


def is_expert(name: str) -> bool:
    """True if the integers at a hook point are numbers of experts, and not tokens."""
    return name.endswith(CHOSEN_EXPERTS) and split_name(name)[1] == CHOSEN_EXPERTS


def untupled(function: HookFunction) -> HookFunction:
    """A backward hook whose result may also be a tuple of one gradient, which is what torch's own hooks return.

    Args:
        function: The hook.

    Returns:
        The hook with such a tuple unpacked.
    """

    @functools.wraps(function)
    def run(gradient: object, hook: HookPoint) -> object:
        result = function(gradient, hook=hook)
        return result[0] if isinstance(result, tuple) and len(result) == 1 else result

    return run


def _checked(
    border: Border[Any],
    value: object,
    shape: tuple[int, ...],
    dtype: npt.DTypeLike,
    point: HookPoint,
    function: HookFunction,
) -> Array:
    """What a hook returned, as an array. Raises HookResultError for what has not the activation's shape and dtype."""
    try:
        array = border.from_user(value)
    except TypeError as error:
        raise HookResultError(
            f"{_described(function, point)} returned a {type(value).__name__}, not an array."
        ) from error
    if array.shape != shape:
        raise HookResultError(
            f"{_described(function, point)} returned shape {list(array.shape)}; the activation's shape is {list(shape)}. "
            "Return an array of that shape, or None to leave it as it is."
        )
    if array.dtype != dtype:
        raise HookResultError(
            f"{_described(function, point)} returned dtype {array.dtype}; the activation's is {dtype}. Cast it back before "
            "returning."
        )
    return array


def _described(function: HookFunction, point: HookPoint) -> str:
    """A hook as an error names it: its function's name and its place."""
    name = getattr(function, "__name__", None) or getattr(getattr(function, "func", None), "__name__", repr(function))
    return f"the hook {name!r} at {point.name!r}"
