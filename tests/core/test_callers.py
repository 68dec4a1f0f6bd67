"""Which hook points of a graph may call Python, and that it makes no difference to numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from graphlens import HookedTransformer, surgery
from graphlens.engine.callers import Callers
from graphlens.engine.graphs import Graphs
from graphlens.engine.plan import Plan

Z = "blocks.1.attn.hook_z"
Array = npt.NDArray[np.float32]


def _halved(value: Array, hook: object) -> Array:
    return value * np.float32(0.5)


def _callers(model: HookedTransformer, size: int) -> Callers:
    graph = surgery.load(model.runner.engine.path)
    return Callers(Graphs(graph, surgery.read_manifest(graph).hooks, kept=4), size)


def _python_plans(model: HookedTransformer) -> list[Plan]:
    return [plan for plan in model.runner.engine.open_sessions if plan.python]


def test_a_set_that_often_calls_gets_a_graph_of_its_own_and_the_same_bits(tiny_copy: Path) -> None:
    model = HookedTransformer.from_onnx(tiny_copy, "cpu")
    ids = np.random.default_rng(0).integers(0, model.cfg.d_vocab, (2, 7))

    def run() -> Array:
        logits: Array = model.run_with_hooks(ids, fwd_hooks=[(Z, _halved)])
        return logits

    first = run()
    assert [plan.calls for plan in _python_plans(model)] == [()]
    later = [run() for _ in range(200)]
    assert [plan.calls for plan in _python_plans(model)][1:] == [(Z,)]
    assert all(np.array_equal(first, logits) for logits in later)


def test_no_more_than_four_sets_have_a_graph_of_their_own(tiny: HookedTransformer) -> None:
    callers = _callers(tiny, 0)
    names = list(tiny.hook_dict)[:6]
    for name in names:
        while callers.chosen(Plan(), False, [name]).calls != (name,):
            pass
    own = [callers.chosen(Plan(), False, [name]).calls == (name,) for name in names]
    assert own == [False] * 2 + [True] * 4


def test_a_cheap_graph_is_opened_sooner(tiny: HookedTransformer) -> None:
    def runs(size: int) -> int:
        callers, count = _callers(tiny, size), 1
        while callers.chosen(Plan(), False, [Z]).calls != (Z,):
            count += 1
        return count

    few, many = runs(0), runs(500_000_000)
    assert 20 < few < many < 100 * few
