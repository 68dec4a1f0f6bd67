"""The weights of HookedTransformer: its parts, every weight property, and what follows from the weights alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Generic

import numpy as np

from graphlens.analysis.arrays import Array, ArrayInput, ArrayT, working
from graphlens.analysis.factored_matrix import FactoredMatrix
from graphlens.errors import InputError, checked_number, is_one_of
from graphlens.file.names import block_name, in_block
from graphlens.model import state_dict
from graphlens.model.hooks import HookPoint
from graphlens.model.parts import Block, Embed, Norm, PosEmbed, Unembed
from graphlens.model.weights import ov_factors, qk_factors

if TYPE_CHECKING:
    from graphlens.model.runner import Runner


class WeightMethods(Generic[ArrayT]):
    """The part of HookedTransformer that reads and sets weights.

    The weights of one layer (``model.blocks[i].attn.W_Q``) and the unstacked ones (``W_E``, ``W_U``) are views of the
    mapped files: reading them copies nothing. Those stacked over layers (``W_Q``) are copies. All are read-only, since
    writing into an array would not change what the model computes: ``set_weights`` does.
    """

    runner: Runner[ArrayT]
    _made: state_dict.Made

    @property
    def weights(self) -> Mapping[str, Array]:
        """Weights by TransformerLens name, as NumPy arrays: read-only views of the mapped files, or of what was set."""
        return self.runner.engine.weights

    def set_weights(self, weights: Mapping[str, ArrayInput]) -> None:
        """Computes with other weights from now on, in runs, gradients, sweeps, generation, ``bake``: in all there is.

        What was set before stays set, and the file stays as it is. Sessions are opened again. Copies of the model keep
        the weights that they have; caches of earlier runs keep their activations, and their methods read the new weights.

        Args:
            weights: TransformerLens name ("blocks.0.attn.W_O", see ``state_dict``) -> the new weight, shaped as the old one, of
                any floating dtype. An embedding and an unembedding that the file holds as one tensor may be set apart. Keys'
                and values' weights that several heads share may be given for each head or, as ``attn._W_K``, once.

        Raises:
            InputError: For a name, a shape or a dtype that does not fit, numbers that are not finite, and what is no
                array. Nothing is changed then.
            ModelFileError: The model's file was replaced since it was opened.
        """
        self.runner.use(self.runner.weights.with_others(weights))

    def reset_weights(self) -> None:
        """Takes back what ``set_weights`` did: the model computes with its file's weights again, or where it was built from a
        config or had a state dict processed, with those of that.

        Raises:
            ModelFileError: The model's file was replaced since it was opened.
        """
        self.runner.use(self.runner.engine.with_weights(self._made.weights))

    # TransformerLens's state dicts

    init_weights = state_dict.init_weights
    load_state_dict = state_dict.load_state_dict
    load_and_process_state_dict = state_dict.load_and_process_state_dict
    process_weights_ = state_dict.process_weights_
    fill_missing_keys = state_dict.fill_missing_keys
    fold_layer_norm = state_dict.fold_layer_norm
    center_writing_weights = state_dict.center_writing_weights
    center_unembed = state_dict.center_unembed
    fold_value_biases = state_dict.fold_value_biases
    refactor_factored_attn_matrices = state_dict.refactor_factored_attn_matrices

    # Parts

    @property
    def embed(self) -> Embed[ArrayT]:
        """The token embedding, with ``W_E``; call it on tokens."""
        return Embed(self.runner, "embed")

    @property
    def pos_embed(self) -> PosEmbed[ArrayT]:
        """The positional embedding, with ``W_pos``; call it on tokens."""
        return PosEmbed(self.runner, "pos_embed")

    @property
    def blocks(self) -> list[Block[ArrayT]]:
        """The layers; see ``Block``."""
        # Not kept: they point back at the model, and a cycle would hold its session until the garbage collector runs.
        return [Block(self.runner, block_name(layer)) for layer in range(self.runner.config.n_layers)]

    @property
    def ln_final(self) -> Norm[ArrayT]:
        """The final norm: ``model.ln_final(residual)`` [..., d_model], same shape.

        Raises:
            AttributeError: For a model whose blocks end with a norm, and that has no other.
        """
        if self.runner.config.normalises_residual:
            raise AttributeError(
                "this model has no ln_final: each block ends with a norm, and unembed reads hook_normalized_resid_post."
            )
        return Norm(self.runner, "ln_final")

    @property
    def unembed(self) -> Unembed[ArrayT]:
        """The unembedding: ``model.unembed(normalised)``, [..., d_model] -> logits [..., d_vocab]."""
        return Unembed(self.runner, "unembed")

    @property
    def hook_embed(self) -> HookPoint:
        """The hook point of that name."""
        return self.runner.hooks.need("hook_embed")

    @property
    def hook_pos_embed(self) -> HookPoint:
        """The hook point of that name.

        Raises:
            AttributeError: For a model without positional embeddings.
        """
        return self.runner.hooks.need("hook_pos_embed")

    @property
    def hook_tokens(self) -> HookPoint:
        """The hook point of that name.

        Raises:
            AttributeError: While ``use_hook_tokens`` is not set.
        """
        return self.runner.hooks.need("hook_tokens")

    # Every weight

    def named_parameters(self) -> Iterator[tuple[str, ArrayT]]:
        """Every weight with its name, one at a time.

        Biases that the checkpoint lacks are zeros. Tied weights come under each of their names.

        Yields:
            (TransformerLens name, a view of the mapped file).
        """
        for name in self.runner.weights.names():
            yield name, self.runner.weight(name)

    def parameters(self) -> Iterator[ArrayT]:
        """The arrays of ``named_parameters()``."""
        return (array for _, array in self.named_parameters())

    def state_dict(self) -> dict[str, ArrayT]:
        """Every weight by its TransformerLens name."""
        return dict(self.named_parameters())

    @property
    def n_params_total(self) -> int:
        """The number of all parameters, embeddings, biases and norms included; tied ones count twice."""
        return sum(self.runner.weights[name].size for name in self.runner.weights.names())

    @property
    def W_E(self) -> ArrayT:  # noqa: N802
        """Token embedding [d_vocab, d_model]."""
        weight: ArrayT = self.embed.W_E
        return weight

    @property
    def W_pos(self) -> ArrayT:  # noqa: N802
        """Positional embedding [n_ctx, d_model].

        Raises:
            AttributeError: For a model without one.
        """
        weight: ArrayT = self.pos_embed.W_pos
        return weight

    @property
    def W_E_pos(self) -> ArrayT:  # noqa: N802
        """W_E above W_pos [d_vocab + n_ctx, d_model]; a copy.

        Raises:
            AttributeError: For a model without positional embeddings.
        """
        both = np.concatenate([self.runner.weights["embed.W_E"], self.runner.weights["pos_embed.W_pos"]])
        return self.runner.border.weight_to_user(both, "embed.W_E")

    @property
    def W_U(self) -> ArrayT:  # noqa: N802
        """Unembedding [d_model, d_vocab]."""
        weight: ArrayT = self.unembed.W_U
        return weight

    @property
    def b_U(self) -> ArrayT:  # noqa: N802
        """Unembedding bias [d_vocab]; zeros where the model has none."""
        weight: ArrayT = self.unembed.b_U
        return weight

    @property
    def W_Q(self) -> ArrayT:  # noqa: N802
        """Query weights [n_layers, n_heads, d_model, d_head]; a copy, as is every stack over layers."""
        return self._stacked("attn.W_Q")

    @property
    def W_K(self) -> ArrayT:  # noqa: N802
        """Key weights [n_layers, n_heads, d_model, d_head]; a copy. Where heads share keys, once for each head."""
        return self._stacked("attn.W_K")

    @property
    def W_V(self) -> ArrayT:  # noqa: N802
        """Value weights [n_layers, n_heads, d_model, d_head]; a copy. Where heads share values, once for each head."""
        return self._stacked("attn.W_V")

    @property
    def W_O(self) -> ArrayT:  # noqa: N802
        """Output weights of the heads [n_layers, n_heads, d_head, d_model]; a copy."""
        return self._stacked("attn.W_O")

    @property
    def W_in(self) -> ArrayT:  # noqa: N802
        """MLP input weights [n_layers, d_model, d_mlp], those beside the gate where there is one; a copy."""
        return self._stacked("mlp.W_in")

    @property
    def W_gate(self) -> ArrayT | None:  # noqa: N802
        """MLP gate weights [n_layers, d_model, d_mlp], a copy; None for a model without gates."""
        return self._stacked("mlp.W_gate") if in_block(0, "mlp.W_gate") in self.runner.weights else None

    @property
    def W_out(self) -> ArrayT:  # noqa: N802
        """MLP output weights [n_layers, d_mlp, d_model]; a copy."""
        return self._stacked("mlp.W_out")

    @property
    def b_Q(self) -> ArrayT:  # noqa: N802
        """Query biases [n_layers, n_heads, d_head]; a copy."""
        return self._stacked("attn.b_Q")

    @property
    def b_K(self) -> ArrayT:  # noqa: N802
        """Key biases [n_layers, n_heads, d_head]; a copy."""
        return self._stacked("attn.b_K")

    @property
    def b_V(self) -> ArrayT:  # noqa: N802
        """Value biases [n_layers, n_heads, d_head]; a copy."""
        return self._stacked("attn.b_V")

    @property
    def b_O(self) -> ArrayT:  # noqa: N802
        """Attention output biases [n_layers, d_model]; a copy."""
        return self._stacked("attn.b_O")

    @property
    def b_in(self) -> ArrayT:
        """MLP input biases [n_layers, d_mlp]; a copy."""
        return self._stacked("mlp.b_in")

    @property
    def b_out(self) -> ArrayT:
        """MLP output biases [n_layers, d_model]; a copy."""
        return self._stacked("mlp.b_out")

    @property
    def QK(self) -> FactoredMatrix:  # noqa: N802
        """W_Q W_K^T of every head: a FactoredMatrix [n_layers, n_heads, d_model, d_model]."""
        return self.runner.border.factored(*qk_factors(self._attention))

    @property
    def OV(self) -> FactoredMatrix:  # noqa: N802
        """W_V W_O of every head: a FactoredMatrix [n_layers, n_heads, d_model, d_model]."""
        return self.runner.border.factored(*ov_factors(self._attention))

    def _attention(self, leaf: str) -> Array:
        """A weight of every attention layer, [n_layers, n_heads, ...]."""
        weight = self.runner.weights.stacked(f"attn.{leaf}")
        weight.flags.writeable = False
        return weight

    def _stacked(self, name: str) -> ArrayT:
        """A weight of every block for the user, [n_layers, ...]; a copy."""
        return self.runner.border.weight_to_user(self.runner.weights.stacked(name), in_block(0, name))

    # What follows from them

    def accumulated_bias(self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True) -> ArrayT:
        """The sum of the output biases before a layer. TransformerLens: the same name.

        Args:
            layer: 0 to n_layers, where n_layers means all of them.
            mlp_input: Whether to add b_O of that layer too.
            include_mlp_biases: Whether every b_out counts.

        Returns:
            [d_model], float64 for a float64 model, else float32.

        Raises:
            InputError: For a layer outside 0..n_layers, for ``mlp_input`` past the last one, and where norms after the
                sublayers make something else of the biases at each position.
        """
        n_layers = self.runner.config.n_layers
        layer = checked_number(layer, "layer")
        if not 0 <= layer <= n_layers or (mlp_input and layer == n_layers):
            last = n_layers - 1 if mlp_input else n_layers
            raise InputError(f"layer must be from 0 to {last}{' with mlp_input' if mlp_input else ''}, not {layer}.")
        names = [in_block(i, "attn.b_O") for i in range(layer + mlp_input)]
        if include_mlp_biases and not self.runner.config.num_experts:  # experts have none
            names += [in_block(i, "mlp.b_out") for i in range(layer)]
        config = self.runner.config
        if config.normalises_residual and layer + mlp_input > 0:
            raise InputError(
                "accumulated_bias is not for this model: it normalises its residual stream after each sublayer, so no bias is in "
                "it as it was added."
            )
        normalised = config.use_normalization_before_and_after or config.post_norm_only
        if normalised and any(np.any(self.runner.weights[name]) for name in names):
            raise InputError(
                "the output biases of this model go through a norm before they are added, so what they add differs from "
                "position to position: cache.get_full_resid_decomposition has it as its last entry."
            )
        total = working(np.zeros(config.d_model, config.dtype))
        for name in names:
            total += self.runner.weights[name]
        return self.runner.border.to_user(total)

    def all_composition_scores(self, mode: str) -> ArrayT:
        """How far each head's output reaches each later head's query, key or value. TransformerLens: the same name.

        Args:
            mode: "Q", "K" or "V".

        Returns:
            [n_layers, n_heads, n_layers, n_heads], float64 for a float64 model and else float32: ``|L R| / (|L| |R|)``
            (Frobenius norms) of the first head's OV and the second one's QK, QK^T or OV; 0 unless the second is in a
            later layer. Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".

        Raises:
            InputError: For another mode.
        """
        if not is_one_of(mode, ("Q", "K", "V")):
            raise InputError(f"mode must be 'Q', 'K' or 'V', not {mode!r}.")
        first, second = {"Q": ("W_Q", "W_K"), "K": ("W_K", "W_Q"), "V": ("W_V", "W_O")}[mode]
        outer = (
            self.runner.weights.computing("attn.W_O")
            if mode == "V"
            else np.swapaxes(self.runner.weights.computing(f"attn.{second}"), -2, -1)
        )
        # An orthonormal factor changes no Frobenius norm, so each d_model x d_model product shrinks to d_head rows.
        left = np.linalg.qr(self.runner.weights.computing("attn.W_V"), mode="r") @ self.runner.weights.computing(
            "attn.W_O"
        )
        outer_r = np.linalg.qr(np.swapaxes(outer, -2, -1), mode="r")
        right = self.runner.weights.computing(f"attn.{first}") @ np.swapaxes(outer_r, -2, -1)
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
        return self.runner.border.to_user(scores)

    def all_head_labels(self) -> list[str]:
        """["L0H0", "L0H1", ...], layer by layer."""
        config = self.runner.config
        return [f"L{layer}H{head}" for layer in range(config.n_layers) for head in range(config.n_heads)]
