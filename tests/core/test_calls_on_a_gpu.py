"""Python hooks on a GPU: which hook points of the graph can call, and that such graphs compute the same, tried on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from graphlens import HookedTransformer
from graphlens.engine.graphs import Firing
from graphlens.engine.plan import Plan
from graphlens.engine.python_calls import calling
from graphlens.file.names import all_names
from graphlens.runtime.providers import CPU, CUDA
from graphlens.surgery import load, with_python_gates
from graphlens.surgery.python_gates import RUN_INPUT, gate_input

GPU = [CUDA, CPU]
Z, K = "blocks.1.attn.hook_z", "blocks.0.attn.hook_k"


def firings_of(model: HookedTransformer) -> dict[str, list[Firing]]:
    """The one firing of each hook point."""
    hooks = model.runner.engine.hooks(Plan())
    return {name: [Firing(name, place, entry)] for place, (name, entry) in enumerate(hooks.items())}


def test_on_the_cpu_every_hook_point_can_call(tiny: HookedTransformer) -> None:
    firings = firings_of(tiny)
    assert calling(Plan(bare=True), firings, [Z], [CPU]) == Plan(bare=True, python=True)


def test_on_a_gpu_hook_points_of_the_same_kind_can_call(tiny: HookedTransformer) -> None:
    firings = firings_of(tiny)
    plan = calling(Plan(), firings, [Z, K], GPU)
    every = [[f"blocks.{layer}.attn.hook_k", f"blocks.{layer}.attn.hook_z"] for layer in range(tiny.cfg.n_layers)]
    assert plan == Plan(python=True, called=tuple(name for block in every for name in block))
    # A loop over layers keeps its session.
    assert calling(Plan(), firings, ["blocks.0.attn.hook_z", "blocks.2.attn.hook_k"], GPU) == plan


def test_on_a_gpu_very_many_hook_points_call_without_gates(tiny: HookedTransformer) -> None:
    entry = next(iter(tiny.runner.engine.hooks(Plan()).values()))
    firings = {name: [Firing(name, place, entry)] for place, name in enumerate(all_names(101))}
    two = [f"blocks.7.{tail}" for tail in ("attn.hook_z", "hook_mlp_out")]
    assert not calling(Plan(), firings, ["hook_embed"], GPU).always
    for callbacks in (two, two[:1], list(firings)):
        plan = calling(Plan(), firings, callbacks[::-1], GPU)
        assert plan.python
        assert plan.always
        assert plan.called == tuple(callbacks)


@pytest.mark.parametrize("always", [False, True])
def test_such_a_graph_calls_at_the_same_places_in_the_same_order(
    tiny: HookedTransformer, tokens: np.ndarray, always: bool
) -> None:
    engine = tiny.runner.engine
    names = [name for name in tiny.hook_dict if name.endswith(("hook_k", "hook_q", "hook_v", "hook_scale", "hook_z"))]
    seen: list[tuple[str, np.ndarray]] = []

    def look(name: str, activation: np.ndarray) -> np.ndarray:
        seen.append((name, activation.copy()))
        return activation * 0.5 if name == Z else activation

    callbacks: dict[str, Callable[[np.ndarray], np.ndarray]] = {name: partial(look, name) for name in names}
    feeds = {"input_ids": tokens}
    right = engine.run(feeds, [Z], callbacks)
    expected, seen = seen, []
    found = engine.run(feeds, [Z], callbacks, plan=Plan(python=True, called=tuple(names), always=always))
    assert [name for name, _ in seen] == [name for name, _ in expected] == names
    for (_, one), (_, other) in zip(seen, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(found.output, right.output)
    np.testing.assert_array_equal(found.values[Z], right.values[Z])
    assert np.abs(right.output - engine.run(feeds, []).output).max() > 1e-3


def test_without_gates_the_graph_has_no_if_and_no_gate_to_feed(tiny: HookedTransformer) -> None:
    graph = with_python_gates(load(tiny.runner.engine.folder), [K, Z], always=True).graph
    assert "If" not in {node.op_type for node in graph}
    inputs = {value.name for value in graph.inputs}
    assert RUN_INPUT in inputs
    assert not inputs & {gate_input(K), gate_input(Z)}
    assert [node.attributes["index"].as_int() for node in graph if "index" in node.attributes] == sorted(
        node.attributes["index"].as_int() for node in graph if "index" in node.attributes
    )
