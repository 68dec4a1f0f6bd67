"""Gradients against torch autograd on transformers' own model, for GPT-2s that differ in more than size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import save_model
from torch.nn.functional import cross_entropy
from torch_reference import ODD_CONFIG

import graphlens
from graphlens.metrics import CrossEntropy

TOKENS = np.array([[3, 14, 15, 92, 65, 35], [89, 79, 32, 38, 46, 26]])


def autograd(checkpoint: Path) -> dict[str, Any]:
    """The gradient of the next-token loss at hook points that modules of transformers read or give."""
    model = transformers.GPT2LMHeadModel.from_pretrained(checkpoint, attn_implementation="eager").eval()
    model.requires_grad_(False)
    kept: dict[str, torch.Tensor] = {}

    def keep(name: str, value: torch.Tensor) -> torch.Tensor:
        value = value if value.requires_grad else value.detach().requires_grad_(True)
        value.retain_grad()
        kept[name] = value
        return value

    def reads(module: Any, name: str) -> None:
        module.register_forward_pre_hook(lambda _, given: (keep(name, given[0]), *given[1:]))

    def gives(module: Any, name: str) -> None:
        def hook(_: Any, given: Any, result: Any) -> Any:
            return (keep(name, result[0]), *result[1:]) if isinstance(result, tuple) else keep(name, result)

        module.register_forward_hook(hook)

    for layer, block in enumerate(model.transformer.h):
        at = f"blocks.{layer}."
        reads(block, f"{at}hook_resid_pre")
        reads(block.attn.c_proj, f"{at}attn.hook_z")
        gives(block.attn, f"{at}hook_attn_out")
        reads(block.ln_2, f"{at}hook_resid_mid")
        gives(block.mlp.c_fc, f"{at}mlp.hook_pre")
        reads(block.mlp.c_proj, f"{at}mlp.hook_post")
        gives(block.mlp, f"{at}hook_mlp_out")
    with torch.enable_grad():
        logits = model(torch.from_numpy(TOKENS)).logits
        cross_entropy(logits[:, :-1].flatten(0, 1), torch.from_numpy(TOKENS)[:, 1:].flatten()).backward()
    return {name: value.grad.numpy() for name, value in kept.items()}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "variant",
    [
        {"activation_function": "relu"},
        {"activation_function": "gelu"},
        {"tie_word_embeddings": False},
        {"scale_attn_by_inverse_layer_idx": True},
    ],
    ids=str,
)
def test_gradients_of_a_variant(variant: dict[str, Any], tmp_path: Path) -> None:
    save_model(tmp_path / "checkpoint", transformers.GPT2Config(**{**ODD_CONFIG, **variant}))
    hooked = graphlens.export_model(tmp_path / "checkpoint", tmp_path / "hooked", verify=False).folder
    expected = autograd(tmp_path / "checkpoint")
    model = graphlens.HookedTransformer.from_onnx(hooked, "cpu")
    found = model.gradients(TOKENS, CrossEntropy(TOKENS, position=None), list(expected))
    assert len(expected) == 7 * 3
    for name, gradient in expected.items():
        scale = float(np.abs(gradient).max())
        assert scale > 0, name
        assert float(np.abs(found[name].reshape(gradient.shape) - gradient).max()) <= 1e-4 * scale, name
