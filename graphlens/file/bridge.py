"""TransformerLens 4's names of hook points beside ours, in a block and outside, as its TransformerBridge has them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

# TransformerLens 4's own names (TransformerBridge) for the same points, in a block and outside. Of several names for one
# point the first is the one that TransformerLens 4 itself gives to what our name is an alias of.
BRIDGE_BLOCK: Mapping[str, str] = {
    "hook_in": "hook_resid_pre",
    "hook_out": "hook_resid_post",
    "ln2.hook_in": "hook_resid_mid",
    "attn.hook_out": "hook_attn_out",
    "attn.hook_attn_in": "hook_attn_in",
    "attn.hook_q_input": "hook_q_input",
    "attn.hook_k_input": "hook_k_input",
    "attn.hook_v_input": "hook_v_input",
    "attn.q.hook_out": "attn.hook_q",
    "attn.k.hook_out": "attn.hook_k",
    "attn.v.hook_out": "attn.hook_v",
    "attn.o.hook_in": "attn.hook_z",
    "attn.o.hook_out": "hook_attn_out",
    "mlp.in.hook_out": "mlp.hook_pre",
    "mlp.out.hook_in": "mlp.hook_post",
    "mlp.hook_out": "hook_mlp_out",
    "mlp.out.hook_out": "hook_mlp_out",
}
# The same where the MLP has a gate, where norms come after the sublayers too, and where they come after them alone.
BRIDGE_GATED: Mapping[str, str] = {"mlp.gate.hook_out": "mlp.hook_pre", "mlp.in.hook_out": "mlp.hook_pre_linear"}
BRIDGE_POST_NORMS: Mapping[str, str] = {"ln1_post.hook_out": "hook_attn_out", "ln2_post.hook_out": "hook_mlp_out"}
BRIDGE_LATE_NORMS: Mapping[str, str] = {
    **BRIDGE_POST_NORMS,
    "mlp.hook_in": "hook_resid_mid",
    "ln1_post.hook_scale": "ln1.hook_scale",
    "ln1_post.hook_normalized": "ln1.hook_normalized",
    "ln2_post.hook_scale": "ln2.hook_scale",
    "ln2_post.hook_normalized": "ln2.hook_normalized",
}
# And where they normalise the residual stream itself.
BRIDGE_RESIDUAL_NORMS: Mapping[str, str] = {
    "hook_out": "hook_normalized_resid_post",
    "ln1.hook_in": "hook_resid_mid",
    "ln2.hook_in": "hook_resid_post",
    "ln2.hook_out": "hook_normalized_resid_post",
}
# What a sublayer gives before such a norm, which is no hook point; and what norms that come late alone do not read.
BEFORE_POST_NORMS = frozenset({"attn.hook_out", "attn.o.hook_out", "mlp.out.hook_out", "mlp.hook_out"})
BEFORE_LATE_NORMS = frozenset({*BEFORE_POST_NORMS, "ln2.hook_in"})
BRIDGE: Mapping[str, str] = {
    "embed.hook_in": "hook_tokens",
    "embed.hook_out": "hook_embed",
    "pos_embed.hook_out": "hook_pos_embed",
    "ln_final.hook_out": "unembed.hook_in",
    "hook_unembed": "unembed.hook_out",
}
# The same where the embeddings are normalised: what is added to the residual stream comes after that.
BRIDGE_NORMED_EMBEDDINGS: Mapping[str, str] = {
    "embed_ln.hook_scale": "embed.ln.hook_scale",
    "embed_ln.hook_normalized": "embed.ln.hook_normalized",
    "embed_ln.hook_out": "hook_embed",
}
# There the modules of attention and MLP add the residual stream themselves, and what they give is no hook point.
AFTER_RESIDUALS = frozenset({"attn.hook_out", "mlp.hook_out"})
# Of our names, those that TransformerLens 4 calls the point by too, though it has another that comes to the same.
_SAME = frozenset({"unembed.hook_in", "unembed.hook_out"})
_INSIDE = frozenset({*BRIDGE_BLOCK, *BRIDGE_GATED, *BRIDGE_LATE_NORMS, *BRIDGE_RESIDUAL_NORMS})
_OUTSIDE = frozenset({*BRIDGE, *BRIDGE_NORMED_EMBEDDINGS})


def inside(own: Sequence[str], normed_embeddings: bool) -> dict[str, str]:
    """TransformerLens 4's names in a block -> ours.

    Args:
        own: The block's hook points, without ``blocks.N.``, in firing order: what some names mean depends on the
            architecture. None of them gives what the names mean in most.
        normed_embeddings: Whether the model normalises its embeddings.
    """
    table = dict(BRIDGE_BLOCK)
    if normed_embeddings:
        table = {key: value for key, value in table.items() if key not in AFTER_RESIDUALS}
    if "mlp.hook_pre_linear" in own:
        table |= BRIDGE_GATED
    whole = {"attn.hook_z", "hook_attn_out"} <= set(own)
    late = whole and "ln1.hook_scale" in own[own.index("attn.hook_z") : own.index("hook_attn_out")]
    if "hook_normalized_resid_post" in own:
        table |= BRIDGE_RESIDUAL_NORMS
    if late or "ln1_post.hook_scale" in own:
        before = BEFORE_LATE_NORMS if late else BEFORE_POST_NORMS
        table = {key: value for key, value in table.items() if key not in before}
        table |= BRIDGE_LATE_NORMS if late else BRIDGE_POST_NORMS
    return table


def outside(names: Collection[str]) -> dict[str, str]:
    """TransformerLens 4's names outside the blocks -> ours.

    Args:
        names: The model's hook points.
    """
    if not has_normed_embeddings(names):
        return dict(BRIDGE)
    return {key: value for key, value in BRIDGE.items() if value != "hook_embed"} | dict(BRIDGE_NORMED_EMBEDDINGS)


def has_normed_embeddings(names: Collection[str]) -> bool:
    """True if a model normalises its embeddings, as Bloom does.

    Args:
        names: The model's hook points.
    """
    return "embed.ln.hook_scale" in names


def is_bridges(rest: str, in_block: bool) -> bool:
    """True if a name, without ``blocks.N.``, is one of TransformerLens 4's in some architecture.

    Args:
        rest: The name.
        in_block: Whether it is a block's.
    """
    return rest in (_INSIDE if in_block else _OUTSIDE)


def twins(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Each hook point of a model -> all its names, the one that TransformerLens 4 calls the point by first.

    >>> twins(["hook_embed", "blocks.0.attn.hook_q", "blocks.0.attn.hook_pattern"])["blocks.0.attn.hook_q"]
    ('blocks.0.attn.q.hook_out', 'blocks.0.attn.hook_q')

    Args:
        names: The model's hook points, in firing order.
    """
    blocks: dict[str, list[str]] = {}
    for name in names:
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            blocks.setdefault(f"blocks.{layer}.", []).append(rest)
    found: dict[str, list[str]] = {name: [] for name in names}
    normed = has_normed_embeddings(names)
    tables = [("", outside(names)), *((block, inside(own, normed)) for block, own in blocks.items())]
    for prefix, table in tables:
        for theirs, ours in table.items():
            if prefix + ours in found:
                found[prefix + ours].append(prefix + theirs)
    return {name: (name, *theirs) if name in _SAME else (*theirs, name) for name, theirs in found.items()}
