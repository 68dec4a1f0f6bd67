"""What users import stays importable: the names that each public door had at commit 7f73819, when the house was rebuilt."""

from __future__ import annotations

import importlib
import inspect

import pytest

import graphlens
from graphlens import HookedTransformer, KeyValueCache, patching
from graphlens.metrics import LogitDiff

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
# What an object of each kind had then, methods and attributes.
MEMBERS = {
    "HookedTransformer": """
        OV QK W_E W_E_pos W_K W_O W_Q W_U W_V W_gate W_in W_out W_pos accumulated_bias add_hook add_perma_hook
        all_composition_scores all_head_labels b_K b_O b_Q b_U b_V b_in b_out bake blocks cfg clear_contexts
        dtype embed forward from_onnx from_pretrained from_pretrained_no_processing generate generate_stream
        get_token_position gradients hook_dict hook_embed hook_points hook_pos_embed hook_tokens hooks intervene
        ln_final loss_fn n_params_total named_parameters parameters pos_embed providers reset_hooks
        run_with_cache run_with_hooks run_with_interventions sessions set_tokenizer set_use_attn_in
        set_use_attn_result set_use_hook_mlp_in set_use_hook_tokens set_use_split_qkv_input state_dict
        test_prompt to_single_str_token to_single_token to_str_tokens to_string to_tokens tokenizer
        tokens_to_residual_directions unembed weights
    """,
    "ActivationCache": """
        accumulated_resid apply_ln_to_stack apply_slice_to_batch_dim cache_dict compute_head_results
        decompose_resid get get_full_resid_decomposition get_neuron_results has_batch_dim has_embed
        has_pos_embed items keys logit_attrs logit_lens model remove_batch_dim stack_activation
        stack_head_results stack_neuron_results to values
    """,
    "SweepResult": """
        against axes baselines labels load metadata plot save sel shape to_dataframe top values
    """,
    "HookPoint": """
        add_hook add_perma_hook bwd_hooks clear_context ctx fwd_hooks has_hooks layer name remove_hooks
    """,
    "KeyValueCache": """
        batch_size check config extend feeds freeze frozen init_cache length mask owner present prompt unfreeze
    """,
    "FactoredMatrix": """
        A AB B BA S T U V Vh collapse_l collapse_r eigenvalues get_corner has_leading_dims ldim make_even mdim
        ndim norm pair rdim shape svd unsqueeze
    """,
}
DOORS = [door for door in NAMES if door != "graphlens.torch"]


@pytest.mark.parametrize("door", DOORS)
def test_every_name_of_before_is_there(door: str) -> None:
    module = importlib.import_module(door)
    assert [name for name in NAMES[door].split() if not hasattr(module, name)] == []
    assert set(NAMES[door].split()) <= set(module.__all__) <= set(dir(module))


def test_the_version_is_there() -> None:
    assert graphlens.__version__[0].isdigit()


def test_every_method_and_attribute_of_before_is_there(tiny: HookedTransformer) -> None:
    _, cache = tiny.run_with_cache([[1, 2, 3]])
    clean, site = cache["resid_pre", 1], patching.Site("resid_pre", 1, position=2)
    objects = {
        "HookedTransformer": tiny,
        "ActivationCache": cache,
        "SweepResult": patching.sweep(tiny, [[1, 2, 4]], site, {site.hook: clean}, LogitDiff(3, 4), verbose=False),
        "HookPoint": tiny.hook_dict[site.hook],
        "KeyValueCache": KeyValueCache.init_cache(tiny.cfg, batch_size=1),
        "FactoredMatrix": tiny.QK,
    }
    assert objects.keys() == MEMBERS.keys()
    lost = {kind: set(MEMBERS[kind].split()) - set(dir(item)) for kind, item in objects.items()}
    assert not any(lost.values()), lost


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


def assert_short_line(model: type, limit: int) -> None:
    """A model's classes are few, and its mixins inherit no other."""
    line = [kind for kind in model.__mro__ if kind is not object]
    assert len(line) <= limit
    mixins = [kind for kind in line if kind.__name__ not in ("Generic", "HookedTransformer")]
    assert len(mixins) >= 2
    for mixin in mixins:
        assert [base.__name__ for base in mixin.__bases__] == ["Generic"], mixin


def test_the_model_is_a_short_line_of_classes() -> None:
    assert_short_line(HookedTransformer, 7)
