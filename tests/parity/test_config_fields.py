"""HookedTransformerConfig against TransformerLens 3.9's: every field of many constructor calls, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig as LensConfig

import graphlens
import graphlens.torch
from graphlens import InputError
from graphlens.model.config import ACTIVATIONS

SIZES: dict[str, Any] = {"n_layers": 2, "d_model": 48, "n_ctx": 20, "d_head": 12}
CALLS: dict[str, dict[str, Any]] = {
    "ARENA's attention-only": {
        "d_model": 768, "d_head": 64, "n_heads": 12, "n_layers": 2, "n_ctx": 2048, "d_vocab": 50278,
        "attention_dir": "causal", "attn_only": True, "tokenizer_name": "EleutherAI/gpt-neox-20b", "seed": 398,
        "use_attn_result": True, "normalization_type": None, "positional_embedding_type": "shortformer",
    },
    "modular addition": {
        "n_layers": 1, "n_heads": 4, "d_model": 128, "d_head": 32, "d_mlp": 512, "act_fn": "relu",
        "normalization_type": None, "d_vocab": 114, "d_vocab_out": 113, "n_ctx": 3, "init_weights": True,
        "device": "cpu", "seed": 999,
    },
    "brackets": {
        "n_ctx": 42, "d_model": 56, "d_head": 28, "n_heads": 2, "d_mlp": 56, "n_layers": 3,
        "attention_dir": "bidirectional", "act_fn": "relu", "d_vocab": 5, "d_vocab_out": 2, "use_attn_result": True,
    },
    "sorted lists": {
        "n_layers": 1, "n_heads": 2, "d_model": 96, "d_head": 48, "n_ctx": 21, "d_vocab": 52, "act_fn": "relu",
        "normalization_type": "LN", "attn_only": True, "d_mlp": None,
    },
    "the least": {**SIZES},
    "n_heads given": {**SIZES, "n_heads": 3},
    "by position": {"d_vocab": 9, "act_fn": "gelu"},
    "d_mlp": {**SIZES, "d_mlp": 7, "d_vocab": 11},
    "rotary": {**SIZES, "positional_embedding_type": "rotary"},
    "rotary_dim": {**SIZES, "positional_embedding_type": "rotary", "rotary_dim": 4, "rotary_base": 500},
    "gated": {**SIZES, "gated_mlp": True, "act_fn": "silu"},
    "parallel": {**SIZES, "parallel_attn_mlp": True},
    "grouped": {**SIZES, "n_key_value_heads": 2},
    "no scale": {**SIZES, "use_attn_scale": False},
    "own scale": {**SIZES, "attn_scale": 3.5},
    "by layer": {**SIZES, "scale_attn_by_inverse_layer_idx": True},
    "local": {**SIZES, "use_local_attn": True, "window_size": 3, "attn_types": ["local", "global"]},
    "experts": {**SIZES, "num_experts": 4, "experts_per_token": 2, "gated_mlp": True},
    "experts, attention only": {**SIZES, "num_experts": 4, "experts_per_token": 2, "attn_only": True},
    "initializer_range": {**SIZES, "initializer_range": 0.3},
    "xavier": {**SIZES, "init_mode": "xavier_uniform"},
    "xavier, own gain": {**SIZES, "init_mode": "xavier_normal", "initializer_range": 0.7},
    "muP": {**SIZES, "init_mode": "muP"},
    "float64": {**SIZES, "dtype": torch.float64},
    "bfloat16": {**SIZES, "dtype": torch.bfloat16},
    "seeded": {**SIZES, "seed": 7},
    "attention only without act_fn": {**SIZES, "attn_only": True, "act_fn": None},
    "solu": {**SIZES, "act_fn": "solu_ln"},
    "final_rms": {**SIZES, "final_rms": True, "normalization_type": "LNPre"},
    "no normalisation": {**SIZES, "normalization_type": None},
    "flags": {**SIZES, "use_attn_in": True, "use_hook_mlp_in": True, "use_hook_tokens": True, "use_split_qkv_input": True},
    "caps": {**SIZES, "attn_scores_soft_cap": 50.0, "output_logits_soft_cap": 30.0},
    "no bos": {**SIZES, "default_prepend_bos": False, "model_name": "mine", "checkpoint_index": 3},
    "no weights": {**SIZES, "init_weights": False, "eps": 1e-4, "d_vocab_out": 4, "d_vocab": 3},
}  # fmt: skip
POSITIONAL = {"by position": (48, 12, 2, 20)}


def both(name: str) -> tuple[graphlens.HookedTransformerConfig, LensConfig]:
    call, given = CALLS[name], POSITIONAL.get(name, ())
    return graphlens.torch.HookedTransformerConfig(*given, **call), LensConfig(*given, **call)


@pytest.mark.parametrize("name", CALLS)
def test_every_field_is_transformerlenss(name: str) -> None:
    ours, theirs = both(name)
    assert ours.to_dict() == {**theirs.to_dict(), "device": str(theirs.device)}
    assert ours.is_layer_norm_activation() == theirs.is_layer_norm_activation()


def test_the_arguments_and_their_order_are_transformerlenss() -> None:
    ours, theirs = (
        [(p.name, p.kind, p.default) for p in inspect.signature(kind).parameters.values()]
        for kind in (graphlens.torch.HookedTransformerConfig, LensConfig)
    )
    assert ours[: len(theirs)] == theirs
    assert all(kind is inspect.Parameter.KEYWORD_ONLY for _, kind, _ in ours[len(theirs) :])


def test_the_activation_functions_are_transformerlenss() -> None:
    from transformer_lens.utilities.activation_functions import SUPPORTED_ACTIVATIONS

    assert set(ACTIVATIONS) == set(SUPPORTED_ACTIVATIONS)


WRONG = {
    "d_head does not divide d_model": ({**SIZES, "d_head": 13}, "d_model"),
    "no such activation": ({**SIZES, "act_fn": "swishy"}, "act_fn"),
    "no activation": ({**SIZES, "act_fn": None}, "act_fn"),
    "local without a window": ({**SIZES, "use_local_attn": True, "attn_types": ["local"] * 2}, "window_size"),
    "local without types": ({**SIZES, "use_local_attn": True, "window_size": 3}, "attn_types"),
    "experts without how many": ({**SIZES, "num_experts": 4}, "experts_per_token"),
    "how many without experts": ({**SIZES, "experts_per_token": 4}, "num_experts"),
    "bos": ({**SIZES, "default_prepend_bos": "yes"}, "default_prepend_bos"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_transformerlens_refuses_is_refused(name: str) -> None:
    call, said = WRONG[name]
    with pytest.raises((AssertionError, ValueError)):
        LensConfig(**call)
    with pytest.raises(InputError, match=said):
        graphlens.torch.HookedTransformerConfig(**call)


def test_what_is_no_argument_or_missing_is_a_type_error_in_both() -> None:
    for kind in (LensConfig, graphlens.torch.HookedTransformerConfig):
        with pytest.raises(TypeError):
            kind(**SIZES, d_hidden=3)
        with pytest.raises(TypeError):
            kind(n_layers=1, d_model=8, n_ctx=3)


@pytest.mark.parametrize("name", CALLS)
def test_configs_survive_dictionaries_and_copies(name: str) -> None:
    ours, theirs = both(name)
    kind = type(ours)
    assert kind.from_dict(ours.to_dict()) == ours
    assert kind.unwrap(ours) is ours
    assert kind.unwrap(ours.to_dict()) == ours
    assert kind.unwrap(theirs) == kind.from_dict(theirs.to_dict())  # a config of TransformerLens's own
    assert copy.deepcopy(ours) == ours
    assert dataclasses.replace(ours, model_name="other") != ours
    numpys = graphlens.HookedTransformerConfig.unwrap(ours)
    assert numpys.dtype == str(ours.dtype).removeprefix("torch.")
    assert {**numpys.to_dict(), "dtype": ours.dtype} == ours.to_dict()
    assert kind.unwrap(numpys).dtype == ours.dtype


def test_it_prints_as_transformerlenss_does() -> None:
    ours, theirs = both("modular addition")
    assert repr(ours).splitlines()[0] == repr(theirs).splitlines()[0]
    theirs_plain = re.sub(r"np\.float64\((.*?)\)", r"\1", repr(theirs))
    assert sorted(repr(ours).splitlines()[2:-1]) == sorted(theirs_plain.splitlines()[2:-1])


def test_a_seed_seeds_what_transformerlens_seeds() -> None:
    drawn = []
    for kind in (LensConfig, graphlens.torch.HookedTransformerConfig, graphlens.HookedTransformerConfig):
        kind(**SIZES, seed=11)
        drawn.append((random.random(), np.random.rand(), float(torch.rand(()))))
    assert drawn[0] == drawn[1] == drawn[2]
    state = torch.get_rng_state()
    graphlens.torch.HookedTransformerConfig(**SIZES)
    assert torch.equal(state, torch.get_rng_state())


def test_a_name_is_not_taken_for_a_config() -> None:
    with pytest.raises(InputError, match="from_pretrained opens a model by its name"):
        graphlens.torch.HookedTransformer("gpt2")  # type: ignore[arg-type]
