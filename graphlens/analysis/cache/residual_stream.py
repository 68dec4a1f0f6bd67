"""The residual stream of a run: as it accumulates, as the sum of what was written to it, and read as logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from graphlens.analysis.cache.activations import Activations, Array
from graphlens.analysis.slices import Slice, SliceInput
from graphlens.errors import InputError


@dataclass(frozen=True)
class Readout:
    """What a vector written to the residual stream is read as: centred and scaled by a norm, projected, or as it is.

    ``scale`` is the norm's own [*b, p, 1], so reading is linear, and a direction can be read before anything is
    multiplied by it: that is what keeps neurons and heads from being expanded to d_model.
    """

    centre: bool = False
    scale: Array | None = None
    onto: Array | None = None

    def directions(self, written: Array) -> Array:
        """Written vectors [..., D] -> what is read of them but for the scale: [..., D], [..., n] or (1-D onto) [...]."""
        if self.centre:
            written = written - written.mean(-1, keepdims=True)
        return written if self.onto is None else written @ self.onto

    def coefficients(self, factors: Array) -> Array:
        """Activations [*b, p, k] that multiply directions -> the same, divided by the scale."""
        return factors if self.scale is None else factors / self.scale

    def vectors(self, written: Array) -> Array:
        """Written vectors [..., *b, p, D] at the scale's positions -> what is read of them."""
        read = self.directions(written)
        if self.scale is None:
            return read
        return read / (self.scale[..., 0] if self.onto is not None and self.onto.ndim == 1 else self.scale)


class ResidualMethods(Activations):
    """The part of ActivationCache that reads the residual stream. Stacks are [n, *b, p, D]: *b is [b], or nothing
    without a batch axis, and p goes when ``pos_slice`` is an int."""

    # Normalisation

    def _normalises(self) -> bool:
        return self.model.cfg.normalization_type in ("LN", "LNPre", "RMS", "RMSPre")

    def _centres(self) -> bool:
        return self.model.cfg.normalization_type in ("LN", "LNPre")

    def _scale(self, layer: int, mlp_input: bool, positions: Slice, prompts: Slice) -> Array:
        norm = "ln_final" if layer == self.model.cfg.n_layers else f"blocks.{layer}.ln{2 if mlp_input else 1}"
        scale: Array = positions.apply(self._activation(f"{norm}.hook_scale"), dim=-2)
        return prompts.apply(scale) if self.has_batch_dim else scale

    def _readout(self, apply_ln: bool, layer: int, mlp_input: bool, positions: Slice, onto: Any = None) -> Readout:
        projection = None
        if onto is not None:
            projection, d_model = self._in(onto, "project_output_onto"), self.model.cfg.d_model
            if projection.ndim not in (1, 2) or projection.shape[0] != d_model:
                raise InputError(
                    f"project_output_onto has shape {list(projection.shape)}: it must be [{d_model}] or [{d_model}, n]."
                )
        if not apply_ln or not self._normalises():
            return Readout(onto=projection)
        return Readout(self._centres(), self._scale(layer, mlp_input, positions, Slice()), projection)

    def _normalised(
        self,
        stack: Array,
        layer: int,
        mlp_input: bool = False,
        pos_slice: SliceInput = None,
        batch_slice: SliceInput = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Array:
        prompts = Slice(batch_slice)
        if stack.ndim < 2 or stack.shape[-1] != self.model.cfg.d_model:
            raise InputError(
                f"residual_stack has shape {list(stack.shape)}: it must be [n, ..., {self.model.cfg.d_model}]."
            )
        if has_batch_dim:
            stack = prompts.apply(stack, dim=1)
        if not self._normalises():
            return stack
        if recompute_ln and layer == self.model.cfg.n_layers:
            return self._in(self.model.ln_final(self._out(stack)), "ln_final")
        scale = self._scale(layer, mlp_input, Slice(pos_slice), prompts)
        scale = _fitted(scale, stack, self.has_batch_dim and prompts.mode != "int")
        return Readout(self._centres(), scale).vectors(stack)

    def apply_ln_to_stack(
        self,
        residual_stack: Any,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: SliceInput = None,
        batch_slice: SliceInput = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Any:
        """A stack [n, *b, p, D] as the norm before ``layer`` leaves it: centred (LayerNorm only) and divided by the
        scale that the run had, without the norm's weights. Linear, so parts sum to the whole.

        ``layer`` 0 to n_layers, None or -1 for the final norm; ``mlp_input`` for ln2. ``pos_slice`` applies to the
        scale alone (slice the stack before), ``batch_slice`` to both; ``has_batch_dim`` says whether the stack has a
        batch axis. ``recompute_ln`` applies the whole final norm to each entry by itself. Raises InputError for shapes
        that do not fit, UnknownHookPoint when the scale was not cached. TransformerLens: the same name.
        """
        upto = self._upto(layer, mlp_input)
        stack = self._in(residual_stack, "residual_stack")
        return self._out(self._normalised(stack, upto, mlp_input, pos_slice, batch_slice, has_batch_dim, recompute_ln))

    # The stream

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: SliceInput = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Any:
        """The residual stream before each layer up to ``layer`` (None or -1: and after the last), [n, *b, p, D].

        ``incl_mid`` adds each layer's middle, ``mlp_input`` that of ``layer`` itself. ``apply_ln`` applies the norm
        before ``layer`` at the run's scale, or the whole final norm, recomputed, when that is the last. Labels "0_pre",
        "0_mid", ..., "final_post". Raises InputError, UnknownHookPoint. TransformerLens: the same name.
        """
        stack, labels = self._accumulated(layer, incl_mid, apply_ln, pos_slice, mlp_input)
        return self._labelled(stack, labels, return_labels)

    def _accumulated(
        self, layer: int | None, incl_mid: bool, apply_ln: bool, pos_slice: SliceInput, mlp_input: bool
    ) -> tuple[Array, list[str]]:
        upto, count, positions = self._upto(layer, mlp_input), self.model.cfg.n_layers, Slice(pos_slice)
        points: list[tuple[str, str, int]] = []
        for i in range(upto + 1):
            points.append(("final_post", "resid_post", count - 1) if i == count else (f"{i}_pre", "resid_pre", i))
            if i < count and (mlp_input if i == upto else incl_mid):
                points.append((f"{i}_mid", "resid_mid", i))
        stack = np.stack([positions.apply(self._activation(name, i), dim=-2) for _, name, i in points])
        if apply_ln:
            stack = self._normalised(stack, upto, mlp_input, pos_slice, recompute_ln=upto == count)
        return stack, [label for label, _, _ in points]

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: str = "all",
        apply_ln: bool = False,
        pos_slice: SliceInput = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Any:
        """What was written to the residual stream before ``layer`` (None or -1: the unembedding), [n, *b, p, D].

        Embeddings (with ``incl_embeds``) and each layer's outputs, of ``mode`` "all", "attn" or "mlp"; ``mlp_input``
        adds the attention of ``layer`` itself. All of them sum to the residual. ``apply_ln``: see apply_ln_to_stack.
        Labels "embed", "pos_embed", "0_attn_out", "0_mlp_out", .... Raises InputError, UnknownHookPoint.
        TransformerLens: the same name.
        """
        if mode not in ("all", "attn", "mlp"):
            raise InputError(f"mode must be 'all', 'attn' or 'mlp', not {mode!r}.")
        upto, positions = self._upto(layer, mlp_input), Slice(pos_slice)
        has_mlp = mode != "attn" and not getattr(self.model.cfg, "attn_only", False)
        parts = self._embeddings() if incl_embeds else []
        for i in range(upto):
            parts += [(f"{i}_attn_out", f"blocks.{i}.hook_attn_out")] if mode != "mlp" else []
            parts += [(f"{i}_mlp_out", f"blocks.{i}.hook_mlp_out")] if has_mlp else []
        if mlp_input and mode != "mlp":
            parts.append((f"{upto}_attn_out", f"blocks.{upto}.hook_attn_out"))
        stack = np.empty((len(parts), *self._positions_shape(positions), self.model.cfg.d_model), np.float32)
        if parts:
            stack = np.stack([positions.apply(self._activation(name), dim=-2) for _, name in parts])
        if apply_ln:
            stack = self._normalised(stack, upto, mlp_input, pos_slice)
        return self._labelled(stack, [label for label, _ in parts], return_labels)

    def _embeddings(self) -> list[tuple[str, str]]:
        """(label, hook name) of the embeddings that this architecture has. A filtered cache must not lose one silently,
        so what the model has is asked for."""
        exist = getattr(self.model, "hook_dict", self.cache_dict)
        both = (("embed", "hook_embed"), ("pos_embed", "hook_pos_embed"))
        return [(label, name) for label, name in both if name in exist]

    def _positions_shape(self, positions: Slice) -> tuple[int, ...]:
        """[*b, p], sliced: read off any residual there is, since a layer's parts may be none at all."""
        for name in ("hook_embed", "blocks.0.hook_resid_pre", *self.cache_dict):
            if name in self.cache_dict and name.endswith(("embed", "resid_pre", "resid_post", "attn_out", "mlp_out")):
                return tuple(positions.apply(self.cache_dict[name], dim=-2).shape[:-1])
        return tuple(self["hook_embed"].shape[:-1])

    # Logits

    def logit_lens(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        pos_slice: SliceInput = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Any:
        """The logits of every residual of ``accumulated_resid``, [n, *b, p, V]: the final norm, recomputed for each,
        then the unembedding with its bias. The last of all are the model's own logits.

        Labels as accumulated_resid. Raises InputError, UnknownHookPoint. TransformerLens 4: the same name.
        """
        stack, labels = self._accumulated(layer, incl_mid, False, pos_slice, mlp_input)
        residual = self._out(stack)
        logits = self.model.unembed(self.model.ln_final(residual) if self._normalises() else residual)
        return (logits, labels) if return_labels else logits

    def logit_attrs(
        self,
        residual_stack: Any,
        tokens: Any,
        incorrect_tokens: Any = None,
        pos_slice: SliceInput = None,
        batch_slice: SliceInput = None,
        has_batch_dim: bool = True,
    ) -> Any:
        """What each entry of a stack [n, *b, p, D] adds to the logit of ``tokens``, [n, *b, p]: its product with the
        token's column of W_U after the final norm at the run's scale. With ``incorrect_tokens``, to the difference.

        ``tokens``: one token (a string, an id) or ids [p], [b] (with a stack of one position) or [b, p]. The norm's own
        weights count only where they are folded into W_U. ``pos_slice``, ``batch_slice`` and ``has_batch_dim`` are
        apply_ln_to_stack's. Raises InputError for a string that is not one token, ids outside the vocabulary and
        shapes that do not fit. TransformerLens: the same name.
        """
        stack = self._normalised(
            self._in(residual_stack, "residual_stack"),
            self.model.cfg.n_layers,
            False,
            pos_slice,
            batch_slice,
            has_batch_dim,
        )
        directions = self._directions(tokens)
        if incorrect_tokens is not None:
            wrong = self._directions(incorrect_tokens)
            if wrong.shape != directions.shape:
                raise InputError(
                    f"tokens {list(directions.shape[:-1])} and incorrect_tokens {list(wrong.shape[:-1])} must have the "
                    "same shape."
                )
            directions = directions - wrong
        if directions.ndim > 1:
            directions = _aligned(directions, stack.shape[1:-1])
        return self._out(np.einsum("...d,...d->...", stack, directions))

    def _directions(self, tokens: Any) -> Array:
        """W_U's columns for tokens [...] as [..., D]; a single one in any shape gives [D]."""
        if isinstance(tokens, (list, tuple)) and tokens and all(isinstance(token, str) for token in tokens):
            tokens = np.asarray([self.model.to_single_token(token) for token in tokens])
        return self._in(self.model.tokens_to_residual_directions(tokens), "tokens")


def _fitted(scale: Array, stack: Array, batched: bool) -> Array:
    """``scale`` [*b, p, 1] ready to divide ``stack`` [n, *b, p, D], or InputError where broadcasting would pair a
    prompt with another's position."""
    found, wanted = scale.shape[:-1], stack.shape[1:-1]
    if batched and len(found) == len(wanted) + 1 and found[0] == 1:
        scale, found = scale[0], found[1:]
    if not batched and len(wanted) == 2 and len(found) == 1:
        batched, found = True, (1, *found)
    # One prompt's scale serves a batch; one position's never serves the others.
    fits = len(found) == len(wanted) and all(
        size in (found_size, 1) or (batched and axis == 0 and found_size == 1)
        for axis, (found_size, size) in enumerate(zip(found, wanted, strict=True))
    )
    if not fits:
        raise InputError(
            f"residual_stack has shape {list(stack.shape)} where the cached norm's scale has {list(scale.shape)}: "
            "the axes between must be the same prompts and positions. Give the pos_slice that the stack was made with."
        )
    return scale


def _aligned(directions: Array, axes: tuple[int, ...]) -> Array:
    """One direction [..., D] for each prompt and position of ``axes``, or InputError where it is open which is whose."""
    given = directions.shape[:-1]
    if len(given) == 1 and len(axes) == 2 and axes[0] > 1:
        if given[0] == axes[0] == axes[1]:
            raise InputError(
                f"{given[0]} tokens for {axes[0]} prompts of {axes[1]} positions: say which by a shape of "
                f"[{given[0]}, 1] (a token a prompt) or [1, {given[0]}] (a token a position)."
            )
        if given[0] == axes[0]:
            return directions[:, None]
    if len(given) > len(axes) or any(
        size not in (1, axis) for size, axis in zip(given[::-1], axes[::-1], strict=False)
    ):
        raise InputError(
            f"tokens have shape {list(given)} and the stack's prompts and positions {list(axes)}: give one token, "
            "or one for each of them."
        )
    return directions
