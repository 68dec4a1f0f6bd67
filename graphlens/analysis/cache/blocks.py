"""Stacks of what heads and neurons write to the residual stream, filled one layer at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT, working
from graphlens.analysis.cache.reader import Reader
from graphlens.analysis.cache.readout import Readout
from graphlens.analysis.slices import Slice
from graphlens.errors import InputError
from graphlens.file.names import in_block


class Blocks(NamedTuple):
    """Some entries of a stack: their labels, and the entries a block at a time, [k, *b, p, D] each."""

    labels: list[str]
    arrays: Iterator[Array]


def heads_before(reader: Reader[ArrayT], layer: int, positions: Slice, readout: Readout) -> Blocks:
    """Every head before a layer, a block for each layer."""
    labels = [f"L{i}H{head}" for i in range(layer) for head in range(reader.model.cfg.n_heads)]
    return Blocks(labels, (head_results(reader, i, positions, readout) for i in range(layer)))


def head_results(reader: Reader[ArrayT], layer: int, positions: Slice, readout: Readout) -> Array:
    """What is read of each head of one layer, [h, *b, p, D]."""
    if in_block(layer, "attn.hook_result") in reader.activations:
        results = positions.apply(reader.activation("result", layer), dim=-3)
        return readout.vectors(np.moveaxis(results, -2, 0))
    z = np.moveaxis(positions.apply(reader.activation("z", layer), dim=-3), -2, 0)
    weight = working(reader.model.weights[in_block(layer, "attn.W_O")])
    if z.shape[0] != weight.shape[0] or z.shape[-1] != weight.shape[1]:
        raise InputError(f"{in_block(layer, 'attn.hook_z')} does not fit W_O of shape {list(weight.shape)}.")
    directions = readout.directions(weight)
    flat = readout.coefficients(z).reshape(z.shape[0], -1, z.shape[-1])
    product: Array = (flat @ directions.reshape(*weight.shape[:2], -1)).reshape(*z.shape[:-1], -1)
    return product[..., 0] if directions.ndim == 2 else product


def neurons_of(
    reader: Reader[ArrayT], layer: int, positions: Slice, neurons: Slice, readout: Readout
) -> tuple[Array, Array]:
    """Activations [*b, p, M] of one layer's neurons and what is read of the output weights of each, [M, D]."""
    acts = neurons.apply(positions.apply(reader.activation("post", layer), dim=-2), dim=-1)
    weight = neurons.apply(reader.model.weights[in_block(layer, "mlp.W_out")])
    return np.asarray(readout.coefficients(acts)), np.asarray(readout.directions(working(weight)))


def neurons_before(reader: Reader[ArrayT], layer: int, positions: Slice, neurons: Slice, readout: Readout) -> Blocks:
    """Every chosen neuron before a layer, a block for each layer."""
    kept = Slice.unwrap(neurons.slice if neurons.mode == "int" else neurons)

    def block(i: int) -> Array:
        acts, directions = neurons_of(reader, i, positions, kept, readout)
        first, trailing = np.moveaxis(acts, -1, 0), directions.shape[1:]
        rows = directions.reshape(len(first), *[1] * (first.ndim - 1), *trailing)
        return np.asarray(first.reshape(*first.shape, *[1] * len(trailing)) * rows)

    names = kept.indices(reader.model.cfg.d_mlp)
    return Blocks([f"L{i}N{neuron}" for i in range(layer) for neuron in names], (block(i) for i in range(layer)))


def whole(reader: Reader[ArrayT], parts: Iterable[tuple[str, str]], positions: Slice, readout: Readout) -> Blocks:
    """Whole activations, (label, hook name) each, a block of one for each."""
    chosen = list(parts)
    arrays = (readout.vectors(positions.apply(reader.activation(name), dim=-2))[None] for _, name in chosen)
    return Blocks([label for label, _ in chosen], arrays)


def stacked(
    reader: Reader[ArrayT], parts: list[Blocks], layer: int, positions: Slice, readout: Readout, incl_remainder: bool
) -> tuple[Array, list[str]]:
    """One stack [n, *b, p, D] of some blocks, and its labels.

    Args:
        reader: The run.
        parts: What to stack.
        layer: The layer before which they were written.
        positions: Which positions they are of.
        readout: How they were read.
        incl_remainder: Whether the rest of the residual before that layer follows as a last entry.
    """
    if incl_remainder:
        # At layer 0 nothing is written yet, and all there is to read is the embeddings.
        name = in_block(0, "hook_resid_pre") if layer == 0 else in_block(layer - 1, "hook_resid_post")
        parts = [*parts, whole(reader, [("remainder", name)], positions, readout)]
    labels = [label for part in parts for label in part.labels]
    stack, filled = None, 0
    # Filled block by block: a list of all blocks and their concatenation would take the memory twice.
    for block in itertools.chain.from_iterable(part.arrays for part in parts):
        if stack is None:
            stack = np.empty((len(labels), *block.shape[1:]), block.dtype)
        stack[filled : filled + len(block)] = block
        filled += len(block)
    if stack is None:
        shape = (0, *reader.positions_shape(positions), reader.model.cfg.d_model)
        stack = Readout(onto=readout.onto).vectors(np.zeros(shape, np.float32))
    if incl_remainder:
        stack[-1] -= stack[:-1].sum(0)
    return stack, labels
