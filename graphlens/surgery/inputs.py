"""The head of a hooked graph: how positions and masks come from input_ids and the optional inputs.

The body reads input_ids [b, s], ``positions`` int64 [b, s], ``mask`` bool [b, 1, q, k] and ``token_mask`` bool [b, s]; some
architectures also ``local_mask``, what a window leaves of the mask, and ``distance`` [q, k], how far before a query a key lies.
An encoder's body reads ``mask`` [b, 1, 1, k], the same for every query, and ``token_types`` int64 [b, s].
Keeping their computation apart lets another head (one with a KV cache, one that starts from a residual) feed the same body.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from graphlens.errors import ModelFileError
from graphlens.file.io_names import (
    ATTENTION_MASK,
    BODY_INPUTS,
    DISTANCE,
    INPUT_IDS,
    LOCAL_MASK,
    MASK,
    POSITION_IDS,
    POSITIONS,
    TOKEN_MASK,
    TOKEN_TYPE_IDS,
    TOKEN_TYPES,
)
from graphlens.surgery.graph import Attribute, install, integers, numbered, optional_input, read_manifest, replace_value

_PREFIX = "preamble/"


class _Head:
    """Nodes under construction for a head that is fed by ``source``, an input, and their installation before a body.

    The body's inputs are ``body``, by name; its local layers see ``window`` tokens.
    """

    def __init__(self, graph: ir.Graph, source: ir.Value, body: Mapping[str, ir.Value], window: int | None) -> None:
        self.graph, self.source, self._window = graph, source, window
        # A segment of a model may read some of them alone.
        self._body = {name: value for name, value in body.items() if value.uses()}
        self._tape = Tape()

    def op(self, kind: str, inputs: Sequence[ir.Value], **attributes: Attribute) -> ir.Value:
        """The output of a new node."""
        return self._tape.op(kind, inputs, attributes)

    def constant(self, value: int | list[int], name: str) -> ir.Value:
        """An int64 constant."""
        return integers(self._tape, value, f"{_PREFIX}{name}")

    def attention_mask(self) -> ir.Value:
        """The optional input [b, s], 1 at real tokens."""
        return optional_input(self.graph, ATTENTION_MASK, np.ones((1, 1), np.int64), ["mask_batch", "mask_sequence"])

    def install(
        self, positions: ir.Value, token_mask: ir.Value, keys: ir.Value, sizes: tuple[ir.Value, ir.Value | None]
    ) -> None:
        """Feeds the body.

        Args:
            positions: int64 [b, s].
            token_mask: bool [b, s], True at tokens that are no padding.
            keys: bool [b, k], the same for all keys.
            sizes: How many keys there are, and which of them the first query is, if not the first: scalars.
        """
        self.feed({POSITIONS: positions, TOKEN_MASK: token_mask, **self._seen(keys, *sizes)})

    def feed(self, values: Mapping[str, ir.Value]) -> None:
        """Lets the body read ``values`` in the place of its inputs of those names."""
        for name, old in self._body.items():
            replace_value(old, values[name])
            values[name].name = name
        install(self.graph, self._tape, numbered(_PREFIX), after=self.source)

    def _seen(self, real: ir.Value, length: ir.Value, offset: ir.Value | None) -> dict[str, ir.Value]:
        """What each query may see of the keys, and how far they are away."""
        zero, unit = self.constant(0, "zero"), self.constant(1, "one")
        keys = self.op("Range", [zero, length, unit])
        queries = keys if offset is None else self.op("Range", [offset, length, unit])
        column = self.op("Unsqueeze", [queries, self.constant([1], "column")])
        causal = self.op("LessOrEqual", [keys, column])
        mask = self.op("And", [causal, self.op("Unsqueeze", [real, self.constant([1, 2], "keys")])])
        found = {MASK: mask}
        if self._body.keys() & {LOCAL_MASK, DISTANCE}:
            away = self.op("Sub", [keys, column])
            if LOCAL_MASK in self._body:
                if self._window is None:
                    raise ModelFileError(
                        f"the graph reads {LOCAL_MASK!r}, and its manifest names no window (window_size). Export the model again."
                    )
                near = self.op("Greater", [away, self.constant(-self._window, "window")])
                found[LOCAL_MASK] = self.op("And", [mask, near])
            if DISTANCE in self._body:
                dtype = self._body[DISTANCE].dtype or ir.DataType.FLOAT
                found[DISTANCE] = self.op("Cast", [self.op("Min", [away, zero])], to=dtype)
        return found


def _plain_head(head: _Head, **sizes: int) -> None:
    """Makes positions and masks of the optional inputs, and feeds them to the body.

    Args:
        head: Takes the nodes.
        sizes: Attributes with which a Shape of the head's source gives batch and sequence.
    """
    attention_mask, minus_one = head.attention_mask(), np.full((1, 1), -1, np.int64)
    position_ids = optional_input(head.graph, POSITION_IDS, minus_one, ["position_batch", "position_sequence"])
    zero, unit = head.constant(0, "nothing"), head.constant(1, "unit")
    full = head.op("Expand", [attention_mask, head.op("Shape", [head.source], **sizes)])
    token_mask = head.op("Cast", [full], to=ir.DataType.BOOL)
    computed = head.op("Max", [head.op("Sub", [head.op("CumSum", [full, unit]), unit]), zero])
    positions = head.op("Where", [head.op("Less", [position_ids, zero]), computed, position_ids])
    length = head.op("Shape", [head.source], start=1, end=2)
    head.install(positions, token_mask, token_mask, (head.op("Squeeze", [length]), None))


def _encoder_head(head: _Head, **sizes: int) -> None:
    """Makes an encoder's mask and token types of the optional inputs, and feeds them to the body.

    Args:
        head: Takes the nodes.
        sizes: As in ``_plain_head``.
    """
    attention_mask = head.attention_mask()
    types = optional_input(head.graph, TOKEN_TYPE_IDS, np.zeros((1, 1), np.int64), ["types_batch", "types_sequence"])
    shape = head.op("Shape", [head.source], **sizes)
    real = head.op("Cast", [head.op("Expand", [attention_mask, shape])], to=ir.DataType.BOOL)
    mask = head.op("Unsqueeze", [real, head.constant([1, 2], "keys")])
    head.feed({MASK: mask, TOKEN_TYPES: head.op("Expand", [types, shape])})


def attach_preamble(model: ir.Model, window: int | None = None, encoder: bool = False) -> ir.Model:
    """A copy of a traced body with the plain head, so that it runs from ``input_ids`` alone.

    ``attention_mask`` int64 [b, s] (1 = real token) defaults to ones. ``position_ids`` int64 [b, s] default to
    max(cumsum(attention_mask) - 1, 0); a negative entry asks for that default too. An encoder has ``token_type_ids`` int64
    [b, s] in their place, which default to zeros.

    Args:
        model: A traced body, with ``input_ids`` and some of BODY_INPUTS as its inputs.
        window: How many tokens back its local layers see; None where it has none.
        encoder: True for the body of an encoder.

    Returns:
        The copy.
    """
    model = model.clone()
    body = {str(value.name): value for value in model.graph.inputs}
    tokens = body.pop(INPUT_IDS)
    for value in body.values():
        model.graph.inputs.remove(value)
    (_encoder_head if encoder else _plain_head)(_Head(model.graph, tokens, body, window))
    return model


def detach_preamble(model: ir.Model) -> dict[str, ir.Value]:
    """Takes the head off, in place.

    Args:
        model: A hooked graph with the plain head.

    Returns:
        The body's inputs by name, which nothing computes any more.
    """
    graph = model.graph
    body = {str(value.name): value for node in graph for value in node.outputs if value.name in BODY_INPUTS}
    loose = {}
    for name, value in body.items():
        loose[name] = ir.Value(name=f"{name}/loose", shape=value.shape, type=value.type)
        value.replace_all_uses_with(loose[name])
    for node in reversed([node for node in graph if str(node.name).startswith(_PREFIX)]):
        graph.remove(node, safe=True)
    for name in (
        ATTENTION_MASK,
        POSITION_IDS,
        TOKEN_TYPE_IDS,
        *[n for n in graph.initializers if n.startswith(_PREFIX)],
    ):
        if name in graph.initializers:
            value = graph.initializers.pop(name)
            if value in graph.inputs:
                graph.inputs.remove(value)
    return loose


def head_from_residual(model: ir.Model, residual: ir.Value) -> None:
    """Gives a model a plain head that takes the batch and the sequence from a residual, in place.

    Args:
        model: A hooked graph with the plain head.
        residual: The input [b, s, d_model] that it starts from.
    """
    body, plain = detach_preamble(model), _encoder_head if _is_encoder(model) else _plain_head
    plain(_Head(model.graph, residual, body, _window(model)), start=0, end=2)


def _window(model: ir.Model) -> int | None:
    """How many tokens back a model's local layers see."""
    return read_manifest(model).config.window_size


def _is_encoder(model: ir.Model) -> bool:
    """True for a model whose tokens attend to each other both ways."""
    return read_manifest(model).config.is_encoder


def head_with_past(model: ir.Model, source: ir.Value) -> None:
    """Replaces the plain head, in place, by the one of a KV cache.

    ``attention_mask`` int64 [b, past + s] covers the cached tokens too and ``position_ids`` int64 [b, s] the new ones;
    both are required.

    Args:
        model: A hooked graph with the plain head.
        source: The input that it starts from, with the sequence at axis 1: ``input_ids`` or a residual.
    """
    body = detach_preamble(model)
    head = _Head(model.graph, source, body, _window(model))

    def required(name: str, sequence: str) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(["batch", sequence]), type=ir.TensorType(ir.DataType.INT64))
        model.graph.inputs.append(value)
        return value

    attention_mask = required(ATTENTION_MASK, "total_sequence")
    positions = head.op("Identity", [required(POSITION_IDS, "sequence")])
    new = head.op("Shape", [source], start=1, end=2)
    total = head.op("Shape", [attention_mask], start=1, end=2)
    past = head.op("Sub", [total, new])
    attended = head.op("Cast", [attention_mask], to=ir.DataType.BOOL)
    token_mask = head.op("Slice", [attended, past, total, head.constant([1], "sequence_axis")])
    head.install(positions, token_mask, attended, (head.op("Squeeze", [total]), head.op("Squeeze", [past])))
