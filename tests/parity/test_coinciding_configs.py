"""Models from a config whose sizes all coincide, and windows shorter than the prompt, against TransformerLens."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import transformer_lens

from graphlens.torch import HookedTransformer, HookedTransformerConfig, KeyValueCache

FOUR: dict[str, Any] = {
    "n_layers": 2, "d_model": 4, "n_ctx": 4, "d_head": 4, "n_heads": 4, "d_vocab": 4, "d_mlp": 4, "act_fn": "relu",
    "normalization_type": "LN", "seed": 1,
}  # fmt: skip
WINDOW: dict[str, Any] = {
    **FOUR, "n_ctx": 11, "d_vocab": 13, "use_local_attn": True, "window_size": 3, "attn_types": ["local", "global"],
}  # fmt: skip


def close(ours: Any, theirs: torch.Tensor) -> None:
    found, expected = np.asarray(ours), theirs.detach().numpy()
    assert found.shape == expected.shape
    finite = np.isfinite(expected)
    assert np.array_equal(finite, np.isfinite(found))
    assert np.abs(found[finite] - expected[finite]).max() <= 5e-6 * max(1.0, np.abs(expected[finite]).max())


def pair(settings: dict[str, Any]) -> tuple[HookedTransformer, transformer_lens.HookedTransformer]:
    """The same model in both libraries, every weight and bias random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformer_lens.HookedTransformer(transformer_lens.HookedTransformerConfig(**settings, device="cpu"))
        ours = HookedTransformer(HookedTransformerConfig(**settings))
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(value.shape, generator=generator) * 0.7
        for name, value in sorted(theirs.state_dict().items())
        if "mask" not in name and "IGNORE" not in name
    }
    theirs.load_state_dict(state, strict=False)
    ours.load_state_dict(state, strict=False)
    return ours, theirs


def test_a_batch_of_as_many_prompts_as_positions_heads_and_dimensions() -> None:
    ours, theirs = pair(FOUR)
    tokens = torch.tensor([[0, 1, 2, 3], [3, 3, 1, 0], [2, 0, 2, 0], [1, 2, 3, 3]])
    logits, cache = ours.run_with_cache(tokens)
    expected, others = theirs.run_with_cache(tokens)
    close(logits, expected)
    assert list(cache) == list(others)
    for name, value in others.items():
        close(cache[name], value)
    stack = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    for given in ({"layer": -1}, {"layer": 1, "mlp_input": True}, {"layer": 2, "batch_slice": [1, 3, 0, 2]}):
        close(cache.apply_ln_to_stack(stack, **given), others.apply_ln_to_stack(stack, **given))
    wrong = tokens.flip(0)
    close(
        cache.logit_attrs(stack, tokens, incorrect_tokens=wrong),
        others.logit_attrs(stack, tokens=tokens, incorrect_tokens=wrong),
    )
    with pytest.raises(ValueError, match="in a run of 4 prompts of 4 positions"):
        cache.apply_ln_to_stack(stack[0, 0], layer=-1)  # [4, d_model]: of the prompts, or of the positions?


def test_a_window_shorter_than_the_prompt_with_padding_a_cache_and_a_called_block() -> None:
    ours, theirs = pair(WINDOW)
    tokens = torch.randint(0, 13, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0  # more than the window
    whole = theirs(tokens)
    close(ours(tokens), whole)
    close(ours(tokens, attention_mask=mask)[:, 4:], theirs(tokens, attention_mask=mask)[:, 4:])
    past = KeyValueCache.init_cache(ours.cfg, batch_size=2)
    parts = [ours(part, past_kv_cache=past) for part in tokens.split([4, 1, 4], 1)]
    close(torch.cat(parts, 1), whole)
    residual = theirs.run_with_cache(tokens)[1]["resid_pre", 0]
    for given in ({}, {"attention_mask": mask}):
        close(ours.blocks[0](residual, **given)[:, 4:], theirs.blocks[0](residual, **given)[:, 4:])
