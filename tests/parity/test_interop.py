"""onnx-graphsurgeon edits a hooked graph and comes back with hooks, metadata and weights intact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest

import graphlens
from graphlens import surgery
from graphlens.errors import ModelFileError


def test_a_round_trip_changes_nothing(odd_hooked: Path, tmp_path: Path) -> None:
    model = surgery.load(odd_hooked)
    back = surgery.from_graphsurgeon(surgery.to_graphsurgeon(model), model)
    assert surgery.read_manifest(back) == surgery.read_manifest(model)
    assert [v.name for v in back.graph.outputs] == [v.name for v in model.graph.outputs]
    assert {v.name for v in back.graph.inputs} == {v.name for v in model.graph.inputs}
    folder = surgery.save(back, tmp_path / "back").parent
    tokens = np.random.default_rng(0).integers(0, 101, (2, 7))
    mask = np.asarray([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    one, two = (graphlens.HookedTransformer.from_onnx(f) for f in (odd_hooked, folder))
    logits, cache = one.run_with_cache(tokens, attention_mask=mask)
    other_logits, other_cache = two.run_with_cache(tokens, attention_mask=mask)
    np.testing.assert_array_equal(logits, other_logits)
    for name in cache:
        np.testing.assert_array_equal(cache[name], other_cache[name])


def test_an_edit_made_there_is_the_hooks_edit_here(odd_hooked: Path, tmp_path: Path) -> None:
    model = surgery.load(odd_hooked)
    graph = surgery.to_graphsurgeon(model)
    z = graph.tensors()["blocks.1.attn.hook_z"]
    consumers = list(z.outputs)
    halved = gs.Variable("halved", dtype=np.float32)
    graph.nodes.append(
        gs.Node("Mul", "halve", inputs=[z, gs.Constant("half", np.asarray(0.5, np.float32))], outputs=[halved])
    )
    for node in consumers:
        node.inputs = [halved if tensor is z else tensor for tensor in node.inputs]
    folder = surgery.save(surgery.from_graphsurgeon(graph.toposort(), model), tmp_path / "halved").parent
    tokens = np.random.default_rng(0).integers(0, 101, (2, 7))
    expected = graphlens.HookedTransformer.from_onnx(odd_hooked).run_with_hooks(
        tokens, fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: z * np.float32(0.5))]
    )
    np.testing.assert_array_equal(graphlens.HookedTransformer.from_onnx(folder)(tokens), expected)


def test_losing_a_hook_point_is_an_error(odd_hooked: Path) -> None:
    model = surgery.load(odd_hooked)
    graph = surgery.to_graphsurgeon(model)
    graph.tensors()["blocks.1.attn.hook_z"].name = "renamed"
    with pytest.raises(ModelFileError, match=r"lost 1 hook points, 'blocks\.1\.attn\.hook_z'"):
        surgery.from_graphsurgeon(graph, model)
