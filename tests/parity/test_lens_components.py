"""A part of a model is an instance of the kind that TransformerLens has for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graphlens
from graphlens import GraphlensError
from graphlens.transformer_lens import components as ours


@pytest.mark.parametrize("processed", [False, True])
@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_a_part_is_what_it_is_in_transformerlens(name: str, processed: bool) -> None:
    from lens_oracle import PROCESSING, oracle
    from transformer_lens import components as theirs

    from graphlens.torch import HookedTransformer

    lens = oracle(graphlens.embedded_model(name), **dict.fromkeys(PROCESSING, processed))
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
