"""A matched graph run with ONNX Runtime: hook points and weights as arrays in TransformerLens's axes, by NumPy alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from graphlens.surgery import unfuse
from graphlens.surgery.match import Match, MatchedWeight, View, match, with_norms_apart

Array = np.ndarray


def opened(file: Path) -> tuple[ir.Model, Match]:
    """A foreign file with standard operators, and what was found in it."""
    made = unfuse(ir.external_data.load_to_model(ir.load(file)))
    made.model.graph.sort()
    model, copies = with_norms_apart(made.model)
    origin = dict(made.origin)
    origin.update({new: made.origin.get(old, old) for new, old in copies.items()})
    return model, match(model, origin=origin)


def values_of(model: ir.Model, names: Iterable[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Values of a graph in a run of ONNX Runtime without optimisation, and its initializers."""
    copy = model.clone()
    made = {str(value.name): value for node in copy.graph for value in node.outputs}
    given = {str(value.name) for value in copy.graph.outputs}
    wanted = list(dict.fromkeys(names))
    copy.graph.outputs.extend(made[name] for name in wanted if name in made and name not in given)
    proto = ir.to_proto(copy)
    for output in proto.graph.output:
        output.ClearField("type")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    found = dict(zip(outputs, session.run(outputs, dict(feeds)), strict=True))
    for name in wanted:
        if name not in found:
            stored = copy.graph.initializers[name].const_value
            assert stored is not None
            found[name] = stored.numpy()
    return found


def activations(model: ir.Model, found: Match, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Every hook point of a match in one run."""
    asked = [name for view in found.hooks.values() for name in (view.value, view.like, view.tokens) if name is not None]
    values = values_of(model, asked, feeds)
    return {name: viewed(view, values) for name, view in found.hooks.items()}


def viewed(view: View, values: Mapping[str, Array]) -> Array:
    """A view's activation, the steps in the order that the record states."""
    array = values[view.value]
    if view.tokens is not None:
        array = array.reshape(*values[view.tokens].shape[:2], *array.shape[1:])
    if view.first is not None:
        array = array.transpose(view.first)
    if view.shape is not None:
        array = array.reshape([array.shape[place] if size == 0 else size for place, size in enumerate(view.shape)])
    if view.permute is not None:
        array = array.transpose(view.permute)
    if view.like is not None:
        array = np.broadcast_to(array, (values[view.like].shape[0], *array.shape[1:]))
    return array


def weight_of(model: ir.Model, view: MatchedWeight) -> Array:
    """A weight of plain numbers as an array."""
    assert view.quantised is None
    stored = model.graph.initializers[view.tensor].const_value
    assert stored is not None
    array = stored.numpy()
    if view.take is not None:
        axis, part, parts = view.take
        array = np.split(array, parts, axis)[part]
    for stretch, place in ((view.cut, 0), (view.shape, 1), (view.within, 0)):
        if stretch is None:
            continue
        array = array.reshape(stretch) if place else array.take(range(stretch[1], stretch[2]), stretch[0])
    if view.permute is not None:
        array = array.transpose(view.permute)
    if view.joined:
        array = array.reshape(-1, *array.shape[2:])
    if view.times is not None:
        array = array * np.float32(view.times)
    return array if view.plus is None else array + np.float32(view.plus)
