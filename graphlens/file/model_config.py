"""The architecture of a model as a hooked file states it: plain values, under TransformerLens's names."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a model, under TransformerLens's names.

    The fields with defaults are constants of an architecture; the defaults are GPT-2's. A manifest leaves out those that
    equal their defaults, so files written before a field existed open as what they are.

    Attributes:
        model_name: The name that the model was asked for by.
        original_architecture: The Hugging Face class, e.g. ``GPT2LMHeadModel``.
        n_layers: The number of blocks.
        n_heads: The number of query heads in a block.
        n_key_value_heads: The number of key and value heads; fewer than ``n_heads`` with grouped queries.
        d_model: The width of the residual stream.
        d_head: The width of a head.
        d_mlp: The number of neurons of an MLP.
        d_vocab: The number of tokens in the vocabulary.
        n_ctx: The most tokens that a run takes.
        act_fn: The name of the MLP's activation function, as in transformers' config.
        eps: What the norms add to a variance.
        normalization_type: ``"LN"`` for LayerNorm, ``"RMS"`` for RMSNorm, ``"LNPre"`` and ``"RMSPre"`` for those without
            weights, None for no norms.
        positional_embedding_type: ``"standard"`` for learned embeddings added to the residual stream, ``"rotary"``,
            ``"alibi"``, or ``"shortformer"`` for learned ones that queries and keys alone are computed with.
        dtype: The NumPy name of the dtype of weights and activations.
        attn_only: True if the blocks have no MLP.
        gated_mlp: True if an MLP multiplies its activation by a second, linear projection.
        parallel_attn_mlp: True if attention and MLP of a block read the same residual stream.
        attention_dir: ``"causal"``, or ``"bidirectional"`` where tokens attend to later ones too.
        default_prepend_bos: True if BOS is put before a text unless the caller says otherwise.
        attn_scale: What attention scores are divided by: sqrt(d_head), unless the architecture has its own.
        attn_scores_soft_cap: The bound that tanh squeezes the scores into; -1 for none.
        output_logits_soft_cap: The same for the logits.
        output_logits_scale: What the logits are multiplied by after the unembedding, before that bound.
        use_attn_scale: False where scores are not divided.
        scale_attn_by_inverse_layer_idx: True if the scores of layer i are also divided by i + 1.
        use_local_attn: True if some layers see a window of tokens alone.
        window_size: How many tokens back a query of such a layer sees, itself included.
        attn_types: ``"local"`` or ``"global"`` for each layer, where some are local.
        use_qk_norm: True if queries and keys are normalised before rotation.
        rotary_dim: How many of a head's dimensions are rotated; None without rotary embeddings.
        rotary_base: The base of the rotation's frequencies.
        rotary_adjacent_pairs: True where neighbouring dimensions are rotated together.
        rotary_short: The most positions of an input beyond which it is rotated by other frequencies (longrope), or None.
        use_normalization_before_and_after: True if there are norms after the sublayers besides those before.
        post_norm_only: True if the norms are after the sublayers alone (OLMo-2).
        residual_norms: True if the norms of a decoder normalise the residual stream itself, after each sublayer (OPT-350m).
        post_embedding_ln: True if the embeddings are normalised.
        num_experts: The number of an MLP's experts; None for a plain MLP.
        experts_per_token: How many of them a token goes through.
        n_token_types: How many types of tokens an encoder tells apart; None for decoders.
        pre_norm_encoder: True for an encoder whose norms come before its sublayers (ModernBERT, MegatronBERT): its hook points
            have a decoder's names and order, and its residual stream is a sum.
        n_ctx_trained: The most tokens that the model was trained for, where ``n_ctx`` is lower; None where it is that.
        d_vocab_out: The number of logits: ``d_vocab``, unless the model was made with another.
        final_rms: True if the last norm is RMSNorm where the others are LayerNorm.
        image_size: The height and width of a vision model's images, in pixels; None for a model of tokens.
        patch_size: The height and width of the patches that they are cut into.
        n_channels: The number of their channels.
        late_mlp_bias: True if ``mlp.b_in`` is added to the gated activations, and not to what ``W_in`` gives.
    """

    model_name: str
    original_architecture: str
    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    act_fn: str
    eps: float
    normalization_type: str | None
    positional_embedding_type: str
    dtype: str
    attn_only: bool = field(default=False, repr=False)
    gated_mlp: bool = field(default=False, repr=False)
    parallel_attn_mlp: bool = field(default=False, repr=False)
    attention_dir: str = field(default="causal", repr=False)
    default_prepend_bos: bool = True
    attn_scale: float = field(default=-1.0, repr=False)
    attn_scores_soft_cap: float = field(default=-1.0, repr=False)
    output_logits_soft_cap: float = field(default=-1.0, repr=False)
    output_logits_scale: float = field(default=1.0, repr=False)
    use_attn_scale: bool = field(default=True, repr=False)
    scale_attn_by_inverse_layer_idx: bool = field(default=False, repr=False)
    use_local_attn: bool = field(default=False, repr=False)
    window_size: int | None = field(default=None, repr=False)
    attn_types: tuple[str, ...] | None = field(default=None, repr=False)
    use_qk_norm: bool = field(default=False, repr=False)
    rotary_dim: int | None = field(default=None, repr=False)
    rotary_base: float | None = field(default=None, repr=False)
    rotary_adjacent_pairs: bool = field(default=False, repr=False)
    rotary_short: int | None = field(default=None, repr=False)
    use_normalization_before_and_after: bool = field(default=False, repr=False)
    post_norm_only: bool = field(default=False, repr=False)
    residual_norms: bool = field(default=False, repr=False)
    post_embedding_ln: bool = field(default=False, repr=False)
    num_experts: int | None = field(default=None, repr=False)
    experts_per_token: int | None = field(default=None, repr=False)
    n_ctx_trained: int | None = field(default=None, repr=False)
    n_token_types: int | None = field(default=None, repr=False)
    d_vocab_out: int = field(default=-1, repr=False)
    final_rms: bool = field(default=False, repr=False)
    late_mlp_bias: bool = field(default=False, repr=False)
    image_size: int | None = field(default=None, repr=False)
    patch_size: int | None = field(default=None, repr=False)
    n_channels: int | None = field(default=None, repr=False)
    pre_norm_encoder: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        """Fills in what follows from the rest, as TransformerLens does."""
        if self.attn_scale == -1:
            object.__setattr__(self, "attn_scale", math.sqrt(self.d_head) if self.use_attn_scale else 1.0)
        if self.d_vocab_out == -1:
            object.__setattr__(self, "d_vocab_out", self.d_vocab)

    @property
    def is_encoder(self) -> bool:
        """True for an encoder (BERT), whose forward is another than a decoder's."""
        return self.n_token_types is not None

    @property
    def is_vision(self) -> bool:
        """True for a model of images (ViT): its vocabulary is its classes, its positions are patches behind a class token."""
        return self.image_size is not None

    @property
    def lengths(self) -> str:
        """How many tokens the model can take at most, for errors: "was trained for 1 to 1024 tokens"."""
        longest = self.n_ctx_trained or self.n_ctx
        if self.positional_embedding_type == "alibi":  # no config says
            return (
                f"takes 1 to {longest} tokens, as in TransformerLens: how long its inputs were in training is not known"
            )
        return f"was trained for 1 to {longest} tokens"

    @property
    def normalises_residual(self) -> bool:
        """True where a norm of the residual stream follows each sublayer, so that it is no sum of what was written to it."""
        return (self.is_encoder and not self.pre_norm_encoder) or self.residual_norms

    @property
    def is_causal(self) -> bool:
        """True where tokens attend to none after them."""
        return self.attention_dir == "causal"

    @property
    def centres(self) -> bool:
        """True where the norms of the blocks are LayerNorms, which subtract the mean; False for RMSNorms and for no norms."""
        return self.normalization_type is not None and self.normalization_type.startswith("LN")

    def norm_centres(self, norm: str) -> bool:
        """True if a norm subtracts the mean.

        Args:
            norm: Its name, without the block ("ln1", "mlp.ln", "ln_final").
        """
        if norm == "ln_final" and self.final_rms:
            return False
        if self.original_architecture == "HookedTransformer":  # which has these at every normalization_type
            if norm in ("mlp.ln", "embed.ln"):
                return True
            if norm.endswith(("_norm", "_post")):
                return False
        return self.centres

    @property
    def n_params(self) -> int:
        """The parameters in the matrices of attention and MLPs, without embeddings, biases and norms.

        TransformerLens's ``n_params``, except that grouped key and value heads count as often as they are stored.
        """
        attention = 2 * self.d_model * self.d_head * (self.n_heads + self.n_key_value_heads)
        mlp = 0 if self.attn_only else self.d_model * self.d_mlp * (2 + self.gated_mlp)
        return self.n_layers * (attention + (mlp + (self.d_model if self.num_experts else 0)) * (self.num_experts or 1))
