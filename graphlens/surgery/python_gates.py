"""The graph that calls back into Python: at each hook point an ``If`` around a call, off by default.

Such a graph lives in memory only; it is never what is saved.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphlens.errors import ModelFileError
from graphlens.file.firing import graph_order
from graphlens.surgery.graph import read_manifest, values_by_name
from graphlens.surgery.splice import Edit, Scope, splice

CALLBACK_DOMAIN = "ai.onnx.contrib"  # the domain onnxruntime-extensions serves Python operators in
RUN_INPUT = "python/run"
_CALLBACK_OPS = {
    ir.DataType.FLOAT: "GraphlensHookFloat",
    ir.DataType.DOUBLE: "GraphlensHookDouble",
    ir.DataType.INT64: "GraphlensHookInt64",
}


def gate_input(hook: str) -> str:
    """The name of the input that turns a hook point's call on.

    Args:
        hook: The hook point's name.

    Returns:
        The name of a bool scalar; its default is False.
    """
    return f"python/{hook}"


def _gate(index: int, turn: list[ir.Value]) -> Edit:
    """The edit that gates one hook point.

    Each gate reads the number of the run from the gate before it, and hands it on. So the calls come in firing order, and
    not in whatever order the runtime chooses.

    Args:
        index: What the call is told: the hook point's place in the hook map.
        turn: The numbers that the gates before this one handed on; this gate adds its own.
    """

    def edit(value: ir.Value, scope: Scope) -> ir.Value:
        assert value.dtype is not None
        active = scope.input(gate_input(scope.hook), np.asarray(False), [])
        run = turn[-1] if turn else scope.input(RUN_INPUT, np.asarray(0, np.int64), [])

        def named(label: str, like: ir.Value, dtype: ir.DataType | None = None) -> ir.Value:
            kind = like.type if dtype is None else ir.TensorType(dtype)
            return ir.Value(name=f"{scope.hook}/{label}", shape=like.shape, type=kind)

        def branch(name: str, nodes: list[ir.Node]) -> ir.Graph:
            handed = named(f"{name}_run", run)
            hand = ir.Node("", "Identity", [run], outputs=[handed], name=f"{scope.hook}/{name}_hand")
            return ir.Graph([], [nodes[-1].outputs[0], handed], nodes=[*nodes, hand], name=name)

        def node(
            op_type: str, inputs: list[ir.Value], output: ir.Value, domain: str = "", **attributes: int
        ) -> ir.Node:
            given = [ir.AttrInt64(key, number) for key, number in attributes.items()]
            return ir.Node(domain, op_type, inputs, given, outputs=[output], name=f"{output.name}_node")

        # A Python operator of float16 aborts the process, so it works on float32 between two casts.
        half = value.dtype == ir.DataType.FLOAT16
        given, called = (
            (value, named("call", value))
            if not half
            else (named("wide", value, ir.DataType.FLOAT), named("edited", value, ir.DataType.FLOAT))
        )
        operator = _CALLBACK_OPS[ir.DataType.FLOAT if half else value.dtype]
        call = [node(operator, [given, run], called, CALLBACK_DOMAIN, index=index)]
        if half:
            widen = node("Cast", [value], given, to=int(ir.DataType.FLOAT))
            narrow = node("Cast", [called], named("call", value), to=int(ir.DataType.FLOAT16))
            call = [widen, *call, narrow]
        passed = [node("Identity", [value], named("pass", value))]
        result, handed = scope.ops(
            "If", [active], 2, then_branch=branch("call", call), else_branch=branch("pass", passed)
        )
        handed.shape, handed.type = run.shape, run.type
        turn.append(handed)
        return result

    return edit


def _misordered(model: ir.Model, hooks: Sequence[str]) -> str:
    """What is wrong with a hook map whose order is not one in which its hook points can fire."""
    manifest, values = read_manifest(model), values_by_name(model)
    carried = {name: values[manifest.hooks[name].value] for name in hooks}
    order = graph_order(model.graph, carried, manifest.config.n_layers)
    found, wanted = next(((a, b) for a, b in zip(hooks, order, strict=False) if a != b), (hooks[0], hooks[0]))
    return (
        f"the graph's hook map is not in the order in which its hook points fire: it has {found!r} before {wanted!r}, which "
        "comes first. Export the model again."
    )


def with_python_gates(model: ir.Model, names: Sequence[str] | None = None) -> ir.Model:
    """A copy in which hook points may call Python: ``call(activation, run, index=i)``.

    A call happens in runs that feed the hook point's ``gate_input`` with True. The int64 input ``python/run`` is handed to
    every call and tells concurrent runs apart.

    Args:
        model: A hooked model.
        names: The hook points; all by default. ``i`` is a hook point's place in the manifest's hook map, whichever are
            named.

    Returns:
        The copy.

    Raises:
        UnknownHookPoint: The model has no hook point of that name.
        ModelFileError: The hook map is not in the order in which the hook points fire.
    """
    hooks = list(read_manifest(model).hooks)
    chosen = hooks if names is None else list(names)
    indices = {name: index for index, name in enumerate(hooks)}
    turn: list[ir.Value] = []
    gated = splice(model, {name: _gate(indices.get(name, -1), turn) for name in chosen})
    try:
        gated.graph.sort()  # a gate may lie before the one that it waits for
    except ValueError as error:  # a cycle
        raise ModelFileError(_misordered(model, hooks)) from error
    gated.opset_imports[CALLBACK_DOMAIN] = 1
    return gated
