"""Modules of our own for models that transformers does not know: parameters alone, which a Spec decides, for Decoder to read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphlens.export.families import Norms, Rotary, Spec

EMBED, POSITIONS, EMBED_NORM, BLOCKS, ROTARY = "embed", "pos_embed", "embed_ln", "blocks", "rotary"


class _Matrix(nn.Module):
    """A matrix [inputs, outputs] and, if wanted, its bias [outputs]."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None


class _Bias(nn.Module):
    """A bias [size] and nothing else."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size))


class _Rotary(nn.Module):
    """Cosines and sines of rotary embeddings, with frequencies of their own for each kind of layer."""

    def __init__(self, rotary: Rotary) -> None:
        super().__init__()
        self.pairs = rotary.pairs
        for kind, (base, factor) in rotary.bases.items():
            # In the order of TransformerLens's arithmetic, for the same rounding.
            wave = base ** (torch.arange(rotary.size // 2, dtype=torch.float32) / (rotary.size / 2)) * factor
            self.register_buffer(f"wave_{kind}", wave, persistent=False)

    def forward(self, x: Tensor, positions: Tensor, kind: str = "") -> tuple[Tensor, Tensor]:
        """Cosines and sines [b, p, r] of positions [b, p], in the dtype of ``x``."""
        wave = getattr(self, f"wave_{kind}")
        angles = positions.unsqueeze(-1).to(wave.dtype) / wave
        angles = angles.repeat_interleave(2, -1) if self.pairs else torch.cat([angles, angles], -1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def _norm(norms: Norms, size: int) -> nn.Module:
    """The parameters of a norm."""
    module = nn.Module()
    if not norms.bare:
        module.weight = nn.Parameter(torch.ones(size))
        if norms.kind == "LN":
            module.bias = nn.Parameter(torch.zeros(size))
    return module


def _block(spec: Spec) -> nn.Module:
    """The modules of a block."""
    block, attn, a = nn.Module(), nn.Module(), spec.attention

    def norm(root: nn.Module, path: str | None, size: int, full: str | None = None) -> None:
        if path is not None:
            root.add_module(path, _norm(spec.other_norms.get(full or path, spec.norms), size))

    norm(block, spec.ln1, spec.d_model)
    norm(block, spec.ln1_post, spec.d_model)
    for path, heads in ((a.q, a.n_heads), (a.k, a.n_key_value_heads), (a.v, a.n_key_value_heads)):
        attn.add_module(path, _Matrix(spec.d_model, heads * a.d_head))
    for normed in (a.q_norm, a.k_norm):
        norm(attn, normed, a.d_head, f"{a.module}.{normed}")
    attn.add_module(a.out, _Matrix(a.n_heads * a.d_head, spec.d_model))
    block.add_module(a.module, attn)
    if spec.attn_only:
        return block
    mlp, size = nn.Module(), spec.mlp.size
    norm(block, spec.ln2, spec.d_model)
    norm(block, spec.ln2_post, spec.d_model)
    bias = spec.mlp.late_bias is None
    for first in (spec.mlp.gate, spec.mlp.up):
        if first is not None:
            mlp.add_module(first, _Matrix(spec.d_model, size, bias=bias))
    if spec.mlp.late_bias is not None:
        mlp.add_module(spec.mlp.late_bias, _Bias(size))
    norm(mlp, spec.mlp.norm, size, f"{spec.mlp.module}.{spec.mlp.norm}")
    mlp.add_module(spec.mlp.down, _Matrix(size, spec.d_model))
    block.add_module(spec.mlp.module, mlp)
    return block


def own_model(spec: Spec) -> nn.Module:
    """The modules of a model, at the paths that its Spec names, as transformers' model would have them.

    Args:
        spec: What the model computes; ``spec.own`` is set.
    """
    model = nn.Module()
    model.add_module(spec.embed, nn.Embedding(spec.d_vocab, spec.d_model))
    if spec.embed_norm is not None:
        model.add_module(spec.embed_norm, _norm(spec.other_norms.get(spec.embed_norm, spec.norms), spec.d_model))
    if spec.pos_embed is not None:
        model.add_module(spec.pos_embed, nn.Embedding(spec.n_ctx, spec.d_model))
    if spec.attention.rotary is not None:
        model.add_module(spec.attention.rotary.module, _Rotary(spec.attention.rotary))
    model.add_module(spec.blocks, nn.ModuleList(_block(spec) for _ in range(spec.n_layers)))
    if spec.final_norm is not None:
        model.add_module(spec.final_norm, _norm(spec.other_norms.get(spec.final_norm, spec.norms), spec.d_model))
    model.add_module(spec.head, nn.Linear(spec.d_model, spec.d_vocab_out or spec.d_vocab))
    return model
