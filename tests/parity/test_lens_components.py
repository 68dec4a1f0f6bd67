"""A part of a model is an instance of the kind that TransformerLens has for it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import graphlens
from graphlens import GraphlensError
from graphlens.transformer_lens import components as ours


def in_transformerlens(name: str, processed: bool) -> Any:
    """A model of TransformerLens's with parts of the same kinds."""
    from lens_oracle import PROCESSING, oracle

    if name == "tiny-gpt2":
        return oracle(graphlens.embedded_model(), **dict.fromkeys(PROCESSING, processed))
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        **{"n_layers": 2, "d_model": 12, "d_head": 4, "n_heads": 3, "n_key_value_heads": 1, "n_ctx": 8, "d_vocab": 9},
        **{"normalization_type": "RMSPre" if processed else "RMS", "gated_mlp": True, "final_rms": True},
        **{"positional_embedding_type": "rotary", "rotary_dim": 4, "act_fn": "silu", "device": "cpu"},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return HookedTransformer(config)


@pytest.mark.parametrize("processed", [False, True])
@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_a_part_is_what_it_is_in_transformerlens(name: str, processed: bool) -> None:
    from transformer_lens import components as theirs

    from graphlens.torch import HookedTransformer

    lens = in_transformerlens(name, processed)
    opened = "from_pretrained" if processed else "from_pretrained_no_processing"
    model: Any = getattr(HookedTransformer, opened)(name)
    kinds = [each for each, kind in vars(ours).items() if isinstance(kind, type) and not each.startswith("_")]
    assert len(kinds) > 12
    paths = ["embed", "unembed", "ln_final", *(["pos_embed"] if name == "tiny-gpt2" else [])]
    for path in [*paths, *(f"block.{part}" for part in ("attn", "mlp", "ln1", "ln2")), "block"]:
        pair = [(each.blocks[1] if path.startswith("block") else each) for each in (model, lens)]
        for part in path.replace("block", "").strip(".").split(".") if path != "block" else []:
            pair = [getattr(each, part) for each in pair]
        for kind in kinds:
            expected = isinstance(pair[1], getattr(theirs, kind))
            assert isinstance(pair[0], getattr(ours, kind)) is expected, (path, kind)


def test_no_part_is_made_by_itself() -> None:
    with pytest.raises(GraphlensError, match="pieces of its graph"):
        ours.MLP({"d_model": 4})
    assert not isinstance(torch.nn.Identity(), ours.MLP)
    assert not isinstance(Path(), ours.LayerNorm)
