"""The one primitive of editing: a hook point's value is replaced by a new one computed from it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.tape import Tape

from graphlens.file.names import unknown_hook
from graphlens.surgery.clean_path import keep_clean
from graphlens.surgery.graph import (
    Attribute,
    finish,
    install,
    let_read,
    optional_input,
    read_manifest,
    replace_value,
    values_by_name,
)


class Scope:
    """What an edit may add to the graph: nodes, constants and inputs. Its names lie under the hook point's own name.

    Args:
        graph: The graph that is edited.
        hook: The hook point's name.
        taken: Every name in the graph; the scope adds its own.
        masks_with_numbers: True in an adopted file, which may mask scores with a low number in place of -inf.
    """

    def __init__(self, graph: ir.Graph, hook: str, taken: set[str], masks_with_numbers: bool = False) -> None:
        self.graph, self.hook, self.masks_with_numbers = graph, hook, masks_with_numbers
        self._tape = Tape()
        self._taken = taken

    def op(
        self, op_type: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: Attribute
    ) -> ir.Value:
        """Adds a node with one output.

        Args:
            op_type: The operator.
            inputs: What the node reads; None for an optional input that is left out.
            domain: The operator's domain; standard ONNX by default.
            **attributes: The node's attributes.

        Returns:
            The output.
        """
        return self._tape.op(op_type, inputs, attributes, domain=domain)

    def ops(
        self, op_type: str, inputs: Sequence[ir.Value | None], count: int, **attributes: Attribute
    ) -> Sequence[ir.Value]:
        """Adds a node with several outputs.

        Args:
            op_type: The operator, of standard ONNX.
            inputs: What the node reads; None for an optional input that is left out.
            count: How many outputs it has.
            **attributes: The node's attributes.

        Returns:
            The outputs.
        """
        return self._tape.op_multi_out(op_type, inputs, attributes, num_outputs=count)

    def constant(self, array: npt.ArrayLike, label: str) -> ir.Value:
        """Adds a constant.

        Args:
            array: Its content.
            label: The constant is named ``{hook}/{label}``, with a number behind where that is taken.

        Returns:
            The constant.
        """
        return self._tape.initializer(ir.tensor(array), name=self._unique(label))

    def input(self, name: str, default: npt.ArrayLike, shape: Sequence[str | int]) -> ir.Value:
        """Adds an input that a run may leave out, or finds the one of that name.

        Args:
            name: The input's full name.
            default: Its value where a run does not feed it.
            shape: Its shape; symbolic where a run may feed a larger array than the default.

        Returns:
            The input.
        """
        for value in self.graph.inputs:
            if value.name == name:
                return value
        self._taken.add(name)
        return optional_input(self.graph, name, default, shape)

    def _unique(self, label: str) -> str:
        """``{hook}/{label}``, numbered where an earlier edit of this hook point took that name."""
        base = f"{self.hook}/{label}"
        name = base
        for number in itertools.count(1):
            if name not in self._taken:
                break
            name = f"{base}_{number}"
        self._taken.add(name)
        return name

    def _edited(self, old: ir.Value, edit: Edit) -> ir.Value:
        """What the edit makes of a value, computed by a node of this scope; the value itself where nothing is changed."""
        new = edit(old, self)
        if new is not old and new.producer() not in set(self._tape.nodes):
            new = self.op("Identity", [new])  # a constant, an input, another value: it keeps its own name
        return new

    def _install(self, after: ir.Value) -> None:
        """Puts what the scope holds into the graph, behind the node that computes a value."""
        install(
            self.graph,
            self._tape,
            lambda node, _: self._unique(f"{node.op_type}_node"),
            lambda node, _: self._unique(node.op_type),
            after=after,
        )
        self._taken.update(str(output.name) for node in self._tape.nodes for output in node.outputs)


Edit = Callable[[ir.Value, Scope], ir.Value]
"""Makes the new value of a hook point from the old one, in a scope that takes the new nodes."""


def splice(model: ir.Model, edits: Mapping[str, Edit], changing: bool = True) -> ir.Model:
    """A copy in which hook points carry what an edit makes of them.

    All readers of a hook point, and its output, see the new value. Of hook points that share a value (a block's
    resid_post and the next one's resid_pre) those that fire before the edited one keep reading the old value, so a
    chain of edits behaves as hooks firing in order, whatever order they were spliced in.

    Args:
        model: A hooked model.
        edits: Hook name -> ``edit(value, scope)``, which returns the new value. One that returns ``value`` itself
            changes nothing.
        changing: False for edits that put nodes there and leave every number as it is. Others do not reach what the error
            term of an SAE is computed from.

    Returns:
        The copy.

    Raises:
        UnknownHookPoint: The model has no hook point of that name. No edit was called then.
    """
    manifest = read_manifest(model)
    names, layers = list(manifest.hooks), manifest.config.n_layers
    for name in edits:
        if name not in manifest.hooks:
            raise unknown_hook(name, names, layers)
    model = model.clone()
    values, taken = values_by_name(model), _names(model.graph)
    hooks = dict(manifest.hooks)
    carried = {name: entry.value for name, entry in hooks.items()}
    unreached = keep_clean(model, values, carried, edits) if changing else set()
    for name in [name for name in names if name in edits]:
        old_name = hooks[name].value
        old = values[old_name]
        sharers = [other for other in names if hooks[other].value == old_name]
        readers = tuple(
            use for use in old.uses() if use.node not in unreached
        )  # taken first: the edit's own nodes must keep reading the old value
        scope = Scope(model.graph, name, taken, manifest.adopted is not None)
        new = scope._edited(old, edits[name])
        if new is old:
            continue
        if sharers[0] == name:
            replace_value(old, new, readers, left=scope._unique("unedited"))
            values[str(old.name)] = old
        else:  # those that fire earlier keep the old value, under its name
            let_read(readers, new, old)
            new.name = name
            if old.is_graph_output():
                model.graph.outputs.append(new)
        scope._install(old)
        values[str(new.name)] = new
        for other in sharers[sharers.index(name) :]:
            hooks[other] = replace(hooks[other], value=str(new.name))
    return finish(model, manifest.with_hooks(hooks))


def _names(graph: ir.Graph) -> set[str]:
    """Every name that a value or a node of a graph has."""
    values = (*graph.inputs, *graph.initializers.values(), *(output for node in graph for output in node.outputs))
    return {*(str(value.name) for value in values), *(str(node.name) for node in graph)}
