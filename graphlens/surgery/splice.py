"""The one primitive of editing: a hook point's value is replaced by a new one computed from it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir
from onnx_ir.tape import Tape

from graphlens.file.names import unknown_hook
from graphlens.surgery.graph import (
    ensure_hooks_resolve,
    optional_input,
    read_manifest,
    values_by_name,
    write_manifest,
)


class Scope:
    """What an edit may add to the graph: nodes, constants and inputs. Its names live under the hook's own name."""

    def __init__(self, graph: ir.Graph, hook: str) -> None:
        self.graph, self.hook = graph, hook
        self._tape = Tape()
        self._taken = set(graph.initializers) | {str(v.name) for n in graph for v in n.outputs}
        self._taken |= {str(node.name) for node in graph} | {str(value.name) for value in graph.inputs}

    def _unique(self, label: str) -> str:
        """``{hook}/{label}``, numbered when an earlier edit of this hook point took that name."""
        base = f"{self.hook}/{label}"
        name = base
        for number in itertools.count(1):
            if name not in self._taken:
                break
            name = f"{base}_{number}"
        self._taken.add(name)
        return name

    def op(self, op_type: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: Any) -> ir.Value:
        """Adds a node with one output and returns it."""
        return self._tape.op(op_type, inputs, attributes, domain=domain)

    def ops(self, op_type: str, inputs: Sequence[ir.Value | None], count: int, **attributes: Any) -> Sequence[ir.Value]:
        """Adds a node with ``count`` outputs and returns them."""
        return self._tape.op_multi_out(op_type, inputs, attributes, num_outputs=count)

    def constant(self, array: Any, label: str) -> ir.Value:
        """Adds a constant named ``{hook}/{label}``."""
        return self._tape.initializer(ir.tensor(array), name=self._unique(label))

    def input(self, name: str, default: Any, shape: Sequence[str | int]) -> ir.Value:
        """Adds (or finds) a graph input with a default: an initializer that is also an input."""
        for value in self.graph.inputs:
            if value.name == name:
                return value
        return optional_input(self.graph, name, default, shape)

    def _added(self, value: ir.Value) -> bool:
        """Whether a node of this scope computes the value."""
        return value.producer() in set(self._tape.nodes)

    def _install(self, before: ir.Value) -> None:
        for initializer in self._tape.initializers:
            self.graph.initializers[str(initializer.name)] = initializer
        for node in self._tape.nodes:
            node.name = self._unique(f"{node.op_type}_node")
            for output in node.outputs:
                output.name = output.name or self._unique(node.op_type)
        producer = before.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], list(self._tape.nodes))
        else:
            self.graph.insert_after(producer, list(self._tape.nodes))


Edit = Callable[[ir.Value, Scope], ir.Value]


def splice(model: ir.Model, edits: Mapping[str, Edit]) -> ir.Model:
    """A copy of a hooked model in which each named hook point carries ``edit(value, scope)`` instead of its value.

    All consumers of the hook point, and its output, see the new value. Of hook points that share a value (a block's
    resid_post and the next one's resid_pre) those that fire before the edited one keep reading the old value, so a
    chain of edits behaves as hooks firing in order, whatever order they were spliced in.
    Raises UnknownHookPoint before anything is changed.
    """
    manifest = read_manifest(model)
    names, layers = list(manifest.hooks), manifest.config.n_layers
    for name in edits:
        if name not in manifest.hooks:
            raise unknown_hook(name, names, layers)
    model = model.clone()
    values = values_by_name(model)
    hooks = dict(manifest.hooks)
    for name in [name for name in names if name in edits]:
        old_name = hooks[name].value
        old = values[old_name]
        sharers = [other for other in names if hooks[other].value == old_name]
        position = sharers.index(name)
        uses = tuple(old.uses())  # taken first: the edit's own nodes must keep reading the old value
        scope = Scope(model.graph, name)
        new = edits[name](old, scope)
        if new is old:
            continue
        if not scope._added(new):  # a constant, an input, another value: it keeps its own name
            new = scope.op("Identity", [new])
        new.shape = new.shape if new.shape is not None else old.shape
        new.type = new.type if new.type is not None else old.type
        for node, index in uses:
            node.replace_input_with(index, new)
        if position == 0:
            old.name, new.name = scope._unique("unedited"), old_name
            values[str(old.name)] = old
            outputs = model.graph.outputs
            for index, output in enumerate(outputs):
                if output is old:
                    outputs[index] = new
        else:
            new.name = name
            if old.is_graph_output():
                model.graph.outputs.append(new)
        scope._install(old)
        values[str(new.name)] = new
        for other in sharers[position:]:
            hooks[other] = replace(hooks[other], value=str(new.name))
    write_manifest(model, manifest.with_hooks(hooks))
    return ensure_hooks_resolve(model)
