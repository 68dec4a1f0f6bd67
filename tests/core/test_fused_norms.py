"""Norms as one operator: the same numbers as their steps, and where the steps stay."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from graphlens import HookedTransformer, surgery
from graphlens.engine.plan import Plan
from graphlens.file.io_names import LOGITS
from graphlens.runtime.sessions import open_session
from graphlens.surgery.fused_norms import with_fused_norms


def _graph(model: HookedTransformer) -> ir.Model:
    return surgery.load(model.runner.engine.path)


def _count(model: ir.Model) -> int:
    return Counter(node.op_type for node in model.graph)["LayerNormalization"]


def test_every_hook_point_is_as_by_the_steps(tiny: HookedTransformer) -> None:
    graph, folder = _graph(tiny), tiny.runner.engine.folder
    fused = with_fused_norms(graph)
    assert _count(fused) == 2 * tiny.cfg.n_layers + 1
    assert _count(graph) == 0, "the given graph was changed"
    assert surgery.read_manifest(fused) == surgery.read_manifest(graph)
    ids = np.random.default_rng(0).integers(0, tiny.cfg.d_vocab, (3, 11))
    one, other = (open_session(ir.to_proto(each).SerializeToString(), "cpu", folder) for each in (graph, fused))
    assert one.outputs == other.outputs
    names = one.outputs
    for name, wanted, found in zip(
        names, one.run(names, {"input_ids": ids}), other.run(names, {"input_ids": ids}), strict=True
    ):
        seen = np.isfinite(wanted)
        assert np.array_equal(seen, np.isfinite(found)), name
        assert np.abs(wanted[seen] - found[seen]).max() <= 3e-6 * max(1, np.abs(wanted[seen]).max()), name


@pytest.mark.parametrize("tail", ["hook_scale", "hook_normalized"])
def test_a_gate_at_a_norm_changes_what_comes_after(tiny: HookedTransformer, tail: str) -> None:
    hook = f"blocks.1.ln2.{tail}"
    gated = surgery.with_gates(_graph(tiny), {hook: ("scale",)})
    fused, folder = with_fused_norms(gated), tiny.runner.engine.folder
    inside = tail == "hook_scale"  # between the steps, which then stay
    assert _count(fused) == 2 * tiny.cfg.n_layers + (0 if inside else 1)
    ids = np.random.default_rng(0).integers(0, tiny.cfg.d_vocab, (2, 5))
    feeds = {"input_ids": ids, f"{hook}/scale": np.full((1, 1, 1), 0.5, np.float32)}
    wanted, found = (
        open_session(ir.to_proto(each).SerializeToString(), "cpu", folder).run([LOGITS], feeds)[0]
        for each in (gated, fused)
    )
    assert np.abs(wanted - found).max() <= 3e-6 * np.abs(wanted).max()
    assert np.abs(wanted - tiny(ids)).max() > 1e-3


def test_steps_that_gradients_or_outputs_read_stay(tiny: HookedTransformer) -> None:
    graph = _graph(tiny)
    last = 2 * tiny.cfg.n_layers + 1
    differentiated = surgery.differentiate(graph, ["blocks.0.hook_resid_pre"])
    assert _count(with_fused_norms(differentiated)) == 0
    centred = next(node for node in graph.graph if node.op_type == "Div").inputs[0]
    assert centred is not None
    assert _count(with_fused_norms(surgery.expose(_unhooked(graph), [str(centred.name)]))) == last - 1


def _unhooked(model: ir.Model) -> ir.Model:
    copy = model.clone()
    copy.metadata_props.clear()
    return copy


def test_what_nobody_reads_is_left_to_onnx_runtime(tiny: HookedTransformer) -> None:
    bare = surgery.keep_results(_graph(tiny))
    assert with_fused_norms(bare) is bare


def test_root_mean_square_norms_have_no_such_operator(tiny: HookedTransformer) -> None:
    llama = HookedTransformer.from_pretrained_no_processing("tiny-llama")
    graph = _graph(llama)
    assert with_fused_norms(graph) is graph


def test_reading_and_not_reading_give_the_same_bits(tiny: HookedTransformer) -> None:
    ids = np.random.default_rng(0).integers(0, tiny.cfg.d_vocab, (2, 9))
    logits, cache = tiny.run_with_cache(ids)
    assert np.array_equal(tiny(ids), logits)
    seen = {}
    tiny.run_with_hooks(ids, fwd_hooks=[("blocks.1.hook_mlp_out", lambda value, hook: seen.update(it=value.copy()))])
    assert np.array_equal(seen["it"], cache["blocks.1.hook_mlp_out"])
    assert Plan() in tiny.runner.engine.open_sessions
