"""The table of gradient rules, how one gets into it, and what their functions share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphlens.surgery.rules.builder import Builder, Gradient

Grads = Sequence[Gradient | None]
"""The gradient that arrived at each output of a node; None where none did."""
Needs = Sequence[bool]
"""Whether the gradient of each input of a node is asked for."""
Found = list[Gradient | None]
"""The gradient of each input of a node; None where it is not asked for or there is none."""
Function = Callable[[Builder, ir.Node, Grads, Needs], Found]


@dataclass(frozen=True)
class Rule:
    """How gradients pass an operator of standard ONNX.

    Attributes:
        operator: The operator's name.
        function: Makes the gradients of a node's inputs from those of its outputs.
        reads_output: True if the gradients are computed from what the node gave, and not only from what it took. An edit
            of that value is then kept apart from it, so that the gradient is that of the unedited operator.
        constant: True if no gradient passes: the outputs do not change when an input changes a little.
    """

    operator: str
    function: Function
    reads_output: bool = False
    constant: bool = False

    def __call__(self, b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
        """The gradients of a node's inputs.

        Args:
            b: Takes the nodes that compute them.
            node: A node of this operator.
            grads: The gradient that arrived at each output; None where none did.
            needs: Whether the gradient of each input is asked for.

        Returns:
            A gradient for each input; None where it is not asked for or there is none.

        Raises:
            InputError: This node is of a kind that the rule does not know.
        """
        return self.function(b, node, grads, needs)


RULES: dict[str, Rule] = {}
"""Operator -> its rule."""


def register(found: Rule) -> None:
    """Puts a rule into the table.

    Args:
        found: The rule.

    Raises:
        ValueError: Its operator has a rule already.
    """
    if found.operator in RULES:
        raise ValueError(f"the operator {found.operator} has a gradient rule already: two would hide one another.")
    RULES[found.operator] = found


def rule(*operators: str, reads_output: bool = False) -> Callable[[Function], Function]:
    """Makes a function the gradient rule of operators.

    Args:
        *operators: Names of operators of standard ONNX.
        reads_output: True if the function computes with the value of an output of its node (its shape and type do not
            count), or if the rule of an operator before it does.

    Returns:
        A decorator, which hands the function back.

    Raises:
        ValueError: An operator has a rule already.
    """

    def add(function: Function) -> Function:
        for operator in operators:
            register(Rule(operator, function, reads_output))
        return function

    return add


def constant(*operators: str) -> None:
    """Says of operators that no gradient passes them.

    Args:
        *operators: Names of operators whose outputs do not change when an input changes a little.

    Raises:
        ValueError: An operator has a rule already.
    """
    for operator in operators:
        register(Rule(operator, lambda b, node, grads, needs: [None] * len(needs), constant=True))


# What the functions share


def taken(node: ir.Node, index: int) -> ir.Value:
    """An input of a node that is there.

    Args:
        node: The node.
        index: The input's place.

    Returns:
        The input.
    """
    value = node.inputs[index]
    assert value is not None
    return value


def only(grads: Grads) -> Gradient:
    """The gradient of the one output of a node.

    Args:
        grads: What arrived at the node's outputs.

    Returns:
        The first of them.
    """
    assert grads[0] is not None
    return grads[0]


def first_of(gradient: Gradient, needs: Needs) -> Found:
    """The gradients of a node's inputs where only the first has one.

    Args:
        gradient: The gradient of the first input.
        needs: An entry for each input.

    Returns:
        ``gradient``, and None for each of the others.
    """
    return [gradient, *([None] * (len(needs) - 1))]


def number(node: ir.Node, name: str, default: int) -> int:
    """An attribute that is an integer.

    Args:
        node: The node.
        name: The attribute's name.
        default: Its value where the node does not have it.

    Returns:
        The integer.
    """
    return node.attributes[name].as_int() if name in node.attributes else default
