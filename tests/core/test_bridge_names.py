"""TransformerLens 4's names: which of them a hook point has depends on the architecture, and each leads back to it."""

from __future__ import annotations

import pytest

from graphlens.file.bridge import twins
from graphlens.file.names import canonical

TAIL = ["attn.hook_q", "attn.hook_z"]
# Kind of block -> its hook points in firing order, some of TransformerLens 4's own names of them, names that are none there.
KINDS = {
    "plain": (
        ["hook_resid_pre", "ln1.hook_scale", *TAIL, "hook_attn_out", "hook_resid_mid", "mlp.hook_pre", "hook_mlp_out"],
        {"ln2.hook_in": "hook_resid_mid", "attn.hook_out": "hook_attn_out", "mlp.in.hook_out": "mlp.hook_pre"},
        ["mlp.gate.hook_out", "ln1_post.hook_out", "mlp.hook_in"],
    ),
    "gated": (
        ["ln1.hook_scale", *TAIL, "mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post"],
        {
            "mlp.gate.hook_out": "mlp.hook_pre",
            "mlp.in.hook_out": "mlp.hook_pre_linear",
            "mlp.out.hook_in": "mlp.hook_post",
        },
        ["mlp.hook_out"],
    ),
    "norms before and after": (
        ["ln1.hook_scale", *TAIL, "ln1_post.hook_scale", "hook_attn_out", "hook_resid_mid", "hook_mlp_out"],
        {"ln1_post.hook_out": "hook_attn_out", "ln2_post.hook_out": "hook_mlp_out", "ln2.hook_in": "hook_resid_mid"},
        ["attn.hook_out", "attn.o.hook_out", "mlp.hook_out", "mlp.out.hook_out"],
    ),
    "norms after": (
        [*TAIL, "ln1.hook_scale", "hook_attn_out", "hook_resid_mid", "hook_mlp_out"],
        {
            "ln1_post.hook_scale": "ln1.hook_scale",
            "ln1_post.hook_out": "hook_attn_out",
            "mlp.hook_in": "hook_resid_mid",
        },
        ["attn.hook_out", "ln2.hook_in"],
    ),
    "side by side": (
        ["ln1.hook_scale", *TAIL, "hook_attn_out", "ln2.hook_scale", "hook_mlp_out", "hook_resid_post"],
        {"hook_out": "hook_resid_post", "attn.hook_out": "hook_attn_out"},
        ["ln2.hook_in"],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_names_in_a_block(kind: str) -> None:
    own, theirs, absent = KINDS[kind]
    names = [f"blocks.12.{name}" for name in own]
    every = twins(names)
    assert list(every) == names
    for name, known in every.items():
        assert name in known
        for other in known:
            assert canonical(other, names) == name
    for name, meant in theirs.items():
        assert every[f"blocks.12.{meant}"][0] == f"blocks.12.{name}"
    for name in absent:
        assert canonical(f"blocks.12.{name}", names) not in names


def test_of_several_names_its_own_comes_first() -> None:
    every = twins(
        ["blocks.0.hook_attn_out", "blocks.0.hook_mlp_out", "unembed.hook_in", "unembed.hook_out", "hook_embed"]
    )
    assert [known[0] for known in every.values()] == [
        "blocks.0.attn.hook_out",
        "blocks.0.mlp.hook_out",
        "unembed.hook_in",
        "unembed.hook_out",
        "embed.hook_out",
    ]
    assert every["unembed.hook_out"] == ("unembed.hook_out", "hook_unembed")


def test_normalised_embeddings_are_those_that_are_added() -> None:
    """What the table of embeddings gives before its norm is no hook point, so that its name means nothing."""
    names = ["embed.ln.hook_scale", "embed.ln.hook_normalized", "hook_embed"]
    assert [known[0] for known in twins(names).values()] == [
        "embed_ln.hook_scale",
        "embed_ln.hook_normalized",
        "embed_ln.hook_out",
    ]
    assert canonical("embed_ln.hook_out", names) == "hook_embed"
    assert canonical("embed.hook_out", names) == "embed.hook_out"
    assert canonical("embed.hook_out", ["hook_embed"]) == "hook_embed"


def test_blooms_modules_add_the_residual_stream_themselves() -> None:
    """So that what they give is not what our names mean, and what their projections give is."""
    names = ["embed.ln.hook_scale", "hook_embed", "blocks.0.hook_attn_out", "blocks.0.hook_mlp_out"]
    every = twins(names)
    assert every["blocks.0.hook_attn_out"] == ("blocks.0.attn.o.hook_out", "blocks.0.hook_attn_out")
    assert every["blocks.0.hook_mlp_out"] == ("blocks.0.mlp.out.hook_out", "blocks.0.hook_mlp_out")
    assert canonical("blocks.0.attn.hook_out", names) == "blocks.0.attn.hook_out"
    assert canonical("blocks.0.mlp.out.hook_out", names) == "blocks.0.hook_mlp_out"


def test_a_name_that_is_none_of_theirs_stays_as_it_is() -> None:
    for name in ("blocks.1.attn.hook_z", "blocks.1.attn.q.hook_in", "embed.hook_nope", "decoder.0.hook_in"):
        assert canonical(name, ["hook_embed", "blocks.1.attn.hook_z"]) == name
