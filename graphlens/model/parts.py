"""The model's parts as objects: ``model.blocks[0].attn.W_Q``, ``model.ln_final(x)``, ``model.blocks[1].hook_resid_pre``.

They hold nothing but a name: every attribute is looked up when it is asked for, so they cost no memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic

import numpy as np

from graphlens.analysis import numerics
from graphlens.analysis.arrays import Array, ArrayInput, ArrayT, UserArray
from graphlens.analysis.factored_matrix import FactoredMatrix
from graphlens.model.weights import ov_factors, qk_factors

if TYPE_CHECKING:
    from graphlens.file.model_config import ModelConfig
    from graphlens.model.runner import Runner


# Keys' and values' weights as they are stored, where several heads share one.
_AS_STORED = ("_W_K", "_W_V", "_b_K", "_b_V")


@dataclass(frozen=True, repr=False)
class Component(Generic[ArrayT]):
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
        if name.startswith("hook_"):
            return self._runner.hooks.need(full)
        raise AttributeError(f"{self._prefix} of this model has no {name!r}. It has: {', '.join(self._own_names())}.")

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

        Args:
            residual: [..., d_model].

        Returns:
            The same shape and dtype.

        Raises:
            TypeError: For what is no array of the user's kind.
        """
        runner, config, stored = self._runner, self._runner.config, self._runner.weights.stored
        x = runner.border.from_user(residual)
        normal = numerics.layer_norm(
            x.astype(np.result_type(x, np.float32), copy=False),  # half precision overflows in the squares
            stored.get(f"{self._prefix}.w"),
            stored.get(f"{self._prefix}.b"),
            config.eps,
            centre=config.normalization_type.startswith("LN"),
        )
        return runner.border.to_user(normal.astype(x.dtype, copy=False))


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
class Unembed(Component[ArrayT]):
    """The unembedding: ``W_U`` [d_model, d_vocab] and ``b_U`` [d_vocab] (zeros where the model has none)."""

    def __call__(self, residual: ArrayT) -> ArrayT:
        """The logits of a residual stream.

        Args:
            residual: [..., d_model], after the final norm (``model.ln_final``).

        Returns:
            [..., d_vocab], in the dtype of ``residual``.

        Raises:
            TypeError: For what is no array of the user's kind.
        """
        runner = self._runner
        x = runner.border.from_user(residual)
        logits = x @ runner.weights[f"{self._prefix}.W_U"]
        bias = runner.weights.stored.get(f"{self._prefix}.b_U")
        return runner.border.to_user(np.asarray(logits if bias is None else logits + bias).astype(x.dtype, copy=False))


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


@dataclass(frozen=True, repr=False)
class Block(Component[ArrayT]):
    """One layer: ``attn``, ``mlp``, ``ln1``, ``ln2`` and the layer's own hook points."""

    @property
    def attn(self) -> Attention[ArrayT]:
        """The attention layer."""
        return Attention(self._runner, f"{self._prefix}.attn")

    @property
    def mlp(self) -> Component[ArrayT]:
        """The MLP: ``W_in`` [d_model, d_mlp], ``b_in`` [d_mlp], ``W_out`` [d_mlp, d_model], ``b_out`` [d_model], and where it
        is gated ``W_gate`` [d_model, d_mlp]."""
        return Component(self._runner, f"{self._prefix}.mlp")

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
