"""Where a norm follows attention, or a weight has no name, what rewrites the model refuses, and the rest is right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import post_norms
import pytest
import torch
import transformers

from graphlens import Ablate, HookedTransformer, Scale, Steer, process_weights, surgery
from graphlens.analysis.numerics import log_softmax
from graphlens.errors import ExportError, InputError
from graphlens.surgery.graph import write_manifest
from graphlens.surgery.process import STEPS

TOKENS = np.random.default_rng(0).integers(0, 101, (2, 9))
post_norms.register()
KINDS = {"sandwich": post_norms.SandwichLMHeadModel, "post only": post_norms.PostOnlyLMHeadModel}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return post_norms.exported(KINDS[request.param], tmp_path_factory.mktemp("post"))


@pytest.fixture
def model(folder: Path) -> HookedTransformer:
    return HookedTransformer.from_onnx(folder, "cpu")


def reference(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder.parent / "checkpoint", attn_implementation="eager"
    ).eval()


def test_the_model_itself_is_exported(model: HookedTransformer, folder: Path) -> None:
    with torch.no_grad():
        expected = reference(folder)(torch.from_numpy(TOKENS)).logits.numpy()
    assert np.abs(model(TOKENS) - expected).max() <= 1e-4 * np.abs(expected).max()
    assert model.cfg.normalization_type == "LN"
    assert "blocks.0.attn.W_O" in model.weights


@pytest.mark.parametrize("step", STEPS)
def test_weights_are_processed_and_norms_after_sublayers_stay(
    step: str, model: HookedTransformer, folder: Path, tmp_path: Path
) -> None:
    steps = {name: name == step for name in STEPS}
    process_weights(folder, tmp_path / "out", **steps, announce=lambda _: None)
    processed = HookedTransformer.from_onnx(tmp_path / "out", "cpu")
    expected = log_softmax(model(TOKENS))
    assert np.abs(log_softmax(processed(TOKENS)) - expected).max() <= 1e-5 * np.abs(expected).max()
    left_out = model.cfg.post_norm_only and step in ("fold_ln", "center_writing_weights")
    assert processed.cfg.processing == (() if left_out else (step,))


@pytest.mark.parametrize("flag", ["use_attn_result", "use_split_qkv_input", "use_attn_in"])
def test_flags_keep_the_norm_after_attention(flag: str, model: HookedTransformer) -> None:
    expected, cache = model.run_with_cache(TOKENS)
    getattr(model, f"set_{flag}")(True)
    logits, flagged = model.run_with_cache(TOKENS)
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    np.testing.assert_allclose(flagged["attn_out", 1], cache["attn_out", 1], atol=2e-5)


def test_what_the_mlp_reads_is_edited(model: HookedTransformer, folder: Path) -> None:
    expected = model(TOKENS)
    model.set_use_hook_mlp_in(True)
    logits, cache = model.run_with_cache(TOKENS)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_array_equal(cache["blocks.1.hook_mlp_in"], cache["blocks.1.hook_resid_mid"])
    # What the MLP reads is zero: torch says what it gives then.
    zeroed = model.run_with_interventions(TOKENS, Ablate("blocks.1.hook_mlp_in"))
    torch_model = reference(folder)
    torch_model.transformer.h[1].ln_2.register_forward_pre_hook(lambda _, args: (args[0] * 0,))
    with torch.no_grad():
        wanted = torch_model(torch.from_numpy(TOKENS)).logits.numpy()
    assert np.abs(zeroed - wanted).max() <= 1e-4 * np.abs(wanted).max()


EDITS = {
    "what attention writes": Scale("blocks.1.hook_attn_out", 0.5),
    "what attention adds": Steer("blocks.1.hook_attn_out", 0.3),
    "after attention": Steer("blocks.1.hook_resid_mid", 0.3),
    "what the MLP writes": Ablate("blocks.0.hook_mlp_out"),
    "after the MLP": Steer("blocks.1.hook_resid_pre", 0.3),
    "a head": Ablate("blocks.1.attn.hook_z", heads=2),
    "neurons": Scale("blocks.1.mlp.hook_post", 2.0),
    "queries": Steer("blocks.1.attn.hook_q", 0.3),
    "before the neurons": Scale("blocks.1.mlp.hook_pre", 0.5),
}


@pytest.mark.parametrize("edit", EDITS)
def test_baked_edits_are_the_edits(edit: str, model: HookedTransformer, tmp_path: Path) -> None:
    """Folded into a matrix before the norm they would be others."""
    expected = model.run_with_interventions(TOKENS, EDITS[edit])
    path = model.bake(EDITS[edit], tmp_path / "baked") / "model.onnx"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(["logits"], {"input_ids": TOKENS})[0]
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


# Weights without views


@pytest.mark.parametrize(
    ("lost", "flag"),
    [
        ("attn.b_O", "use_attn_result"),
        ("attn.b_Q", "use_split_qkv_input"),
        ("attn.b_V", "use_attn_in"),
        ("ln1.b", "use_split_qkv_input"),
        ("ln1.w", "use_attn_in"),
    ],
)
def test_a_flag_does_not_leave_out_a_weight_without_a_name(
    lost: str, flag: str, odd_hooked: Path, tmp_path: Path
) -> None:
    model = surgery.load(odd_hooked)
    manifest = surgery.read_manifest(model)
    write_manifest(
        model,
        replace(manifest, weights={name: view for name, view in manifest.weights.items() if not name.endswith(lost)}),
    )
    surgery.save(model, tmp_path / "less")
    opened = HookedTransformer.from_onnx(tmp_path / "less", "cpu")
    with pytest.raises(InputError, match=f"{flag} cannot be set"):
        getattr(opened, f"set_{flag}")(True)
    with pytest.raises(ExportError, match=r"cannot be processed|does not say where"):
        process_weights(tmp_path / "less", tmp_path / "out")


def test_a_flag_does_not_leave_out_an_edit_that_was_baked_in(odd_hooked: Path, tmp_path: Path) -> None:
    model = HookedTransformer.from_onnx(odd_hooked, "cpu")
    for number, (hook, flag) in enumerate(
        (("attn.hook_q", "use_split_qkv_input"), ("hook_attn_out", "use_attn_result"))
    ):
        folder = model.bake(Steer(f"blocks.1.{hook}", 0.5), tmp_path / str(number), keep_hooks=True)
        baked = HookedTransformer.from_onnx(folder, "cpu")
        with pytest.raises(InputError, match=f"{flag} cannot be set"):
            getattr(baked, f"set_{flag}")(True)
        with pytest.raises(ExportError, match="cannot be processed"):
            process_weights(folder, tmp_path / "out")
