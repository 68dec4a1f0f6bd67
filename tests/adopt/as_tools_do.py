"""What a tool computes otherwise than transformers does, on purpose: its files are compared with a model that does the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.adopt.checkpoints import CHECKPOINTS, family_of


@dataclass(frozen=True)
class Change:
    """How a tool's file differs from the checkpoint.

    Attributes:
        config: Fields of the config that transformers' model is made with instead.
        embed_scale: What embeddings are multiplied by instead; None for no change.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    embed_scale: float | None = None


NONE = Change()
# optimum's O3 computes gelu by the tanh formula; its Gemma 2 has no soft cap of attention scores. The genai builder rounds the
# square root that Gemma's embeddings are multiplied by to two digits.
_TANH = Change({"hidden_act": "gelu_new"})
_UNCAPPED = Change({"attn_logit_softcapping": None})
_CHANGES = {
    ("bert", "optimum-O3"): _TANH,
    ("vit", "optimum-O3"): _TANH,
    ("neox", "optimum-O3"): _TANH,
    ("neox", "optimum-past-O3"): _TANH,
    ("gemma2", "optimum"): _UNCAPPED,
    ("gemma2", "optimum-past"): _UNCAPPED,
}


def change_of(name: str, route: str) -> Change:
    """How a kind of file of a family differs from its checkpoint; NONE where it does not."""
    if family_of(name) == "gemma2" and route == "genai-fp32":
        return Change(embed_scale=round(CHECKPOINTS[name].arguments["hidden_size"] ** 0.5, 2))
    return _CHANGES.get((family_of(name), route), NONE)
