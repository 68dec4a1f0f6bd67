"""The graph that calls back into Python: at each hook point an ``If`` around a call, off by default.

Such a graph lives in memory only; it is never what is saved.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphlens.surgery.hooked_graph import read_manifest
from graphlens.surgery.splice import Edit, Scope, splice

CALLBACK_DOMAIN = "ai.onnx.contrib"  # the domain onnxruntime-extensions serves Python operators in
RUN_INPUT = "python/run"
_CALLBACK_OPS = {ir.DataType.FLOAT: "GraphlensHookFloat", ir.DataType.DOUBLE: "GraphlensHookDouble"}


def gate_input(hook: str) -> str:
    """The name of the bool scalar input that turns a hook point's call on."""
    return f"python/{hook}"


def _gate(index: int) -> Edit:
    def edit(value: ir.Value, scope: Scope) -> ir.Value:
        assert value.dtype is not None
        active = scope.input(gate_input(scope.hook), np.asarray(False), [])
        run = scope.input(RUN_INPUT, np.asarray(0, np.int64), [])

        def branch(name: str, op_type: str, domain: str, inputs: list[ir.Value], attributes: list[ir.Attr]) -> ir.Graph:
            output = ir.Value(name=f"{scope.hook}/{name}", shape=value.shape, type=value.type)
            node = ir.Node(domain, op_type, inputs, attributes, outputs=[output], name=f"{scope.hook}/{name}_node")
            return ir.Graph([], [output], nodes=[node], name=name)

        call = branch("call", _CALLBACK_OPS[value.dtype], CALLBACK_DOMAIN, [value, run], [ir.AttrInt64("index", index)])
        passed = branch("pass", "Identity", "", [value], [])
        return scope.op("If", [active], then_branch=call, else_branch=passed)

    return edit


def with_python_gates(model: ir.Model, names: Sequence[str] | None = None) -> ir.Model:
    """A copy in which each named hook point (default: all) may call Python: ``call(activation, run, index=i)``.

    ``i`` is the hook point's place in the manifest's hook map. A call happens in runs that feed its ``gate_input``
    with True; the int64 ``python/run`` input is handed to every call and tells concurrent runs apart.
    """
    hooks = list(read_manifest(model).hooks)
    chosen = hooks if names is None else list(names)
    gated = splice(model, {name: _gate(hooks.index(name)) for name in chosen})
    gated.opset_imports[CALLBACK_DOMAIN] = 1
    return gated
