"""The weights of HookedEncoder, where they have other names than a decoder's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from graphlens.analysis.arrays import ArrayInput, ArrayT, UserArray
from graphlens.errors import InputError
from graphlens.file.names import block_name
from graphlens.model.calls import call_block, of_additive
from graphlens.model.hooks import HookPoint
from graphlens.model.methods.weights import WeightMethods
from graphlens.model.parts import Block, Component, Embed, Norm, PosEmbed


@dataclass(frozen=True, repr=False)
class EncoderEmbed(Embed[ArrayT]):
    """The embeddings of an encoder, normalised: ``embed``, ``pos_embed`` and ``token_type_embed``, and the norm ``ln``.

    Of an encoder with a decoder's blocks too (``cfg.pre_norm_encoder``), whose weights have a decoder's names.
    """

    @property
    def embed(self) -> Component[ArrayT]:
        """The token embedding: ``W_E`` [d_vocab, d_model]."""
        decoder = self._runner.config.pre_norm_encoder
        return Component(self._runner, self._prefix if decoder else f"{self._prefix}.embed")

    @property
    def pos_embed(self) -> PosEmbed[ArrayT]:
        """The positional embedding: ``W_pos`` [n_ctx, d_model]."""
        decoder = self._runner.config.pre_norm_encoder
        return PosEmbed(self._runner, "pos_embed" if decoder else f"{self._prefix}.pos_embed")

    @property
    def token_type_embed(self) -> Component[ArrayT]:
        """The embedding of token types: ``W_token_type`` [n_token_types, d_model]."""
        return Component(self._runner, f"{self._prefix}.token_type_embed")

    def __call__(self, *args: object, **options: object) -> NoReturn:
        """Refused: the embeddings of a run are a hook point. Raises InputError."""
        hook = "blocks.0.hook_resid_pre" if self._runner.config.pre_norm_encoder else "hook_full_embed"
        raise InputError(f"model.embed is not called on an encoder: run_with_cache(..., names_filter={hook!r}).")


@dataclass(frozen=True, repr=False)
class EncoderBlock(Block[ArrayT]):
    """One layer of an encoder."""

    def __call__(  # type: ignore[override]
        self,
        resid_pre: ArrayT,
        additive_attention_mask: ArrayInput | UserArray | None = None,
        attention_mask: ArrayInput | UserArray | None = None,
    ) -> ArrayT:
        """The residual stream after this block, normalised. Its hooks and interventions are called.

        Args:
            resid_pre: The residual stream before it, [b, p, d_model].
            additive_attention_mask: [b, 1, 1, p], 0 at real tokens and -inf at padding.
            attention_mask: The same as int [b, p], 1 at real tokens and 0 at padding.

        Returns:
            [b, p, d_model].

        Raises:
            InputError: For inputs that do not fit.
        """
        if additive_attention_mask is not None:
            attention_mask = of_additive(additive_attention_mask, self._prefix)
        return call_block(self._runner, self._layer, resid_pre, None, attention_mask)


@dataclass(frozen=True, repr=False)
class MlmHead(Component[ArrayT]):
    """The head before the unembedding: ``W`` [d_model, d_model], ``b`` [d_model], an activation function, and the norm ``ln``."""

    @property
    def ln(self) -> Norm[ArrayT]:
        """The last norm."""
        return Norm(self._runner, f"{self._prefix}.ln")


class EncoderWeightMethods(WeightMethods[ArrayT]):
    """The part of HookedEncoder that reads and sets weights; see WeightMethods."""

    @property
    def embed(self) -> EncoderEmbed[ArrayT]:
        """The embeddings and their norm."""
        return EncoderEmbed(self.runner, "embed")

    @property
    def pos_embed(self) -> PosEmbed[ArrayT]:
        """The positional embedding, with ``W_pos``. TransformerLens: ``embed.pos_embed``."""
        return self.embed.pos_embed

    @property
    def blocks(self) -> list[EncoderBlock[ArrayT]]:  # type: ignore[override]
        """The layers; see ``EncoderBlock``."""
        return [EncoderBlock(self.runner, block_name(layer)) for layer in range(self.runner.config.n_layers)]

    @property
    def mlm_head(self) -> MlmHead[ArrayT]:
        """The masked-language head, but for the unembedding."""
        return MlmHead(self.runner, "mlm_head")

    @property
    def hook_full_embed(self) -> HookPoint:
        """The hook point of that name."""
        return self.runner.hooks.need("hook_full_embed")

    @property
    def ln_final(self) -> Norm[ArrayT]:
        """The norm after the last block, of an encoder with a decoder's blocks.

        Raises:
            AttributeError: For any other: its last norm is ``mlm_head.ln``, after a matrix.
        """
        if self.runner.config.pre_norm_encoder:
            return super().ln_final
        raise AttributeError("an encoder has no ln_final: its last norm is mlm_head.ln.")

    @property
    def W_E(self) -> ArrayT:  # noqa: N802
        """Token embedding [d_vocab, d_model]."""
        weight: ArrayT = self.embed.embed.W_E
        return weight

    @property
    def W_pos(self) -> ArrayT:  # noqa: N802
        """Positional embedding [n_ctx, d_model]."""
        weight: ArrayT = self.embed.pos_embed.W_pos
        return weight

    @property
    def W_E_pos(self) -> ArrayT:  # noqa: N802
        """W_E above W_pos [d_vocab + n_ctx, d_model]; a copy."""
        weights = self.runner.weights
        if self.runner.config.pre_norm_encoder:
            return super().W_E_pos
        both = np.concatenate([weights["embed.embed.W_E"], weights["embed.pos_embed.W_pos"]])
        return self.runner.border.weight_to_user(both, "embed.embed.W_E")

    def accumulated_bias(self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True) -> ArrayT:
        """The sum of the biases written before a layer, where an encoder's residual stream is a sum; see HookedTransformer.

        Args:
            layer: See HookedTransformer.accumulated_bias, as for the others.
            mlp_input: See there.
            include_mlp_biases: See there.

        Raises:
            InputError: For an encoder that normalises what biases are added to, and what it raises there.
        """
        if self.runner.config.pre_norm_encoder:
            return super().accumulated_bias(layer, mlp_input, include_mlp_biases)
        raise InputError(
            "accumulated_bias is for decoders: an encoder normalises its residual stream after each sublayer, so biases do not "
            "add up in it."
        )
