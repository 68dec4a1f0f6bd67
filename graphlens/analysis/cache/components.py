"""The residual stream of a run by its smallest writers: heads, neurons, embeddings and biases."""

from __future__ import annotations

from typing import Generic, Literal, overload

import numpy as np

from graphlens.analysis.arrays import ArrayT, UserArray
from graphlens.analysis.cache.blocks import Before, head_results, neurons_of
from graphlens.analysis.cache.reader import Reader
from graphlens.analysis.cache.readout import Readout
from graphlens.analysis.slices import Slice, SliceInput
from graphlens.errors import InputError, checked_number
from graphlens.file.names import get_act_name, in_block


class ComponentMethods(Generic[ArrayT]):
    """The part of ActivationCache that takes layers apart. It needs ``_reader`` and ``cache_dict``."""

    cache_dict: dict[str, ArrayT]

    @property
    def _reader(self) -> Reader[ArrayT]:
        """The run's activations as arrays, and its model."""
        raise NotImplementedError

    def stack_activation(
        self, activation_name: str, layer: int | None = -1, sublayer_type: str | None = None
    ) -> ArrayT:
        """One activation of every layer before ``layer``, stacked (TransformerLens: the same name).

        Args:
            activation_name: A short name: "z", "resid_pre", "scale".
            layer: 1 to n_layers; None or -1: all layers.
            sublayer_type: "attn", "mlp" or "ln1", where the name alone does not say.

        Returns:
            [layer, ...].

        Raises:
            InputError: For layer 0, before which there is nothing, and for a layer that is not there.
            UnknownHookPoint: For an activation that was not cached.
        """
        reader = self._reader
        upto = reader.layers_before(layer)
        if upto == 0:
            raise InputError("there is no layer before layer 0 to stack activations of.")
        layers = [reader.activations[get_act_name(activation_name, i, sublayer_type)] for i in range(upto)]
        return reader.out(np.stack([reader.array(value, activation_name) for value in layers]))

    # Heads

    def compute_head_results(self) -> None:
        """Adds what each head writes, ``blocks.i.attn.hook_result`` [*b, p, h, D], to the cache.

        It is computed from z and W_O, before any norm of attention's output; results that are there already stay.
        TransformerLens: the same name.

        Raises:
            UnknownHookPoint: When a layer's ``attn.hook_z`` was not cached.
        """
        reader = self._reader
        for i in range(reader.model.cfg.n_layers):
            name = in_block(i, "attn.hook_result")
            if name not in self.cache_dict:
                heads = head_results(reader, i, Slice(), Readout())
                self.cache_dict[name] = reader.out(np.ascontiguousarray(np.moveaxis(heads, 0, -2)))

    @overload
    def stack_head_results(
        self,
        layer: int | None = ...,
        return_labels: Literal[False] = ...,
        incl_remainder: bool = ...,
        pos_slice: SliceInput = ...,
        apply_ln: bool = ...,
    ) -> ArrayT: ...
    @overload
    def stack_head_results(
        self,
        layer: int | None = ...,
        *,
        return_labels: Literal[True],
        incl_remainder: bool = ...,
        pos_slice: SliceInput = ...,
        apply_ln: bool = ...,
    ) -> tuple[ArrayT, list[str]]: ...
    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: SliceInput = None,
        apply_ln: bool = False,
    ) -> ArrayT | tuple[ArrayT, list[str]]:
        """What every head before ``layer`` writes; the cache stays as it is (TransformerLens: the same name).

        Where a norm follows attention (Gemma 2 and 3, OLMo 2), each head's result goes through it at the scale of the run, so
        that the entries sum to what was written, biases apart; TransformerLens leaves that norm out. So do neurons.

        Args:
            layer: 0 to n_layers; None or -1: all layers.
            return_labels: Whether to return labels too: "L0H0", ..., "remainder".
            incl_remainder: Whether the rest of the residual follows as a last entry.
            pos_slice: Which positions.
            apply_ln: Whether as the norm before ``layer`` reads it: see ``apply_ln_to_stack``.

        Returns:
            [layer * h, *b, p, D], or (that, labels).

        Raises:
            InputError: For a layer or positions that are not there.
            UnknownHookPoint: For activations that were not cached.
        """
        before = Before.asked(self._reader, layer, False, apply_ln, pos_slice)
        stack, labels = before.stacked([before.heads()], incl_remainder)
        return before.reader.labelled(stack, labels, return_labels)

    # Neurons

    def get_neuron_results(
        self,
        layer: int,
        neuron_slice: SliceInput = None,
        pos_slice: SliceInput = None,
        project_output_onto: UserArray | None = None,
    ) -> ArrayT:
        """What each neuron of one layer writes (TransformerLens: the same name).

        Args:
            layer: The layer; a negative one counts from the end.
            neuron_slice: Which neurons; an int drops their axis.
            pos_slice: Which positions.
            project_output_onto: Directions [D] or [D, n]: their product with what is written is returned instead, and
                the former is never built.

        Returns:
            [*b, p, M, D]; projected, [*b, p, M] or [*b, p, M, n].

        Raises:
            InputError: For a layer, neurons or positions that are not there, and for directions of another shape.
            UnknownHookPoint: For activations that were not cached.
        """
        reader = self._reader
        count = reader.model.cfg.n_layers
        layer = checked_number(layer, "layer")
        if not -count <= layer < count:
            raise InputError(f"layer {layer!r}: this model has {count} layers, 0 to {count - 1}.")
        layer, positions, neurons = layer % count, Slice(pos_slice), Slice(neuron_slice)
        readout = reader.readout(False, layer, False, positions, project_output_onto)
        activations, directions = neurons_of(reader, layer, positions, neurons, readout)
        if neurons.mode == "int":
            return reader.out(
                activations * directions if np.ndim(directions) == 0 else activations[..., None] * directions
            )
        trailing = directions.ndim - 1
        return reader.out(activations.reshape(*activations.shape, *[1] * trailing) * directions)

    @overload
    def stack_neuron_results(
        self,
        layer: int | None,
        pos_slice: SliceInput = ...,
        neuron_slice: SliceInput = ...,
        return_labels: Literal[False] = ...,
        incl_remainder: bool = ...,
        apply_ln: bool = ...,
        project_output_onto: UserArray | None = ...,
    ) -> ArrayT: ...
    @overload
    def stack_neuron_results(
        self,
        layer: int | None,
        pos_slice: SliceInput = ...,
        neuron_slice: SliceInput = ...,
        *,
        return_labels: Literal[True],
        incl_remainder: bool = ...,
        apply_ln: bool = ...,
        project_output_onto: UserArray | None = ...,
    ) -> tuple[ArrayT, list[str]]: ...
    def stack_neuron_results(
        self,
        layer: int | None,
        pos_slice: SliceInput = None,
        neuron_slice: SliceInput = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: UserArray | None = None,
    ) -> ArrayT | tuple[ArrayT, list[str]]:
        """What every neuron before ``layer`` writes (TransformerLens: the same name).

        That is large; projected, it is never built, with ``apply_ln`` or without.

        Args:
            layer: 0 to n_layers; None or -1: all layers.
            pos_slice: Which positions.
            neuron_slice: Which neurons of each layer.
            return_labels: Whether to return labels too: "L0N0", ..., "remainder".
            incl_remainder: Whether the rest of the residual follows as a last entry.
            apply_ln: Whether as the norm before ``layer`` reads it: see ``apply_ln_to_stack``.
            project_output_onto: Directions [D] or [D, n]: their product with what is written is returned instead.

        Returns:
            [layer * M, *b, p, D]; projected, [layer * M, *b, p] or [layer * M, *b, p, n]; or (that, labels).

        Raises:
            InputError: For a layer, neurons or positions that are not there, and for directions of another shape.
            UnknownHookPoint: For activations that were not cached.
        """
        before = Before.asked(self._reader, layer, False, apply_ln, pos_slice, project_output_onto)
        stack, labels = before.stacked([before.neurons(Slice(neuron_slice))], incl_remainder)
        return before.reader.labelled(stack, labels, return_labels)

    # Everything

    @overload
    def get_full_resid_decomposition(
        self,
        layer: int | None = ...,
        mlp_input: bool = ...,
        expand_neurons: bool = ...,
        apply_ln: bool = ...,
        pos_slice: SliceInput = ...,
        return_labels: Literal[False] = ...,
        project_output_onto: UserArray | None = ...,
    ) -> ArrayT: ...
    @overload
    def get_full_resid_decomposition(
        self,
        layer: int | None = ...,
        mlp_input: bool = ...,
        expand_neurons: bool = ...,
        apply_ln: bool = ...,
        pos_slice: SliceInput = ...,
        *,
        return_labels: Literal[True],
        project_output_onto: UserArray | None = ...,
    ) -> tuple[ArrayT, list[str]]: ...
    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: SliceInput = None,
        return_labels: bool = False,
        project_output_onto: UserArray | None = None,
    ) -> ArrayT | tuple[ArrayT, list[str]]:
        """Everything that was written before a layer, which sums to the residual there (TransformerLens: the same name).

        Heads, neurons (or MLPs), embeddings, and the biases as one entry.

        Args:
            layer: 0 to n_layers; None or -1: the input of the unembedding.
            mlp_input: Whether to add the attention of ``layer`` itself.
            expand_neurons: Whether neurons are entries of their own; False: each MLP is one.
            apply_ln: Whether as the norm before ``layer`` reads it: see ``apply_ln_to_stack``.
            pos_slice: Which positions.
            return_labels: Whether to return labels too: "L0H0", "L0N0" (or "0_mlp_out"), "embed", "pos_embed", "bias".
            project_output_onto: Directions [D] or [D, n]: their product with what is written is returned instead, and
                no head or neuron is expanded for it.

        Returns:
            [n, *b, p, D]; projected, [n, *b, p] or [n, *b, p, n']; or (that, labels).

        Raises:
            InputError: For a layer or positions that are not there, and for directions of another shape.
            UnknownHookPoint: For activations that were not cached.
        """
        if mlp_input:
            self._reader.ensure_middle("mlp_input")
        before = Before.asked(self._reader, layer, mlp_input, apply_ln, pos_slice, project_output_onto)
        reader, upto = before.reader, before.layer
        parts = [before.heads(mlp_input)]
        entire = reader.embeddings()
        if not reader.model.cfg.attn_only:
            if expand_neurons:
                parts.append(before.neurons(Slice()))
            else:
                entire = [*((f"{i}_mlp_out", in_block(i, "hook_mlp_out")) for i in range(upto)), *entire]
        bias = before.bias(mlp_input, expand_neurons)
        stack, labels = before.stacked([*parts, before.whole(entire), bias])
        return reader.labelled(stack, labels, return_labels)
