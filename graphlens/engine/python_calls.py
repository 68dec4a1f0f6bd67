"""Which hook points of a graph can call Python, by the execution provider that runs it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from graphlens.engine.plan import Plan
from graphlens.file.names import split_name
from graphlens.runtime.providers import CUDA

if TYPE_CHECKING:
    from graphlens.engine.graphs import Firing

# ONNX Runtime keeps a cuBLAS handle for each ``If`` of a graph on a GPU, and each If costs a run some 25 us there. With a gate at
# every hook point a model of 30 blocks runs out of handles.
_MOST_GATES = 100


def calling(
    plan: Plan, firings: Mapping[str, Sequence[Firing]], callbacks: Collection[str], providers: Sequence[str]
) -> Plan:
    """The plan with what callbacks need.

    On the CPU any hook point can call, behind a gate: one session for all hooks. On a GPU those of the same kinds can, in every
    block, so that a loop over layers keeps its session; or where these are very many, only those with a callback, without gates.

    Args:
        plan: The plan of a run.
        firings: The firings of each hook point in its graph, in firing order.
        callbacks: The hook points that have one.
        providers: The execution providers that were asked for.
    """
    if CUDA not in providers:
        return replace(plan, python=True)
    kinds = {split_name(hook)[1] for hook in callbacks}
    alike = [one.name for hook, some in firings.items() if split_name(hook)[1] in kinds for one in some]
    if len(alike) <= _MOST_GATES:
        return replace(plan, python=True, called=tuple(alike))
    exactly = tuple(one.name for hook, some in firings.items() if hook in callbacks for one in some)
    return replace(plan, python=True, called=exactly, always=True)
