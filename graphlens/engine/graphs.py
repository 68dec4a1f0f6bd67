"""The graphs of plans: each is made by one step of surgery from the graph of a smaller plan, and kept for the next."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import onnx_ir as ir

from graphlens import surgery
from graphlens.engine.plan import Plan, hook_point
from graphlens.file.manifest import HookEntry
from graphlens.file.names import UNEMBEDDED
from graphlens.file.sae_names import OUTPUT

_AFTER_BODY = ("unembed.hook_out", f"{UNEMBEDDED}.hook_sae")  # what is changed there is changed after the body
_NOTHING = Plan()  # asks for the file's own graph


@dataclass(frozen=True)
class Step:
    """One step of surgery on the way to the graph of a plan.

    Attributes:
        fields: The fields of Plan that ask for the step. It is taken where one of them is not at its default.
        make: The surgery: (the graph of the plan without these fields, the plan) -> the graph of the plan.
    """

    fields: tuple[str, ...]
    make: Callable[[ir.Model, Plan], ir.Model]

    def is_asked_by(self, plan: Plan) -> bool:
        """True if the plan's graph needs this step."""
        return any(getattr(plan, field) != getattr(_NOTHING, field) for field in self.fields)

    def undone(self, plan: Plan) -> Plan:
        """The plan whose graph this step starts from."""
        return replace(plan, **{field: getattr(_NOTHING, field) for field in self.fields})


# In the order in which they are taken. What costs the same for every kind of gate comes before the gates, so that its
# result is kept and used for all of them.
STEPS = (
    Step(("flags",), lambda graph, plan: surgery.with_flagged(graph, plan.flags)),
    Step(("saes",), lambda graph, plan: surgery.with_saes(graph, plan.saes)),
    Step(("start", "stop"), lambda graph, plan: surgery.segment(graph, plan.start, plan.stop)),
    Step(("past",), lambda graph, plan: surgery.with_past(graph)),
    Step(("part",), lambda graph, plan: surgery.part_alone(graph, plan.start or 0, plan.part)),
    Step(("bare",), lambda graph, plan: surgery.keep_results(graph)),
    Step(("body",), lambda graph, plan: surgery.without_logits(graph)),
    Step(("gates",), lambda graph, plan: surgery.with_gates(graph, dict(plan.gates))),
    Step(
        ("gradients", "seed", "of", "held"),
        lambda graph, plan: surgery.differentiate(graph, plan.gradients, plan.of, plan.seed, plan.held),
    ),
    Step(("python", "calls"), lambda graph, plan: surgery.with_python_gates(graph, plan.calls or None)),
    Step(("reads",), lambda graph, plan: surgery.prune(graph, plan.reads)),
)


class Firing(NamedTuple):
    """One firing of a hook point in a graph.

    Attributes:
        name: Its name in the graph's hook map.
        place: Its place there, counted from 0.
        entry: What the hook map says of it.
    """

    name: str
    place: int
    entry: HookEntry


class Graphs:
    """The graphs made of one file, with the hook map of each. Safe to use from several threads.

    Args:
        model: The file's own graph.
        hooks: Its hook map.
        kept: How many graphs are kept, 1 or more; the one used longest ago goes first.

    Attributes:
        kept: See above. It may be changed.
    """

    def __init__(self, model: ir.Model, hooks: Mapping[str, HookEntry], kept: int) -> None:
        self._model, self._plain_hooks, self.kept = model, hooks, kept
        self._graphs: OrderedDict[Plan, ir.Model] = OrderedDict()
        self._hooks: dict[Plan, Mapping[str, HookEntry]] = {_NOTHING: hooks}
        self._rounded: dict[Plan, Mapping[str, int]] = {}
        self._firings: dict[Plan, Mapping[str, Sequence[Firing]]] = {}
        self._lock = threading.RLock()

    def graph(self, plan: Plan) -> ir.Model:
        """The graph of a plan. It is kept, so whoever gets it must not change it.

        Args:
            plan: The plan.
        """
        with self._lock:
            if plan == _NOTHING:
                return self._model
            if plan not in self._graphs:
                last = next(step for step in reversed(STEPS) if step.is_asked_by(plan))
                self._graphs[plan] = last.make(self.graph(last.undone(plan)), plan)
                while len(self._graphs) > self.kept:
                    self._forget(next(iter(self._graphs)))
            self._graphs.move_to_end(plan)
            return self._graphs[plan]

    def _forget(self, plan: Plan) -> None:
        """Drops a graph and what is known of it."""
        del self._graphs[plan]
        whole = replace(plan, body=False)  # its hook map was read from the graph that ends before the unembedding
        if whole != _NOTHING:
            self._hooks.pop(whole, None)
        self._firings.pop(plan, None)

    def hooks(self, plan: Plan) -> Mapping[str, HookEntry]:
        """The hook map of a plan's graph: name -> entry, in firing order.

        Args:
            plan: The plan.
        """
        with self._lock:
            found = self._hooks.get(plan)
            if found is None:
                found = self._hooks[plan] = self._read_hooks(plan)
            return found

    def _read_hooks(self, plan: Plan) -> Mapping[str, HookEntry]:
        """The hook map from a graph's manifest, without making the graph's unembedding where that is the plain one."""
        plain_end = self.ends_plainly(plan)
        hooks = surgery.read_manifest(self.graph(replace(plan, body=plain_end))).hooks
        if not plain_end:
            return hooks
        after_body = {name: entry for name, entry in self.hooks(plan.ungated).items() if name not in hooks}
        return {**hooks, **after_body}

    def straight_through(self, plan: Plan) -> Mapping[str, int]:
        """What the gradients of a plan's graph pass as if it did not round: see ``surgery.straight_through``.

        Args:
            plan: The plan.
        """
        if not plan.gradients:
            return {}
        with self._lock:
            if plan not in self._rounded:
                self._rounded[plan.kept] = surgery.straight_through(self.graph(plan))
            return self._rounded[plan]

    def firings(self, plan: Plan) -> Mapping[str, Sequence[Firing]]:
        """The firings of each hook point in a plan's graph.

        Args:
            plan: The plan.

        Returns:
            Hook point -> its firings, both in firing order.
        """
        with self._lock:
            known = self._firings.get(plan)
            if known is not None:
                return known
            found: dict[str, list[Firing]] = {}
            for place, (name, entry) in enumerate(self.hooks(plan).items()):
                found.setdefault(hook_point(name), []).append(Firing(name, place, entry))
            self._firings[plan] = found
            return found

    def ends_plainly(self, plan: Plan) -> bool:
        """True if a plan's graph has gates and ends with the unembedding exactly as the file's own graph does.

        Args:
            plan: The plan.
        """
        return bool(plan.gates) and self.ends_alike(plan)

    def ends_alike(self, plan: Plan) -> bool:
        """True if a plan's graph ends with the unembedding exactly as the file's own graph does.

        Args:
            plan: The plan.
        """
        whole = (
            plan.stop is None and not (plan.gradients or plan.python or plan.reads) and UNEMBEDDED in self._plain_hooks
        )
        hooks = [*(name for name, _ in plan.gates), *(f"{one.writes}.{OUTPUT}" for one in plan.saes)]
        return whole and not any(name.startswith(_AFTER_BODY) for name in hooks)
