"""Gives the MLPs of parallel blocks a norm of their own where attention and MLP share one.

TransformerLens has two hook points there, ln1 and ln2, and a change at one must not reach what the other is read by.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from graphlens.surgery.match.assembled import assemble
from graphlens.surgery.match.parts import Block, Found, Linear

_SUFFIX = "/of_mlp"


def with_norms_apart(
    model: ir.Model, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[ir.Model, dict[str, str]]:
    """A model in whose parallel blocks attention and MLP each have a norm, computed twice where the model has one.

    Args:
        model: A model with standard operators, as for ``match``. It is not changed.
        shapes: See ``match``.

    Returns:
        (the model, which computes the same; name of each node that is a copy -> that of the node it is a copy of). The model
        that was given and no names, where no norm is shared.

    Raises:
        ModelFileError: As ``match``.
    """
    if not _shared(assemble(model, shapes)):
        return model, {}
    copy = model.clone()
    found, names = assemble(copy, shapes), dict[str, str]()
    for block in _shared(found):
        mlp = block.mlp
        if mlp is not None:
            copies: dict[ir.Value, ir.Value] = {}
            for linear in dict.fromkeys(one for one in (mlp.first, mlp.second) if one is not None):
                _copy(found, block, linear, copies, names)
    common_passes.RemoveUnusedNodesPass()(copy)
    return copy, names


def _shared(found: Found) -> list[Block]:
    """The parallel blocks with one norm."""
    return [
        block
        for block in found.blocks
        if block.parallel and block.ln1 is not None and block.ln2 is not None and block.ln1.norm is block.ln2.norm
    ]


def _copy(found: Found, block: Block, linear: Linear, copies: dict[ir.Value, ir.Value], names: dict[str, str]) -> None:
    """Computes a projection of an MLP from the residual stream by nodes of its own."""
    wires, graph = found.wires, found.wires.graph
    nodes, waiting, seen = list[ir.Node](), [linear.out], set[ir.Value]()
    ends = set(wires.chain(block.pre))
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if value in seen or value in ends or node is None or wires.is_fixed(value) or value in copies:
            continue
        seen.add(value)
        if node.op_type in ("Shape", "Size"):
            continue
        if node not in nodes:
            nodes.append(node)
        waiting += [one for one in node.inputs if one is not None]
    for node in sorted(nodes, key=lambda one: wires.place[one]):
        made = ir.Node(
            node.domain,
            node.op_type,
            [copies.get(one, one) if one is not None else None for one in node.inputs],
            list(node.attributes.values()),
            overload=node.overload,
            num_outputs=len(node.outputs),
            name=f"{node.name}{_SUFFIX}",
        )
        names[str(made.name)] = str(node.name)
        for old, new in zip(node.outputs, made.outputs, strict=True):
            new.name, new.shape, new.type = f"{old.name}{_SUFFIX}", old.shape, old.type
            copies[old] = new
        graph.insert_after(node, made)
    out = linear.out
    out.replace_all_uses_with(copies[out])
