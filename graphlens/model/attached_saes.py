"""Which SAEs a model runs with: those that were added to it, and those of the ``with`` blocks of each thread."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Self

from graphlens.edits.spliced_sae import SplicedSae
from graphlens.model.per_thread import Block, PerThread

# Held while the SAEs of a model change, which several threads may do.
_changing = threading.RLock()


class AttachedSaes:
    """The SAEs of one model, by the hook point that each reads. A copy has those that are there in this thread, as added.

    Args:
        added: Those that are there for every thread.
    """

    def __init__(self, added: Mapping[str, SplicedSae] | None = None) -> None:
        self._added: Mapping[str, SplicedSae] = added or {}
        self._blocks: PerThread[tuple[SplicedSae, ...]] = PerThread(())

    def __reduce__(self) -> tuple[type[Self], tuple[Mapping[str, SplicedSae]]]:
        return type(self), (self.by_hook,)

    @property
    def by_hook(self) -> dict[str, SplicedSae]:
        """The SAEs that are there in this thread, by the hook point that each reads: those of inner blocks before others."""
        return {**self._added, **{one.hook: one for one in self._blocks.get()}}

    @property
    def now(self) -> tuple[SplicedSae, ...]:
        """The same in an order of their own, so that equal sets of SAEs make equal plans."""
        if not (self._added or self._blocks.get()):  # every run asks
            return ()
        return tuple(sorted(self.by_hook.values(), key=lambda one: (one.writes, one.hook)))

    def with_others(self, saes: Sequence[SplicedSae]) -> list[SplicedSae]:
        """What would be there with others besides; each takes the place of one that reads the same hook point."""
        return list({**self.by_hook, **{one.hook: one for one in saes}}.values())

    def add(self, saes: Sequence[SplicedSae]) -> None:
        """Adds SAEs for every thread, until they are removed."""
        with _changing:
            self._added = {**self._added, **{one.hook: one for one in saes}}
        blocks = self._blocks.get()
        if blocks:  # what is added inside a block counts from now on there too
            hooks = {one.hook for one in saes}
            self._blocks.set(tuple(one for one in blocks if one.hook not in hooks))

    def remove(self, hooks: Collection[str]) -> None:
        """Removes the SAEs that read some hook points: those that were added, and those of this thread's blocks."""
        with _changing:
            self._added = {hook: one for hook, one in self._added.items() if hook not in hooks}
        self._blocks.set(tuple(one for one in self._blocks.get() if one.hook not in hooks))

    def during(self, saes: Sequence[SplicedSae]) -> Block[None]:
        """Adds SAEs for the length of a ``with`` block, in this thread."""
        return Block(self._blocks, lambda around: (*around, *saes))
