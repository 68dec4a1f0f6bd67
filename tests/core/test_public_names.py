"""What users import stays importable: the names that each public door had at commit 7f73819, when the house was rebuilt."""

from __future__ import annotations

import importlib
import inspect

import pytest

import graphlens
from graphlens import patching

# graphlens.torch is looked at in tests/parity/test_torch_face.py, where torch is.
NAMES = {
    "graphlens": """
        Ablate ActivationCache ExportError FactoredMatrix GraphlensError HookResultError HookedTransformer
        HookedTransformerKeyValueCache InputError KeyValueCache ModelFileError Patch RuntimeUnavailable
        Scale Steer TransformerLensKeyValueCache UnknownHookPoint VerificationError bake_model
        embedded_model export_model get_act_name process_weights write_adapter write_drivable
    """,
    "graphlens.torch": """
        ActivationCache FactoredMatrix HookedTransformer HookedTransformerKeyValueCache KeyValueCache
        TransformerLensKeyValueCache
    """,
    "graphlens.patching": """
        Cache Mean Noise Site Sites SweepResult Zero act_patch_sites generic_activation_patch
        get_act_patch_attn_head_all_pos_every get_act_patch_attn_head_by_pos_every
        get_act_patch_attn_head_k_all_pos get_act_patch_attn_head_k_by_pos
        get_act_patch_attn_head_out_all_pos get_act_patch_attn_head_out_by_pos
        get_act_patch_attn_head_pattern_all_pos get_act_patch_attn_head_pattern_by_pos
        get_act_patch_attn_head_pattern_dest_src_pos get_act_patch_attn_head_q_all_pos
        get_act_patch_attn_head_q_by_pos get_act_patch_attn_head_v_all_pos get_act_patch_attn_head_v_by_pos
        get_act_patch_attn_out get_act_patch_block_every get_act_patch_mlp_out get_act_patch_resid_mid
        get_act_patch_resid_pre grid layer_head_dest_src_pos_pattern_patch_setter
        layer_head_pattern_patch_setter layer_head_pos_pattern_patch_setter layer_head_vector_patch_setter
        layer_pos_head_vector_patch_setter layer_pos_patch_setter path_patch sweep
    """,
    "graphlens.metrics": """
        CrossEntropy KLDivergence LogitDiff Metric Needs Probability normalised
    """,
    "graphlens.attribution": """
        Comparison attribution_patch circuit compare_with_sweep direct_logit_attribution edge_attribution
        faithfulness
    """,
    "graphlens.interventions": """
        Ablate FORMAT FORMAT_VERSION Intervention KINDS Patch Scale Steer checked from_json hooks_of load
        save to_json
    """,
    "graphlens.utils": """
        FactoredMatrix Slice composition_scores detect_head get_act_name induction_loss lm_accuracy
        lm_cross_entropy_loss test_prompt
    """,
    "graphlens.deploy": """
        EDITED_FILE GATES_KEY LAYOUTS bake_model write_adapter write_drivable write_stripped
    """,
    "graphlens.surgery": """
        CheckReport bake check check_graph cut differentiate ensure_hooks_resolve expose fingerprint
        first_layers from_graphsurgeon gate_input gradient_output keep_results load load_plain
        process_weights prune read_manifest save segment splice strip to_graphsurgeon with_flagged
        with_gates with_past with_python_gates without_gates without_logits
    """,
}
DOORS = [door for door in NAMES if door != "graphlens.torch"]


@pytest.mark.parametrize("door", DOORS)
def test_every_name_of_before_is_there(door: str) -> None:
    module = importlib.import_module(door)
    assert [name for name in NAMES[door].split() if not hasattr(module, name)] == []
    listed = set(getattr(module, "__all__", ()))
    assert listed <= set(dir(module))


@pytest.mark.parametrize(
    "name", [name for name in NAMES["graphlens.patching"].split() if name.startswith("get_act_patch")]
)
def test_patching_functions_are_functions_with_help(name: str) -> None:
    function = getattr(patching, name)
    assert inspect.isfunction(function)
    assert function.__name__ == name
    taken = list(inspect.signature(function).parameters)
    assert taken[:3] == ["model", "corrupted_tokens", "clean_cache"]
    assert taken[3] in ("patching_metric", "metric")
    assert len((function.__doc__ or "").strip()) > 40


def test_the_model_is_a_short_line_of_classes() -> None:
    line = [kind for kind in graphlens.HookedTransformer.__mro__ if kind is not object]
    assert len(line) <= 7
    mixins = [kind for kind in line[1:] if kind.__name__ != "Generic"]
    for mixin in mixins:
        assert [base.__name__ for base in mixin.__bases__] == ["Generic"], mixin
