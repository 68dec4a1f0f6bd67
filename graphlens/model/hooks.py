"""Python hooks on a model: which functions are active at which hook points, and what they may return."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, overload

from graphlens.analysis.arrays import Border
from graphlens.errors import InputError, InputTypeError, checked_number, is_one_of
from graphlens.file.names import canonical, select, unknown_hook
from graphlens.model.hook_calls import Chosen, HookFunction, HookName, Hooks, chained, is_expert, pairs, untupled
from graphlens.model.hook_point import BACKWARD as BACKWARD
from graphlens.model.hook_point import FORWARD as FORWARD
from graphlens.model.hook_point import HookPoint as HookPoint
from graphlens.model.per_thread import Block, PerThread
from graphlens.model.ran import ActiveHook as ActiveHook
from graphlens.model.ran import Handle
from graphlens.runtime.types import Callback

Default = TypeVar("Default")
_NEVER = {
    FORWARD: "the hook at {!r} would never fire: this run does not pass it. Its flag was switched off, or start_at_layer or "
    "stop_at_layer leaves it out.",
    BACKWARD: "the backward hook at {!r} would never fire: this run does not pass it, it holds integers, or it fires several "
    "times (ln1, with inputs split).",
}
# Held while the added hooks of a model change, which several threads may do, and a signal's handler in the midst of it.
_changing = threading.RLock()


class HookDict(dict[str, HookPoint]):
    """Hook points by name, in firing order. TransformerLens 4's names find them too, and are not among the keys.

    Raises:
        UnknownHookPoint: (a KeyError) for a name that is none.
    """

    def __init__(self, points: Mapping[str, HookPoint], n_layers: int) -> None:
        super().__init__(points)
        self._n_layers = n_layers

    def __missing__(self, name: str) -> HookPoint:
        known = canonical(name, self) if isinstance(name, str) else name
        if known == name or not super().__contains__(known):
            raise unknown_hook(str(name), list(self), self._n_layers)
        return self[known]

    def __contains__(self, name: object) -> bool:
        return super().__contains__(canonical(name, self) if isinstance(name, str) else name)

    @overload
    def get(self, name: str, default: None = None) -> HookPoint | None: ...

    @overload
    def get(self, name: str, default: HookPoint | Default) -> HookPoint | Default: ...

    def get(self, name: str, default: HookPoint | Default | None = None) -> HookPoint | Default | None:
        """The hook point of a name.

        Args:
            name: Our name or TransformerLens 4's.
            default: What to give where there is none.
        """
        return self[name] if name in self else default


class _Blocks(NamedTuple):
    """The ``with`` blocks that are open in a thread: their hooks, those of outer blocks first, and how many they are."""

    hooks: tuple[ActiveHook, ...]
    depth: int


class HookRegistry:
    """The hooks of one model: those added to it, and those of the ``with`` blocks of each thread, in order.

    Args:
        names: Gives the hook points there are now, in firing order.
        n_layers: The number of blocks.
        d_vocab: The size of the vocabulary.
        n_experts: The number of experts of an MLP; 0 for none.
    """

    def __init__(self, names: Callable[[], Sequence[str]], n_layers: int, d_vocab: int, n_experts: int = 0) -> None:
        self._names, self._n_layers, self._d_vocab, self._n_experts = names, n_layers, d_vocab, n_experts
        self._points: dict[str, HookPoint] = {}
        self._added: tuple[ActiveHook, ...] = ()
        self._blocks: PerThread[_Blocks] = PerThread(_Blocks((), 0))
        self._only: PerThread[tuple[ActiveHook, ...] | None] = PerThread(None)

    @property
    def depth(self) -> int:
        """How many blocks of hooks are open in this thread."""
        return self._blocks.get().depth

    @property
    def points(self) -> HookDict:
        """The hook points there are now, in firing order."""
        return HookDict({name: self.point(name) for name in self._names()}, self._n_layers)

    def point(self, name: str) -> HookPoint:
        """The HookPoint of a name: the same object each time, so that its ``ctx`` is kept.

        Args:
            name: The hook point's own name. Whether there is one now is not checked.
        """
        point = self._points.get(name)
        return self._points.setdefault(name, HookPoint(name, self)) if point is None else point

    def fire(self, name: str, value: object) -> object:
        """An activation of the user's after the hooks that are active at a hook point in this thread.

        Args:
            name: The hook point's own name.
            value: The activation.

        Raises:
            InputError: If these hooks belong to no open model.
        """
        raise InputError(f"the hook point {name!r} belongs to no open model")

    def find(self, name: str) -> HookPoint | None:
        """The hook point of our name or TransformerLens 4's, None where there is none now."""
        names = self._names()
        known = canonical(name, names)
        return self.point(known) if known in names else None

    def need(self, name: str) -> HookPoint:
        """The hook point of a name that was asked for as an attribute.

        Args:
            name: Our name or TransformerLens 4's.

        Raises:
            AttributeError: Where there is none now; it offers the nearest.
        """
        found = self.find(name)
        if found is None:
            raise AttributeError(str(unknown_hook(name, list(self._names()), self._n_layers)))
        return found

    def leads(self, prefix: str) -> bool:
        """True for a part that hook points have in their names and that has no weights: TransformerLens 4's ``attn.q``.

        Args:
            prefix: The part's full name, ``blocks.1.attn.q``.
        """
        return False

    def active(self, name: str | None = None, dir: str = FORWARD) -> list[ActiveHook]:
        """The hooks that are active in this thread, in the order in which they run.

        Args:
            name: Only those at this hook point; None for all.
            dir: "fwd" or "bwd".
        """
        return [hook for hook in self.snapshot() if hook.dir == dir and name in (None, hook.name)]

    def snapshot(self) -> tuple[ActiveHook, ...]:
        """All hooks that are active in this thread now, of both directions."""
        only, blocks = self._only.get(), self._blocks.get()  # which may end one first: it takes added hooks with it
        return (*self._added, *blocks.hooks) if only is None else only

    def only(self, hooks: tuple[ActiveHook, ...]) -> Block[None]:
        """Makes these hooks, and no others, active for the length of the block, in this thread.

        Args:
            hooks: What ``snapshot`` gave.
        """
        return self._only.during(hooks)

    def _expand(
        self, hooks: Hooks, permanent: bool = False, level: int | None = None, dir: str = FORWARD
    ) -> list[ActiveHook]:
        expanded = []
        given = pairs(hooks)
        names = self._names() if given else []
        for name, function in given:
            if not callable(function):
                raise InputTypeError(f"the hook at {name!r} is not callable but {type(function).__name__}")
            found = select(names, name, self._n_layers)
            asked = isinstance(name, str) and not isinstance(name, Chosen)
            expanded += [ActiveHook(n, function, asked, permanent, level, dir, Handle(self._drop)) for n in found]
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
        """Adds a hook that stays until it is reset.

        Args:
            name: See ``HookedTransformer.add_hook``, as for what follows.
            function: Its ``hook``.
            dir: See there.
            permanent: Its ``is_permanent``.
            prepend: See there.
            level: See there.

        Raises:
            UnknownHookPoint: For a name that is none.
            InputError: For another ``dir``.
        """
        if not is_one_of(dir, (FORWARD, BACKWARD)):
            raise InputError(f"dir must be 'fwd' or 'bwd', not {dir!r}.")
        new = tuple(self._expand([(name, function)], permanent, level, dir))
        with _changing:
            self._added = (*new, *self._added) if prepend else (*self._added, *new)

    def reset(
        self,
        including_permanent: bool = False,
        level: int | None = None,
        name: str | None = None,
        dir: str = "both",
    ) -> None:
        """Removes the hooks that were added and those of this thread's blocks; see HookedTransformer.reset_hooks.

        Args:
            including_permanent: Whether permanent ones go too.
            level: Only those of one level.
            name: Only those at one hook point.
            dir: "fwd", "bwd" or "both".
        """
        if not is_one_of(dir, (FORWARD, BACKWARD, "both")):
            raise InputError(f"the direction must be 'fwd', 'bwd' or 'both', not {dir!r}.")
        level = None if level is None else checked_number(level, "level")
        self._remove(lambda hook: hook.goes(including_permanent, level, name, dir))

    def _drop(self, handle: Handle) -> None:
        """Removes the hook of a handle."""
        self._remove(lambda hook: hook.hook is handle)

    def _remove(self, goes: Callable[[ActiveHook], bool]) -> None:
        """Removes hooks that were added and those of this thread's blocks."""
        blocks = self._blocks.get()
        with _changing:
            self._added = tuple(hook for hook in self._added if not goes(hook))
        self._blocks.set(_Blocks(tuple(hook for hook in blocks.hooks if not goes(hook)), blocks.depth))

    def adding(self, hooks: Hooks, bwd_hooks: Hooks, stay: bool, clear_contexts: bool) -> Block[None]:
        """Adds hooks for the length of a ``with`` block, in this thread.

        Args:
            hooks: Forward hooks; see ``HookedTransformer.hooks``, as for what follows.
            bwd_hooks: Backward hooks.
            stay: True adds them for good.
            clear_contexts: See there.

        Raises:
            UnknownHookPoint: At its beginning, for a name that is none, before any hook is added.
        """
        given, given_bwd = pairs(hooks), pairs(bwd_hooks)  # once: a generator gives them once

        def inside(around: _Blocks) -> _Blocks:
            level = None if stay else around.depth + 1
            new = (*self._expand(given, level=level), *self._expand(given_bwd, level=level, dir=BACKWARD))
            if level is None:
                with _changing:
                    self._added = (*self._added, *new)
                return around
            return _Blocks((*around.hooks, *new), level)

        def after(blocks: _Blocks) -> None:
            if not stay:  # TransformerLens: hooks that were added at the block's level go with it
                with _changing:
                    self._added = tuple(hook for hook in self._added if not hook.goes(False, blocks.depth, None))
            if clear_contexts:
                self.clear_contexts()

        return Block(self._blocks, inside, after)

    def clear_contexts(self) -> None:
        """Empties every hook point's ``ctx``."""
        for point in list(self._points.values()):  # other threads may add some meanwhile
            point.clear_context()

    def callbacks(
        self,
        border: Border[Any],
        names: Collection[str],
        dir: str = FORWARD,
        elsewhere: bool = False,
        learned: list[str] | None = None,
    ) -> dict[str, Callback]:
        """For each hook point with hooks, one function activation -> activation (or gradients) that calls them in order.

        Args:
            border: How arrays cross to the user.
            names: The hook points that the run passes; of backward hooks, those that have one gradient in it.
            dir: "fwd" or "bwd".
            elsewhere: True lets other hook points have hooks asked for by name.
            learned: Takes the description of every hook that returned what requires a gradient.

        Raises:
            InputError: For a hook asked for by name at another one, unless ``elsewhere``: it would silently never fire.
        """
        at: dict[str, list[HookFunction]] = {}
        for hook in self.active(dir=dir):
            if hook.name in names:
                function = hook.user_hook if dir == FORWARD else untupled(hook.user_hook)
                at.setdefault(hook.name, []).append(function)
            elif hook.asked and not hook.is_permanent and not elsewhere:
                raise InputError(_NEVER[dir].format(hook.name))
        return {
            name: chained(
                self.point(name), functions, border, self._n_experts if is_expert(name) else self._d_vocab, learned
            )
            for name, functions in at.items()
        }
