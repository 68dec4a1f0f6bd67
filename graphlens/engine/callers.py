"""Which hook points of a graph may call Python: all, or those alone that run after run calls."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from graphlens.engine.plan import Plan, hook_point

if TYPE_CHECKING:
    from graphlens.engine.graphs import Graphs

# Seconds, as of a server's core: what a hook point that may call Python costs a run that does not call it, and what opening a
# session costs, for each byte of its weights (packed before) and besides. They only say how soon a set gets its graph.
_IDLE, _PER_BYTE, _OPENING = 12e-6, 0.5e-9, 0.02
_ALONE, _COUNTED = 4, 64  # how many sets of hook points have a session of their own; of how many the runs are counted


@dataclass
class _Set:
    """A set of hook points that call.

    Attributes:
        shared: The plan of a graph that serves other sets too.
        alone: The plan of the graph in which this set alone may call.
        idle: Seconds that a run with ``shared`` loses.
        lost: Seconds that such runs lost so far.
    """

    shared: Plan
    alone: Plan
    idle: float
    lost: float = 0.0


class Callers:
    """Chooses, for runs with Python hooks, the graph whose hook points may call.

    A graph for any hook point serves every set of them; each hook point that may call and does not takes some microseconds,
    and copies its activation. So a set gets a graph of its own once its runs have lost as much time as opening that takes.
    The gates that go do nothing, so its numbers are the same to the bit. Safe to use from several threads.

    Args:
        graphs: The graphs of a model.
        size: The bytes of its weights.
    """

    def __init__(self, graphs: Graphs, size: int) -> None:
        self._graphs, self._opening = graphs, _OPENING + size * _PER_BYTE
        self._sets: OrderedDict[tuple[Plan, bool, tuple[str, ...]], _Set] = OrderedDict()
        self._lock = threading.Lock()

    def chosen(self, plan: Plan, bare: bool, called: Iterable[str]) -> Plan:
        """The plan for a run that calls Python at some hook points.

        Args:
            plan: The plan of a run that does not.
            bare: Whether hook points are no outputs of the graph: see ``Plan``.
            called: The hook points. All their firings call.
        """
        key = (plan, bare, tuple(called))
        with self._lock:
            found = self._sets.get(key)
            if found is None:
                found = self._sets[plan.kept, bare, key[2]] = self._set(*key)
                if len(self._sets) > _COUNTED:
                    self._sets.popitem(last=False)
            self._sets.move_to_end(key)
            if found.lost < self._opening:
                chosen, found.lost = found.shared, found.lost + found.idle
                if found.lost >= self._opening:
                    own = [other for other in self._sets.values() if other.lost >= self._opening]
                    for other in own[:-_ALONE]:  # those used longest ago begin anew
                        other.lost = 0.0
            else:
                chosen = found.alone
        return replace(chosen, saes=plan.saes) if plan.saes else chosen

    def _set(self, plan: Plan, bare: bool, called: tuple[str, ...]) -> _Set:
        """What is known of a set before its first run."""
        plan = replace(plan, python=True, bare=bare)
        firings = [one.name for some in self._graphs.firings(plan.ungated).values() for one in some]
        alone = tuple(name for name in firings if hook_point(name) in called)
        plan = plan.kept  # the SAEs are those of the run that asks
        return _Set(plan, replace(plan, calls=alone), _IDLE * (len(firings) - len(alone)))
