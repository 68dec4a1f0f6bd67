"""The arithmetic of weight processing, on weights by their TransformerLens names, a block at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from graphlens.file.manifest import ModelConfig
from graphlens.file.safetensors import Array

# Norm -> the matrices that read it, each with its bias.
_READ_BY: Mapping[str, tuple[tuple[str, str], ...]] = {
    "ln1": tuple((f"attn.W_{letter}", f"attn.b_{letter}") for letter in "QKV"),
    "ln2": (("mlp.W_gate", "mlp.b_gate"), ("mlp.W_in", "mlp.b_in")),
    "mlp.ln": (("mlp.W_out", "mlp.b_out"),),
    "ln_final": (("unembed.W_U", "unembed.b_U"),),
}
_NOT_CENTRED = ("mlp.W_gate",)  # TransformerLens leaves it as it is: an edit of the norm's output with a mean tells
_WRITING = ("embed.W_E", "pos_embed.W_pos", "attn.W_O", "attn.b_O", "mlp.W_out", "mlp.b_out")


def process_group(weights: Mapping[str, Array], steps: Sequence[str], config: ModelConfig) -> None:
    """Processes one group of weights in place, whatever of them it holds.

    Args:
        weights: Name in the block, or outside of blocks -> the weight; key and value weights as often as they are stored.
        steps: Which of file/processing.py's STEPS.
        config: The model's architecture.
    """
    if "fold_ln" in steps:
        for norm, readers in _READ_BY.items():
            if f"{norm}.w" in weights:
                _fold_into_experts(weights, norm)
                _fold_norm(weights, norm, readers, config.norm_centres(norm))
    centred: Sequence[str] = _WRITING if "center_writing_weights" in steps else ()
    if config.positional_embedding_type == "shortformer":  # no norm centres what its position embeddings are added to
        centred = [name for name in centred if name != "pos_embed.W_pos"]
    for name in (*centred, *(("unembed.W_U", "unembed.b_U") if "center_unembed" in steps else ())):
        if name in weights:
            _centre(weights[name], -1)
    if "attn.W_O" not in weights:
        return
    if ("fold_value_biases" in steps or "refactor_factored_attn_matrices" in steps) and "attn.b_V" in weights:
        groups = config.n_heads // config.n_key_value_heads
        values = np.repeat(weights["attn.b_V"], groups, axis=0)
        weights["attn.b_O"][...] += np.einsum("hd,hdD->D", values, weights["attn.W_O"])
        weights["attn.b_V"][...] = 0
    if "refactor_factored_attn_matrices" in steps:
        _refactor(weights)


def _centre(weight: Array, axis: int) -> None:
    """Takes the mean along an axis away, in place."""
    weight -= weight.mean(axis, keepdims=True, dtype=np.float64).astype(weight.dtype)


def _fold_norm(weights: Mapping[str, Array], norm: str, readers: Sequence[tuple[str, str]], centre: bool) -> None:
    """Moves a norm's weight and bias into the matrices that read it, in place; centres those where the norm centres."""
    for matrix, bias in readers:
        if matrix not in weights:
            continue
        if f"{norm}.b" in weights:
            weights[bias][...] += weights[f"{norm}.b"] @ weights[matrix]
        weights[matrix][...] *= weights[f"{norm}.w"][:, None]
        if centre and matrix not in _NOT_CENTRED:
            _centre(weights[matrix], -2)


def _fold_into_experts(weights: Mapping[str, Array], norm: str) -> None:
    """Moves the weight of an MLP's norm into its router and its experts, in place: matrices [outputs, d_model]."""
    for name, matrix in weights.items():
        if norm == "ln2" and name.startswith("mlp.") and name.endswith(("W_gate.weight", "W_in.weight")):
            matrix[...] *= weights[f"{norm}.w"]


def _refactor(weights: Mapping[str, Array]) -> None:
    """Rewrites each head's W_Q W_K^T and W_V W_O by their singular value decompositions, in place."""
    rank = weights["attn.W_Q"].shape[-1]
    queries, keys = (_with_bias(weights, letter) for letter in "QK")
    left, scale, right = _svd_of_product(queries, keys)
    root = np.sqrt(scale[:, None, :rank])
    for letter, factor in (("Q", left[..., :rank] * root), ("K", right[..., :rank] * root)):
        weights[f"attn.W_{letter}"][...] = factor[:, :-1]
        if f"attn.b_{letter}" in weights:  # of a bias that is not there the row is 0
            weights[f"attn.b_{letter}"][...] = factor[:, -1]
    outputs = weights["attn.W_O"].transpose(0, 2, 1).astype(np.float64)
    left, scale, right = _svd_of_product(weights["attn.W_V"].astype(np.float64), outputs)
    weights["attn.W_V"][...] = left[..., :rank] * scale[:, None, :rank]
    weights["attn.W_O"][...] = right[..., :rank].transpose(0, 2, 1)


def _with_bias(weights: Mapping[str, Array], letter: str) -> Array:
    """W_Q or W_K with its bias as a last row, [h, d_model + 1, d]."""
    matrix = weights[f"attn.W_{letter}"]
    bias = weights.get(f"attn.b_{letter}", np.zeros((len(matrix), matrix.shape[-1]), matrix.dtype))
    return np.concatenate([matrix, bias[:, None, :]], 1).astype(np.float64)


def _svd_of_product(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """The singular vectors and values of a b^T, from the small matrices that are left when a and b are made
    orthogonal: left [h, m, r], scale [h, r], right [h, n, r]."""
    (a_basis, a_core), (b_basis, b_core) = np.linalg.qr(a), np.linalg.qr(b)
    left, scale, right = np.linalg.svd(a_core @ b_core.transpose(0, 2, 1), full_matrices=False)
    return a_basis @ left, scale, b_basis @ right.transpose(0, 2, 1)
