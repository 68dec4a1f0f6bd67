"""Python hooks on a model: which functions stand at which hook points, and what they may return."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from graphlens.errors import HookResultError, InputError
from graphlens.file.names import canonical, select, split_name, unknown_hook
from graphlens.runtime.callbacks import Callback

HookFunction = Callable[..., Any]
HookName = str | Callable[[str], bool]
Hooks = Sequence[tuple[HookName, HookFunction]]
FORWARD, BACKWARD = "fwd", "bwd"


class HookPoint:
    """What a hook function receives as ``hook``: where it is, and a place to keep things between calls."""

    def __init__(self, name: str, registry: HookRegistry | None = None) -> None:
        self.name = name
        self.ctx: dict[str, Any] = {}
        self._registry = registry

    def layer(self) -> int:
        """The index of the block this hook point is in. Raises ValueError outside the blocks."""
        layer, _ = split_name(self.name)
        if layer is None:
            raise ValueError(f"{self.name!r} is not in a block")
        return layer

    def clear_context(self) -> None:
        """Empties ``ctx``."""
        self.ctx.clear()

    def add_hook(
        self,
        hook: HookFunction,
        dir: str = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Adds a hook here until it is reset; see HookedTransformer.add_hook."""
        self._owner.add(self.name, hook, dir, is_permanent, prepend, level)

    def add_perma_hook(self, hook: HookFunction, dir: str = "fwd") -> None:
        """Adds a hook here that resetting leaves, unless told ``including_permanent=True``."""
        self.add_hook(hook, dir, is_permanent=True)

    @property
    def fwd_hooks(self) -> list[StandingHook]:
        """The hooks that stand here in this thread, in the order they run. A list of its own: adding to it adds none."""
        return self._owner.standing(self.name)

    @property
    def bwd_hooks(self) -> list[StandingHook]:
        """The backward hooks that stand here in this thread, as ``fwd_hooks``."""
        return self._owner.standing(self.name, BACKWARD)

    def has_hooks(self, dir: str = "both", including_permanent: bool = True, level: int | None = None) -> bool:
        """Whether a hook of that kind stands here in this thread."""
        standing = [*(self.fwd_hooks if dir != BACKWARD else []), *(self.bwd_hooks if dir != FORWARD else [])]
        return any(
            (including_permanent or not hook.is_permanent) and level in (None, hook.context_level) for hook in standing
        )

    def remove_hooks(self, dir: str = "fwd", including_permanent: bool = False, level: int | None = None) -> None:
        """Removes the hooks that stand here; see HookedTransformer.reset_hooks."""
        self._owner.reset(including_permanent, level, self.name, dir)

    @property
    def _owner(self) -> HookRegistry:
        if self._registry is None:
            raise InputError(f"the hook point {self.name!r} belongs to no model")
        return self._registry

    def __repr__(self) -> str:
        return f"HookPoint({self.name!r})"


class HookDict(dict[str, HookPoint]):
    """Hook points by name, in firing order. TransformerLens 4's names find them too, and are not among the keys.

    Raises UnknownHookPoint (a KeyError) for a name that is none.
    """

    def __init__(self, points: Mapping[str, HookPoint], n_layers: int) -> None:
        super().__init__(points)
        self._n_layers = n_layers

    def __missing__(self, name: str) -> HookPoint:
        known = canonical(name) if isinstance(name, str) else name
        if known == name or not super().__contains__(known):
            raise unknown_hook(str(name), list(self), self._n_layers)
        return self[known]

    def __contains__(self, name: object) -> bool:
        return super().__contains__(canonical(name) if isinstance(name, str) else name)

    def get(self, name: str, default: Any = None) -> Any:
        """The hook point of a name or alias, else ``default``."""
        return self[name] if name in self else default


@dataclass(frozen=True)
class StandingHook:
    """A hook that stands. ``asked`` by its very name, not chosen by a function; then it has to fire.

    ``context_level`` is the depth of the ``with`` block it belongs to, from 1, or what ``add_hook(level=)`` said.
    """

    name: str
    user_hook: HookFunction
    asked: bool = False
    is_permanent: bool = False
    context_level: int | None = None
    dir: str = FORWARD

    def goes(self, including_permanent: bool, level: int | None, name: str | None, dir: str = "both") -> bool:
        """Whether a reset removes it. As in TransformerLens, one that includes permanent hooks asks for no level."""
        chosen = including_permanent or (not self.is_permanent and level in (None, self.context_level))
        return chosen and name in (None, self.name) and dir in ("both", self.dir)


class HookRegistry:
    """The hooks of one model: those added to it, and those of the ``with`` blocks of each thread, in order."""

    def __init__(self, names: Callable[[], Sequence[str]], n_layers: int) -> None:
        self._names, self._n_layers = names, n_layers
        self._points: dict[str, HookPoint] = {}
        self._added: tuple[StandingHook, ...] = ()
        # Per thread and task: two of them that share a model must not see each other's hooks.
        self._active: ContextVar[tuple[StandingHook, ...]] = ContextVar("hooks", default=())
        self._depth: ContextVar[int] = ContextVar("depth", default=0)
        self._only: ContextVar[tuple[StandingHook, ...] | None] = ContextVar("only", default=None)

    @property
    def points(self) -> HookDict:
        """The hook points there are now, in firing order."""
        return HookDict({name: self.point(name) for name in self._names()}, self._n_layers)

    def point(self, name: str) -> HookPoint:
        """The one HookPoint of a name, whose ``ctx`` lives on."""
        return self._points.setdefault(name, HookPoint(name, self))

    def standing(self, name: str | None = None, dir: str = FORWARD) -> list[StandingHook]:
        """The hooks at one hook point (None: at all) in this thread, in the order they run."""
        only = self._only.get()
        every = (*self._added, *self._active.get()) if only is None else only
        return [hook for hook in every if name in (None, hook.name) and hook.dir == dir]

    def _expand(
        self, hooks: Hooks, permanent: bool = False, level: int | None = None, dir: str = FORWARD
    ) -> list[StandingHook]:
        expanded = []
        names = self._names()
        for name, function in hooks:
            if not callable(function):
                raise TypeError(f"the hook at {name!r} is not callable but {type(function).__name__}")
            found = select(names, name, self._n_layers)
            expanded += [StandingHook(n, function, isinstance(name, str), permanent, level, dir) for n in found]
        return expanded

    def add(
        self,
        name: HookName,
        function: HookFunction,
        dir: str = "fwd",
        permanent: bool = False,
        prepend: bool = False,
        level: int | None = None,
    ) -> None:
        """Adds a hook that stays until it is reset. Raises UnknownHookPoint, InputError for another ``dir``."""
        if dir not in (FORWARD, BACKWARD):
            raise InputError(f"dir must be 'fwd' or 'bwd', not {dir!r}.")
        new = tuple(self._expand([(name, function)], permanent, level, dir))
        self._added = (*new, *self._added) if prepend else (*self._added, *new)

    def reset(
        self,
        including_permanent: bool = False,
        level: int | None = None,
        name: str | None = None,
        dir: str = "both",
    ) -> None:
        """Removes the hooks that were added and those of this thread's blocks; permanent ones only when asked, only
        those of a ``level``, a direction, or at one hook point ``name`` where that is given. A block that ends puts back
        those outside of it."""
        asked = (including_permanent, level, name, dir)
        self._added = tuple(hook for hook in self._added if not hook.goes(*asked))
        self._active.set(tuple(hook for hook in self._active.get() if not hook.goes(*asked)))

    @contextlib.contextmanager
    def adding(self, hooks: Hooks, bwd_hooks: Hooks = ()) -> Iterator[None]:
        """Adds hooks for the length of the block. Raises UnknownHookPoint before any is added."""
        depth = self._depth.get() + 1
        new = (*self._expand(hooks, level=depth), *self._expand(bwd_hooks, level=depth, dir=BACKWARD))
        hooks_token = self._active.set((*self._active.get(), *new))
        depth_token = self._depth.set(depth)
        try:
            yield
        finally:
            self._active.reset(hooks_token)
            self._depth.reset(depth_token)
            # TransformerLens: hooks that were added at the block's level go with it.
            self._added = tuple(hook for hook in self._added if not hook.goes(False, depth, None))

    def snapshot(self) -> tuple[StandingHook, ...]:
        """All hooks that stand in this thread now."""
        return (*self._added, *self._active.get())

    @contextlib.contextmanager
    def standing_again(self, hooks: tuple[StandingHook, ...]) -> Iterator[None]:
        """The hooks of a ``snapshot``, and no others, for the length of the block, in this thread."""
        token = self._only.set(hooks)
        try:
            yield
        finally:
            self._only.reset(token)

    def clear_contexts(self) -> None:
        """Empties every hook point's ``ctx``."""
        for point in self._points.values():
            point.clear_context()

    def callbacks(
        self,
        to_user: Callable[[npt.NDArray[Any]], Any],
        from_user: Callable[[Any], npt.NDArray[Any]],
        names: Collection[str],
    ) -> dict[str, Callback]:
        """One function per hooked name, running its hooks in order on the user's kind of array.

        ``names`` are the hook points of this run. Raises InputError for a hook that was asked for by name and stands
        elsewhere: it would silently never fire.
        """
        at: dict[str, list[HookFunction]] = {}
        for hook in self.standing():
            if hook.name in names:
                at.setdefault(hook.name, []).append(hook.user_hook)
            elif hook.asked and not hook.is_permanent:
                raise InputError(
                    f"the hook at {hook.name!r} would never fire: this run does not pass it. Its flag was switched off, or "
                    "start_at_layer or stop_at_layer leaves it out."
                )
        return {name: self._chain(self.point(name), functions, to_user, from_user) for name, functions in at.items()}

    def backward_callbacks(
        self,
        to_user: Callable[[npt.NDArray[Any]], Any],
        from_user: Callable[[Any], npt.NDArray[Any]],
        names: Collection[str],
    ) -> dict[str, Callback]:
        """One function per hook point with backward hooks: gradient -> gradient. ``names`` are those that have one in this
        run. Raises InputError for a hook that was asked for by name and stands elsewhere."""
        at: dict[str, list[HookFunction]] = {}
        for hook in self.standing(dir=BACKWARD):
            if hook.name in names:
                at.setdefault(hook.name, []).append(_untupled(hook.user_hook))
            elif hook.asked and not hook.is_permanent:
                raise InputError(
                    f"the backward hook at {hook.name!r} would never fire: this run does not pass it, it holds integers, or it "
                    "fires several times (ln1, with inputs split)."
                )
        return {name: self._chain(self.point(name), functions, to_user, from_user) for name, functions in at.items()}

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


def _untupled(function: HookFunction) -> HookFunction:
    """A backward hook whose result may be a tuple of one gradient, as torch's own hooks return it."""

    @functools.wraps(function)
    def run(gradient: Any, hook: HookPoint) -> Any:
        result = function(gradient, hook=hook)
        return result[0] if isinstance(result, tuple) and len(result) == 1 else result

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
