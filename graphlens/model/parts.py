"""The model's parts as objects: ``model.blocks[0].attn.W_Q``, ``model.ln_final(x)``, ``model.blocks[1].hook_resid_pre``.

They hold nothing but a name: every attribute is looked up when it is asked for, so they cost no memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from graphlens.analysis.arrays import Array, ArrayInput, ArrayT, UserArray, as_array
from graphlens.analysis.factored_matrix import FactoredMatrix
from graphlens.errors import InputAttributeError, InputError, checked_number
from graphlens.file.names import split_name
from graphlens.model.calls import Entry, Hooked, call_attention, call_block, call_mlp, of_additive
from graphlens.model.limits import longest
from graphlens.model.modules import Module, refuse_assignments
from graphlens.model.weights import ov_factors, qk_factors

if TYPE_CHECKING:
    from graphlens.file.model_config import ModelConfig
    from graphlens.model.runner import Runner


# Keys' and values' weights as they are stored, where several heads share one.
_AS_STORED = ("_W_K", "_W_V", "_b_K", "_b_V")


@dataclass(frozen=True, repr=False)
class Component(Module[ArrayT]):
    """A part of the model: its weights and hook points are attributes, under TransformerLens's names.

    Weights are read-only views of the mapped file, nothing copied (on the torch face, tensors over such views).

    Raises:
        AttributeError: For what the part does not have, and on assignment.
    """

    _runner: Runner[ArrayT]
    _prefix: str

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") and name not in _AS_STORED:  # while it is unpickled there is no _runner to ask
            raise AttributeError(name)
        full = f"{self._prefix}.{name}"
        if full in self._runner.weights:
            return self._runner.weight(full)
        found = self._runner.hooks.find(full)
        if found is not None:
            return found
        if name in self._own_names():  # a part that not every architecture has
            return (Norm if self._runner.hooks.find(f"{full}.hook_scale") else Component)(self._runner, full)
        if name.startswith("hook_"):
            return self._runner.hooks.need(full)
        if self._runner.hooks.leads(full):
            return Component(self._runner, full)
        raise InputAttributeError(f"{self._prefix} has no {name!r} in this model, only {', '.join(self._own_names())}.")

    @property
    def _layer(self) -> int:
        """The block that the part is in, or is."""
        layer, _ = split_name(f"{self._prefix}.x")
        assert layer is not None, "a part of a block"
        return layer

    def _own_names(self) -> list[str]:
        known = [*self._runner.weights.names(), *self._runner.names()]
        start = f"{self._prefix}."
        found = dict.fromkeys(name[len(start) :].split(".")[0] for name in known if name.startswith(start))
        return [*found, *(name[1:] for name in found if name in _AS_STORED)]

    @property
    def cfg(self) -> ModelConfig:
        """The architecture of the model that the part is of."""
        return self._runner.config

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._own_names()})

    def __repr__(self) -> str:
        return f"<{self._prefix}: {', '.join(self._own_names())}>"


@dataclass(frozen=True, repr=False)
class Norm(Component[ArrayT]):
    """LayerNorm or RMSNorm; ``w`` [d_model] and ``b`` [d_model] are absent once they are folded into what follows.

    Norms of queries and keys have [d_head], or all heads' dimensions.
    """

    def __call__(self, residual: ArrayT) -> ArrayT:
        """A residual stream, normalised, then scaled by ``w`` and shifted by ``b`` if the model has them.

        The hooks at ``hook_scale`` and ``hook_normalized`` are called.

        Args:
            residual: [..., d_model].

        Returns:
            The same shape and dtype.

        Raises:
            TypeError: For what is no array of the user's kind.
            InputError: While an intervention is active at one of its hook points, or an adopted file hides ``w`` or ``b``.
        """
        runner, config, stored = self._runner, self._runner.config, self._runner.weights.stored
        given = runner.border.from_user(residual)
        if not config.normalization_type:  # a model without norms
            return residual
        self._runner.weights.ensure_known(f"{self._prefix}.w", f"{self._prefix}.b")
        hooked = Hooked(self._runner, self._prefix, ("hook_scale", "hook_normalized"))
        x = given.astype(np.result_type(given, np.float32), copy=False)  # half precision overflows in the squares
        if config.norm_centres(split_name(self._prefix)[1]):
            x = x - x.mean(-1, keepdims=True)
        scale = np.sqrt((x * x).mean(-1, keepdims=True) + np.asarray(config.eps, x.dtype))
        x = x / hooked("hook_scale", scale, given)
        x = hooked("hook_normalized", x, given)
        weight, bias = stored.get(f"{self._prefix}.w"), stored.get(f"{self._prefix}.b")
        if weight is not None:
            x = x * weight
        if bias is not None:
            x = x + bias
        return hooked.result(x.astype(given.dtype, copy=False), residual)


@dataclass(frozen=True, repr=False)
class Embed(Component[ArrayT]):
    """The token embedding: ``W_E`` [d_vocab, d_model], as it is added: with Gemma's factor in it."""

    @property
    def ln(self) -> Norm[ArrayT]:
        """The norm of the embeddings.

        Raises:
            AttributeError: For a model without one.
        """
        return _norm(self, "ln")

    def __call__(self, tokens: ArrayInput | UserArray) -> ArrayT:
        """The embeddings of token ids, normalised where the model does that.

        Args:
            tokens: Integers of any shape [...].

        Returns:
            [..., d_model], a copy.

        Raises:
            InputError: For ids outside the vocabulary.
        """
        ids = self._runner.text.token_ids(tokens)
        found = self._runner.border.to_user(self._runner.weights[f"{self._prefix}.W_E"][ids])
        return self.ln(found) if self._runner.config.post_embedding_ln else found


@dataclass(frozen=True, repr=False)
class PosEmbed(Component[ArrayT]):
    """The learned positional embedding: ``W_pos`` [n_ctx, d_model]."""

    def __call__(
        self,
        tokens: ArrayInput | UserArray,
        past_kv_pos_offset: int = 0,
        attention_mask: ArrayInput | UserArray | None = None,
    ) -> ArrayT:
        """What is added to the embeddings of tokens for their positions. No hook is called, as in TransformerLens.

        Args:
            tokens: Integers [b, p], of which the shape alone counts.
            past_kv_pos_offset: How many tokens lie before them in a KV cache.
            attention_mask: int [b, past_kv_pos_offset + p], 1 at real tokens, which alone count as positions; padding gets zeros.

        Returns:
            [b, p, d_model], a copy.

        Raises:
            AttributeError: For a model without learned positions.
            InputError: For tokens that are not [b, p], for more positions than the model has, and for another mask.
        """
        border, table = self._runner.border, self._runner.weights[f"{self._prefix}.W_pos"]
        past = checked_number(past_kv_pos_offset, "past_kv_pos_offset", least=0)
        shape = as_array(tokens).shape
        if len(shape) != 2:
            raise InputError(f"pos_embed takes tokens [batch, pos], not {list(shape)}.")
        if past + shape[1] > len(table):
            raise InputError(f"{past + shape[1]} positions, and {longest(self._runner.config)}.")
        if attention_mask is None:
            rows = table[past : past + shape[1]]
            return border.to_user(np.repeat(rows[None], shape[0], axis=0))
        mask = as_array(attention_mask)
        if mask.shape != (shape[0], past + shape[1]) or not np.isin(mask, (0, 1)).all():
            raise InputError(
                f"attention_mask of pos_embed must hold 1 and 0 at {[shape[0], past + shape[1]]}; its shape is "
                f"{list(mask.shape)}."
            )
        positions = np.maximum(mask.astype(np.int64).cumsum(-1) - 1, 0)[:, past:]
        return border.to_user(np.where(mask[:, past:, None] != 0, table[positions], np.zeros((), table.dtype)))


@dataclass(frozen=True, repr=False)
class Unembed(Component[ArrayT]):
    """The unembedding: ``W_U`` [d_model, d_vocab] and ``b_U`` [d_vocab] (zeros where the model has none)."""

    def __call__(self, residual: ArrayT) -> ArrayT:
        """The logits of a residual stream. The hooks at ``hook_in`` and ``hook_out`` are called.

        Args:
            residual: [..., d_model], after the final norm (``model.ln_final``).

        Returns:
            [..., d_vocab], in the dtype of ``residual``.

        Raises:
            TypeError: For what is no array of the user's kind.
            InputError: While an intervention is active at one of its hook points.
        """
        runner = self._runner
        given = runner.border.from_user(residual)
        hooked = Hooked(self._runner, self._prefix, ("hook_in", "hook_out"))
        logits = hooked("hook_in", given, given) @ runner.weights[f"{self._prefix}.W_U"]
        bias = runner.weights.stored.get(f"{self._prefix}.b_U")
        logits = np.asarray(logits if bias is None else logits + bias)
        return hooked.result(hooked("hook_out", logits, given).astype(given.dtype, copy=False), residual)


@dataclass(frozen=True, repr=False)
class Attention(Component[ArrayT]):
    """Attention: ``W_Q``, ``W_K``, ``W_V`` [h, d_model, d_head], ``W_O`` [h, d_head, d_model], ``b_Q``, ``b_K``,
    ``b_V`` [h, d_head], ``b_O`` [d_model].

    Where several heads share a key and a value, ``_W_K``, ``_W_V``, ``_b_K`` and ``_b_V`` have each of them once.
    """

    @property
    def q_norm(self) -> Norm[ArrayT]:
        """The norm of the queries.

        Raises:
            AttributeError: For a model without one.
        """
        return _norm(self, "q_norm")

    @property
    def k_norm(self) -> Norm[ArrayT]:
        """The norm of the keys.

        Raises:
            AttributeError: For a model without one.
        """
        return _norm(self, "k_norm")

    @property
    def QK(self) -> FactoredMatrix:  # noqa: N802
        """W_Q W_K^T per head: a FactoredMatrix [h, d_model, d_model]."""
        return self._runner.border.factored(*qk_factors(self._weight))

    @property
    def OV(self) -> FactoredMatrix:  # noqa: N802
        """W_V W_O per head: a FactoredMatrix [h, d_model, d_model]."""
        return self._runner.border.factored(*ov_factors(self._weight))

    def _weight(self, leaf: str) -> Array:
        return self._runner.weights[f"{self._prefix}.{leaf}"]

    def __call__(
        self,
        query_input: ArrayT,
        key_input: ArrayT,
        value_input: ArrayT,
        past_kv_cache_entry: Entry | None = None,
        additive_attention_mask: ArrayInput | UserArray | None = None,
        attention_mask: ArrayInput | UserArray | None = None,
        position_bias: None = None,
    ) -> ArrayT:
        """What this attention adds to the residual stream, before a norm of it. Its hooks and interventions are called.

        Args:
            query_input: What queries are computed from, after the block's norm (``blocks[i].ln1(resid_pre)``): [b, p, d_model],
                or [b, p, heads, d_model] while ``use_split_qkv_input`` or ``use_attn_in`` is set.
            key_input: The same for keys.
            value_input: The same for values.
            past_kv_cache_entry: ``cache.entries[i]`` of a KV cache, which is extended.
            additive_attention_mask: Of an encoder, [b, 1, 1, p], 0 at real tokens and -inf at padding.
            attention_mask: int [b, p], with a KV cache [b, past + p]; 1 at real tokens, 0 at padding.
            position_bias: TransformerLens's for T5.

        Returns:
            [b, p, d_model].

        Raises:
            InputError: For inputs that do not fit.
        """
        if additive_attention_mask is not None and self._runner.config.is_encoder:
            attention_mask, additive_attention_mask = of_additive(additive_attention_mask, self._prefix), None
        for name, value in (("additive_attention_mask", additive_attention_mask), ("position_bias", position_bias)):
            if value is not None:
                raise InputError(f"{self._prefix} takes no {name}: say which tokens are real with attention_mask.")
        given = (query_input, key_input, value_input)
        return call_attention(self._runner, self._layer, given, past_kv_cache_entry, attention_mask)


@dataclass(frozen=True, repr=False)
class Mlp(Component[ArrayT]):
    """An MLP: ``W_in`` [d_model, d_mlp], ``b_in`` [d_mlp], ``W_out`` [d_mlp, d_model], ``b_out`` [d_model], and where it is gated
    ``W_gate`` [d_model, d_mlp]."""

    def __call__(self, x: ArrayT) -> ArrayT:
        """What this MLP adds to the residual stream, before a norm of it. Its hooks and interventions are called.

        Args:
            x: What it reads, after the block's norm (``blocks[i].ln2(resid_mid)``): [b, p, d_model]; [..., d_model] where
                nothing is hooked there.

        Returns:
            The same shape.

        Raises:
            InputError: For an array that does not fit.
        """
        return call_mlp(self._runner, self._layer, x)


@dataclass(frozen=True, repr=False)
class Block(Component[ArrayT]):
    """One layer: ``attn``, ``mlp``, ``ln1``, ``ln2`` and the layer's own hook points."""

    @property
    def attn(self) -> Attention[ArrayT]:
        """The attention layer."""
        return Attention(self._runner, f"{self._prefix}.attn")

    def __call__(
        self,
        resid_pre: ArrayT,
        shortformer_pos_embed: ArrayInput | UserArray | None = None,
        past_kv_cache_entry: Entry | None = None,
        attention_mask: ArrayInput | UserArray | None = None,
    ) -> ArrayT:
        """The residual stream after this block. Its hooks and interventions are called.

        Args:
            resid_pre: The residual stream before it, [b, p, d_model].
            shortformer_pos_embed: Holds TransformerLens's place.
            past_kv_cache_entry: ``cache.entries[i]`` of a KV cache, which is extended.
            attention_mask: int [b, p], with a KV cache [b, past + p]; 1 at real tokens, 0 at padding.

        Returns:
            [b, p, d_model].

        Raises:
            InputError: For inputs that do not fit.
        """
        if shortformer_pos_embed is not None and self._runner.config.positional_embedding_type != "shortformer":
            raise InputError("shortformer_pos_embed: this model adds no position embeddings to queries and keys.")
        return call_block(self._runner, self._layer, resid_pre, past_kv_cache_entry, attention_mask)

    @property
    def mlp(self) -> Mlp[ArrayT]:
        """The MLP; see ``Mlp``."""
        return Mlp(self._runner, f"{self._prefix}.mlp")

    @property
    def ln1(self) -> Norm[ArrayT]:
        """The norm before attention, or after it where the architecture has none before."""
        return Norm(self._runner, f"{self._prefix}.ln1")

    @property
    def ln1_post(self) -> Norm[ArrayT]:
        """The norm after attention, besides the one before.

        Raises:
            AttributeError: For a model without one.
        """
        return _norm(self, "ln1_post")

    @property
    def ln2_post(self) -> Norm[ArrayT]:
        """The norm after the MLP, besides the one before.

        Raises:
            AttributeError: For a model without one.
        """
        return _norm(self, "ln2_post")

    @property
    def ln2(self) -> Norm[ArrayT]:
        """The norm before the MLP, or after it where the architecture has none before."""
        return Norm(self._runner, f"{self._prefix}.ln2")


def _norm(part: Component[ArrayT], name: str) -> Norm[ArrayT]:
    """A norm that not every architecture has, as a part of another. Raises AttributeError where there is none."""
    if name not in part._own_names():
        raise AttributeError(f"{part._prefix} of this model has no {name!r}.")
    return Norm(part._runner, f"{part._prefix}.{name}")


refuse_assignments(Component, Norm, Embed, PosEmbed, Unembed, Attention, Mlp, Block)
