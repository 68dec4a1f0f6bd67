"""A gradient rule that uses what its node gave says so: the value is kept for it then, and not otherwise."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from test_imports import ALL, is_in

# Where a function of a rule takes a value for its shape and dtype alone: the places of such arguments.
SHAPE_ONLY: dict[str, tuple[int, ...]] = {
    "dims": (0,),
    "rank": (0,),
    "width": (0,),
    "shape_of": (0,),
    "whole": (1,),
    "summed": (1,),
    "constant": (1,),
    "_scaled": (3,),
}


def gradient_rules(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef, ast.Call]]:
    """The functions of a module that are gradient rules, each with its ``@rule(...)``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func).rpartition(".")[2] == "rule":
                    yield node, mark


def reads_its_output(function: ast.FunctionDef) -> list[int]:
    """The lines where a rule computes with the value that its node gave; its shape and dtype do not count.

    What ``node.outputs[...]`` is assigned to is followed; wherever else the two occur, they count unless SHAPE_ONLY says
    otherwise.
    """

    def is_output(node: ast.AST) -> bool:
        return isinstance(node, ast.Subscript) and ast.unparse(node.value) == "node.outputs"

    names: set[str] = set()
    harmless: set[ast.AST] = set()  # occurrences that read no value
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            (target,) = node.targets
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            for name, value in pairs:
                if isinstance(name, ast.Name) and is_output(value):
                    names.add(name.id)
                    harmless |= {name, value}
        elif isinstance(node, ast.Call):
            places = SHAPE_ONLY.get(ast.unparse(node.func).rpartition(".")[2], ())
            harmless |= {node.args[place] for place in places if place < len(node.args)}
        elif isinstance(node, ast.Attribute) and node.attr in ("type", "dtype", "shape"):
            harmless.add(node.value)
    harmless |= {part for node in harmless if is_output(node) for part in ast.walk(node)}
    return [
        node.lineno
        for node in ast.walk(function)
        if node not in harmless
        and (
            (isinstance(node, ast.Name) and node.id in names)
            or (isinstance(node, ast.Attribute) and ast.unparse(node) == "node.outputs")
        )
    ]


def lying_rules(tree: ast.Module) -> list[str]:
    """The gradient rules that compute with their node's output and do not say so."""
    return [
        f"line {line}: {function.name}"
        for function, mark in gradient_rules(tree)
        if not any(word.arg == "reads_output" and ast.unparse(word.value) == "True" for word in mark.keywords)
        for line in reads_its_output(function)
    ]


def test_every_gradient_rule_that_uses_its_nodes_output_says_so() -> None:
    rules = {name: tree for name, tree in ALL.items() if is_in(name, "graphlens.surgery.rules")}
    assert {name: lying_rules(tree) for name, tree in rules.items() if lying_rules(tree)} == {}
    honest = {
        operator.value
        for tree in rules.values()
        for function, mark in gradient_rules(tree)
        if reads_its_output(function)
        for operator in mark.args
        if isinstance(operator, ast.Constant)
    }
    assert honest == {
        *("Sqrt", "Exp", "Reciprocal", "Tanh", "Sigmoid", "Relu", "Div", "Softmax", "LogSoftmax", "Min", "Max", "TopK"),
        *("ReduceMax", "ReduceMin", "ReduceL2", "ReduceLogSumExp", "DynamicQuantizeLinear"),
    }


@pytest.mark.parametrize(
    "body",
    [
        "return [Gradient(b.op('Mul', only(grads).value, node.outputs[0]))]",
        "y = node.outputs[0]\n    return [Gradient(b.op('Mul', only(grads).value, y))]",
        "out, g = node.outputs[0], only(grads)\n    return [b.summed(Gradient(b.op('Mul', g.value, out)), out, g)]",
        "y = helper(node.outputs[0])\n    return [Gradient(y)]",
        "return [_scaled(b, only(grads), node.outputs[0], node.outputs[0], taken(node, 0))]",
        "for y in node.outputs:\n        b.op('Neg', y)\n    return []",
        "y = node.outputs[0]\n    z = y\n    return [Gradient(z)]",
    ],
)
def test_a_gradient_rule_that_lies_is_found(body: str) -> None:
    code = f"@rule('Sin')\ndef sine(b, node, grads, needs):\n    {body}\n"
    assert lying_rules(ast.parse(code)) != []
    assert lying_rules(ast.parse(code.replace("'Sin'", "'Sin', reads_output=True"))) == []


@pytest.mark.parametrize(
    "body",
    [
        "out, g = node.outputs[0], only(grads)\n    return [b.summed(g, out, taken(node, 0))]",
        "return [Gradient(b.whole(only(grads), node.outputs[0]))]",
        "y = node.outputs[0]\n    return [Gradient(b.op('Cast', only(grads).value, to=int(y.type.dtype)))]",
        "return [Gradient(b.op('Mul', only(grads).value, taken(node, 0)))]",
    ],
)
def test_a_gradient_rule_may_ask_for_its_outputs_shape(body: str) -> None:
    assert lying_rules(ast.parse(f"@rule('Sin')\ndef sine(b, node, grads, needs):\n    {body}\n")) == []
