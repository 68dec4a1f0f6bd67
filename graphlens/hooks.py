"""Python hooks on a model: which functions stand at which hook points, and what they may return."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import numpy.typing as npt

from graphlens import hook_points
from graphlens.errors import HookResultError
from graphlens.runtime.callbacks import Callback

HookFunction = Callable[..., Any]
HookName = str | Callable[[str], bool]
Hooks = Sequence[tuple[HookName, HookFunction]]


class HookPoint:
    """What a hook function receives as ``hook``: where it is, and a place to keep things between calls."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ctx: dict[str, Any] = {}

    def layer(self) -> int:
        """The index of the block this hook point is in. Raises ValueError outside the blocks."""
        layer, _ = hook_points.split_name(self.name)
        if layer is None:
            raise ValueError(f"{self.name!r} is not in a block")
        return layer

    def clear_context(self) -> None:
        """Empties ``ctx``."""
        self.ctx.clear()

    def __repr__(self) -> str:
        return f"HookPoint({self.name!r})"


class HookRegistry:
    """The hooks that are active on one model, in the order they were added."""

    def __init__(self, names: Sequence[str], n_layers: int) -> None:
        self._names, self._n_layers = list(names), n_layers
        self.points = {name: HookPoint(name) for name in names}
        # Per thread and task: two of them that share a model must not see each other's hooks.
        self._active: ContextVar[tuple[tuple[str, HookFunction], ...]] = ContextVar("hooks", default=())

    def _expand(self, hooks: Hooks) -> list[tuple[str, HookFunction]]:
        expanded = []
        for name, function in hooks:
            if not callable(function):
                raise TypeError(f"the hook at {name!r} is not callable but {type(function).__name__}")
            expanded += [(n, function) for n in hook_points.select(self._names, name, self._n_layers)]
        return expanded

    @contextlib.contextmanager
    def adding(self, hooks: Hooks) -> Iterator[None]:
        """Adds hooks for the length of the block. Raises UnknownHookPoint before any is added."""
        token = self._active.set((*self._active.get(), *self._expand(hooks)))
        try:
            yield
        finally:
            self._active.reset(token)

    def clear_contexts(self) -> None:
        """Empties every hook point's ``ctx``."""
        for point in self.points.values():
            point.clear_context()

    def callbacks(
        self, to_user: Callable[[npt.NDArray[Any]], Any], from_user: Callable[[Any], npt.NDArray[Any]]
    ) -> dict[str, Callback]:
        """One function per hooked name, running its hooks in order on the user's kind of array."""
        at: dict[str, list[HookFunction]] = {}
        for name, function in self._active.get():
            at.setdefault(name, []).append(function)
        return {name: self._chain(self.points[name], functions, to_user, from_user) for name, functions in at.items()}

    @staticmethod
    def _chain(point: HookPoint, functions: Sequence[HookFunction], to_user: Any, from_user: Any) -> Callback:
        def run(activation: npt.NDArray[Any]) -> npt.NDArray[Any]:
            shape, dtype = activation.shape, activation.dtype  # before a hook can change them in place
            value = to_user(activation)
            for function in functions:
                result = function(value, hook=point)
                if result is not None:
                    value = result
                _check(from_user, value, shape, dtype, point, function)
            return np.asarray(from_user(value))

        return run


def _check(
    from_user: Any,
    value: Any,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    point: HookPoint,
    function: HookFunction,
) -> None:
    name = getattr(function, "__name__", None) or getattr(getattr(function, "func", None), "__name__", repr(function))
    try:
        array = from_user(value)
    except TypeError as error:
        raise HookResultError(
            f"the hook {name!r} at {point.name!r} returned a {type(value).__name__}, not an array."
        ) from error
    if array.shape != shape:
        raise HookResultError(
            f"the hook {name!r} at {point.name!r} returned shape {list(array.shape)}; the activation's shape is "
            f"{list(shape)}. Return an array of that shape, or None to leave it as it is."
        )
    if array.dtype != dtype:
        raise HookResultError(
            f"the hook {name!r} at {point.name!r} returned dtype {array.dtype}; the activation's is {dtype}. "
            "Cast it back before returning."
        )


def hook_table(entries: Mapping[str, tuple[str, str]], title: str) -> Any:
    """A rich table of hook points: name, shape, dtype."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("hook point", style="cyan", no_wrap=True)
    table.add_column("shape")
    table.add_column("dtype")
    for name, (shape, dtype) in entries.items():
        table.add_row(name, shape.replace("[", r"\["), dtype)
    return table
