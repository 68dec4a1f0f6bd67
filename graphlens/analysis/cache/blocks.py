"""Stacks of what heads and neurons write to the residual stream, filled one layer at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, NamedTuple, Self

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT, UserArray, working
from graphlens.analysis.cache.reader import Reader
from graphlens.analysis.cache.readout import PostNorm, Readout
from graphlens.analysis.slices import Slice, SliceInput
from graphlens.errors import InputError
from graphlens.file.names import in_block


class Blocks(NamedTuple):
    """Some entries of a stack: their labels, and the entries a block at a time, [k, *b, p, D] each."""

    labels: list[str]
    arrays: Iterator[Array]


def head_results(
    reader: Reader[ArrayT], layer: int, positions: Slice, readout: Readout, post: PostNorm | None = None
) -> Array:
    """What is read of each head of one layer, [h, *b, p, D], through the norm of attention's output if ``post`` is one."""
    if in_block(layer, "attn.hook_result") in reader.activations:
        results = np.moveaxis(positions.apply(reader.activation("result", layer), dim=-3), -2, 0)
        return readout.vectors(results if post is None else post.vectors(results))
    z = np.moveaxis(positions.apply(reader.activation("z", layer), dim=-3), -2, 0)
    weight = working(reader.model.weights[in_block(layer, "attn.W_O")])
    if z.shape[0] != weight.shape[0] or z.shape[-1] != weight.shape[1]:
        raise InputError(f"{in_block(layer, 'attn.hook_z')} does not fit W_O of shape {list(weight.shape)}.")
    directions = readout.directions(weight if post is None else post.directions(weight))
    z = readout.coefficients(z if post is None else z / post.scale)
    flat = z.reshape(z.shape[0], -1, z.shape[-1])
    product: Array = (flat @ directions.reshape(*weight.shape[:2], -1)).reshape(*z.shape[:-1], -1)
    return product[..., 0] if directions.ndim == 2 else product


def neurons_of(
    reader: Reader[ArrayT], layer: int, positions: Slice, neurons: Slice, readout: Readout
) -> tuple[Array, Array]:
    """Activations [*b, p, M] of one layer's neurons and what is read of the output weights of each, [M, D]."""
    acts = neurons.apply(positions.apply(reader.activation("post", layer), dim=-2), dim=-1)
    weight = working(neurons.apply(reader.model.weights[in_block(layer, "mlp.W_out")]))
    post = reader.post_norm(layer, "mlp", positions)
    if post is not None:
        acts, weight = acts / (post.scale if neurons.mode != "int" else post.scale[..., 0]), post.directions(weight)
    return np.asarray(readout.coefficients(acts)), np.asarray(readout.directions(weight))


@dataclass(frozen=True)
class Before(Generic[ArrayT]):
    """What is written to the residual stream before a layer, as stacks of it are asked for.

    Attributes:
        reader: The run.
        layer: The layer.
        positions: Which positions.
        readout: How what is written is read.
    """

    reader: Reader[ArrayT]
    layer: int
    positions: Slice
    readout: Readout

    @classmethod
    def asked(
        cls,
        reader: Reader[ArrayT],
        layer: int | None,
        mlp_input: bool,
        apply_ln: bool,
        pos_slice: SliceInput,
        onto: UserArray | None = None,
    ) -> Self:
        """What the arguments of a method of ActivationCache mean.

        Args:
            reader: The run.
            layer: See ``Reader.layers_before``.
            mlp_input: Whether the residual in the middle of that layer is meant.
            apply_ln: Whether as the norm there reads it.
            pos_slice: Which positions.
            onto: Directions [D] or [D, n] to project onto.

        Raises:
            InputError: For a layer that is not there, and for directions of another shape.
            UnknownHookPoint: Where the norm's scale was not cached.
        """
        positions, upto = Slice(pos_slice), reader.layers_before(layer, mlp_input)
        return cls(reader, upto, positions, reader.readout(apply_ln, upto, mlp_input, positions, onto))

    def heads(self, in_layer_too: bool = False) -> Blocks:
        """Every head before the layer, and with ``in_layer_too`` those of it; a block for each layer."""
        layers = range(self.layer + in_layer_too)
        labels = [f"L{i}H{head}" for i in layers for head in range(self.reader.model.cfg.n_heads)]

        def results(i: int) -> Array:
            post = self.reader.post_norm(i, "attn", self.positions)
            return head_results(self.reader, i, self.positions, self.readout, post)

        return Blocks(labels, map(results, layers))

    def neurons(self, neurons: Slice) -> Blocks:
        """Every chosen neuron before the layer, a block for each layer."""
        kept = Slice.unwrap(neurons.slice if neurons.mode == "int" else neurons)

        def block(i: int) -> Array:
            acts, directions = neurons_of(self.reader, i, self.positions, kept, self.readout)
            first, trailing = np.moveaxis(acts, -1, 0), directions.shape[1:]
            rows = directions.reshape(len(first), *[1] * (first.ndim - 1), *trailing)
            return np.asarray(first.reshape(*first.shape, *[1] * len(trailing)) * rows)

        layers, names = range(self.layer), kept.indices(self.reader.model.cfg.d_mlp or 0)
        return Blocks([f"L{i}N{neuron}" for i in layers for neuron in names], map(block, layers))

    def whole(self, parts: Iterable[tuple[str, str]]) -> Blocks:
        """Whole activations, (label, hook name) each, a block of one for each."""
        chosen = list(parts)
        found = (self.positions.apply(self.reader.activation(name), dim=-2) for _, name in chosen)
        return Blocks([label for label, _ in chosen], (self.readout.vectors(array)[None] for array in found))

    def bias(self, mlp_input: bool, include_mlp_biases: bool) -> Blocks:
        """The output biases before the layer as one entry: see ``HookedTransformer.accumulated_bias``."""
        config = self.reader.model.cfg
        if config.use_normalization_before_and_after or config.post_norm_only:
            bias = self._normalised_biases(mlp_input, include_mlp_biases)
        else:
            given = self.reader.model.accumulated_bias(self.layer, mlp_input, include_mlp_biases)
            bias = np.broadcast_to(self.reader.numbers(given, "bias"), (1, *self._shape))
        return Blocks(["bias"], iter([self.readout.vectors(bias)]))

    def _normalised_biases(self, mlp_input: bool, include_mlp_biases: bool) -> Array:
        """The output biases where norms of the sublayers' outputs make something else of them at each position."""
        parts = [("attn", i) for i in range(self.layer + mlp_input)]
        parts += [("mlp", i) for i in range(self.layer)] if include_mlp_biases else []
        total = np.zeros((1, *self._shape), np.float32)
        for part, i in parts:
            bias = self.reader.model.weights.get(in_block(i, "attn.b_O" if part == "attn" else "mlp.b_out"))
            post = self.reader.post_norm(i, part, self.positions)
            assert post is not None, "this architecture has such norms"
            if bias is not None:
                total = total + post.vectors(working(bias))
            if post.bias is not None:
                total = total + post.bias
        return total

    def stacked(self, parts: list[Blocks], incl_remainder: bool = False) -> tuple[Array, list[str]]:
        """One stack [n, *b, p, D] of some blocks, and its labels.

        Args:
            parts: What to stack.
            incl_remainder: Whether the rest of the residual before the layer follows as a last entry.
        """
        if incl_remainder:
            # At layer 0 nothing is written yet, and all there is to read is the embeddings.
            layer, point = (0, "hook_resid_pre") if self.layer == 0 else (self.layer - 1, "hook_resid_post")
            parts = [*parts, self.whole([("remainder", in_block(layer, point))])]
        labels = [label for part in parts for label in part.labels]
        stack, filled = None, 0
        # Filled block by block: a list of all blocks and their concatenation would take the memory twice.
        for block in itertools.chain.from_iterable(part.arrays for part in parts):
            if stack is None:
                stack = np.empty((len(labels), *block.shape[1:]), block.dtype)
            stack[filled : filled + len(block)] = block
            filled += len(block)
        if stack is None:
            stack = Readout(onto=self.readout.onto).vectors(np.zeros((0, *self._shape), np.float32))
        if incl_remainder:
            stack[-1] -= stack[:-1].sum(0)
        return stack, labels

    @property
    def _shape(self) -> tuple[int, ...]:
        """[*b, p, D], of one entry that is not projected."""
        return (*self.reader.positions_shape(self.positions), self.reader.model.cfg.d_model)
