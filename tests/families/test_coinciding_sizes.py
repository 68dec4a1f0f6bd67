"""Inputs whose sizes coincide, and a weight of which one row differs: where a rule that looks at sizes would be wrong unseen."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import graphlens
from graphlens import HookedTransformer, Patch, Scale
from tests.families.exports import reference_of

# Five prompts of five tokens for five heads, and a window of four.
TOKENS = np.random.default_rng(5).integers(1, 101, (5, 5))


def close(found: Any, right: Any) -> None:
    """Within float32's rounding of sums in another order."""
    np.testing.assert_allclose(found, right, rtol=0, atol=2e-5 * max(1.0, float(np.abs(right).max())))


def test_as_many_prompts_as_tokens_as_heads(family_model: Callable[[str], HookedTransformer]) -> None:
    model = family_model("gemma3")
    assert model.cfg.n_heads == 5 > (model.cfg.window_size or 5) == 4
    z, value = "blocks.1.attn.hook_z", np.random.default_rng(6).standard_normal((5, 5, model.cfg.d_head), np.float32)

    def hook(x: np.ndarray, hook: Any) -> None:
        x[:, -1] = value  # [batch, head, d_head]
        x[:, :, 2] *= 3
        x[:, 1] *= 0.5

    edits = [Patch(z, value, positions=-1), Scale(z, 3.0, heads=2), Scale(z, 0.5, positions=1)]
    expected = model.run_with_hooks(TOKENS, fwd_hooks=[(z, hook)])
    close(model.run_with_interventions(TOKENS, edits), expected)
    assert np.abs(expected - model(TOKENS)).max() > 0.1
    for row in range(5):  # and each prompt alone
        with model.intervene([Patch(z, value[row : row + 1], positions=-1), *edits[1:]]):
            close(model(TOKENS[row : row + 1])[0], expected[row])


def test_generation_past_a_window_with_as_much_padding_as_the_window(
    family_model: Callable[[str], HookedTransformer],
) -> None:
    """A prompt of one token behind four of padding: all that its window holds besides itself."""
    model, mask = family_model("gemma3"), np.ones_like(TOKENS)
    for row in range(5):
        mask[row, :row] = 0
    options = {"do_sample": False, "verbose": False, "stop_at_eos": False, "return_type": "tokens"}
    together = model.generate(TOKENS, 9, attention_mask=mask, **options)
    for row in range(5):
        alone = model.generate(TOKENS[row : row + 1, row:], 9, **options)
        np.testing.assert_array_equal(together[row, row:], alone[0])


def test_a_head_of_which_one_row_is_not_the_embeddings(
    family_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """The config ties them, and the checkpoint stores both: the stored head is the model's, as transformers loads it."""
    folder = Path(shutil.copytree(family_checkpoint("llama-tied-biases"), tmp_path / "checkpoint"))
    weights = load_file(folder / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    head[7] += 1.0
    save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    model = HookedTransformer.from_onnx(graphlens.export_model(folder, tmp_path / "hooked").folder, "cpu")
    with torch.no_grad():
        right = reference_of(folder)(torch.from_numpy(TOKENS)).logits.numpy()
        tied = reference_of(family_checkpoint("llama-tied-biases"))(torch.from_numpy(TOKENS)).logits.numpy()
    close(model(TOKENS), right)
    assert np.abs(right - tied)[..., 7].max() > 0.1
