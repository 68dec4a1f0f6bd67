"""Attention and MLP of a block as the hook points and weights that their parts lie between, for every architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from graphlens.file.manifest import ModelConfig
from graphlens.file.names import in_block
from graphlens.file.residual import sums_in_block

Pair = tuple[str, str]
"""A matrix and its bias, by their TransformerLens names; a model may lack the bias."""


@dataclass(frozen=True)
class Sublayer:
    """What a sublayer computes, from the residual stream and back: a norm, matrices, a matrix, perhaps a norm.

    Attributes:
        residual: The hook point of the residual stream that it reads.
        norm: The norm that reads it; None where the matrices do.
        readers: The hook point of each first matrix's output -> the matrix and its bias.
        inner: The hook point that the last matrix reads.
        out: The last matrix and its bias.
        post: The norm of what it gives; None for none.
        late: What the matrices of some readers read besides, added after the norm: the reader's hook point -> its hook point.
        inner_norm: The norm whose output the last matrix reads, between its activation function and ``inner``; None for none.
        written: The hook point of what is added to the residual stream.
    """

    residual: str
    norm: str | None
    readers: Mapping[str, Pair]
    inner: str
    out: Pair
    post: str | None
    written: str
    inner_norm: str | None = None
    late: Mapping[str, str] = field(default_factory=dict)

    @property
    def start(self) -> str:
        """The hook point that the first matrices read, but for the norm's weights."""
        return self.residual if self.norm is None else f"{self.norm}.hook_normalized"

    def weights(self, hook: str) -> list[str]:
        """The names of what lies between ``start`` and the hook point of a first matrix's output."""
        return [*([] if self.norm is None else norm_weights(self.norm)), *self.readers[hook]]


def norm_weights(norm: str) -> list[str]:
    """The names of a norm's weight and bias."""
    return [f"{norm}.w", f"{norm}.b"]


def sublayers(config: ModelConfig, layer: int) -> list[Sublayer]:
    """Attention and, where there is one, the MLP of a block.

    Args:
        config: The model's architecture.
        layer: The block.
    """

    def pair(part: str, leaf: str) -> Pair:
        return in_block(layer, f"{part}.W_{leaf}"), in_block(layer, f"{part}.b_{leaf}")

    def norms(name: str) -> tuple[str | None, str | None]:
        """(the norm before, the norm after)."""
        before = in_block(layer, name)
        if config.normalization_type is None:
            return None, None
        if config.normalises_residual:  # ln1, after the first sum, is what the MLP reads
            return (None if name == "ln1" else in_block(layer, "ln1")), None
        if config.post_norm_only:
            return None, before
        return before, f"{before}_post" if config.use_normalization_before_and_after else None

    before, after = norms("ln1")
    placed = [in_block(layer, f"attn.hook_{letter}") for letter in "qk"]
    attention = Sublayer(
        residual=in_block(layer, "hook_resid_pre"),
        norm=before,
        readers={in_block(layer, f"attn.hook_{letter}"): pair("attn", letter.upper()) for letter in "qkv"},
        inner=in_block(layer, "attn.hook_z"),
        out=pair("attn", "O"),
        post=after,
        written=in_block(layer, "hook_attn_out"),
        late=dict.fromkeys(placed, "hook_pos_embed") if config.positional_embedding_type == "shortformer" else {},
    )
    if config.attn_only:
        return [attention]
    before, after = norms("ln2")
    entries = {"hook_pre": "gate", "hook_pre_linear": "in"} if config.gated_mlp else {"hook_pre": "in"}
    readers = {in_block(layer, f"mlp.{hook}"): pair("mlp", leaf) for hook, leaf in entries.items()}
    if config.late_mlp_bias:  # no weight has this name: b_in comes after the product
        readers[in_block(layer, "mlp.hook_pre_linear")] = in_block(layer, "mlp.W_in"), in_block(layer, "mlp.b_linear")
    mlp = Sublayer(
        residual=in_block(layer, "hook_resid_pre" if config.parallel_attn_mlp else "hook_resid_mid"),
        norm=before,
        readers=readers,
        inner=in_block(layer, "mlp.hook_post"),
        out=pair("mlp", "out"),
        post=after,
        written=in_block(layer, "hook_mlp_out"),
        inner_norm=in_block(layer, "mlp.ln") if config.act_fn == "solu_ln" else None,
    )
    return [attention, mlp]


def sums(config: ModelConfig, layer: int) -> dict[str, list[str]]:
    """The hook points of the residual stream in a block that are sums -> what each is the sum of."""
    return {
        in_block(layer, total): [in_block(layer, term) for term in terms]
        for total, terms in sums_in_block(config).items()
    }
