"""Python hooks of every family: TransformerLens's order, blocks side by side kept apart, and TransformerLens 4's names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graphlens import HookedTransformer, UnknownHookPoint, surgery
from graphlens.errors import ModelFileError
from graphlens.file.firing import graph_order
from graphlens.surgery.graph import values_by_name, write_manifest
from tests.families.comparing import TOLERANCE, edit_of, prompt, relative
from tests.families.variants import CHOSEN, VARIANTS

TOKENS = prompt(101, 2, 11)
IDS = torch.from_numpy(TOKENS)
BY_LENS = [name for name in CHOSEN if VARIANTS[name].lens is not None]
Model = Callable[[str], HookedTransformer]


@pytest.mark.parametrize("name", BY_LENS)
def test_all_hook_points_at_once(name: str, family_model: Model, family_checkpoint: Callable[[str], Path]) -> None:
    """They fire in TransformerLens's order, and a change at each of one block's gives its logits."""
    from tests.families.lens import lens_of

    model, lens = family_model(name), lens_of(name, family_checkpoint(name))

    def run(either: Any, tokens: Any) -> tuple[list[str], Any]:
        fired: list[str] = []

        def hook(activation: Any, hook: Any) -> Any:
            fired.append(hook.name)
            if not hook.name.startswith("blocks.1.") or hook.name.endswith("expert_indices"):
                return None
            if isinstance(activation, torch.Tensor):
                return torch.from_numpy(edit_of(hook.name, activation.numpy()))
            return edit_of(hook.name, activation)

        logits = either.run_with_hooks(tokens, fwd_hooks=[(lambda name: ".experts." not in name, hook)])
        return list(dict.fromkeys(fired)), logits  # there ln1 runs once each for queries, keys and values

    (ours, found), (theirs, expected) = run(model, TOKENS), run(lens, IDS)
    assert ours == theirs
    assert ours == list(model.hook_dict)
    assert relative(found, expected, name) <= TOLERANCE


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize(("norm", "other", "reads"), [("ln1", "ln2", "attn.hook_q"), ("ln2", "ln1", "mlp.hook_pre")])
def test_the_norms_of_blocks_side_by_side_are_apart(
    name: str, norm: str, other: str, reads: str, family_model: Model
) -> None:
    """Also where the checkpoint has one norm for both."""
    model = family_model(name)
    if not model.cfg.parallel_attn_mlp:
        pytest.skip("one after the other")
    edited = f"blocks.1.{norm}.hook_normalized"
    apart = [f"blocks.1.{other}.{end}" for end in ("hook_scale", "hook_normalized")]
    left = f"blocks.1.{'mlp.hook_pre' if norm == 'ln1' else 'attn.hook_z'}"
    _, plain = model.run_with_cache(TOKENS)
    with model.hooks([(edited, lambda x, hook: edit_of(edited, x))]):
        _, cache = model.run_with_cache(TOKENS)
    for hook in (*apart, left):
        np.testing.assert_array_equal(cache[hook], plain[hook], hook)
    assert np.abs(cache[f"blocks.1.{reads}"] - plain[f"blocks.1.{reads}"]).max() > 1e-2


@pytest.mark.parametrize("name", CHOSEN)
def test_transformerlens_4_names(name: str, family_model: Model) -> None:
    """What TransformerBridge's own aliases of our names lead to; what a post norm reads has no name here."""
    model = family_model(name)
    cfg = model.cfg
    if "blocks.1.mlp.hook_pre" not in model.hook_dict:
        pytest.skip("its MLPs are experts")
    twins = {"hook_in": "hook_resid_pre", "attn.v.hook_out": "attn.hook_v", "mlp.out.hook_in": "mlp.hook_post"}
    twins["mlp.gate.hook_out" if cfg.gated_mlp else "mlp.in.hook_out"] = "mlp.hook_pre"
    if cfg.gated_mlp:
        twins["mlp.in.hook_out"] = "mlp.hook_pre_linear"
    if cfg.use_normalization_before_and_after or cfg.post_norm_only:
        twins |= {"ln1_post.hook_out": "hook_attn_out", "ln2_post.hook_out": "hook_mlp_out"}
        absent = ["attn.hook_out", "mlp.hook_out"]
    elif cfg.post_embedding_ln:  # Bloom's modules add the residual stream themselves
        twins |= {"attn.o.hook_out": "hook_attn_out", "mlp.out.hook_out": "hook_mlp_out"}
        absent = ["attn.hook_out", "mlp.hook_out"]
    else:
        twins |= {"attn.hook_out": "hook_attn_out", "mlp.hook_out": "hook_mlp_out"}
        absent = ["ln1_post.hook_out"]
    if cfg.residual_norms:
        twins |= {"ln1.hook_in": "hook_resid_mid", "ln2.hook_in": "hook_resid_post"}
        twins["hook_out"] = "hook_normalized_resid_post"
    if cfg.post_norm_only:
        twins |= {"mlp.hook_in": "hook_resid_mid", "ln1_post.hook_normalized": "ln1.hook_normalized"}
        absent.append("ln2.hook_in")
    _, cache = model.run_with_cache(TOKENS, names_filter=[f"blocks.1.{alias}" for alias in twins])
    assert set(cache) == {f"blocks.1.{own}" for own in twins.values()}
    for alias, own in twins.items():
        assert cache[f"blocks.1.{alias}"] is cache[f"blocks.1.{own}"]
        assert model.hook_dict[f"blocks.1.{alias}"].name == f"blocks.1.{own}"
    for alias in absent:
        with pytest.raises(UnknownHookPoint):
            model.run_with_cache(TOKENS, names_filter=f"blocks.1.{alias}")


@pytest.mark.parametrize("name", CHOSEN)
def test_a_hook_map_is_in_the_graphs_order(name: str, family_folder: Callable[[str], Path]) -> None:
    graph = surgery.load(family_folder(name))
    manifest, values = surgery.read_manifest(graph), values_by_name(graph)
    carried = {hook: values[entry.value] for hook, entry in manifest.hooks.items()}
    assert graph_order(graph.graph, carried, manifest.config.n_layers) == list(manifest.hooks)


def test_a_hook_map_in_no_order_is_refused(family_folder: Callable[[str], Path]) -> None:
    graph = surgery.load(family_folder("gpt2"))
    manifest = surgery.read_manifest(graph)
    order = list(manifest.hooks)
    late, early = order.index("blocks.1.attn.hook_z"), order.index("blocks.1.hook_resid_pre")
    order.insert(early, order.pop(late))
    write_manifest(graph, replace(manifest, hooks={hook: manifest.hooks[hook] for hook in order}))
    wanted = r"not in the order .* has 'blocks.1.attn.hook_z' before 'blocks.1.hook_resid_pre'"
    with pytest.raises(ModelFileError, match=wanted):
        surgery.with_python_gates(graph)


@pytest.mark.parametrize("tail", ["hook_pre", "hook_pre_linear", "hook_post"])
def test_what_an_mlp_of_experts_has_instead_is_said(tail: str, family_model: Model) -> None:
    with pytest.raises(
        UnknownHookPoint, match=rf"mlp\.{tail}' is not .* its MLPs are several experts; there are mlp\.hook_ex"
    ):
        family_model("mixtral").run_with_cache(TOKENS, names_filter=f"blocks.1.mlp.{tail}")
    with pytest.raises(UnknownHookPoint, match=r"its MLPs have no gate; there are mlp\.hook_pre"):
        family_model("neox").run_with_cache(TOKENS, names_filter="blocks.1.mlp.hook_pre_linear")
