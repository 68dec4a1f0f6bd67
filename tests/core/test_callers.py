"""Which hook points of a graph may call Python, and that it makes no difference to numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

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


def test_a_cache_of_keys_and_values_survives_the_change_of_graphs(tiny_copy: Path) -> None:
    """The prompt's graph and that of each further token change at different moments."""
    model = HookedTransformer.from_onnx(tiny_copy, "cpu")
    prompt = np.random.default_rng(2).integers(0, model.cfg.d_vocab, (2, 9))

    def generated() -> npt.NDArray[np.int64]:
        with model.hooks(fwd_hooks=[(Z, _halved), ("blocks.2.hook_mlp_out", _halved)]):
            tokens: npt.NDArray[np.int64] = model.generate(
                prompt, max_new_tokens=8, do_sample=False, verbose=False, stop_at_eos=False
            )
        return tokens

    first = generated()
    for _ in range(30):
        assert np.array_equal(generated(), first)
    assert sorted(bool(plan.past) for plan in _python_plans(model) if plan.calls)[-1]
    with model.hooks(fwd_hooks=[(Z, _halved), ("blocks.2.hook_mlp_out", _halved)]):
        for length in range(9, 17):  # each token is the likeliest of a whole run
            assert np.array_equal(model(first[:, :length])[:, -1].argmax(-1), first[:, length])


@pytest.mark.parametrize("hook", ["blocks.1.ln1.hook_normalized", "blocks.1.hook_v_input"])
def test_every_firing_calls_in_a_graph_of_its_own(tiny_copy: Path, hook: str) -> None:
    model = HookedTransformer.from_onnx(tiny_copy, "cpu")
    model.set_use_split_qkv_input(True)
    ids = np.random.default_rng(3).integers(0, model.cfg.d_vocab, (2, 5))
    calls: list[int] = []

    def counted(value: Array, hook: object) -> Array:
        calls.append(1)
        return value * np.float32(0.5)

    first = model.run_with_hooks(ids, fwd_hooks=[(hook, counted)])
    each = len(calls)
    assert each == (3 if "ln1" in hook else 1)
    for _ in range(80):
        assert np.array_equal(model.run_with_hooks(ids, fwd_hooks=[(hook, counted)]), first)
    assert len(calls) == 81 * each
    assert any(len(plan.calls) == each for plan in _python_plans(model))
