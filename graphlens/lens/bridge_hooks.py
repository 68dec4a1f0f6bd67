"""Hook points by TransformerLens 4's names: what finds them, what a filter picks of them, and what a cache calls them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import cast

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT, Border
from graphlens.analysis.cache.activation_cache import ActivationCache
from graphlens.analysis.cache.activations import Key
from graphlens.errors import UnknownHookPoint
from graphlens.file.bridge import twins
from graphlens.file.names import FLAGGED, SCORES, NamesFilter, canonical, in_block, split_name, unknown_hook
from graphlens.model.hook_calls import HookName, Hooks, pairs
from graphlens.model.hooks import FORWARD, ActiveHook, HookDict, HookPoint
from graphlens.model.runner import Runner
from graphlens.model.runner_hooks import RunnerHooks
from graphlens.runtime.types import Callback

# Granite multiplies what its sublayers give by a number before it is added. Our names mean the product, as those of
# TransformerLens 3.9's models do; these names mean what comes before, which is no hook point.
_BEFORE_A_FACTOR = {"GraniteForCausalLM": ("attn.hook_out", "attn.o.hook_out", "mlp.hook_out", "mlp.out.hook_out")}
# What TransformerLens 4 has besides -> the hook point that is nearest to it, and what lies between them.
_NORMED = "before the norm's weight and bias"
_BESIDES: Mapping[str, tuple[str, str]] = {
    "ln1.hook_in": ("hook_in", "which what adds to the residual stream reads too"),
    **dict.fromkeys(
        ("ln1.hook_out", "attn.hook_in", *(f"attn.{part}.hook_in" for part in ("q", "k", "v", "qkv"))),
        ("ln1.hook_normalized", _NORMED),
    ),
    **dict.fromkeys(
        ("ln2.hook_out", "mlp.hook_in", "mlp.in.hook_in", "mlp.gate.hook_in"), ("ln2.hook_normalized", _NORMED)
    ),
}
# What TransformerLens 3.9 calls as TransformerLens 4 does, and TransformerLens 4 in compatibility mode otherwise.
_LEGACY = {"unembed.hook_out": "hook_unembed"}


class BridgeHooks(RunnerHooks):
    """A model's hooks, its hook points called by TransformerLens 4's names. Those of 3.9 are other names of the same.

    Args:
        runner: Runs the model.
    """

    def __init__(self, runner: Runner[ArrayT]) -> None:
        super().__init__(runner)
        self._before = _BEFORE_A_FACTOR.get(runner.config.original_architecture, ())
        self._known: tuple[list[str], dict[str, tuple[str, ...]]] = ([], {})

    # Names

    def twins(self) -> Mapping[str, tuple[str, ...]]:
        """Our name of each hook point there is now, in firing order -> all its names, TransformerLens 4's first."""
        names = list(self._names())
        if names != self._known[0]:
            self._known = (
                names,
                {
                    own: tuple(name for name in every if split_name(name)[1] not in self._before)
                    for own, every in twins(names).items()
                },
            )
        return self._known[1]

    def called(self, own: str) -> str:
        """What a hook point is called: by TransformerLens 4's name, and in compatibility mode as TransformerLens 4 has it.

        Args:
            own: Our name, of a hook point or of its gradient (``<name>_grad``).
        """
        name = own.removesuffix("_grad")
        names = self.twins().get(name, (name,))
        legacy = getattr(self._runner.border, "compatibility_mode", False)
        if legacy and split_name(name)[1] not in (
            "hook_resid_pre",
            "hook_resid_post",
        ):  # these two keep the new name there
            return _LEGACY.get(name, name) + own[len(name) :]
        return names[0] + own[len(name) :]

    def rename(self) -> None:
        """Calls the hook points that there are as ``called`` says now."""
        for own, point in list(self._points.items()):
            point.name = self.called(own)

    def own(self, name: str) -> str:
        """Our name of a hook point.

        Args:
            name: TransformerLens 4's name, or ours.

        Raises:
            UnknownHookPoint: Where there is none now; it offers the nearest.
        """
        found = self._own(name)
        if found not in self.twins():
            raise self._unknown(name, found)
        return found

    def _own(self, name: str) -> str:
        """Our name of the hook point of this name, or the name itself."""
        every = self.twins()
        if name in every:
            return name
        known = canonical(name, self._known[0])
        return known if name in every.get(known, (name,)) else name

    def _unknown(self, name: str, own: str) -> UnknownHookPoint:
        layer, rest = split_name(own)
        near, why = _BESIDES.get(rest, ("", ""))
        near = near and in_block(layer or 0, near)
        if near and any(names[0] == near for names in self.twins().values()):
            return UnknownHookPoint(f"{name!r} is not a hook point of this model. Nearest: {near!r}, {why}.")
        # What our names say of a layer beyond the last, and of a flag that is not set, holds for TransformerLens 4's.
        meant = own if rest in FLAGGED or (layer or 0) >= self._n_layers else name
        every = [other for names in self.twins().values() for other in names]
        return unknown_hook(meant, every, self._n_layers)

    def picked(self, names_filter: NamesFilter, compatibility_mode: bool) -> Picked:
        """What a ``names_filter`` picks, and what the activations are then called.

        Args:
            names_filter: None, a name, several, or a function name -> bool that is asked for all names of each hook point.
            compatibility_mode: Whether activations are called by TransformerLens 3.9's names too, whatever was asked for.

        Raises:
            UnknownHookPoint: For a name that is none.
        """
        return Picked(self, names_filter, compatibility_mode)

    # What HookRegistry looks up by our names

    @property
    def points(self) -> HookDict:
        """The hook points there are now in firing order, each under all its names."""
        every = {name: self.point(own) for own, names in self.twins().items() for name in names}
        return HookDict(every, self._n_layers)

    def point(self, name: str) -> HookPoint:
        """The HookPoint of a name, which is called by TransformerLens 4's: the same object each time.

        Args:
            name: One of the hook point's names. Whether there is one now is not checked.
        """
        own = self._own(name)
        point = self._points.get(own)
        return self._points.setdefault(own, HookPoint(self.called(own), self)) if point is None else point

    def find(self, name: str) -> HookPoint | None:
        """The hook point of a name of TransformerLens 4's or ours, None where there is none now."""
        own = self._own(name)
        return self.point(own) if own in self.twins() else None

    def need(self, name: str) -> HookPoint:
        """The hook point of a name that was asked for as an attribute.

        Args:
            name: TransformerLens 4's name, or ours.

        Raises:
            AttributeError: Where there is none now; it offers the nearest.
        """
        found = self.find(name)
        if found is None:
            raise AttributeError(str(self._unknown(name, self._own(name))))
        return found

    def leads(self, prefix: str) -> bool:
        """True for a part that hook points have in their names: ``blocks.1.attn.q``.

        Args:
            prefix: The part's full name.
        """
        return any(name.startswith(f"{prefix}.") for names in self.twins().values() for name in names)

    def active(self, name: str | None = None, dir: str = FORWARD) -> list[ActiveHook]:
        """The hooks that are active in this thread, in the order in which they run.

        Args:
            name: Only those at this hook point; None for all.
            dir: "fwd" or "bwd".
        """
        return super().active(None if name is None else self._own(name), dir)

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
        super().reset(including_permanent, level, None if name is None else self._own(name), dir)

    def _expand(
        self, hooks: Hooks, permanent: bool = False, level: int | None = None, dir: str = FORWARD
    ) -> list[ActiveHook]:
        given = [(cast(HookName, self.picked(name, False).filter), function) for name, function in pairs(hooks)]
        return super()._expand(given, permanent, level, dir)

    # Masked scores

    def callbacks(
        self,
        border: Border[ArrayT],
        names: Collection[str],
        dir: str = FORWARD,
        elsewhere: bool = False,
        learned: list[str] | None = None,
    ) -> dict[str, Callback]:
        """For each hook point with hooks, one function activation -> activation; see HookRegistry.

        Outside of compatibility mode masked attention scores are the lowest number of their dtype for a hook, as
        TransformerLens 4 has them there, and what a hook leaves at that number stays masked.

        Args:
            border: How arrays cross to the user.
            names: The hook points that the run passes.
            dir: "fwd" or "bwd".
            elsewhere: See HookRegistry.
            learned: See HookRegistry.

        Raises:
            InputError: For a hook asked for by name at another one: it would silently never fire.
        """
        found = super().callbacks(border, names, dir, elsewhere, learned)
        if dir == FORWARD and not getattr(border, "compatibility_mode", False):
            found = {name: _finite(run) if is_scores(name) else run for name, run in found.items()}
        return found


class Picked:
    """What a ``names_filter`` picks by any of the hook points' names.

    Args:
        hooks: The hook points.
        asked: The filter.
        compatibility_mode: See ``BridgeHooks.picked``.

    Attributes:
        filter: The same filter by our names.
    """

    def __init__(self, hooks: BridgeHooks, asked: NamesFilter, compatibility_mode: bool) -> None:
        self._hooks, self._asked, self._aliased = hooks, asked, compatibility_mode
        self._matched: dict[str, list[str]] = {}
        self.filter = self._by_own_names()

    def _by_own_names(self) -> NamesFilter:
        asked, hooks = self._asked, self._hooks
        if callable(asked):
            return self._matches
        if isinstance(asked, str):
            own = hooks.own(asked)
            self._matched[own] = [asked]
            return own
        if not isinstance(asked, Sequence):
            return asked
        wanted = []
        for name in asked:
            if not isinstance(name, str):
                return asked  # refused where it is used
            own = hooks.own(name)
            self._matched.setdefault(own, []).append(name)
            wanted.append(own)
        return wanted

    def _matches(self, own: str) -> bool:
        """Asks a function for every name of a hook point."""
        assert callable(self._asked)
        self._matched[own] = [name for name in self._hooks.twins()[own] if self._asked(name)]
        return bool(self._matched[own])

    def names(self, own: str) -> list[str]:
        """What the activation of a hook point is called in a cache.

        Args:
            own: Our name of it.
        """
        every = self._hooks.twins()[own]
        if self._asked is None:
            return list(every)
        found = list(self._matched[own])
        if not callable(self._asked):
            found.append(every[0])
        if self._aliased and every[0] in found:
            found.append(own)
        return [name for name in every if name in found]


class BridgeCache(ActivationCache[ArrayT]):
    """The activations of a run under TransformerLens 4's names; any name of a hook point finds what is there of it."""

    def _name(self, key: Key) -> str:
        name = super()._name(key)
        hooks = self.model.hook_dict
        if name in self.cache_dict or not isinstance(hooks, HookDict):
            return name
        base = name.removesuffix("_grad")
        point = hooks.get(base)
        same = [other for other in hooks if hooks[other] is point and other + name[len(base) :] in self.cache_dict]
        return same[0] + name[len(base) :] if same else name


def is_scores(name: str) -> bool:
    """True if a hook point's activation is attention scores, where what is masked is minus infinity."""
    return split_name(name)[1] == SCORES


def _finite(run: Callback) -> Callback:
    """A hook point's function, for which masked scores are the lowest number of their dtype."""

    def masked(activation: Array) -> Array:
        lowest = np.finfo(activation.dtype).min
        given = np.where(np.isneginf(activation), lowest, activation)
        result = run(given)
        return np.where(result == lowest, -np.inf, result).astype(activation.dtype, copy=False)

    return masked
