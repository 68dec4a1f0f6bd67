"""A model's weights under TransformerLens's names: the weight properties of HookedTransformer and what follows from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from graphlens.analysis.arrays import working
from graphlens.errors import InputError
from graphlens.file.names import unknown_hook
from graphlens.file.safetensors import WeightStore
from graphlens.model.border import NumpyFace
from graphlens.model.parts import Block, Component, Embed, Norm, Unembed

if TYPE_CHECKING:
    from graphlens.model.hooks import HookPoint

Array = npt.NDArray[Any]

# A bias that a checkpoint lacks is zero, as in TransformerLens; its shape in the config's terms.
_BIASES: Mapping[str, tuple[str, ...]] = {
    "b_Q": ("n_heads", "d_head"),
    "b_K": ("n_key_value_heads", "d_head"),
    "b_V": ("n_key_value_heads", "d_head"),
    "b_O": ("d_model",),
    "b_in": ("d_mlp",),
    "b_out": ("d_model",),
    "b_U": ("d_vocab_out",),
}


class ParameterMethods(NumpyFace):
    """The part of HookedTransformer that reads weights.

    The weights of one layer (``model.blocks[i].attn.W_Q``) and the unstacked ones (``W_E``, ``W_U``) are views of the
    mapped files: reading them copies nothing. Those stacked over layers (``W_Q``) are copies. The model runs from its
    own file, so no edit of an array changes what it computes.
    """

    @property
    def _whole(self) -> Any:
        """This object as the HookedTransformer it is part of, whose other methods the parts need."""
        return self

    @property
    def weights(self) -> WeightStore:
        """Weights by TransformerLens name, as NumPy arrays: read-only views of the mapped files."""
        return self._engine.weights

    # Access

    def _has_weight(self, name: str) -> bool:
        leaf = name.rpartition(".")[2]
        return name in self.weights or (leaf in _BIASES and _matrix_of(name) in self.weights)

    def _weight(self, name: str) -> Array:
        if name in self.weights:
            weight = self.weights[name]
            # A model opened with a lower n_ctx has so many positions.
            return weight[: self._engine.manifest.config.n_ctx] if name == "pos_embed.W_pos" else weight
        if not self._has_weight(name):
            raise AttributeError(f"this model has no weight {name!r}. List what it has with list(model.weights).")
        config = self._engine.manifest.config
        shape = tuple(int(getattr(config, size)) for size in _BIASES[name.rpartition(".")[2]])
        return np.zeros(shape, self.weights[_matrix_of(name)].dtype)

    def _weight_names(self) -> list[str]:
        names = dict.fromkeys(self.weights)
        for name in list(names):
            prefix, _, leaf = name.rpartition(".")
            if f"b_{leaf[2:]}" in _BIASES and leaf.startswith("W_"):
                names[f"{prefix}.b_{leaf[2:]}"] = None
        return list(names)

    def _weight_to_user(self, array: Array) -> Any:
        return self._to_user(array)

    def _stacked(self, name: str) -> Array:
        return np.stack([self._weight(f"blocks.{i}.{name}") for i in range(self._engine.manifest.config.n_layers)])

    def _factored(self, left: Array, right: Array) -> Any:
        from graphlens.analysis.factored_matrix import FactoredMatrix

        return FactoredMatrix(left, right)

    # Parts

    @property
    def embed(self) -> Embed:
        """The token embedding, with ``W_E``; call it on tokens."""
        return Embed(self._whole, "embed")

    @property
    def pos_embed(self) -> Component:
        """The positional embedding, with ``W_pos``."""
        return Component(self._whole, "pos_embed")

    @property
    def blocks(self) -> list[Block]:
        """The layers; see ``Block``."""
        # Not kept: they point back at the model, and a cycle would hold its session until the garbage collector runs.
        return [Block(self._whole, f"blocks.{i}") for i in range(self._engine.manifest.config.n_layers)]

    @property
    def ln_final(self) -> Norm:
        """The final norm: ``model.ln_final(residual)`` [..., d_model], same shape."""
        return Norm(self._whole, "ln_final")

    @property
    def unembed(self) -> Unembed:
        """The unembedding: ``model.unembed(normalised)``, [..., d_model] -> logits [..., d_vocab]."""
        return Unembed(self._whole, "unembed")

    @property
    def hook_embed(self) -> HookPoint:
        """The hook point of that name."""
        return self._hook_point("hook_embed")

    @property
    def hook_pos_embed(self) -> HookPoint:
        """The hook point of that name. Raises AttributeError for a model without positional embeddings."""
        return self._hook_point("hook_pos_embed")

    @property
    def hook_tokens(self) -> HookPoint:
        """The hook point of that name. Raises AttributeError while its flag is not set."""
        return self._hook_point("hook_tokens")

    def _hook_point(self, name: str) -> HookPoint:
        points: Mapping[str, HookPoint] = self._whole.hook_dict
        if name not in points:
            raise AttributeError(str(unknown_hook(name, list(points), self._engine.manifest.config.n_layers)))
        return points[name]

    # Every weight

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        """(TransformerLens name, array) of every weight, one at a time; views of the mapped file.

        Biases that the checkpoint lacks are zeros. Tied weights come under each of their names.
        """
        for name in self._weight_names():
            yield name, self._weight_to_user(self._weight(name))

    def parameters(self) -> Iterator[Any]:
        """The arrays of ``named_parameters()``."""
        return (array for _, array in self.named_parameters())

    def state_dict(self) -> dict[str, Any]:
        """Every weight by its TransformerLens name."""
        return dict(self.named_parameters())

    @property
    def n_params_total(self) -> int:
        """The number of all parameters, embeddings, biases and norms included; tied ones count twice."""
        return sum(self._weight(name).size for name in self._weight_names())

    @property
    def W_E(self) -> Any:  # noqa: N802
        """Token embedding [d_vocab, d_model]."""
        return self.embed.W_E

    @property
    def W_pos(self) -> Any:  # noqa: N802
        """Positional embedding [n_ctx, d_model]. Raises AttributeError for a model without one."""
        return self.pos_embed.W_pos

    @property
    def W_E_pos(self) -> Any:  # noqa: N802
        """W_E above W_pos [d_vocab + n_ctx, d_model]; a copy."""
        return self._to_user(np.concatenate([self._weight("embed.W_E"), self._weight("pos_embed.W_pos")]))

    @property
    def W_U(self) -> Any:  # noqa: N802
        """Unembedding [d_model, d_vocab]."""
        return self.unembed.W_U

    @property
    def b_U(self) -> Any:  # noqa: N802
        """Unembedding bias [d_vocab]; zeros where the model has none."""
        return self.unembed.b_U

    @property
    def W_Q(self) -> Any:  # noqa: N802
        """Query weights [n_layers, n_heads, d_model, d_head]; a copy, as is every stack over layers."""
        return self._to_user(self._stacked("attn.W_Q"))

    @property
    def W_K(self) -> Any:  # noqa: N802
        """Key weights [n_layers, n_heads, d_model, d_head]; a copy."""
        return self._to_user(self._stacked("attn.W_K"))

    @property
    def W_V(self) -> Any:  # noqa: N802
        """Value weights [n_layers, n_heads, d_model, d_head]; a copy."""
        return self._to_user(self._stacked("attn.W_V"))

    @property
    def W_O(self) -> Any:  # noqa: N802
        """Output weights of the heads [n_layers, n_heads, d_head, d_model]; a copy."""
        return self._to_user(self._stacked("attn.W_O"))

    @property
    def W_in(self) -> Any:  # noqa: N802
        """MLP input weights [n_layers, d_model, d_mlp]; a copy."""
        return self._to_user(self._stacked("mlp.W_in"))

    @property
    def W_gate(self) -> Any:  # noqa: N802
        """MLP gate weights [n_layers, d_model, d_mlp], a copy; None for a model without gates."""
        return self._to_user(self._stacked("mlp.W_gate")) if self._has_weight("blocks.0.mlp.W_gate") else None

    @property
    def W_out(self) -> Any:  # noqa: N802
        """MLP output weights [n_layers, d_mlp, d_model]; a copy."""
        return self._to_user(self._stacked("mlp.W_out"))

    @property
    def b_Q(self) -> Any:  # noqa: N802
        """Query biases [n_layers, n_heads, d_head]; a copy."""
        return self._to_user(self._stacked("attn.b_Q"))

    @property
    def b_K(self) -> Any:  # noqa: N802
        """Key biases [n_layers, n_heads, d_head]; a copy."""
        return self._to_user(self._stacked("attn.b_K"))

    @property
    def b_V(self) -> Any:  # noqa: N802
        """Value biases [n_layers, n_heads, d_head]; a copy."""
        return self._to_user(self._stacked("attn.b_V"))

    @property
    def b_O(self) -> Any:  # noqa: N802
        """Attention output biases [n_layers, d_model]; a copy."""
        return self._to_user(self._stacked("attn.b_O"))

    @property
    def b_in(self) -> Any:
        """MLP input biases [n_layers, d_mlp]; a copy."""
        return self._to_user(self._stacked("mlp.b_in"))

    @property
    def b_out(self) -> Any:
        """MLP output biases [n_layers, d_model]; a copy."""
        return self._to_user(self._stacked("mlp.b_out"))

    @property
    def QK(self) -> Any:  # noqa: N802
        """W_Q W_K^T of every head: a FactoredMatrix [n_layers, n_heads, d_model, d_model]."""
        return self._factored(self._stacked("attn.W_Q"), np.swapaxes(self._stacked("attn.W_K"), -2, -1))

    @property
    def OV(self) -> Any:  # noqa: N802
        """W_V W_O of every head: a FactoredMatrix [n_layers, n_heads, d_model, d_model]."""
        return self._factored(self._stacked("attn.W_V"), self._stacked("attn.W_O"))

    # What follows from them

    def accumulated_bias(self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True) -> Any:
        """The sum of the output biases before layer ``layer`` (n_layers: of all of them), [d_model]: float64 for a
        float64 model, else float32.

        ``mlp_input`` adds b_O of that layer too; ``include_mlp_biases=False`` leaves out every b_out. Raises InputError
        for a layer outside 0..n_layers, and for ``mlp_input`` past the last one.
        """
        n_layers = self._engine.manifest.config.n_layers
        if not 0 <= layer <= n_layers or (mlp_input and layer == n_layers):
            last = n_layers - 1 if mlp_input else n_layers
            raise InputError(f"layer must be from 0 to {last}{' with mlp_input' if mlp_input else ''}, not {layer}.")
        names = [f"blocks.{i}.attn.b_O" for i in range(layer + mlp_input)]
        if include_mlp_biases:
            names += [f"blocks.{i}.mlp.b_out" for i in range(layer)]
        total = working(np.zeros(self._engine.manifest.config.d_model, self._engine.manifest.config.dtype))
        for name in names:
            total += self._weight(name)
        return self._to_user(total)

    def all_composition_scores(self, mode: str) -> Any:
        """How far each head's output reaches each later head's query, key or value (``mode`` "Q", "K" or "V").

        [n_layers, n_heads, n_layers, n_heads], float64 for a float64 model and else float32: ``|L R| / (|L| |R|)``
        (Frobenius) of the first head's OV and the second one's QK, QK^T or OV; 0 unless the second is in a later layer.
        Raises InputError for another mode.
        """
        if mode not in ("Q", "K", "V"):
            raise InputError(f"mode must be 'Q', 'K' or 'V', not {mode!r}.")
        first, second = {"Q": ("W_Q", "W_K"), "K": ("W_K", "W_Q"), "V": ("W_V", "W_O")}[mode]
        outer = self._working("attn.W_O") if mode == "V" else np.swapaxes(self._working(f"attn.{second}"), -2, -1)
        # An orthonormal factor changes no Frobenius norm, so each d_model x d_model product shrinks to d_head rows.
        left = np.linalg.qr(self._working("attn.W_V"), mode="r") @ self._working("attn.W_O")
        outer_r = np.linalg.qr(np.swapaxes(outer, -2, -1), mode="r")
        right = self._working(f"attn.{first}") @ np.swapaxes(outer_r, -2, -1)
        layers, heads, _, width = right.shape
        sizes = np.linalg.norm(left, axis=(-2, -1))[:, :, None, None] * np.linalg.norm(right, axis=(-2, -1))
        scores = np.zeros((layers, heads, layers, heads), right.dtype)
        for layer in range(layers - 1):
            later = np.moveaxis(right[layer + 1 :], 2, 0).reshape(right.shape[2], -1)
            for head in range(heads):
                squares = ((left[layer, head] @ later) ** 2).reshape(-1, layers - layer - 1, heads, width)
                with np.errstate(invalid="ignore"):  # a head of zeros has no score: nan, as in TransformerLens
                    scores[layer, head, layer + 1 :] = (
                        np.sqrt(squares.sum(axis=(0, 3))) / sizes[layer, head, layer + 1 :]
                    )
        return self._to_user(scores)

    def _working(self, name: str) -> Array:
        return working(self._stacked(name))  # linear algebra has no half precision

    def all_head_labels(self) -> list[str]:
        """["L0H0", "L0H1", ...], layer by layer."""
        config = self._engine.manifest.config
        return [f"L{layer}H{head}" for layer in range(config.n_layers) for head in range(config.n_heads)]


def _matrix_of(bias: str) -> str:
    prefix, _, leaf = bias.rpartition(".")
    return f"{prefix}.W_{leaf[2:]}"
