"""Which activation function a few nodes compute, told by their operators and constants."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from graphlens.surgery.match.wires import Wires

_NEAR = 1e-3
_PLAIN = {
    "Relu": "relu",
    "Tanh": "tanh",
    "Sigmoid": "sigmoid",
    "HardSwish": "hardswish",
    "Elu": "elu",
    "Softplus": "softplus",
    "Mish": "mish",
}
_MOVES = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"})


def activation_of(wires: Wires, nodes: Sequence[ir.Node], pre: ir.Value) -> str | None:
    """The name that transformers' configs have for an activation function.

    Args:
        wires: The graph.
        nodes: All nodes from what the function is of to its result.
        pre: What it is of.

    Returns:
        The name; None for a function that is none of those known here.
    """
    inner = [node for node in nodes if node.op_type not in _MOVES]
    operators = sorted(node.op_type for node in inner)
    numbers = [number for node in inner for one in node.inputs if (number := wires.number(one)) is not None]
    if operators == ["Gelu"]:
        kind = inner[0].attributes.get("approximate")
        return "gelu_new" if kind is not None and kind.as_string() == "tanh" else "gelu"
    if operators == ["Swish"]:
        alpha = inner[0].attributes.get("alpha")
        return _swish(1.0 if alpha is None else alpha.as_float())
    if operators in (["Mul", "Sigmoid"], ["Mul", "Mul", "Sigmoid"]):
        return _swish(numbers[0] if numbers else 1.0) if len(operators) - 2 == len(numbers) else None
    if operators in (["Mul", "Relu"], ["Pow", "Relu"]):
        return "relu2" if operators[0] == "Mul" or numbers == [2] else None
    if len(inner) == 1 and not inner[0].attributes:
        return _PLAIN.get(operators[0])
    if "Erf" in operators and set(operators) <= {"Erf", "Mul", "Div", "Add"}:
        return "gelu" if _has(numbers, 0.5) and (_has(numbers, math.sqrt(2)) or _has(numbers, math.sqrt(0.5))) else None
    if "Tanh" in operators and set(operators) <= {"Tanh", "Mul", "Pow", "Add"}:
        return "gelu_new" if _has(numbers, 0.044715) and _has(numbers, 0.5) and _has(numbers, 0.7978845608) else None
    return None


def _swish(alpha: float) -> str | None:
    if abs(alpha - 1) < _NEAR:
        return "silu"
    return "quick_gelu" if abs(alpha - 1.702) < _NEAR else None


def _has(numbers: Sequence[float], wanted: float) -> bool:
    return any(abs(number - wanted) < _NEAR for number in numbers)
