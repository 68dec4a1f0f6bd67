"""The architecture that the structure of a graph says."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from graphlens.surgery.match.embeddings import rows_of
from graphlens.surgery.match.masks import Mask, Masks
from graphlens.surgery.match.parts import Block, Found
from graphlens.surgery.match.positions import offset_of
from graphlens.surgery.match.records import Kind, MatchedWeight, Number
from graphlens.surgery.match.rotations import base_of, trained_tokens
from graphlens.surgery.match.wires import Wires

_NEAR = 1e-4


def kind_of(found: Found) -> Kind:
    """What kind of transformer was found: "decoder", "encoder" or "vision".

    Args:
        found: It.
    """
    if found.beginning.pixels is not None:
        return "vision"
    # An encoder by TransformerLens's names is BERT: its norms are of the residual stream itself. One with norms before its
    # sublayers (ModernBERT) has a decoder's hook points, and attends both ways.
    if not found.blocks[0].normalises:
        return "decoder"
    told = found.ending.dense is not None or found.beginning.types is not None
    causal = Masks(found.wires).of(found.blocks[0].attention.core).causal
    return "encoder" if told or not causal else "decoder"


def config_of(found: Found, kind: Kind, weights: Mapping[str, MatchedWeight]) -> tuple[dict[str, Number], list[str]]:
    """Fields of ``ModelConfig`` that structure says, and "tied": True if the unembedding is the token embedding.

    Args:
        found: The transformer.
        kind: Which kind it is.
        weights: Its weights.

    Returns:
        (the fields, what else a reader should know)
    """
    block, notes = found.blocks[0], list[str]()
    masks = Masks(found.wires)
    config: dict[str, Number] = {"n_layers": len(found.blocks)}
    config |= _sizes(found, block, kind)
    config |= _norms(found, block, kind)
    config |= _mlp(block)
    config |= _scores(found, notes)
    config |= _sight([masks.of(one.attention.core) for one in found.blocks], kind, notes)
    config |= _positions(found, block, masks, notes)
    if found.ending.soft_cap is not None:
        config["output_logits_soft_cap"] = _rounded(found.ending.soft_cap)
    if found.ending.times != 1:
        config["output_logits_scale"] = _rounded(found.ending.times)
    tied = _tied(found.wires, weights)
    if tied is not None:
        config["tied"] = tied
    return config, notes


def _rounded(number: float) -> float:
    """A number of float32 as it was meant."""
    return float(f"{number:.7g}")


def _sizes(found: Found, block: Block, kind: Kind) -> dict[str, Number]:
    wires, begin, end = found.wires, found.beginning, found.ending
    width = (wires.shape(block.pre) or (0,))[-1]
    z = wires.shape(block.attention.core.z) or (0,)
    sizes: dict[str, Number] = {
        "n_heads": found.heads,
        "n_key_value_heads": found.heads // max(1, block.attention.k.repeats),
        "d_model": width,
        "d_head": z[-1],
        "dtype": _dtype(found),
    }
    if block.mlp is not None:
        sizes["d_mlp"] = (wires.shape(block.mlp.post) or (0,))[-1]
    else:
        sizes["attn_only"], sizes["d_mlp"] = True, 0
    out = None if end.unembed is None else wires.shape(end.unembed.out)
    if kind == "vision":
        sizes |= {"d_vocab": out[-1]} if out else {}
        sizes["n_ctx"] = found.tokens
        return sizes
    rows = rows_of(wires, begin.tokens)
    if rows is not None:
        sizes["d_vocab"] = rows
        if out is not None and out[-1] != rows:
            sizes["d_vocab_out"] = out[-1]
    table = None if begin.positions is None else wires.shape(begin.positions.table)
    if begin.positions is not None and table is not None:
        sizes["n_ctx"] = table[-2] - (offset_of(wires, begin.positions) or 0)
    if begin.types is not None and (types := wires.shape(begin.types.table)) is not None:
        sizes["n_token_types"] = types[0]
    return sizes


def _dtype(found: Found) -> str:
    """The dtype that the residual stream has."""
    for value in (found.blocks[0].pre, found.blocks[0].post, found.beginning.whole):
        if value.dtype is not None and value.dtype.is_floating_point():
            return str(value.dtype.numpy())
    return "float32"


def _norms(found: Found, block: Block, kind: Kind) -> dict[str, Number]:
    fields: dict[str, Number] = {}
    last, mlp = found.ending.norm, block.mlp
    late = mlp is not None and mlp.branch.post is not None
    own = [
        normed
        for normed in (block.ln1, block.ln2, block.attn.post, mlp.branch.post if mlp is not None else None)
        if normed
    ]
    known = own or ([last] if last is not None else [])
    if not known:
        return {"normalization_type": None}
    norm = known[0].norm
    plain = all(one.affine.weight is None for one in known)
    fields["normalization_type"] = ("LN" if norm.centred else "RMS") + ("Pre" if plain else "")
    fields["eps"] = _rounded(norm.eps)
    if last is not None and norm.centred and not last.norm.centred:
        fields["final_rms"] = True
    if block.normalises:
        if kind != "encoder":
            fields["residual_norms"] = True
    elif block.attn.post is not None or late:
        fields["use_normalization_before_and_after" if block.ln1 is not None else "post_norm_only"] = True
    if found.beginning.norm is not None:
        fields["post_embedding_ln"] = True
    if block.attention.q.normed is not None:
        fields["use_qk_norm"] = True
    return fields


def _mlp(block: Block) -> dict[str, Number]:
    fields: dict[str, Number] = {}
    if block.mlp is not None:
        if block.mlp.act_fn is not None:
            fields["act_fn"] = block.mlp.act_fn
        if block.mlp.pre_linear is not None:
            fields["gated_mlp"] = True
    if block.parallel:
        fields["parallel_attn_mlp"] = True
    return fields


def _scores(found: Found, notes: list[str]) -> dict[str, Number]:
    """What scores are divided by, and their bound."""
    fields: dict[str, Number] = {}
    scales = [
        1 / (block.attention.core.scale * block.attention.q.scale * block.attention.k.scale) for block in found.blocks
    ]
    first = scales[0]
    if all(math.isclose(one, first, rel_tol=_NEAR) for one in scales):
        fields["attn_scale"] = _rounded(first)
        size = (found.wires.shape(found.blocks[0].attention.core.z) or (0,))[-1]
        if math.isclose(first, math.sqrt(size), rel_tol=_NEAR):
            fields["attn_scale"] = math.sqrt(size)
        elif math.isclose(first**2, round(first**2), rel_tol=1e-6) and round(first**2) > 1:
            fields["attn_scale"] = math.sqrt(round(first**2))
        elif math.isclose(first, 1, rel_tol=_NEAR):
            fields["attn_scale"] = 1.0
            fields["use_attn_scale"] = False
    elif all(math.isclose(one, first * (layer + 1), rel_tol=_NEAR) for layer, one in enumerate(scales)):
        fields["attn_scale"], fields["scale_attn_by_inverse_layer_idx"] = _rounded(first), True
    else:
        notes.append("what scores are divided by differs between layers")
    cap = found.blocks[0].attention.core.soft_cap
    if cap is not None:
        fields["attn_scores_soft_cap"] = _rounded(cap)
    return fields


def _sight(masks: list[Mask], kind: Kind, notes: list[str]) -> dict[str, Number]:
    """Which tokens attention sees."""
    fields: dict[str, Number] = {}
    causal = [mask.causal for mask in masks]
    fields["attention_dir"] = "causal" if all(causal) and kind != "vision" else "bidirectional"
    windows = {mask.window for mask in masks if mask.window is not None}
    if len(windows) == 1:
        fields["use_local_attn"], fields["window_size"] = True, next(iter(windows))
        fields["attn_types"] = tuple("local" if mask.window is not None else "global" for mask in masks)
    elif windows:
        notes.append("the windows of local attention differ between layers: " + ", ".join(map(str, sorted(windows))))
    if any(mask.biased or (mask.sloped and kind == "vision") for mask in masks):
        notes.append("a relative position bias is added to attn.hook_attn_scores")
    return fields


def _positions(found: Found, block: Block, masks: Masks, notes: list[str]) -> dict[str, Number]:
    rotation = block.attention.q.rotation
    if rotation is not None:
        fields: dict[str, Number] = {"positional_embedding_type": "rotary", "rotary_dim": rotation.dimensions}
        bases = _bases(found, masks)
        if bases:
            fields["rotary_base"] = bases[-1]
            if len(bases) > 1:
                notes.append(
                    "the base of the rotation differs between layers: " + ", ".join(f"{base:g}" for base in bases)
                )
        else:
            notes.append(
                "the frequencies of the rotation are no powers of one base that can be read, so rotary_base is not set"
            )
        if rotation.adjacent is None:
            notes.append("which dimensions are rotated together cannot be told, so rotary_adjacent_pairs is not set")
        elif rotation.adjacent:
            fields["rotary_adjacent_pairs"] = True
        rows = trained_tokens(found.wires, rotation)
        return fields | ({"n_ctx": rows} if rows is not None else {})
    if found.beginning.positions is not None:
        return {"positional_embedding_type": "standard"}
    if masks.of(block.attention.core).sloped and found.beginning.pixels is None:
        notes.append(
            "alibi: scores differ from TransformerLens's by a number for each query, which the pattern does not show"
        )
        return {"positional_embedding_type": "alibi"}
    return {}


def _bases(found: Found, masks: Masks) -> list[float]:
    """The bases of all layers' rotations, those of layers that see all tokens last; none where one cannot be read."""
    known: dict[tuple[ir.Value, ...], float | None] = {}
    bases: dict[float, bool] = {}
    for block in found.blocks:
        rotation = block.attention.q.rotation
        if rotation is None:  # some models rotate in some layers only
            continue
        if rotation.angles not in known:
            known[rotation.angles] = base_of(found.wires, rotation)
        base = known[rotation.angles]
        if base is None:
            return []
        bases[base] = bases.get(base, False) or masks.of(block.attention.core).window is None
    return sorted(bases, key=lambda base: bases[base])


def _tied(wires: Wires, weights: Mapping[str, MatchedWeight]) -> bool | None:
    """True if embedding and unembedding are one initializer, or two with the same content; None if one is not known."""
    embed = weights.get("embed.W_E") or weights.get("embed.embed.W_E")
    unembed = weights.get("unembed.W_U")
    if embed is None or unembed is None:
        return None
    if embed.tensor == unembed.tensor:
        return True
    if embed.quantised is not None or unembed.quantised is not None:
        return False
    tables: list[ir.Value] = [wires.graph.initializers[one.tensor] for one in (embed, unembed)]
    numbers = [None if table.const_value is None else table.const_value.numpy() for table in tables]
    if numbers[0] is None or numbers[1] is None:
        return None
    first = numbers[0]
    second = numbers[1].T if unembed.permute is None else numbers[1]
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return bool(np.array_equal(first[:1], second[:1]) and np.array_equal(first, second))
