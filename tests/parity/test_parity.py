"""The numbers are Hugging Face's: every activation read, and what editing one does, on models of odd sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch_reference
import transformers
from conftest import save_model
from torch_reference import EDITABLE_IN_BLOCK, EDITABLE_OUTSIDE, ODD_CONFIG

import graphlens

TOLERANCE = 1e-4


def load_reference(folder: Path) -> transformers.GPT2LMHeadModel:
    return transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()


def assert_close(found: np.ndarray, reference: np.ndarray, what: str) -> None:
    assert found.shape == reference.shape, what
    masked = np.isneginf(reference)
    np.testing.assert_array_equal(np.isneginf(found), masked, what)
    difference = np.abs(np.where(masked, 0, found) - np.where(masked, 0, reference)).max()
    assert difference <= TOLERANCE * max(1.0, np.abs(reference[~masked]).max()), (what, difference)


def assert_every_activation_matches(checkpoint: Path, hooked: Path, shapes: list[tuple[int, int]]) -> None:
    reference_model, model = load_reference(checkpoint), graphlens.HookedTransformer.from_onnx(hooked)
    for seed, shape in enumerate(shapes):
        tokens = np.random.default_rng(seed).integers(0, model.cfg.d_vocab, shape)
        logits, cache = model.run_with_cache(tokens)
        reference = torch_reference.activations(reference_model, torch.from_numpy(tokens))
        assert set(cache) == set(reference)
        for name, expected in reference.items():
            assert_close(cache[name], expected.numpy(), f"{name} at {shape}")
        assert_close(logits, reference["unembed.hook_out"].numpy(), "logits")


def test_every_activation_is_hugging_faces_on_an_odd_model(odd_checkpoint: Path, odd_hooked: Path) -> None:
    assert_every_activation_matches(odd_checkpoint, odd_hooked, [(1, 1), (1, 7), (3, 10), (2, 33)])


def test_every_activation_is_hugging_faces_on_the_embedded_model() -> None:
    folder = graphlens.embedded_model()
    assert_every_activation_matches(folder, folder, [(1, 1), (2, 21), (1, 128)])


@pytest.mark.parametrize(
    "changes",
    [
        {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_inner": None},
        {"activation_function": "relu"},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"layer_norm_epsilon": 0.3},
        {"tie_word_embeddings": False},
    ],
    ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()),
)
def test_every_activation_is_hugging_faces_whatever_the_config(changes: dict, tmp_path: Path) -> None:
    save_model(tmp_path / "checkpoint", transformers.GPT2Config(**{**ODD_CONFIG, **changes}))
    hooked = graphlens.export_model(tmp_path / "checkpoint", tmp_path / "hooked").folder
    assert_every_activation_matches(tmp_path / "checkpoint", hooked, [(2, 9)])


def test_every_activation_is_hugging_faces_at_gpt2_smalls_shape(tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config()).save_pretrained(tmp_path / "checkpoint")
    hooked = graphlens.export_model(tmp_path / "checkpoint", tmp_path / "hooked", verify=False).folder
    assert_every_activation_matches(tmp_path / "checkpoint", hooked, [(2, 16)])


@pytest.mark.parametrize("name", [*EDITABLE_OUTSIDE, *(f"blocks.1.{tail}" for tail in EDITABLE_IN_BLOCK)])
def test_an_edit_has_the_effect_of_a_torch_hook(odd_checkpoint: Path, odd_hooked: Path, name: str) -> None:
    reference_model, model = load_reference(odd_checkpoint), graphlens.HookedTransformer.from_onnx(odd_hooked)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, model.cfg.d_vocab, (2, 9))
    plain, cache = model.run_with_cache(tokens)
    noise = rng.standard_normal(cache[name].shape).astype(np.float32)

    def edit(activation: np.ndarray, hook: object) -> np.ndarray:
        return activation * 0.5 + noise

    with model.hooks(fwd_hooks=[(name, edit)]):
        logits, edited_cache = model.run_with_cache(tokens)
    with torch_reference.edited(reference_model, name, lambda x: x * 0.5 + torch.from_numpy(noise)):
        reference = torch_reference.activations(reference_model, torch.from_numpy(tokens))
    assert np.abs(logits - plain).max() > 1e-2
    assert_close(logits, reference["unembed.hook_out"].numpy(), "logits")
    np.testing.assert_array_equal(edited_cache[name], edit(cache[name], None))
    later = list(cache)[list(cache).index(name) + 1 :]
    for other in (other for other in later if ".2." in other or other.startswith(("ln_final", "unembed"))):
        assert_close(edited_cache[other], reference[other].numpy(), f"{other} after an edit at {name}")


def test_padding_on_the_left_changes_nothing_for_real_tokens(odd_hooked: Path) -> None:
    model = graphlens.HookedTransformer.from_onnx(odd_hooked)
    rng = np.random.default_rng(2)
    tokens = rng.integers(1, model.cfg.d_vocab, (2, 6))
    padded = np.concatenate([np.zeros((2, 3), np.int64), tokens], 1)
    mask = (np.arange(9) >= 3).astype(np.int64)[None].repeat(2, 0)
    logits, cache = model.run_with_cache(tokens)
    padded_logits, padded_cache = model.run_with_cache(padded, attention_mask=mask)
    assert_close(padded_logits[:, 3:], logits, "logits")
    for name in cache:
        if name.endswith(("hook_attn_scores", "hook_pattern")):
            assert_close(padded_cache[name][:, :, 3:, 3:], cache[name], name)
        else:
            assert_close(padded_cache[name][:, 3:], cache[name], name)
    # TransformerLens: no position embedding at masked pads, and a row with nothing to attend to has pattern 0.
    assert np.abs(padded_cache["hook_pos_embed"][:, :3]).max() == 0
    assert np.abs(padded_cache["blocks.0.attn.hook_pattern"][:, :, :3]).max() == 0
    assert np.isneginf(padded_cache["blocks.0.attn.hook_attn_scores"][:, :, :3]).all()


def test_masked_positions_match_transformers_padding(odd_checkpoint: Path, odd_hooked: Path) -> None:
    reference_model, model = load_reference(odd_checkpoint), graphlens.HookedTransformer.from_onnx(odd_hooked)
    tokens = np.random.default_rng(3).integers(0, model.cfg.d_vocab, (2, 8))
    mask = np.asarray([[1] * 8, [0] * 3 + [1] * 5])
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    with torch.no_grad():
        expected = reference_model(
            torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask), position_ids=torch.from_numpy(positions)
        ).logits.numpy()
    found = model(tokens, attention_mask=mask)
    assert_close(found[0], expected[0], "unpadded row")
    assert_close(found[1, 3:], expected[1, 3:], "padded row")


def test_position_ids_can_be_fed_to_the_file_itself(odd_checkpoint: Path, odd_hooked: Path) -> None:
    import onnxruntime as ort

    session = ort.InferenceSession(str(odd_hooked / "model.onnx"), providers=["CPUExecutionProvider"])
    tokens = np.random.default_rng(4).integers(0, 101, (2, 5))
    positions = np.asarray([[3, 4, 5, 6, 7], [0, 2, 4, 6, 8]])
    (found,) = session.run(["logits"], {"input_ids": tokens, "position_ids": positions})
    with torch.no_grad():
        expected = load_reference(odd_checkpoint)(
            torch.from_numpy(tokens), position_ids=torch.from_numpy(positions), attention_mask=torch.ones(2, 5)
        ).logits
    assert_close(found, expected.numpy(), "logits at given positions")


def test_logit_lens_and_loss_are_torchs(odd_checkpoint: Path, odd_hooked: Path) -> None:
    reference_model, model = load_reference(odd_checkpoint), graphlens.HookedTransformer.from_onnx(odd_hooked)
    tokens = np.random.default_rng(5).integers(0, 101, (2, 12))
    _, cache = model.run_with_cache(tokens)
    residual = cache["resid_post", 1]
    with torch.no_grad():
        expected = reference_model.lm_head(reference_model.transformer.ln_f(torch.from_numpy(residual)))
        loss = reference_model(torch.from_numpy(tokens), labels=torch.from_numpy(tokens)).loss
    assert_close(model.unembed(model.ln_final(residual)), expected.numpy(), "logit lens")
    assert_close(np.asarray(model(tokens, return_type="loss")), loss.numpy(), "loss")
    with torch.no_grad():
        last = reference_model(torch.from_numpy(tokens)).logits.numpy()
    assert_close(model.unembed(model.ln_final(cache["resid_post", 2])), last, "lens of the last layer is the output")
