"""A tiny random model of odd sizes, exported once for all tests of a process."""

from __future__ import annotations

import atexit
import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import graphlens
from tests.saes.sae_cases import D_MLP, D_MODEL, HEADS, VOCABULARY

TOKENS = np.random.default_rng(1).integers(1, VOCABULARY, (2, 6))


@functools.cache
def folder(family: str = "gpt2") -> Path:
    """The hooked folder."""
    kept = tempfile.TemporaryDirectory()
    atexit.register(kept.cleanup)
    root = Path(kept.name)
    torch.manual_seed(0)
    if family == "gpt2":
        model: Any = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_layer=3, n_head=HEADS, n_embd=D_MODEL, n_inner=D_MLP, vocab_size=VOCABULARY, n_positions=29,
                bos_token_id=0, eos_token_id=0,
            )
        )  # fmt: skip
    else:
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                num_hidden_layers=3, num_attention_heads=HEADS, num_key_value_heads=1, hidden_size=D_MODEL,
                intermediate_size=D_MLP, vocab_size=VOCABULARY, max_position_embeddings=29, head_dim=8,
            )
        )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.eval().save_pretrained(root / "checkpoint")
    return graphlens.export_model(root / "checkpoint", root / "hooked").folder


def model(family: str = "gpt2") -> graphlens.HookedTransformer:
    """A model of its own over the folder: what is attached to it is no other test's."""
    return graphlens.HookedTransformer.from_onnx(folder(family))
