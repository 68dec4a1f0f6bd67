"""Configs of known architectures that are not exported, each with a part of what is said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.families.variants import VARIANTS


@dataclass(frozen=True)
class Refused:
    """A config that is refused.

    Attributes:
        config: The name of its config class in transformers.
        arguments: What the config is made of.
        said: A part of the error.
        why: Why it is not exported.
    """

    config: str
    arguments: Mapping[str, Any]
    said: str
    why: str


def _of(variant: str) -> dict[str, Any]:
    """What the config of a variant that is exported is made of."""
    return dict(VARIANTS[variant].arguments)


_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
_BY_LENGTH = "its frequencies change with the length of the whole input"
_FLAG = "a flag that changes the computation and that no field of a Spec says"

REFUSED: dict[str, Refused] = {
    "dynamic rope": Refused(
        "LlamaConfig", _of("llama") | {"rope_parameters": _DYNAMIC}, "rope_type='dynamic'", _BY_LENGTH
    ),
    "an unknown flag": Refused(
        "LlamaConfig", _of("llama") | {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping=5.0", _FLAG
    ),
    "cross-attention": Refused("GPT2Config", _of("gpt2") | {"add_cross_attention": True}, "add_cross_attention", _FLAG),
    "attention both ways": Refused(
        "Gemma3TextConfig",
        _of("gemma3") | {"head_dim": 12, "use_bidirectional_attention": True},
        "use_bidirectional_attention",
        "it is no causal model",
    ),
    "a soft cap of Gemma 3's scores": Refused(
        "Gemma3TextConfig",
        _of("gemma3") | {"attn_logit_softcapping": 5.0},
        "attn_logit_softcapping",
        "transformers ignores it in Gemma 3",
    ),
    "chunked attention": Refused(
        "Gemma3TextConfig",
        _of("gemma3") | {"head_dim": 12, "layer_types": ["chunked_attention"] * 3},
        "chunked_attention",
        "a kind of mask that is not computed",
    ),
    "Falcon's first code": Refused(
        "FalconConfig",
        _of("falcon-7b") | {"n_head": 6, "n_layer": 3},
        "config.json is that of Falcon's first code",
        "transformers does not read its keys, and builds a model of other sizes",
    ),
    "Falcon-RW (alibi)": Refused(
        "FalconConfig",
        _of("falcon-7b") | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
        "alibi",
        "transformers computes its biases in bfloat16, 2e-2 off",
    ),
}
