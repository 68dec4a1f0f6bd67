"""The residual stream of a run: as it accumulates, as the sum of what was written to it, and read as logits."""

from __future__ import annotations

from typing import Generic, Literal, overload

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT, UserArray
from graphlens.analysis.cache.reader import Reader, Tokens
from graphlens.analysis.slices import Slice, SliceInput
from graphlens.errors import InputError, InputShapeError, is_one_of
from graphlens.file.names import in_block


class ResidualMethods(Generic[ArrayT]):
    """The part of ActivationCache that reads the residual stream. It needs ``_reader``."""

    @property
    def _reader(self) -> Reader[ArrayT]:
        """The run's activations as arrays, and its model."""
        raise NotImplementedError

    def apply_ln_to_stack(
        self,
        residual_stack: UserArray,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: SliceInput = None,
        batch_slice: SliceInput = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> ArrayT:
        """A stack as the norm before ``layer`` leaves it, at the scale that the norm had in the run.

        Centred (LayerNorm only) and divided by the scale, without the norm's weights; that is linear, so parts sum to
        the whole. TransformerLens: the same name.

        Args:
            residual_stack: Vectors of the residual stream [..., *b, p, D]: what a stack has before its prompts and positions
                ([n], [layer, h], nothing) is up to you. An axis of 1, or none, serves all prompts or positions.
            layer: 0 to n_layers; None or -1 for the final norm.
            mlp_input: Whether ln2 is meant.
            pos_slice: Which positions the stack has, an int for a stack [..., *b, D]; only the scale is sliced by it.
            batch_slice: Which prompts to take, of the stack and of the scale.
            has_batch_dim: Whether ``batch_slice`` is to be taken of the stack too: False for a stack without a batch axis.
            recompute_ln: Whether to apply the whole final norm to each vector by itself instead.

        Returns:
            [..., *b, p, D], broadcast with the scale [*b, p, 1].

        Raises:
            InputError: For shapes that do not fit.
            UnknownHookPoint: When the scale was not cached.
        """
        reader = self._reader
        upto = reader.layers_before(layer, mlp_input)
        stack = reader.numbers(residual_stack, "residual_stack")
        found, _ = reader.normalised(stack, upto, mlp_input, pos_slice, batch_slice, has_batch_dim, recompute_ln)
        return reader.out(found)

    @overload
    def accumulated_resid(
        self,
        layer: int | None = ...,
        incl_mid: bool = ...,
        apply_ln: bool = ...,
        pos_slice: SliceInput = ...,
        mlp_input: bool = ...,
        return_labels: Literal[False] = ...,
    ) -> ArrayT: ...
    @overload
    def accumulated_resid(
        self,
        layer: int | None = ...,
        incl_mid: bool = ...,
        apply_ln: bool = ...,
        pos_slice: SliceInput = ...,
        mlp_input: bool = ...,
        *,
        return_labels: Literal[True],
    ) -> tuple[ArrayT, list[str]]: ...
    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: SliceInput = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> ArrayT | tuple[ArrayT, list[str]]:
        """The residual stream before each layer, up to one layer (TransformerLens: the same name).

        Args:
            layer: The last layer; None or -1: all of them, and the residual after the last.
            incl_mid: Whether to add the middle of each layer.
            apply_ln: Whether to apply the norm before ``layer``: at the run's scale, or, where that is the final norm,
                the whole norm, recomputed for each residual.
            pos_slice: Which positions.
            mlp_input: Whether to add the middle of ``layer`` itself.
            return_labels: Whether to return labels too: "0_pre", "0_mid", ..., "final_post".

        Returns:
            [n, *b, p, D], or (that, labels).

        Raises:
            InputError: For a layer or positions that are not there, and for the middle of parallel blocks.
            UnknownHookPoint: For a residual that was not cached.
        """
        stack, labels = self._accumulated(layer, incl_mid, apply_ln, pos_slice, mlp_input)
        return self._reader.labelled(stack, labels, return_labels)

    def _accumulated(
        self, layer: int | None, incl_mid: bool, apply_ln: bool, pos_slice: SliceInput, mlp_input: bool
    ) -> tuple[Array, list[str]]:
        """(stack, labels) of ``accumulated_resid``."""
        reader, positions = self._reader, Slice(pos_slice)
        if incl_mid or mlp_input:
            reader.ensure_middle("incl_mid" if incl_mid else "mlp_input")
        upto, count = reader.layers_before(layer, mlp_input), reader.model.cfg.n_layers
        points: list[tuple[str, str, int]] = []
        for i in range(upto + 1):
            points.append(("final_post", "resid_post", count - 1) if i == count else (f"{i}_pre", "resid_pre", i))
            if i < count and (mlp_input if i == upto else incl_mid):
                points.append((f"{i}_mid", "resid_mid", i))
        stack = np.stack([positions.apply(reader.activation(name, i), dim=-2) for _, name, i in points])
        if apply_ln:
            stack, _ = reader.normalised(stack, upto, mlp_input, pos_slice, recompute_ln=upto == count)
        return stack, [label for label, _, _ in points]

    @overload
    def decompose_resid(
        self,
        layer: int | None = ...,
        mlp_input: bool = ...,
        mode: str = ...,
        apply_ln: bool = ...,
        pos_slice: SliceInput = ...,
        incl_embeds: bool = ...,
        return_labels: Literal[False] = ...,
    ) -> ArrayT: ...
    @overload
    def decompose_resid(
        self,
        layer: int | None = ...,
        mlp_input: bool = ...,
        mode: str = ...,
        apply_ln: bool = ...,
        pos_slice: SliceInput = ...,
        incl_embeds: bool = ...,
        *,
        return_labels: Literal[True],
    ) -> tuple[ArrayT, list[str]]: ...
    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: str = "all",
        apply_ln: bool = False,
        pos_slice: SliceInput = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> ArrayT | tuple[ArrayT, list[str]]:
        """What layers and embeddings wrote to the residual stream before a layer (TransformerLens: the same name).

        With ``mode="all"`` and the embeddings, the entries sum to the residual.

        Args:
            layer: 0 to n_layers; None or -1: the input of the unembedding.
            mlp_input: Whether to add the attention of ``layer`` itself.
            mode: Which outputs: "all", "attn" or "mlp".
            apply_ln: Whether as the norm before ``layer`` reads them: see ``apply_ln_to_stack``.
            pos_slice: Which positions.
            incl_embeds: Whether the embeddings come first.
            return_labels: Whether to return labels too: "embed", "pos_embed", "0_attn_out", "0_mlp_out", ....

        Returns:
            [n, *b, p, D], or (that, labels).

        Raises:
            InputError: For another mode, for a layer or positions that are not there, and for ``mlp_input`` of parallel blocks.
            UnknownHookPoint: For an output that was not cached.
        """
        if not is_one_of(mode, ("all", "attn", "mlp")):
            raise InputError(f"mode must be 'all', 'attn' or 'mlp', not {mode!r}.")
        reader, positions = self._reader, Slice(pos_slice)
        if mlp_input:
            reader.ensure_middle("mlp_input")
        upto = reader.layers_before(layer, mlp_input)
        has_mlp = mode != "attn" and not reader.model.cfg.attn_only
        parts = reader.embeddings() if incl_embeds else []
        for i in range(upto):
            parts += [(f"{i}_attn_out", in_block(i, "hook_attn_out"))] if mode != "mlp" else []
            parts += [(f"{i}_mlp_out", in_block(i, "hook_mlp_out"))] if has_mlp else []
        if mlp_input and mode != "mlp":
            parts.append((f"{upto}_attn_out", in_block(upto, "hook_attn_out")))
        stack: Array = np.empty((len(parts), *reader.positions_shape(positions), reader.model.cfg.d_model), np.float32)
        if parts:
            stack = np.stack([positions.apply(reader.activation(name), dim=-2) for _, name in parts])
        if apply_ln:
            stack, _ = reader.normalised(stack, upto, mlp_input, pos_slice)
        return reader.labelled(stack, [label for label, _ in parts], return_labels)

    @overload
    def logit_lens(
        self,
        layer: int | None = ...,
        incl_mid: bool = ...,
        pos_slice: SliceInput = ...,
        mlp_input: bool = ...,
        return_labels: Literal[False] = ...,
    ) -> ArrayT: ...
    @overload
    def logit_lens(
        self,
        layer: int | None = ...,
        incl_mid: bool = ...,
        pos_slice: SliceInput = ...,
        mlp_input: bool = ...,
        *,
        return_labels: Literal[True],
    ) -> tuple[ArrayT, list[str]]: ...
    def logit_lens(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        pos_slice: SliceInput = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> ArrayT | tuple[ArrayT, list[str]]:
        """The logits of every residual of ``accumulated_resid`` (TransformerLens 4: the same name).

        The final norm, recomputed for each residual, then the unembedding with its bias; so the last of all are the
        model's own logits (nostalgebraist 2020, "interpreting GPT: the logit lens").

        Args:
            layer: The last layer; None or -1: all of them, and the residual after the last.
            incl_mid: Whether to add the middle of each layer.
            pos_slice: Which positions.
            mlp_input: Whether to add the middle of ``layer`` itself.
            return_labels: Whether to return the labels of ``accumulated_resid`` too.

        Returns:
            Logits [n, *b, p, V], or (that, labels).

        Raises:
            InputError: For a layer or positions that are not there, and for the middle of parallel blocks.
            UnknownHookPoint: For a residual that was not cached.
        """
        stack, labels = self._accumulated(layer, incl_mid, False, pos_slice, mlp_input)
        reader = self._reader
        residual = reader.out(stack)
        logits = reader.model.unembed(reader.model.ln_final(residual) if reader.normalises else residual)
        scale, cap = reader.model.cfg.output_logits_scale, reader.model.cfg.output_logits_soft_cap
        if scale != 1 or cap > 0:
            scaled = reader.numbers(logits, "logits") * np.float32(scale)
            logits = reader.out(np.tanh(scaled / np.float32(cap)) * np.float32(cap) if cap > 0 else scaled)
        return (logits, labels) if return_labels else logits

    def logit_attrs(
        self,
        residual_stack: UserArray,
        tokens: Tokens,
        incorrect_tokens: Tokens | None = None,
        pos_slice: SliceInput = None,
        batch_slice: SliceInput = None,
        has_batch_dim: bool = True,
    ) -> ArrayT:
        """What each entry of a stack adds to the logit of ``tokens`` (TransformerLens: the same name).

        Its product with the token's column of W_U after the final norm at the run's scale; with ``incorrect_tokens``,
        what it adds to the difference. The norm's own weights count only where they are folded into W_U. What a model does to
        its logits after the unembedding (a factor in Granite, a bound in Gemma 2) does not count: the logits meant are those of
        ``unembed.hook_out``.

        Args:
            residual_stack: Vectors of the residual stream [..., *b, p, D], as in ``apply_ln_to_stack``.
            tokens: One token (a string, an id), or ids [p], [b] or [b, p]; ids broadcast with the last axes of the stack.
            incorrect_tokens: Tokens of the same shape, whose logit is subtracted.
            pos_slice: Which positions the stack has, an int for a stack [..., *b, D]; only the norm's scale is sliced by it.
            batch_slice: Which prompts to take, of the stack and of the scale.
            has_batch_dim: Whether ``batch_slice`` is to be taken of the stack too: False for a stack without a batch axis.

        Returns:
            [..., *b, p].

        Raises:
            InputError: For a string that is not one token, ids outside the vocabulary and shapes that do not fit.
            UnknownHookPoint: When the final norm's scale was not cached.
        """
        reader = self._reader
        given, final = reader.numbers(residual_stack, "residual_stack"), reader.model.cfg.n_layers
        stack, axes = reader.normalised(given, final, False, pos_slice, batch_slice, has_batch_dim)
        directions = reader.token_directions(tokens)
        if incorrect_tokens is not None:
            wrong = reader.token_directions(incorrect_tokens)
            if wrong.shape != directions.shape:
                raise InputShapeError(
                    f"tokens {list(directions.shape[:-1])} and incorrect_tokens {list(wrong.shape[:-1])} must have the "
                    "same shape."
                )
            directions = directions - wrong
        return reader.out(np.asarray(np.einsum("...d,...d->...", stack, axes.aligned(directions, stack))))
