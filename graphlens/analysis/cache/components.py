"""The residual stream of a run by its smallest writers: heads, neurons, embeddings and biases."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from graphlens.analysis.arrays import working
from graphlens.analysis.cache.activations import Array
from graphlens.analysis.cache.residual_stream import Readout, ResidualMethods
from graphlens.analysis.slices import Slice, SliceInput
from graphlens.errors import InputError

# The labels of some entries of a stack, and the entries a block at a time: [k, *b, p, D] each.
Blocks = tuple[list[str], Iterator[Array]]


class ComponentMethods(ResidualMethods):
    """The part of ActivationCache that takes layers apart. Stacks are [n, *b, p, D] as in ResidualMethods."""

    # One stack of whole layers

    def stack_activation(self, activation_name: str, layer: int | None = -1, sublayer_type: str | None = None) -> Any:
        """The activation of that name of every layer before ``layer`` (None or -1: all), stacked: [layer, ...].

        ``sublayer_type`` ("attn", "mlp", "ln1") where the name alone does not say. Raises InputError,
        UnknownHookPoint. TransformerLens: the same name.
        """
        upto = self._upto(layer)
        if upto == 0:
            raise InputError("there is no layer before layer 0 to stack activations of.")
        layers = [self[(activation_name, i, sublayer_type)] for i in range(upto)]
        return self._out(np.stack([self._plain(value, activation_name) for value in layers]))

    # Heads

    def compute_head_results(self) -> None:
        """Adds ``blocks.i.attn.hook_result`` [*b, p, h, D], what each head writes, to the cache, from z and W_O.

        Results that are there already stay. Raises UnknownHookPoint when a layer's ``attn.hook_z`` was not cached.
        TransformerLens: the same name.
        """
        for i in range(self.model.cfg.n_layers):
            name = f"blocks.{i}.attn.hook_result"
            if name not in self.cache_dict:
                heads = self._head_stack(i, Slice(), Readout())
                self.cache_dict[name] = self._out(np.ascontiguousarray(np.moveaxis(heads, 0, -2)))

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: SliceInput = None,
        apply_ln: bool = False,
    ) -> Any:
        """What every head before ``layer`` (None or -1: all) writes, [layer * h, *b, p, D]; the cache stays as it is.

        ``incl_remainder`` adds the rest of the residual as a last entry; ``apply_ln``: see apply_ln_to_stack. Labels
        "L0H0", ..., "remainder". Raises InputError, UnknownHookPoint. TransformerLens: the same name.
        """
        upto, positions = self._upto(layer), Slice(pos_slice)
        readout = self._readout(apply_ln, upto, False, positions)
        heads = self._heads_before(upto, positions, readout)
        return self._stacked([heads], upto, positions, readout, incl_remainder, return_labels)

    def _heads_before(self, layer: int, positions: Slice, readout: Readout) -> Blocks:
        labels = [f"L{i}H{head}" for i in range(layer) for head in range(self.model.cfg.n_heads)]
        return labels, (self._head_stack(i, positions, readout) for i in range(layer))

    def _head_stack(self, layer: int, positions: Slice, readout: Readout) -> Array:
        """What is read of each head of one layer, [h, *b, p, D]."""
        if f"blocks.{layer}.attn.hook_result" in self.cache_dict:
            results: Array = positions.apply(self._activation("result", layer), dim=-3)
            return readout.vectors(np.moveaxis(results, -2, 0))
        z: Array = np.moveaxis(positions.apply(self._activation("z", layer), dim=-3), -2, 0)
        weight = working(self.model.weights[f"blocks.{layer}.attn.W_O"])
        if z.shape[0] != weight.shape[0] or z.shape[-1] != weight.shape[1]:
            raise InputError(f"blocks.{layer}.attn.hook_z does not fit W_O of shape {list(weight.shape)}.")
        directions = readout.directions(weight)
        flat = readout.coefficients(z).reshape(z.shape[0], -1, z.shape[-1])
        product = (flat @ directions.reshape(*weight.shape[:2], -1)).reshape(*z.shape[:-1], -1)
        return product[..., 0] if directions.ndim == 2 else product

    # Neurons

    def get_neuron_results(
        self,
        layer: int,
        neuron_slice: SliceInput = None,
        pos_slice: SliceInput = None,
        project_output_onto: Any = None,
    ) -> Any:
        """What each neuron of ``layer`` (negative: from the end) writes, [*b, p, M, D]; an int ``neuron_slice`` drops M.

        ``project_output_onto`` [D] or [D, n]: the product with it instead, [*b, p, M] or [*b, p, M, n], without ever
        building the former. Raises InputError, UnknownHookPoint. TransformerLens: the same name.
        """
        count = self.model.cfg.n_layers
        if not isinstance(layer, (int, np.integer)) or not -count <= layer < count:
            raise InputError(f"layer {layer!r}: this model has {count} layers, 0 to {count - 1}.")
        layer, positions, neurons = int(layer) % count, Slice(pos_slice), Slice(neuron_slice)
        activations, directions = self._neurons(
            layer, positions, neurons, self._readout(False, layer, False, positions, project_output_onto)
        )
        if neurons.mode == "int":
            return self._out(
                activations * directions if np.ndim(directions) == 0 else activations[..., None] * directions
            )
        trailing = directions.ndim - 1
        return self._out(activations.reshape(*activations.shape, *[1] * trailing) * directions)

    def _neurons(self, layer: int, positions: Slice, neurons: Slice, readout: Readout) -> tuple[Array, Array]:
        """Activations [*b, p, M] and what is read of each neuron's output weights, [M, D]."""
        acts: Array = neurons.apply(positions.apply(self._activation("post", layer), dim=-2), dim=-1)
        weight = self.model.weights[f"blocks.{layer}.mlp.W_out"]
        return np.asarray(readout.coefficients(acts)), np.asarray(readout.directions(working(neurons.apply(weight))))

    def stack_neuron_results(
        self,
        layer: int | None,
        pos_slice: SliceInput = None,
        neuron_slice: SliceInput = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Any = None,
    ) -> Any:
        """What every neuron before ``layer`` (None or -1: all) writes, [layer * M, *b, p, D].

        That is large: with ``project_output_onto`` [D] or [D, n] it is the product, [layer * M, *b, p] or
        [..., n], and the former is never built, ``apply_ln`` or not. ``neuron_slice`` is each layer's;
        ``incl_remainder`` adds the rest of the residual. Labels "L0N0", ..., "remainder". Raises InputError,
        UnknownHookPoint. TransformerLens: the same name.
        """
        upto, positions = self._upto(layer), Slice(pos_slice)
        readout = self._readout(apply_ln, upto, False, positions, project_output_onto)
        neurons = self._neurons_before(upto, positions, Slice(neuron_slice), readout)
        return self._stacked([neurons], upto, positions, readout, incl_remainder, return_labels)

    def _neurons_before(self, layer: int, positions: Slice, neurons: Slice, readout: Readout) -> Blocks:
        kept = Slice.unwrap(neurons.slice if neurons.mode == "int" else neurons)

        def block(i: int) -> Array:
            acts, directions = self._neurons(i, positions, kept, readout)
            first, trailing = np.moveaxis(acts, -1, 0), directions.shape[1:]
            rows = directions.reshape(len(first), *[1] * (first.ndim - 1), *trailing)
            return np.asarray(first.reshape(*first.shape, *[1] * len(trailing)) * rows)

        names = kept.indices(self.model.cfg.d_mlp)
        return [f"L{i}N{neuron}" for i in range(layer) for neuron in names], (block(i) for i in range(layer))

    # Stacks of blocks

    def _stacked(
        self,
        parts: list[Blocks],
        layer: int,
        positions: Slice,
        readout: Readout,
        incl_remainder: bool,
        return_labels: bool,
    ) -> Any:
        if incl_remainder:
            # At layer 0 nothing is written yet, and all there is to read is the embeddings.
            name = "blocks.0.hook_resid_pre" if layer == 0 else f"blocks.{layer - 1}.hook_resid_post"
            parts = [*parts, (["remainder"], iter([self._read(name, positions, readout)]))]
        labels = [label for names, _ in parts for label in names]
        stack, filled = None, 0
        # Filled block by block: a list of all blocks and their concatenation would take the memory twice.
        for block in itertools.chain.from_iterable(blocks for _, blocks in parts):
            if stack is None:
                stack = np.empty((len(labels), *block.shape[1:]), block.dtype)
            stack[filled : filled + len(block)] = block
            filled += len(block)
        if stack is None:
            shape = (0, *self._positions_shape(positions), self.model.cfg.d_model)
            stack = Readout(onto=readout.onto).vectors(np.zeros(shape, np.float32))
        if incl_remainder:
            stack[-1] -= stack[:-1].sum(0)
        return self._labelled(stack, labels, return_labels)

    def _read(self, name: str, positions: Slice, readout: Readout) -> Array:
        """What is read of one whole activation, [1, *b, p, D]."""
        return readout.vectors(positions.apply(self._activation(name), dim=-2))[None]

    # Everything

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: SliceInput = None,
        return_labels: bool = False,
        project_output_onto: Any = None,
    ) -> Any:
        """Everything that was written before ``layer`` (None or -1: the unembedding), [n, *b, p, D]; it sums to the
        residual there: heads, neurons (or MLPs, without ``expand_neurons``), embeddings, and the biases as one entry.

        ``mlp_input`` adds the attention of ``layer`` itself. ``project_output_onto`` as in stack_neuron_results, which
        no head or neuron is expanded for. Labels "L0H0", "L0N0" (or "0_mlp_out"), "embed", "pos_embed", "bias".
        Raises InputError, UnknownHookPoint. TransformerLens: the same name.
        """
        upto, positions = self._upto(layer, mlp_input), Slice(pos_slice)
        readout = self._readout(apply_ln, upto, mlp_input, positions, project_output_onto)
        parts = [self._heads_before(upto + mlp_input, positions, readout)]
        whole = self._embeddings()
        if not getattr(self.model.cfg, "attn_only", False):
            if expand_neurons:
                parts.append(self._neurons_before(upto, positions, Slice(), readout))
            else:
                whole = [*((f"{i}_mlp_out", f"blocks.{i}.hook_mlp_out") for i in range(upto)), *whole]
        parts.append(([label for label, _ in whole], (self._read(name, positions, readout) for _, name in whole)))
        bias = self._in(self.model.accumulated_bias(upto, mlp_input, include_mlp_biases=expand_neurons), "bias")
        shape = (1, *self._positions_shape(positions), self.model.cfg.d_model)
        parts.append((["bias"], iter([readout.vectors(np.broadcast_to(bias, shape))])))
        return self._stacked(parts, upto, positions, readout, False, return_labels)
