"""A model's forward as data: which computation each part of its blocks does, and where its parameters lie.

Module paths are those of the transformers model, without the list index of a block; those of a block's parts are relative
to the block. A Spec holds no torch: names and numbers alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Layout = Literal["parts", "heads", "groups"]


@dataclass(frozen=True)
class Norms:
    """How a model normalises.

    Attributes:
        kind: ``"LN"`` subtracts the mean, ``"RMS"`` does not.
        eps: What is added to the variance.
        plus_one: True where the stored weight is the factor less 1, as in Gemma.
        bare: True where the norms have neither weight nor bias (TransformerLens's LNPre); only of modules of our own.
    """

    kind: Literal["LN", "RMS"]
    eps: float
    plus_one: bool = False
    bare: bool = False


@dataclass(frozen=True)
class Rotary:
    """Rotary position embeddings.

    Attributes:
        module: The path of the module of the model that gives cosines and sines, or the name of a buffer in each attention
            that holds the sines and cosines of all positions side by side.
        size: How many of a head's dimensions are rotated.
        base: The base of the frequencies, that of global layers where several.
        in_attention: True where ``module`` is such a buffer.
        pairs: True where neighbouring dimensions are rotated together (GPT-J), and not those half a head apart.
        types: The kind of rotation of each layer, where the module has several; empty for one kind.
        skipped: Layers whose queries and keys are not rotated.
        short: The most positions for which the module's frequencies hold; beyond them, those of a long input. None where
            they do not depend on the length.
        bases: Of modules of our own: the kind of rotation -> the base of its frequencies, and what positions are divided by.
    """

    module: str
    size: int
    base: float | None = None
    in_attention: bool = False
    pairs: bool = False
    types: tuple[str, ...] = ()
    skipped: frozenset[int] = frozenset()
    short: int | None = None
    bases: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Attention:
    """The attention of a block.

    Attributes:
        n_heads: How many heads there are.
        n_key_value_heads: How many of keys and values.
        d_head: Their width.
        scale: What the scores are multiplied by.
        module: The path of the module in the block.
        q: The query's matrix in it, where it is one of its own.
        k: The key's.
        v: The value's.
        fused: The matrix of all three, where they share one.
        layout: How the rows of the fused matrix are ordered: ``"parts"`` all queries, all keys, all values; ``"heads"`` a
            query, a key and a value for each head; ``"groups"`` the queries, the key and the value of each group of heads.
        out: The output's matrix.
        by_layer: True if the scores of layer i are also divided by i + 1.
        q_norm: The norm of the queries in the module, or None.
        k_norm: The norm of the keys.
        norm_of_all: True if those norms are over all heads together, not over each head.
        softcap: The bound that tanh squeezes the scores into, or None.
        clip: The bound that queries, keys and values are cut to, or None.
        alibi: What a bias of (key - query) times each head's slope is multiplied by; None for no such bias.
        even_slopes: True where the slopes are powers of one number for any number of heads, as in TransformerLens.
        rotary: Rotary position embeddings, or None.
        window: How many tokens back a query of a local layer sees, itself included; None for no local layers.
        local: The layers that see a window alone.
    """

    n_heads: int
    n_key_value_heads: int
    d_head: int
    scale: float
    module: str = "self_attn"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    fused: str | None = None
    layout: Layout = "parts"
    out: str = "o_proj"
    by_layer: bool = False
    q_norm: str | None = None
    k_norm: str | None = None
    norm_of_all: bool = False
    softcap: float | None = None
    clip: float | None = None
    alibi: float | None = None
    even_slopes: bool = False
    rotary: Rotary | None = None
    window: int | None = None
    local: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Experts:
    """The gated MLPs of a block, of which each token goes through some, as checkpoints store them.

    Attributes:
        count: How many there are.
        chosen: How many of them a token goes through. Their weights are made to sum to 1.
        fused: The module of transformers' block that holds the same in other tensors, and is not used.
        router: The path of the router in the MLP's module.
        each: The path of the list of experts in it. Each has the matrices that the Mlp names.
    """

    count: int
    chosen: int
    fused: str = "mlp"
    router: str = "gate"
    each: str = "experts"


@dataclass(frozen=True)
class Mlp:
    """The MLP of a block.

    Attributes:
        size: The number of its neurons.
        act: The name of its activation function in transformers.
        module: The path of the module in the block; "" where the block holds the matrices itself.
        gate: The gate's matrix; None for no gate.
        up: The first matrix, or the one beside the gate.
        gate_up: The matrix of both, gate first, where they share one.
        down: The last matrix.
        experts: The experts, each with a gate, a first and a last matrix and no biases; None for a single MLP.
        norm: The norm of the activations in the module (TransformerLens's ``solu_ln``), or None.
        late_bias: What holds the bias that is added to the gated activations, where the matrices have none; None otherwise.
    """

    size: int
    act: str
    module: str = "mlp"
    gate: str | None = None
    up: str = "up_proj"
    gate_up: str | None = None
    down: str = "down_proj"
    experts: Experts | None = None
    norm: str | None = None
    late_bias: str | None = None

    @property
    def gated(self) -> bool:
        """True if the activation is multiplied by a second, linear projection."""
        return self.gate is not None or self.gate_up is not None


@dataclass(frozen=True)
class EncoderParts:
    """What an encoder has that a decoder has not (BERT): token types, and a matrix before its last norm.

    Its attention looks both ways, its norms normalise the residual stream itself, after each sublayer.

    Attributes:
        token_types: The path of the embedding of token types.
        n_token_types: How many types there are.
        dense: The path of that matrix.
        act: The name of the activation function after it, in transformers.
        padding: The id of the PAD token, where positions are counted without it and begin at the row after it (RoBERTa);
            None where a token's position is its index.
    """

    token_types: str
    n_token_types: int
    dense: str
    act: str
    padding: int | None = None


@dataclass(frozen=True)
class Spec:
    """What a model computes, and where its parameters lie.

    Attributes:
        n_layers: The number of blocks.
        d_model: The width of the residual stream.
        d_vocab: The number of tokens.
        n_ctx: The most tokens that the model can take.
        norms: How it normalises.
        attention: The attention of its blocks.
        mlp: Their MLP.
        blocks: The path of the list of blocks.
        embed: The path of the token embedding.
        final_norm: The path of the norm before the unembedding; None for none.
        ln1: The norm of what attention reads, or of what it gives where ``post_norm_only``; None for none.
        ln2: The same for the MLP. The same path as ``ln1`` where one module serves both: still two norms here.
        head: The path of the unembedding.
        embed_in: The path of a matrix from the token embeddings to the residual stream, where they are of another width; None
            for none.
        head_in: The path of a matrix from the residual stream to what ``head`` reads; None for none.
        embed_norm: The path of a norm of the embeddings, or None.
        embed_scale: What the embeddings are multiplied by.
        pos_embed: The path of the learned position embeddings, or None.
        pos_offset: The row of position 0 in them.
        ln1_post: The norm of attention's output besides ``ln1``, or None.
        ln2_post: The norm of the MLP's output.
        post_norm_only: True where ``ln1`` and ``ln2`` come after the sublayers and none before (OLMo-2).
        residual_norms: True where ``ln1`` and ``ln2`` come after the sublayers too, and normalise the residual stream with
            what the sublayer added to it (OPT-350m; encoders do so whatever this says).
        parallel: True if attention and MLP read the same residual stream.
        residual_scale: What a sublayer's output is multiplied by before it is added.
        logit_scale: What the logits are multiplied by after ``unembed.hook_out``.
        logit_softcap: The bound that tanh squeezes the logits into after that, or None.
        transposed: True where matrices are stored [input, output] (GPT-2's Conv1D).
        encoder: What makes it an encoder; None for a decoder. ``final_norm`` is then the last norm of the masked-language head.
        other_norms: The path of a norm, in the block or in the model -> how it normalises, where that is otherwise.
        attn_only: True if the blocks have no MLP; ``mlp`` then says nothing.
        late_positions: True if position embeddings are added to what queries and keys are computed from, after the norm, and
            not to the residual stream (TransformerLens's shortformer).
        bidirectional: True if tokens attend to later ones too, and to padding.
        d_vocab_out: The number of logits, where it is not ``d_vocab``.
        own: True if the modules are of ``export/modules.py``, which the Spec alone decides, and not of transformers.
    """

    n_layers: int
    d_model: int
    d_vocab: int
    n_ctx: int
    norms: Norms
    attention: Attention
    mlp: Mlp
    blocks: str = "model.layers"
    embed: str = "model.embed_tokens"
    final_norm: str | None = "model.norm"
    ln1: str | None = "input_layernorm"
    ln2: str | None = "post_attention_layernorm"
    head: str = "lm_head"
    embed_in: str | None = None
    head_in: str | None = None
    embed_norm: str | None = None
    embed_scale: float = 1.0
    pos_embed: str | None = None
    pos_offset: int = 0
    ln1_post: str | None = None
    ln2_post: str | None = None
    post_norm_only: bool = False
    residual_norms: bool = False
    parallel: bool = False
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    transposed: bool = False
    encoder: EncoderParts | None = None
    other_norms: Mapping[str, Norms] = field(default_factory=dict)
    attn_only: bool = False
    late_positions: bool = False
    bidirectional: bool = False
    d_vocab_out: int | None = None
    own: bool = False
