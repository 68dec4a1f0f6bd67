"""Where a backward pass begins, and how the seed that it starts from is fed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphlens.errors import InputError
from graphlens.file.io_names import LOGITS, LOSS, SEED, SEED_POSITIONS, SEED_TOKENS, SPARSE
from graphlens.file.manifest import Manifest
from graphlens.file.names import UNEMBEDDED
from graphlens.surgery.graph import values_by_name
from graphlens.surgery.rules import Builder, number, width


def add_seed(
    b: Builder, model: ir.Model, manifest: Manifest, result: ir.Value, kind: str, hooked: set[ir.Value]
) -> tuple[ir.Value, ir.Value]:
    """Adds the inputs of a seed to a graph, in place, and makes the gradient that the backward pass starts from.

    Args:
        b: Takes the nodes that make it.
        model: The model that is differentiated.
        manifest: Its manifest.
        result: What is differentiated: the logits, unless the seed is dense.
        kind: ``"dense"``, ``"sparse"`` or ``"loss"``; see differentiate.
        hooked: The values whose gradients are asked for.

    Returns:
        (the value where the pass begins, its gradient). For a sparse seed that is what the unembedding reads, where
        nothing between it and the logits needs a gradient; else it is ``result``.

    Raises:
        InputError: The seed is sparse, and the unembedding is no matrix product.
    """
    graph, fed = model.graph, ir.DataType.from_numpy(np.dtype(manifest.config.dtype))
    if kind == SPARSE:
        # Where something between the unembedding and the logits has a derivative of its own, or a hook, it begins after that,
        # and so it does where an adopted graph does not show what the unembedding reads.
        read = manifest.hooks.get(UNEMBEDDED)
        end = result if read is None else values_by_name(model)[read.value]
        whole = end is result or result in hooked or not _is_product(end, result)
        return (result if whole else end), _sparse_seed(b, graph, end, result, whole, fed)
    if kind == LOSS:
        return result, _loss_seed(b, graph, result, fed)
    assert result.type is not None
    given = ir.Value(
        name=SEED, shape=result.shape, type=ir.TensorType(fed if result.name == LOGITS else result.type.dtype)
    )
    graph.inputs.append(given)
    return result, _as(b, given, result.type.dtype)


def _as(b: Builder, seed: ir.Value, dtype: ir.DataType) -> ir.Value:
    """A seed, which has the dtype that the model computes in, in that of what it is a gradient of."""
    return seed if seed.dtype == dtype else b.op("Cast", seed, to=int(dtype))


def _sparse_seed(
    b: Builder, graph: ir.Graph, end: ir.Value, logits: ir.Value, whole: bool, fed: ir.DataType
) -> ir.Value:
    """The gradient from seeds of few tokens: with respect to what the unembedding reads [b, pos, d_model], or, ``whole``,
    with respect to the logits [b, pos, V]."""
    dtype = (logits if whole else end).dtype or fed
    places, chosen = ("seed_batch", "seeds"), ("seed_batch", "seeds", "seed_tokens")
    positions = _input(graph, SEED_POSITIONS, places, ir.DataType.INT64)
    tokens = _input(graph, SEED_TOKENS, chosen, ir.DataType.INT64)
    seed = _as(b, _input(graph, SEED, chosen, fed), dtype)
    if whole:
        rows = _one_hot(b, tokens, logits, dtype)  # [b, m, k, V]
    else:
        weight, by_row = _unembedding(end)
        rows = b.op("Gather", weight, tokens, axis=0 if by_row else 1)  # [b, m, k, D], or [D, b, m, k]
        if not by_row:
            rows = b.op("Transpose", rows, perm=[1, 2, 3, 0])
    weighted = b.op("Mul", rows, b.op("Unsqueeze", seed, b.constant([3])))
    summed = b.op("ReduceSum", weighted, b.constant([2]), keepdims=0)  # [b, m, D or V]
    length = b.op("Shape", end, start=1, end=2)
    every = b.op("Range", b.constant(0), b.op("Squeeze", length), b.constant(1))
    here = b.op("Equal", b.op("Unsqueeze", every, b.constant([0, 2])), b.op("Unsqueeze", positions, b.constant([1])))
    placed = b.op("Cast", here, to=int(dtype))  # [b, pos, m]
    return b.op("MatMul", placed, summed)  # [b, pos, m] @ [b, m, D or V]


def _input(graph: ir.Graph, name: str, axes: tuple[str, ...], dtype: ir.DataType) -> ir.Value:
    """A new input of a graph."""
    value = ir.Value(name=name, shape=ir.Shape(axes), type=ir.TensorType(dtype))
    graph.inputs.append(value)
    return value


def _one_hot(b: Builder, tokens: ir.Value, logits: ir.Value, dtype: ir.DataType) -> ir.Value:
    """1 at each token, 0 elsewhere, along a new last axis as long as the vocabulary."""
    # ONNX Runtime has no OneHot of every float: of integers, then cast.
    ones = b.op("OneHot", tokens, b.constant(width(logits)), b.constant([0, 1]), axis=-1)
    return b.op("Cast", ones, to=int(dtype))


def _is_product(end: ir.Value, logits: ir.Value) -> bool:
    """Whether the logits are ``end`` times one matrix, perhaps plus a constant: nothing else in between."""
    value, products = logits, 0
    while value is not end:
        node = value.producer()
        if node is None or node.op_type not in ("Gemm", "MatMul", "Add", "Reshape", "Identity"):
            return False
        products += node.op_type in ("Gemm", "MatMul")
        inputs = [other for other in node.inputs if other is not None]
        if node.op_type == "Add":
            inputs = [other for other in inputs if not other.is_initializer() or other.is_graph_input()]
            if len(inputs) != 1:
                return False
        value = inputs[0]
    return products == 1


def _unembedding(end: ir.Value) -> tuple[ir.Value, bool]:
    """(the unembedding matrix, whether a token is a row of it), from the product that reads ``end``."""
    open_ends = [end]
    while open_ends:
        for node, index in open_ends.pop().uses():
            if node.op_type in ("Gemm", "MatMul") and index == 0 and node.inputs[1] is not None:
                return node.inputs[1], bool(number(node, "transB", 0))
            if node.op_type in ("Reshape", "Identity"):
                open_ends.extend(node.outputs)
    raise InputError(
        "the unembedding is no matrix product here, so seeds cannot be sparse: give them as [b, pos, vocabulary]."
    )


def _loss_seed(b: Builder, graph: ir.Graph, logits: ir.Value, fed: ir.DataType) -> ir.Value:
    """The gradient of a weighted sum of cross-entropies: (softmax - one at the target) times the weight."""
    assert logits.type is not None
    axes = ("seed_batch", "seed_sequence")
    targets = _input(graph, SEED_TOKENS, axes, ir.DataType.INT64)
    weights = _as(b, _input(graph, SEED, axes, fed), logits.type.dtype)
    hit = _one_hot(b, targets, logits, logits.type.dtype)
    apart = b.op("Sub", b.op("Softmax", logits, axis=-1), hit)
    return b.op("Mul", apart, b.op("Unsqueeze", weights, b.constant([2])))
