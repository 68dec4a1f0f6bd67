"""Names the values of a matched graph by their hook points, in TransformerLens's layout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from graphlens.file.firing import graph_order
from graphlens.file.io_names import LOGITS
from graphlens.file.manifest import HookEntry
from graphlens.file.names import axes_of, firing_order
from graphlens.surgery.graph import install, integers, numbered
from graphlens.surgery.match.records import View

# Axes whose size only a run knows -> what the graph calls them.
_SYMBOLS = {"batch": "batch", "pos": "sequence", "query_pos": "sequence"}


@dataclass(frozen=True)
class Seen:
    """A value as a probe run saw it.

    Attributes:
        shape: Its sizes.
        dtype: Its NumPy dtype.
    """

    shape: tuple[int, ...]
    dtype: str


def laid_out(view: View, seen: Mapping[str, Seen], shape: Sequence[int] | None = None) -> tuple[int, ...]:
    """The shape of a hook point's activation, from that of the value it is a view of.

    Args:
        view: The view.
        seen: What a probe run saw of each value, by name.
        shape: The value's sizes; by default those that were seen.

    Raises:
        ValueError: The view does not fit them.
    """
    shape = seen[view.value].shape if shape is None else shape
    if view.tokens is not None:
        shape = _apart(shape, seen[view.tokens].shape[:2])
    sizes = _ordered(shape, view.first)
    if view.shape is not None:
        given = [sizes[place] if size == 0 else size for place, size in enumerate(view.shape)]
        known = math.prod(size for size in given if size != -1)
        if given.count(-1) > 1 or known < 1 or math.prod(sizes) % known:
            raise ValueError(f"{list(sizes)} cannot become {list(view.shape)}")
        sizes = tuple(math.prod(sizes) // known if size == -1 else size for size in given)
        if math.prod(sizes) != math.prod(shape):
            raise ValueError(f"{list(shape)} cannot become {list(view.shape)}")
    return _ordered(sizes, view.permute)


def _apart(shape: Sequence[int], tokens: Sequence[int]) -> tuple[int, ...]:
    """Sizes whose first axis, of the tokens of all prompts, is split in two."""
    if not shape or shape[0] != math.prod(tokens):
        raise ValueError(f"{list(shape)} is not of {' x '.join(map(str, tokens))} tokens")
    return (*tokens, *shape[1:])


def _ordered(sizes: Sequence[int], order: Sequence[int] | None) -> tuple[int, ...]:
    """Sizes in another order of their axes."""
    if order is None:
        return tuple(sizes)
    if sorted(order) != list(range(len(sizes))):
        raise ValueError(f"{len(sizes)} axes cannot be ordered {list(order)}")
    return tuple(sizes[axis] for axis in order)


def _moves(view: View) -> bool:
    """True if a hook point has other axes than the value it is a view of."""
    return any(part is not None for part in (view.tokens, view.first, view.shape, view.permute))


def name_hooks(
    model: ir.Model,
    values: Mapping[str, ir.Value],
    hooks: Mapping[str, View],
    seen: Mapping[str, Seen],
    sizes: Mapping[str, int],
    batch: int,
    past: bool,
) -> dict[str, HookEntry]:
    """Gives the values of a graph the names of their hook points, in place, and makes them its outputs.

    Where a value has other axes than TransformerLens's, a reshape and a transposition go before the hook point and their
    inverse behind it: all that reads the value reads it through the hook point. Hook points of one value share it, as in
    graphlens's own exports.

    Args:
        model: The graph, with the inputs and outputs of a hooked file.
        values: The graph's values by the names that they had when it was matched.
        hooks: Hook point -> where it is in the graph.
        seen: What a probe run saw of each value, by name.
        sizes: The size of each axis that does not depend on the input: see ``names.axis_sizes``.
        batch: How many prompts the probe had.
        past: True if the graph takes past keys and values.

    Returns:
        The hook map, in firing order.

    Raises:
        ValueError: A view does not fit its value; the hook point is named.
    """
    graph = model.graph
    layers = 1 + max((int(name.split(".")[1]) for name in hooks if name.startswith("blocks.")), default=-1)
    at: dict[str, ir.Value] = {}  # the value that is read now in a value's place
    found: dict[str, ir.Value] = {}
    done: dict[tuple[object, ...], ir.Value] = {}
    entries: dict[str, HookEntry] = {}
    named: set[int] = set()
    for name in firing_order(hooks, layers):
        view = hooks[name]
        key = (view.value, view.tokens, view.first, view.shape, view.permute)
        saw = seen[view.value] if view.value in seen else _stated(values[view.value])
        try:
            shape = laid_out(view, seen, saw.shape)
            axes = axes_of(name, len(shape))
            spread = _fits(shape, axes, sizes, batch)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if key not in done:
            value = at.get(view.value, values[view.value])
            own = value.producer() is None or id(value) in named or spread
            if _moves(view) or own:
                tokens = None if view.tokens is None else values[view.tokens]
                kind = ir.TensorType(_data_type(saw.dtype))
                value, back = _laid(graph, value, view, name, len(axes) if spread else 0, kind, tokens)
                at[view.value] = back
            else:
                at[view.value] = value
            done[key] = value
            if value.name != LOGITS:
                value.name = name
            named.add(id(value))
            value.type = ir.TensorType(_data_type(saw.dtype))
            keys = {**_SYMBOLS, "key_pos": "total_sequence" if past else "sequence"}
            value.shape = ir.Shape([sizes[axis] if axis in sizes else keys.get(axis, axis) for axis in axes])
        found[name] = done[key]
        entries[name] = HookEntry(str(done[key].name), axes, saw.dtype)
    graph.sort()
    for value in dict.fromkeys(found.values()):
        if not value.is_graph_output():
            graph.outputs.append(value)
    return {name: entries[name] for name in graph_order(graph, found, layers)}


def _stated(value: ir.Value) -> Seen:
    """What an initializer says of itself: no probe sees it."""
    tensor = value.const_value
    if tensor is None:
        raise ValueError(f"{value.name!r} was not computed in the probe")
    return Seen(tuple(int(str(size)) for size in tensor.shape), str(tensor.dtype.numpy()))


def _fits(shape: Sequence[int], axes: Sequence[str], sizes: Mapping[str, int], batch: int) -> bool:
    """True if a value is the same for all prompts and is to be repeated for each; ValueError if it has other sizes."""
    if len(shape) != len(axes):
        raise ValueError(f"{list(shape)} are not the axes {', '.join(axes)}")
    for size, axis in zip(shape, axes, strict=True):
        if axis in sizes and size != sizes[axis]:
            raise ValueError(f"{axis} is {size} long, and the model's is {sizes[axis]}")
    if axes[0] == "batch" and shape[0] not in (1, batch):
        raise ValueError(f"the first axis is {shape[0]} long in a run of {batch} prompts")
    return axes[0] == "batch" and shape[0] == 1 and batch != 1


def _data_type(dtype: str) -> ir.DataType:
    return ir.DataType.from_numpy(np.dtype(dtype))


def _laid(
    graph: ir.Graph,
    value: ir.Value,
    view: View,
    name: str,
    spread: int,
    kind: ir.TypeProtocol,
    tokens: ir.Value | None,
) -> tuple[ir.Value, ir.Value]:
    """Puts a hook point's own value behind one of the graph.

    Where ``spread`` is not 0 it has so many axes, and is repeated for each prompt: what reads it adds it to what has a batch.
    Where there are ``tokens`` its first axis is split by their first two sizes.

    Returns it, and what is read in the old one's place.
    """
    readers = tuple(value.uses())
    is_output = value.is_graph_output()
    tape, new = Tape(), value
    if tokens is not None:
        sizes = tape.op("Shape", [tokens], {"start": 0, "end": 2})
        last = integers(tape, [-1], f"{name}/last")
        new = tape.op("Reshape", [new, tape.op("Concat", [sizes, last], {"axis": 0})])
    if view.first is not None:
        new = tape.op("Transpose", [new], {"perm": list(view.first)})
    whole = new
    if view.shape is not None:
        new = tape.op("Reshape", [new, integers(tape, view.shape, f"{name}/split")])
    if view.permute is not None:
        new = tape.op("Transpose", [new], {"perm": list(view.permute)})
    if spread:
        first = tape.op("Shape", [graph.inputs[0]], {"start": 0, "end": 1})
        ones = integers(tape, [1] * (spread - 1), f"{name}/each")
        new = tape.op("Expand", [new, tape.op("Concat", [first, ones], {"axis": 0})])
    elif new is value:
        new = tape.op("Identity", [new])
    back = new
    if not spread:
        back = _laid_back(tape, view, new, whole, name)
        if tokens is not None:
            back = tape.op("Reshape", [back, tape.op("Shape", [value])])
    for made in tape.nodes:
        made.outputs[0].type = kind if made.op_type not in ("Shape", "Concat") else None
    install(graph, tape, numbered(f"{name}/layout/"), after=value)
    for node, index in readers:
        if node.op_type != "Shape":
            node.replace_input_with(index, back)
    if is_output:
        outputs = graph.outputs
        for place, output in enumerate(outputs):
            if output is value:
                back.name, value.name = value.name, f"{value.name}/original"
                outputs[place] = back
    return new, back


def _laid_back(tape: Tape, view: View, new: ir.Value, whole: ir.Value, name: str) -> ir.Value:
    """A hook point's activation in the layout of the value that it is a view of."""
    back = new
    if view.permute is not None:
        back = tape.op("Transpose", [back], {"perm": _inverse(view.permute)})
    if view.shape is not None:
        sizes = tape.op("Shape", [whole]) if view.back is None else integers(tape, view.back, f"{name}/join")
        back = tape.op("Reshape", [back, sizes])
    return back if view.first is None else tape.op("Transpose", [back], {"perm": _inverse(view.first)})


def _inverse(order: Sequence[int]) -> list[int]:
    return [int(place) for place in np.argsort(order)]
