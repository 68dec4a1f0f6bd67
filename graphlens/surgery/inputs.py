"""The head of a hooked graph: how positions and masks come from input_ids and the optional inputs.

The body reads four values: input_ids [b, s], ``positions`` int64 [b, s], ``mask`` bool [b, 1, q, k] and ``token_mask``
bool [b, s]. Keeping their computation apart lets another head (one with a KV cache, one that starts from a residual)
feed the same body.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from graphlens.surgery.graph import ATTENTION_MASK, INPUT_IDS, POSITION_IDS, optional_input

BODY_INPUTS = ("positions", "mask", "token_mask")
_PREFIX = "preamble/"


class _Head:
    """Nodes under construction for a head, and their installation in front of a body."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._tape = Tape()
        self.op = self._tape.op

    def constant(self, value: int | list[int], name: str) -> ir.Value:
        """An int64 constant."""
        return self._tape.initializer(ir.tensor(np.asarray(value, np.int64)), name=f"{_PREFIX}{name}")

    def install(self, body: Mapping[str, ir.Value], values: tuple[ir.Value, ir.Value, ir.Value]) -> None:
        """Feeds (positions, mask, token_mask) to the body in place of the ``body`` values of those names."""
        for name, value in zip(BODY_INPUTS, values, strict=True):
            if name not in body:
                continue  # a segment of a model may not read it
            old = body[name]
            value.shape, value.type = old.shape, old.type
            old.replace_all_uses_with(value)
            value.name = name
        for initializer in self._tape.initializers:
            self.graph.initializers[str(initializer.name)] = initializer
        first = self.graph[0]
        for index, node in enumerate(self._tape.nodes):
            node.name = f"{_PREFIX}{node.op_type}_{index}"
            for output in node.outputs:
                output.name = output.name if output.name in BODY_INPUTS else f"{_PREFIX}{node.op_type}_{index}"
        self.graph.insert_before(first, list(self._tape.nodes))

    def causal(self, length: ir.Value, offset: ir.Value | None) -> ir.Value:
        """bool [q, k]: which of ``length`` keys each query may see; queries start at key ``offset`` (default 0)."""
        zero, unit = self.constant(0, "zero"), self.constant(1, "one")
        keys = self.op("Range", [zero, length, unit])
        queries = keys if offset is None else self.op("Range", [offset, length, unit])
        return self.op("LessOrEqual", [keys, self.op("Unsqueeze", [queries, self.constant([1], "column")])])


def _plain_head(head: _Head, shape: Callable[[], ir.Value], length: Callable[[], ir.Value]) -> tuple[ir.Value, ...]:
    """Positions, mask and token mask from the optional inputs, for ``shape()`` int64 [2] = (batch, sequence)."""
    one, minus_one = np.ones((1, 1), np.int64), np.full((1, 1), -1, np.int64)
    attention_mask = optional_input(head.graph, ATTENTION_MASK, one, ["mask_batch", "mask_sequence"])
    position_ids = optional_input(head.graph, POSITION_IDS, minus_one, ["position_batch", "position_sequence"])
    zero, unit = head.constant(0, "nothing"), head.constant(1, "unit")
    full = head.op("Expand", [attention_mask, shape()])
    token_mask = head.op("Cast", [full], {"to": ir.DataType.BOOL})
    computed = head.op("Max", [head.op("Sub", [head.op("CumSum", [full, unit]), unit]), zero])
    positions = head.op("Where", [head.op("Less", [position_ids, zero]), computed, position_ids])
    causal = head.causal(head.op("Squeeze", [length()]), None)
    mask = head.op("And", [causal, head.op("Unsqueeze", [token_mask, head.constant([1, 2], "keys")])])
    return positions, mask, token_mask


def attach_preamble(model: ir.Model) -> ir.Model:
    """A copy of a traced body with the plain head: it runs from ``input_ids`` alone.

    ``attention_mask`` int64 [b, s] (1 = real token) defaults to ones. ``position_ids`` int64 [b, s] default to
    max(cumsum(attention_mask) - 1, 0); a negative entry asks for that default too.
    """
    model = model.clone()
    body = {str(value.name): value for value in model.graph.inputs}
    for name in BODY_INPUTS:
        model.graph.inputs.remove(body[name])
    head = _Head(model.graph)
    tokens = body[INPUT_IDS]
    head.install(
        body,
        _plain_head(  # type: ignore[arg-type]
            head, lambda: head.op("Shape", [tokens]), lambda: head.op("Shape", [tokens], {"start": 1, "end": 2})
        ),
    )
    return model


def detach_preamble(model: ir.Model) -> dict[str, ir.Value]:
    """Takes the plain head off, in place: the body's values by name, which then nothing computes."""
    graph = model.graph
    body = {str(value.name): value for node in graph for value in node.outputs if value.name in BODY_INPUTS}
    loose = {}
    for name, value in body.items():
        loose[name] = ir.Value(name=f"{name}/loose", shape=value.shape, type=value.type)
        value.replace_all_uses_with(loose[name])
    for node in reversed([node for node in graph if str(node.name).startswith(_PREFIX)]):
        graph.remove(node, safe=True)
    for name in (ATTENTION_MASK, POSITION_IDS, *[n for n in graph.initializers if n.startswith(_PREFIX)]):
        if name in graph.initializers:
            value = graph.initializers.pop(name)
            if value in graph.inputs:
                graph.inputs.remove(value)
    return loose


def head_from_residual(model: ir.Model, residual: ir.Value) -> None:
    """Gives a model that starts from ``residual`` [b, s, d_model] a plain head that takes its shape from there."""
    body = detach_preamble(model)
    head = _Head(model.graph)
    head.install(
        body,
        _plain_head(  # type: ignore[arg-type]
            head,
            lambda: head.op("Shape", [residual], {"start": 0, "end": 2}),
            lambda: head.op("Shape", [residual], {"start": 1, "end": 2}),
        ),
    )


def head_with_past(model: ir.Model, tokens: ir.Value) -> None:
    """Replaces the plain head, in place, by the one of a KV cache.

    ``attention_mask`` int64 [b, past + s] covers the cached tokens too and ``position_ids`` int64 [b, s] the new ones;
    both are required. ``tokens`` has the sequence at axis 1: input_ids or a residual.
    """
    body = detach_preamble(model)
    head = _Head(model.graph)

    def required(name: str, sequence: str) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(["batch", sequence]), type=ir.TensorType(ir.DataType.INT64))
        model.graph.inputs.append(value)
        return value

    attention_mask = required(ATTENTION_MASK, "total_sequence")
    positions = head.op("Identity", [required(POSITION_IDS, "sequence")])
    new = head.op("Shape", [tokens], {"start": 1, "end": 2})
    total = head.op("Shape", [attention_mask], {"start": 1, "end": 2})
    past = head.op("Sub", [total, new])
    attended = head.op("Cast", [attention_mask], {"to": ir.DataType.BOOL})
    token_mask = head.op("Slice", [attended, past, total, head.constant([1], "sequence_axis")])
    causal = head.causal(head.op("Squeeze", [total]), head.op("Squeeze", [past]))
    mask = head.op("And", [causal, head.op("Unsqueeze", [attended, head.constant([1, 2], "keys")])])
    head.install(body, (positions, mask, token_mask))
