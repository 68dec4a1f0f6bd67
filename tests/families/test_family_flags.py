"""Hook points behind flags on every family: TransformerLens 3.9's, read and edited; refused where there can be none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graphlens import HookedTransformer
from graphlens.errors import InputError
from graphlens.file.names import in_block
from tests.families.comparing import TOLERANCE, edit_of, edited, prompt, relative
from tests.families.variants import CHOSEN, VARIANTS

Folders = Callable[[str], Path]
Models = Callable[[str], HookedTransformer]
FLAGS = {
    "use_attn_result": ("attn.hook_result",),
    "use_split_qkv_input": ("hook_q_input", "hook_k_input", "hook_v_input"),
    "use_attn_in": ("hook_attn_in",),
    "use_hook_mlp_in": ("hook_mlp_in",),
}
TOKENS = prompt(101, 2, 9)


def is_grouped(model: HookedTransformer) -> bool:
    return model.cfg.n_key_value_heads != model.cfg.n_heads


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("name", CHOSEN)
def test_a_flag_changes_no_other_hook_point(name: str, flag: str, family_model: Models) -> None:
    model = family_model(name)
    logits, cache = model.run_with_cache(TOKENS)
    if flag == "use_attn_in" and is_grouped(model):
        with pytest.raises(InputError, match="use_attn_in needs as many key-value heads as heads"):
            model.set_use_attn_in(True)
        return
    getattr(model, f"set_{flag}")(True)
    found, flagged = model.run_with_cache(TOKENS)
    assert relative(found, logits, "logits") <= TOLERANCE
    assert {hook.partition(".")[2].partition(".")[2] for hook in flagged.keys() - cache.keys()} == set(FLAGS[flag])
    for hook in cache:
        if flagged[hook].ndim == cache[hook].ndim:  # ln1's have an axis of heads with inputs for each head
            assert relative(flagged[hook], cache[hook], hook) <= TOLERANCE, hook


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("name", [name for name in CHOSEN if VARIANTS[name].lens is not None])
def test_a_flag_is_transformerlenss(name: str, flag: str, family_model: Models, family_checkpoint: Folders) -> None:
    from tests.families.lens import lens_of

    model = family_model(name)
    if flag == "use_attn_in" and is_grouped(model):
        pytest.skip("refused: see above")
    lens = lens_of(name, family_checkpoint(name))
    for one in (model, lens):
        getattr(one, f"set_{flag}")(True)
    _, cache = model.run_with_cache(TOKENS)
    _, lens_cache = lens.run_with_cache(torch.from_numpy(TOKENS))
    for hook in lens_cache:
        if ".experts." not in hook:
            assert relative(cache[hook], lens_cache[hook], hook) <= TOLERANCE, hook
    for hook in (in_block(layer, leaf) for layer in (0, 1) for leaf in FLAGS[flag]):

        def edit(activation: torch.Tensor, hook: Any, name: str = hook) -> torch.Tensor:
            return torch.from_numpy(edit_of(name, activation.numpy()))

        changed = lens.run_with_hooks(torch.from_numpy(TOKENS), fwd_hooks=[(hook, edit)])
        assert relative(edited(model, TOKENS, hook), changed, hook) <= TOLERANCE, hook


@pytest.mark.parametrize("name", CHOSEN)
def test_a_result_is_z_through_the_heads_own_output_matrix(name: str, family_model: Models) -> None:
    model = family_model(name)
    model.set_use_attn_result(True)
    _, cache = model.run_with_cache(TOKENS)
    for layer in range(model.cfg.n_layers):
        expected = np.einsum("bphd,hdD->bphD", cache["z", layer], model.weights[in_block(layer, "attn.W_O")])
        assert relative(cache["result", layer], expected, name) <= TOLERANCE


@pytest.mark.parametrize("name", CHOSEN)
def test_an_input_of_one_head_reaches_that_head_alone(name: str, family_model: Models) -> None:
    """The key of one group: queries, values and other keys stay."""
    model = family_model(name)
    model.set_use_split_qkv_input(True)
    _, cache = model.run_with_cache(TOKENS)

    def edit(activation: np.ndarray, hook: Any) -> None:
        activation[:, :, 0] = 0.5

    with model.hooks(fwd_hooks=[(in_block(1, "hook_k_input"), edit)]):
        _, changed = model.run_with_cache(TOKENS)
    keys, before = changed["k", 1], cache["k", 1]
    assert np.abs(keys[:, :, 0] - before[:, :, 0]).max() > 1e-3
    for found, expected in ((keys[:, :, 1:], before[:, :, 1:]), *((changed[x, 1], cache[x, 1]) for x in "qv")):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["llama", "neox", "gemma3"])
def test_flags_hold_where_weights_are_folded(
    name: str, family_folder: Folders, family_model: Models, tmp_path: Path
) -> None:
    from graphlens import process_weights

    model = HookedTransformer.from_onnx(process_weights(family_folder(name), tmp_path / "model"), "cpu")
    logits = model(TOKENS)
    for flag in ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in"):
        getattr(model, f"set_{flag}")(True)
    assert relative(model(TOKENS), logits, name) <= TOLERANCE


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-2), ("bfloat16", 1e-5), ("float64", 1e-9)])
@pytest.mark.parametrize("name", ["neox", "gemma3"])
def test_flags_and_set_weights_hold_in_other_precisions(
    name: str, dtype: str, tolerance: float, family_folder: Folders, tmp_path: Path
) -> None:
    """With Gemma's factor, 1 + what is stored: what is set is rounded to the stored dtype after the 1 is taken away."""
    from graphlens.surgery.precision import convert_into

    convert_into(family_folder(name) / "model.onnx", tmp_path, dtype)
    model = HookedTransformer.from_onnx(tmp_path, "cpu")
    logits = model(TOKENS)
    model.set_weights(model.state_dict())
    assert not model.runner.engine.replaced
    new = np.asarray(model.weights["blocks.1.ln1.w"], np.float64) + 0.3
    model.set_weights({"blocks.1.ln1.w": new})
    assert relative(model.weights["blocks.1.ln1.w"], new, dtype) <= {"bfloat16": 4e-3, "float16": 1e-3}.get(dtype, 1e-7)
    changed = model(TOKENS)
    assert relative(changed, logits, dtype) > 0.01
    for flag in ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in"):
        getattr(model, f"set_{flag}")(True)
    assert relative(model(TOKENS), changed, dtype) <= tolerance


@pytest.mark.parametrize("hook", ["ln1.hook_scale", "ln1.hook_normalized"])
def test_an_intervention_at_a_norm_that_fires_thrice_is_the_python_hook(
    hook: str, family_model: Models, tmp_path: Path
) -> None:
    """Its firings have different numbers of heads where keys and values are grouped."""
    from graphlens import Scale, Steer

    model, name = family_model("llama"), in_block(1, hook)
    model.set_use_split_qkv_input(True)
    for head in (0, -1):

        def double(activation: np.ndarray, hook: Any, head: int = head) -> None:
            activation[:, :, head] *= 2

        expected = model.run_with_hooks(TOKENS, fwd_hooks=[(name, double)])
        found = model.run_with_interventions(TOKENS, [Scale(name, 2.0, heads=head)])
        assert relative(found, expected, name) <= TOLERANCE
        baked = model.bake([Scale(name, 2.0, heads=head)], tmp_path / str(head), keep_hooks=True)
        assert relative(HookedTransformer.from_onnx(baked, "cpu")(TOKENS), expected, name) <= TOLERANCE
    with pytest.raises(InputError, match="heads=4: there is no 4; key_value_head_index has 2"):
        model.run_with_interventions(TOKENS, [Scale(name, 2.0, heads=4)])
    with pytest.raises(InputError, match=r"'blocks\.1\.ln1"):
        model.run_with_interventions(TOKENS, [Steer(name, np.ones((2, 1)))])
    one = family_model("llama-one-key")  # whose single key's head is no reason to change every query
    one.set_use_split_qkv_input(True)
    found = one.run_with_interventions(TOKENS, [Scale(name, 2.0, heads=0)])

    def first(activation: np.ndarray, hook: Any) -> None:
        activation[:, :, 0] *= 2

    assert relative(found, one.run_with_hooks(TOKENS, fwd_hooks=[(name, first)]), name) <= TOLERANCE
