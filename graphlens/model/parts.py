"""The model's parts as objects: ``model.blocks[0].attn.W_Q``, ``model.ln_final(x)``, ``model.blocks[1].hook_resid_pre``.

They hold nothing but a name: every attribute is looked up when it is asked for, so they cost no memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from graphlens.analysis import numerics
from graphlens.file.names import unknown_hook

if TYPE_CHECKING:
    from graphlens.model.hooked_transformer import HookedTransformer


@dataclass(frozen=True, repr=False)
class Component:
    """A part of the model: its weights and hook points are attributes, under TransformerLens's names.

    Weights are read-only views of the mapped file, nothing copied (on the torch face, tensors over such views). Raises
    AttributeError for what the part does not have, and on assignment.
    """

    _model: HookedTransformer
    _prefix: str

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # while it is unpickled there is no _model to ask
            raise AttributeError(name)
        full = f"{self._prefix}.{name}"
        if self._model._has_weight(full):
            return self._model._weight_to_user(self._model._weight(full))
        if full in self._model.hook_dict:
            return self._model.hook_dict[full]
        if name.startswith("hook_"):
            names, config = list(self._model.hook_dict), self._model._engine.manifest.config
            raise AttributeError(str(unknown_hook(full, names, config.n_layers)))
        raise AttributeError(f"{self._prefix} of this model has no {name!r}. It has: {', '.join(self._own_names())}.")

    def _own_names(self) -> list[str]:
        known = [*self._model._weight_names(), *self._model.hook_dict]
        start = f"{self._prefix}."
        return list(dict.fromkeys(name[len(start) :].split(".")[0] for name in known if name.startswith(start)))

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._own_names()]

    def __repr__(self) -> str:
        return f"<{self._prefix}: {', '.join(self._own_names())}>"


@dataclass(frozen=True, repr=False)
class Norm(Component):
    """LayerNorm or RMSNorm; ``w`` [d_model] and ``b`` [d_model] are absent once they are folded into what follows."""

    def __call__(self, residual: Any) -> Any:
        """The norm of a residual stream [..., d_model]: normalised, then scaled by ``w`` and shifted by ``b`` if they
        are there. Same shape and dtype."""
        model, config = self._model, self._model._engine.manifest.config
        x = model._from_user(residual)
        normal = numerics.layer_norm(
            x.astype(np.result_type(x, np.float32), copy=False),  # half precision overflows in the squares
            model.weights.get(f"{self._prefix}.w"),
            model.weights.get(f"{self._prefix}.b"),
            config.eps,
            centre=config.normalization_type.startswith("LN"),
        )
        return model._to_user(normal.astype(x.dtype, copy=False))


@dataclass(frozen=True, repr=False)
class Embed(Component):
    """The token embedding: ``W_E`` [d_vocab, d_model]."""

    def __call__(self, tokens: Any) -> Any:
        """The embeddings [..., d_model] of token ids of any shape. Raises InputError for ids outside the vocabulary."""
        return self._model._to_user(self._model._weight(f"{self._prefix}.W_E")[self._model._token_ids(tokens)])


@dataclass(frozen=True, repr=False)
class Unembed(Component):
    """The unembedding: ``W_U`` [d_model, d_vocab] and ``b_U`` [d_vocab] (zeros where the model has none)."""

    def __call__(self, residual: Any) -> Any:
        """Logits [..., d_vocab] of a residual stream [..., d_model] that the final norm has been applied to."""
        model = self._model
        x = model._from_user(residual)
        logits = x @ model._weight(f"{self._prefix}.W_U")
        bias = model.weights.get(f"{self._prefix}.b_U")
        return model._to_user(np.asarray(logits if bias is None else logits + bias).astype(x.dtype, copy=False))


@dataclass(frozen=True, repr=False)
class Attention(Component):
    """Attention: ``W_Q``, ``W_K``, ``W_V`` [h, d_model, d_head], ``W_O`` [h, d_head, d_model], ``b_Q``, ``b_K``,
    ``b_V`` [h, d_head], ``b_O`` [d_model]."""

    @property
    def QK(self) -> Any:  # noqa: N802
        """W_Q W_K^T per head: a FactoredMatrix [h, d_model, d_model]."""
        return self._model._factored(
            self._model._weight(f"{self._prefix}.W_Q"),
            np.swapaxes(self._model._weight(f"{self._prefix}.W_K"), -2, -1),
        )

    @property
    def OV(self) -> Any:  # noqa: N802
        """W_V W_O per head: a FactoredMatrix [h, d_model, d_model]."""
        return self._model._factored(
            self._model._weight(f"{self._prefix}.W_V"), self._model._weight(f"{self._prefix}.W_O")
        )


@dataclass(frozen=True, repr=False)
class Block(Component):
    """One layer: ``attn``, ``mlp``, ``ln1``, ``ln2`` and the layer's own hook points."""

    @property
    def attn(self) -> Attention:
        """The attention layer."""
        return Attention(self._model, f"{self._prefix}.attn")

    @property
    def mlp(self) -> Component:
        """The MLP: ``W_in`` [d_model, d_mlp], ``b_in`` [d_mlp], ``W_out`` [d_mlp, d_model], ``b_out`` [d_model]."""
        return Component(self._model, f"{self._prefix}.mlp")

    @property
    def ln1(self) -> Norm:
        """The norm before attention."""
        return Norm(self._model, f"{self._prefix}.ln1")

    @property
    def ln2(self) -> Norm:
        """The norm before the MLP."""
        return Norm(self._model, f"{self._prefix}.ln2")
