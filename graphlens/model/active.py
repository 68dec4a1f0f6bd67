"""Running with interventions: which stand in this thread, and what they come to in a run."""

from __future__ import annotations

import contextlib
import functools
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import numpy.typing as npt

from graphlens.edits import gate
from graphlens.edits.gate import Window
from graphlens.edits.kinds import Intervention, checked
from graphlens.engine.plan import Plan
from graphlens.errors import InputError
from graphlens.file.names import axis_sizes, select
from graphlens.model.request import RequestMethods

Array = npt.NDArray[Any]
Interventions = Iterable[Intervention] | Intervention
Edits = Mapping[str, Mapping[str, Array]]
Result = TypeVar("Result")
_KEPT, _FEW = 500_000, 16  # bytes of one result; results


class InterventionMethods(RequestMethods):
    """The part of HookedTransformer that edits runs by data."""

    # Per thread and task, as hooks are. One variable for all models: their entries are told apart by the model.
    _standing: ContextVar[tuple[tuple[int, tuple[Intervention, ...]], ...]] = ContextVar("interventions", default=())

    @functools.cached_property
    def _resolved_before(self) -> _Remembered[tuple[Intervention, ...]]:
        return _Remembered(lambda found: 0)

    @functools.cached_property
    def _composed_before(self) -> _Remembered[tuple[Plan, Edits]]:
        return _Remembered(lambda found: sum(a.nbytes for parts in found[1].values() for a in parts.values()))

    @contextlib.contextmanager
    def intervene(self, interventions: Interventions, strict: bool = True) -> Iterator[Self]:
        """Applies interventions to every call inside the ``with`` block, ``generate`` included, with no Python in the run.

        Blocks nest; those at one hook point apply in order, outer ones first, and before Python hooks there. Cached
        values are those after the edits. ``strict=False`` ignores positions beyond the sequence. Under a KV cache
        positions count from the first token, and ``positions="prompt"`` or ``"generated"`` tells the prompt from what
        ``generate`` adds. Active in the thread (or asyncio task) that entered the block.
        Raises UnknownHookPoint, and InputError for what the model has not or what cannot fit, before anything runs.
        """
        items = checked(interventions)
        # Each call checks its edits; the same ones on the same graph were checked before.
        items = self._resolved_before.of(items, (strict, self._plan()), lambda: self._resolved(items, strict))
        token = self._standing.set((*self._standing.get(), (id(self), items)))
        try:
            yield self
        finally:
            self._standing.reset(token)

    def run_with_interventions(
        self,
        input: Any,
        interventions: Interventions,
        return_type: str | None = "logits",
        names_filter: Any = None,
        fwd_hooks: Any = (),
        strict: bool = True,
        **forward_options: Any,
    ) -> Any:
        """Runs the model once with interventions (see ``intervene``) and returns what ``return_type`` names; with a
        ``names_filter`` (a hook name, a list, or a function name -> bool) the pair of it and an ActivationCache.

        The interventions are inputs of the graph. A session is opened for each *kind* of change at a set of hook points;
        other values, positions, heads and coefficients reuse it (see ``model.sessions``). ``fwd_hooks`` are Python hooks
        of the same run, and ``forward_options`` those of forward.
        """
        with self.intervene(interventions, strict), self.hooks(fwd_hooks):  # type: ignore[attr-defined]
            if names_filter is None:
                return self.forward(input, return_type=return_type, **forward_options)  # type: ignore[attr-defined]
            return self.run_with_cache(  # type: ignore[attr-defined]
                input, names_filter=names_filter, return_type=return_type, **forward_options
            )

    def bake(
        self,
        interventions: Interventions,
        out_dir: str | os.PathLike[str],
        *,
        with_past: bool = False,
        keep_hooks: bool = False,
        self_contained: bool = False,
        layout: str = "plain",
    ) -> Path:
        """Writes the folder ``out_dir``: this model with the interventions inside, a file that runs without graphlens
        (see graphlens.bake_model, which also says what the arguments mean). Returns the folder.
        """
        from graphlens.pipelines.deploy import bake_model

        return bake_model(
            self._engine.path,
            interventions,
            out_dir,
            with_past=with_past,
            keep_hooks=keep_hooks,
            self_contained=self_contained,
            layout=layout,
            flags=sorted(self._flags),
        )

    @property
    def sessions(self) -> list[Plan]:
        """The kinds of graph that have an open session, least recently used first. At most seven stay open."""
        return self._engine.open_sessions

    def _resolved(self, items: Sequence[Intervention], strict: bool) -> tuple[Intervention, ...]:
        """The interventions under the hook points' own names, checked against the model."""
        entries, config = self._engine.hooks(self._plan()), self._engine.manifest.config
        names = self._engine.names(self._plan())
        resolved = []
        for item in items:
            (name,) = select(names, item.hook, config.n_layers)
            resolved.append(item.at(name, strict))
        sizes = axis_sizes(config)
        for hook, some in _by_hook(resolved).items():
            gate.check(some, entries[hook], sizes)
        return tuple(resolved)

    def _edits(self, plan: Plan, window: Window) -> tuple[Plan, Edits]:
        """A run's plan with the gates of the standing interventions, and their arrays for this run."""
        items = tuple(item for model, some in self._standing.get() if model == id(self) for item in some)
        if not items:
            return plan, {}
        return self._composed_before.of(items, (plan, window), lambda: self._composed(items, plan, window))

    def _composed(self, items: Sequence[Intervention], plan: Plan, window: Window) -> tuple[Plan, Edits]:
        entries, passed = self._engine.hooks(plan), set(self._engine.names(plan))
        sizes = axis_sizes(self._engine.manifest.config)
        by_hook = _by_hook(items)
        for hook in by_hook:
            if hook not in passed:
                raise InputError(
                    f"the intervention at {hook!r} would change nothing: this run does not pass it. Its flag was switched "
                    "off, or start_at_layer or stop_at_layer leaves it out."
                )
        edits = {hook: gate.compose(some, entries[hook], sizes, window) for hook, some in by_hook.items()}
        wanted = {hook: gate.kinds(some) for hook, some in by_hook.items()}
        return replace(plan, gates=self._engine.gates(wanted, plan)), edits


class _Remembered(Generic[Result]):
    """What was made of some interventions and a key, of the last few asked for: a loop asks for the same again and again.

    What is large is not kept: ``size`` tells the bytes of a result beyond those of the interventions.
    """

    def __init__(self, size: Callable[[Result], int]) -> None:
        self._size = size
        self._entries: OrderedDict[Any, tuple[Sequence[Intervention], Result]] = OrderedDict()

    def of(self, items: Sequence[Intervention], key: Any, make: Callable[[], Result]) -> Result:
        """What ``make`` gave for these very items and an equal key, called if that is not remembered."""
        entry = (tuple(map(id, items)), key)
        found = self._entries.get(entry)
        if found is not None:
            return found[1]
        result = make()
        if sum(item.array.nbytes for item in items) + self._size(result) <= _KEPT:
            self._entries[entry] = (items, result)  # the items too: while they live, no other has their ids
            while len(self._entries) > _FEW:
                self._entries.popitem(last=False)
        return result


def _by_hook(items: Iterable[Intervention]) -> dict[str, list[Intervention]]:
    found: dict[str, list[Intervention]] = {}
    for item in items:
        found.setdefault(item.hook, []).append(item)
    return found
