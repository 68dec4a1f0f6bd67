"""A run's activations as arrays to compute with, and what the analysis methods ask of the model that ran."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeAlias

import numpy as np

from graphlens.analysis.arrays import Array, ArrayInput, ArrayT, Border, UserArray, working
from graphlens.analysis.cache.readout import PostNorm, Readout, RunAxes
from graphlens.analysis.slices import Slice, SliceInput
from graphlens.errors import InputError, InputShapeError, UnknownHookPoint, checked_number
from graphlens.file.names import get_act_name, in_block

# One token (its text, or its id), or several in any shape.
Tokens: TypeAlias = ArrayInput | UserArray  # a text that is one token, ids, or lists of these


class CacheConfig(Protocol):
    """What a cache reads of its model's configuration."""

    @property
    def n_layers(self) -> int: ...  # noqa: D102
    @property
    def n_heads(self) -> int: ...  # noqa: D102
    @property
    def d_model(self) -> int: ...  # noqa: D102
    @property
    def d_mlp(self) -> int: ...  # noqa: D102
    @property
    def normalization_type(self) -> str: ...  # noqa: D102
    @property
    def attn_only(self) -> bool: ...  # noqa: D102
    @property
    def parallel_attn_mlp(self) -> bool: ...  # noqa: D102
    @property
    def use_normalization_before_and_after(self) -> bool: ...  # noqa: D102
    @property
    def post_norm_only(self) -> bool: ...  # noqa: D102
    @property
    def output_logits_scale(self) -> float: ...  # noqa: D102
    @property
    def output_logits_soft_cap(self) -> float: ...  # noqa: D102


class CacheModel(Protocol[ArrayT]):
    """What a cache needs of its model, which graphlens.HookedTransformer is."""

    @property
    def cfg(self) -> CacheConfig:
        """The architecture."""

    @property
    def weights(self) -> Mapping[str, Array]:
        """The weights by TransformerLens's names."""

    @property
    def hook_dict(self) -> Collection[str]:
        """The names of all hook points."""

    @property
    def border(self) -> Border[ArrayT]:
        """How arrays cross to the user and back."""

    @property
    def ln_final(self) -> Callable[[ArrayT], ArrayT]:
        """The final norm, [..., D] -> [..., D]."""

    @property
    def unembed(self) -> Callable[[ArrayT], ArrayT]:
        """The unembedding, [..., D] -> logits [..., V]."""

    def to_single_token(self, string: str, /) -> int:
        """The id of a text that is one token."""

    def tokens_to_residual_directions(self, tokens: Tokens, /) -> ArrayT:
        """The columns of W_U of tokens [...], as [..., D]; [D] for one token."""

    def accumulated_bias(self, layer: int, mlp_input: bool, include_mlp_biases: bool) -> ArrayT:
        """The sum of the output biases before a layer, [D]."""


@dataclass(frozen=True)
class Reader(Generic[ArrayT]):
    """A run's activations as NumPy arrays. Shapes: *b is [b], or nothing without a batch axis.

    Attributes:
        activations: The activations by hook name.
        model: The model that ran.
        has_batch_dim: Whether the activations have a batch axis.
    """

    activations: Mapping[str, ArrayT]
    model: CacheModel[ArrayT]
    has_batch_dim: bool

    # Arrays in and out

    def array(self, value: object, what: str) -> Array:
        """The array of an activation or of an argument called ``what``, in its own dtype. Raises InputError for others."""
        try:
            return np.asarray(self.model.border.from_user(value))
        except TypeError as error:
            raise InputError(f"{what} must be an array, not {type(value).__name__}.") from error

    def numbers(self, value: object, what: str) -> Array:
        """``array`` in a dtype to compute in: float32 at least."""
        return working(self.array(value, what))

    def out(self, array: Array) -> ArrayT:
        """A result in the user's kind of array."""
        return self.model.border.to_user(array)

    def labelled(self, stack: Array, labels: list[str], wanted: bool) -> ArrayT | tuple[ArrayT, list[str]]:
        """A stack for the user, with its labels where they are wanted."""
        return (self.out(stack), labels) if wanted else self.out(stack)

    def activation(self, name: str, layer: int | None = None, sublayer: str | None = None) -> Array:
        """The activation of a name or shorthand, to compute with. Raises UnknownHookPoint where it was not cached."""
        key = get_act_name(name, layer, sublayer)
        return self.numbers(self.activations[key], key)

    # Layers and positions

    def layers_before(self, layer: int | None, mlp_input: bool = False) -> int:
        """The number of whole layers before the residual that a ``layer`` argument means.

        Args:
            layer: 0 to n_layers, n_layers being the input of the unembedding; None and -1 mean that too.
            mlp_input: Whether the residual in the middle of that layer is meant.

        Raises:
            InputError: For a layer that the model does not have, or whose middle it does not have.
        """
        count = int(self.model.cfg.n_layers)
        layer = count if layer is None else checked_number(layer, "layer")
        layer = count if layer == -1 else layer
        if not 0 <= layer <= count:
            raise InputError(
                f"layer {layer!r}: this model has {count} layers, so layer is 0 to {count}, "
                f"{count} (or -1, or None) being the input of the unembedding."
            )
        if mlp_input and layer == count:
            raise InputError(f"mlp_input needs a layer from 0 to {count - 1}: the unembedding has no MLP input.")
        return layer

    def ensure_middle(self, argument: str) -> None:
        """Raises InputError for an architecture without a residual between attention and MLP; ``argument`` asked for it."""
        if self.model.cfg.parallel_attn_mlp:
            raise InputError(
                f"{argument}: attention and MLP of a block read the same residual in this model, so there is none in the middle."
            )

    def positions_shape(self, positions: Slice) -> tuple[int, ...]:
        """The shape [*b, p] of the chosen positions, taken from any activation of the residual stream that is cached."""
        for name in ("hook_embed", in_block(0, "hook_resid_pre"), *self.activations):
            if name in self.activations and name.endswith(("embed", "resid_pre", "resid_post", "attn_out", "mlp_out")):
                return tuple(positions.apply(self.activations[name], dim=-2).shape[:-1])
        return tuple(self.activations["hook_embed"].shape[:-1])

    def embeddings(self) -> list[tuple[str, str]]:
        """(label, hook name) of the embeddings that this architecture has, whether they are cached or not."""
        # Of the cache's own names a filter may have left one out, which must be an error and not another sum.
        both = (("embed", "hook_embed"), ("pos_embed", "hook_pos_embed"))
        return [(label, name) for label, name in both if name in self.model.hook_dict]

    # Norms

    @property
    def normalises(self) -> bool:
        """True if the architecture has norms."""
        return self.model.cfg.normalization_type in ("LN", "LNPre", "RMS", "RMSPre")

    @property
    def centres(self) -> bool:
        """True if its norms subtract the mean."""
        return self.model.cfg.normalization_type in ("LN", "LNPre")

    def scale(self, layer: int, mlp_input: bool, positions: Slice, prompts: Slice) -> Array:
        """What the norm before a layer (n_layers: the final one) divided by in the run, [*b, p, 1].

        Raises:
            InputError: For an architecture that has no norm there.
            UnknownHookPoint: Where the scale was not cached.
        """
        if self.model.cfg.post_norm_only and layer < self.model.cfg.n_layers:
            raise InputError(
                f"no norm reads the residual before layer {layer}: those of this model come after attention and MLP. Only the "
                "final norm (layer=None) can be applied."
            )
        norm = "ln_final" if layer == self.model.cfg.n_layers else in_block(layer, "ln2" if mlp_input else "ln1")
        scale = positions.apply(self.activation(f"{norm}.hook_scale"), dim=-2)
        return prompts.apply(scale) if self.has_batch_dim else scale

    def post_norm(self, layer: int, sublayer: str, positions: Slice) -> PostNorm | None:
        """The norm of what a sublayer gives, at the scale of the run; None where there is none.

        Args:
            layer: The layer.
            sublayer: "attn" or "mlp".
            positions: Which positions.

        Raises:
            UnknownHookPoint: Where the norm's scale was not cached.
        """
        config = self.model.cfg
        if not config.use_normalization_before_and_after and not config.post_norm_only:
            return None
        name = "ln1" if sublayer == "attn" else "ln2"
        norm = in_block(layer, name if config.post_norm_only else f"{name}_post")
        scale = positions.apply(self.activation(f"{norm}.hook_scale"), dim=-2)
        weight, bias = (self.model.weights.get(f"{norm}.{leaf}") for leaf in "wb")
        return PostNorm(
            self.centres, scale, None if weight is None else working(weight), None if bias is None else working(bias)
        )

    def readout(
        self, apply_ln: bool, layer: int, mlp_input: bool, positions: Slice, onto: UserArray | None = None
    ) -> Readout:
        """How what was written before a layer is read.

        Args:
            apply_ln: Whether as the norm before that layer reads it.
            layer: 0 to n_layers.
            mlp_input: Whether the norm is ln2.
            positions: Which positions of the norm's scale are needed.
            onto: Directions [D] or [D, n] to project onto.

        Raises:
            InputError: For directions of another shape.
            UnknownHookPoint: Where the norm's scale was not cached.
        """
        projection = None
        if onto is not None:
            projection, d_model = self.numbers(onto, "project_output_onto"), self.model.cfg.d_model
            if projection.ndim not in (1, 2) or projection.shape[0] != d_model:
                raise InputError(
                    f"project_output_onto has shape {list(projection.shape)}: it must be [{d_model}] or [{d_model}, n]."
                )
        if not apply_ln or not self.normalises:
            return Readout(onto=projection)
        return Readout(self.centres, self.scale(layer, mlp_input, positions, Slice()), projection)

    def normalised(
        self,
        stack: Array,
        layer: int,
        mlp_input: bool = False,
        pos_slice: SliceInput = None,
        batch_slice: SliceInput = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> tuple[Array, RunAxes]:
        """A stack [..., *b, p, D] as the norm before a layer reads it: see ``ActivationCache.apply_ln_to_stack``.

        Returns:
            (the stack, the axes of the run that end it).
        """
        prompts, positions = Slice(batch_slice), Slice(pos_slice)
        if stack.ndim < 1 or stack.shape[-1] != self.model.cfg.d_model:
            raise InputShapeError(
                f"residual_stack has shape {list(stack.shape)}: it must be [..., {self.model.cfg.d_model}] (d_model)."
            )
        batched = self.has_batch_dim and prompts.mode != "int"
        if has_batch_dim and prompts.mode != "identity":
            stack = prompts.apply(stack, dim=-2 if positions.mode == "int" else -3)
        if not self.normalises:
            return stack, RunAxes(self._run_shape(positions, prompts), batched)
        if recompute_ln and layer == self.model.cfg.n_layers:
            recomputed = self.numbers(self.model.ln_final(self.out(stack)), "ln_final")
            return recomputed, RunAxes((), batched=False)
        scale = self.scale(layer, mlp_input, positions, prompts)
        axes = RunAxes(scale.shape[:-1], batched)
        axes.ensure_fits(stack)
        return Readout(self.centres, scale).vectors(stack), axes

    def _run_shape(self, positions: Slice, prompts: Slice) -> tuple[int, ...]:
        """[*b, p] of the chosen prompts and positions; [] where nothing that is cached tells."""
        try:
            run = np.empty(self.positions_shape(positions))
        except UnknownHookPoint:
            return ()
        return (prompts.apply(run) if self.has_batch_dim else run).shape

    # Tokens

    def token_directions(self, tokens: Tokens) -> Array:
        """W_U's columns for tokens [...] as [..., D]; a single one in any shape gives [D]."""
        if isinstance(tokens, (list, tuple)) and tokens and all(isinstance(token, str) for token in tokens):
            tokens = np.asarray([self.model.to_single_token(token) for token in tokens])
        return self.numbers(self.model.tokens_to_residual_directions(tokens), "tokens")
