"""Cutting a piece out of a model: what computes some values from others, with what it still needs from the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from graphlens.errors import InputError
from graphlens.file.manifest import Manifest
from graphlens.file.names import canonical, unknown_hook
from graphlens.surgery.graph import finish, read_manifest, values_by_name


def cut(
    model: ir.Model,
    inputs: Sequence[str],
    outputs: Sequence[str],
    also: Sequence[str] = (),
    sizes_by_name: bool = False,
) -> tuple[ir.Model, tuple[str, ...]]:
    """The piece of a model that computes some values from others.

    Batch and sequence sizes are taken from the inputs, so a piece may run on other sizes than the model would. Weights
    stay where they are, and the hook map keeps the hook points inside.

    Args:
        model: A hooked model; it is left as it is.
        inputs: Names of hook points or of other values (``mask``, say) to compute from. Hook points that share a value
            are one input.
        outputs: Names of hook points or of other values (``logits``, say) to compute.
        also: Names of values that may be inputs besides (``positions``, say). Those that the piece does not need, and those
            that the model lacks, are left out.
        sizes_by_name: True if sizes that have one name in the model are one size in the piece too. Nothing is then computed for
            its shape alone.

    Returns:
        (the piece, its frontier). The frontier holds the names of further values that the piece needs and that do not
        depend on ``inputs``: they are inputs of it too, after those asked for.

    Raises:
        UnknownHookPoint: The model has no value of that name.
        InputError: An output does not depend on the inputs, or none is given.
    """
    if not inputs or not outputs:
        raise InputError("a piece goes from some values to others: name at least one of either.")
    manifest = read_manifest(model)
    values = values_by_name(model)
    starts = {name: _resolve(name, values, manifest) for name in inputs}
    ends = {name: _resolve(name, values, manifest) for name in outputs}
    optional = {name: values[name] for name in also if name in values}
    piece = _Piece(model, {**starts, **optional}, sizes_by_name)
    reached = _reached(starts.values())
    for name, value in ends.items():
        if value not in reached:
            raise InputError(f"{name!r} does not depend on {', '.join(map(repr, inputs))}: there is nothing to cut.")
    results = [piece.take(value) for value in ends.values()]
    graph = ir.Graph(
        [*piece.inputs(optional), *piece.frontier.values()],
        results,
        nodes=piece.nodes,
        initializers=list(piece.initializers.values()),
        opset_imports=dict(model.graph.opset_imports),
        name="piece",
    )
    for name, value, result in zip(ends, ends.values(), results, strict=True):
        # A sole output is called as it was asked for; a hook point's value may carry an earlier alias's name.
        if result.name != name and list(ends.values()).count(value) == 1 and not result.is_graph_input():
            result.name = name
    found = ir.Model(graph, ir_version=model.ir_version, metadata_props=dict(model.metadata_props))
    new_names = {value.name: copy.name for value, copy in piece.copies.items() if copy not in piece.unread(optional)}
    hooks = {n: h for n, h in manifest.hooks.items() if h.value in new_names}
    hooks = {n: replace(h, value=str(new_names[h.value])) for n, h in hooks.items()}
    frontier = tuple(str(value.name) for value in piece.frontier)
    return finish(found, manifest.with_hooks(hooks), "the piece"), frontier


def _resolve(name: str, values: Mapping[str, ir.Value], manifest: Manifest) -> ir.Value:
    """The value that a hook point, or a value itself, is named by."""
    name = name if name in values else canonical(name, manifest.hooks)
    if name in manifest.hooks:
        return values[manifest.hooks[name].value]
    if name in values:
        return values[name]
    raise unknown_hook(name, list(manifest.hooks), manifest.config.n_layers)


def _reached(starts: Iterable[ir.Value]) -> set[ir.Value]:
    """All values that depend on the starts, these included."""
    found, open_ends = set(starts), list(starts)
    while open_ends:
        for node, _ in open_ends.pop().uses():
            for output in node.outputs:
                if output not in found:
                    found.add(output)
                    open_ends.append(output)
    return found


class _Piece:
    """Copies of the nodes between some values, collected from the outputs backwards."""

    def __init__(self, model: ir.Model, starts: dict[str, ir.Value], sizes_by_name: bool) -> None:
        self._starts, self._sizes_by_name = starts, sizes_by_name
        self.reached = _reached(starts.values())
        self.copies: dict[ir.Value, ir.Value] = {}
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.frontier: dict[ir.Value, ir.Value] = {}
        self._graph = model.graph
        self._fixed: dict[ir.Value, bool] = {}
        for name, value in starts.items():
            if value not in self.copies:
                self.copies[value] = ir.Value(name=name, shape=_own_sizes(name, value.shape), type=value.type)

    def inputs(self, optional: Iterable[str]) -> list[ir.Value]:
        """The new inputs in the order asked for, each once; of those named ``optional`` only what the piece reads."""
        unread = self.unread(optional)
        copies = dict.fromkeys(self.copies[value] for value in self._starts.values())
        return [copy for copy in copies if copy not in unread]

    def unread(self, optional: Iterable[str]) -> set[ir.Value]:
        """The new inputs among those named ``optional`` that nothing in the piece reads."""
        found = {self.copies[self._starts[name]] for name in optional}
        return {copy for copy in found if not copy.uses()}

    def take(self, wanted: ir.Value) -> ir.Value:
        """The copy of a value, made with all it needs. Not recursive: a model is deeper than Python's stack."""
        stack = [wanted]
        while stack:
            value = stack[-1]
            if value in self.copies:
                stack.pop()
                continue
            node = value.producer()
            if node is None or not (value in self.reached or self._is_fixed(value)):
                self.copies[value] = self._leaf(value)
                continue
            if node.op_type == "Shape" and self._sizes_of_inputs(node):
                continue
            missing = [other for other in node.inputs if other is not None and other not in self.copies]
            if missing:
                stack.extend(missing)
                continue
            self._copy(node, [None if other is None else self.copies[other] for other in node.inputs])
        return self.copies[wanted]

    def _copy(self, node: ir.Node, inputs: Sequence[ir.Value | None]) -> None:
        """Adds a copy of a node that reads ``inputs``."""
        # Without shapes: two sizes that were one in the model ("sequence") may differ in a piece, and ONNX Runtime would
        # reuse buffers by their names.
        outputs = [ir.Value(name=o.name, type=o.type) for o in node.outputs]
        self.nodes.append(
            ir.Node(node.domain, node.op_type, inputs, dict(node.attributes).values(), outputs=outputs, name=node.name)
        )
        self.copies.update(zip(node.outputs, outputs, strict=True))

    def _leaf(self, value: ir.Value) -> ir.Value:
        """A weight as a weight; anything else is needed from the rest of the model."""
        name = str(value.name)
        if value.is_initializer() and not value.is_graph_input():
            copy = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
            self.initializers[name] = copy
        else:
            copy = self.frontier[value] = ir.Value(name=name, shape=_own_sizes(name, value.shape), type=value.type)
        return copy

    def _is_fixed(self, value: ir.Value) -> bool:
        """Whether a value is computed from weights, constants and sizes alone."""
        stack = [value]
        while stack:
            at = stack[-1]
            node = at.producer()
            if at in self._fixed:
                stack.pop()
            elif node is None:
                self._fixed[at] = at.is_initializer() and not at.is_graph_input()
            elif node.op_type == "Shape":
                self._fixed[at] = all(isinstance(d, int) or self._factors(str(d)) for d in _dims(node))
            else:
                others = [other for other in node.inputs if other is not None]
                missing = [other for other in others if other not in self._fixed]
                if missing:
                    stack.extend(missing)
                else:
                    self._fixed[at] = all(self._fixed[other] for other in others)
        return self._fixed[value]

    def _sized(self, dim: str) -> tuple[ir.Value, int] | None:
        """An input of the piece that has a symbolic size, and on which axis."""
        for value in self._starts.values():
            for axis, size in enumerate(value.shape or ()):
                if not isinstance(size, int) and size.value == dim:
                    return value, axis
        return None

    def _factors(self, dim: str) -> list[tuple[ir.Value, int]]:
        """The sizes of inputs whose product a symbolic size is, as it says itself ("sequence*batch"); none if that is unknown."""
        found = [self._sized(each.strip()) for each in (dim.split("*") if self._sizes_by_name else [dim])]
        known = [each for each in found if each is not None]
        return known if len(known) == len(found) else []

    def _size(self, source: ir.Value, axis: int, name: str) -> ir.Value:
        """A size of an input, int64 [1]."""
        attributes = [ir.AttrInt64("start", axis), ir.AttrInt64("end", axis + 1)]
        part = ir.Value(name=name)
        self.nodes.append(ir.Node("", "Shape", [self.copies[source]], attributes, outputs=[part], name=f"{name}/Shape"))
        return part

    def _sizes_of_inputs(self, node: ir.Node) -> bool:
        """Copies a Shape of something outside the piece as the shape of an input; False where it is inside."""
        if node.inputs[0] in self.reached:
            known = all(isinstance(dim, int) or self._factors(str(dim)) for dim in _dims(node))
            if not (self._sizes_by_name and known):
                return False
        parts = []
        for index, dim in enumerate(_dims(node)):
            name = f"{node.outputs[0].name}/{index}"
            if isinstance(dim, int):
                part = ir.Value(name=name, const_value=ir.tensor([dim], dtype=ir.DataType.INT64, name=name))
                self.initializers[name] = part
            else:
                factors = self._factors(str(dim))
                assert factors, "checked by _is_fixed"
                part = self._size(*factors[0], name)
                for number, (source, axis) in enumerate(factors[1:], 1):
                    factor, product = self._size(source, axis, f"{name}/{number}"), ir.Value(name=f"{name}*{number}")
                    self.nodes.append(ir.Node("", "Mul", [part, factor], outputs=[product], name=f"{name}/Mul{number}"))
                    part = product
            parts.append(part)
        old = node.outputs[0]
        whole = ir.Value(name=old.name, type=old.type)
        self.nodes.append(
            ir.Node("", "Concat", parts, [ir.AttrInt64("axis", 0)], outputs=[whole], name=f"{old.name}/Concat")
        )
        self.copies[old] = whole
        return True


def _own_sizes(name: str, shape: ir.Shape | None) -> ir.Shape | None:
    """A shape whose symbolic sizes are an input's own."""
    if shape is None:
        return None
    return ir.Shape([dim if isinstance(dim, int) else f"{name}:{axis}" for axis, dim in enumerate(shape)])


def _dims(node: ir.Node) -> list[int | str | None]:
    """What a Shape node gives: sizes, or the names of symbolic ones (None where it is not known)."""
    source = node.inputs[0]
    assert source is not None
    dims = [dim if isinstance(dim, int) else dim.value for dim in source.shape] if source.shape is not None else [None]
    start = node.attributes["start"].as_int() if "start" in node.attributes else 0
    end = node.attributes["end"].as_int() if "end" in node.attributes else len(dims)
    return list(dims[start:end])
