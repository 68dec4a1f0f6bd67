"""The table of gradient rules, how one gets into it, and what their functions share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphlens.errors import InputError
from graphlens.surgery.rules.builder import Builder, Gradient, known

Grads = Sequence[Gradient | None]
"""The gradient that arrived at each output of a node; None where none did."""
Needs = Sequence[bool]
"""Whether the gradient of each input of a node is asked for."""
Found = list[Gradient | None]
"""The gradient of each input of a node; None where it is not asked for or there is none."""
Function = Callable[[Builder, ir.Node, Grads, Needs], Found]


@dataclass(frozen=True)
class Rule:
    """How gradients pass an operator.

    Attributes:
        operator: The operator's name; of another domain than ONNX's own it is ``domain::name``.
        function: Makes the gradients of a node's inputs from those of its outputs.
        reads_output: True if the gradients are computed from what the node gave, and not only from what it took. An edit
            of that value is then kept apart from it, so that the gradient is that of the unedited operator.
        constant: True if no gradient passes: the outputs do not change when an input changes a little.
        straight_through: True if the operator rounds, so that its derivative is 0 or not there, and the rule takes it for what it
            rounds (Bengio et al. 2013). What a gradient means then is said wherever one is given.
    """

    operator: str
    function: Function
    reads_output: bool = False
    constant: bool = False
    straight_through: bool = False

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


def key_of(domain: str, operator: str) -> str:
    """The name of an operator in the table of rules.

    Args:
        domain: Its domain; "" and "ai.onnx" are ONNX's own.
        operator: Its name.

    Returns:
        The name, after the domain where that is not ONNX's own.
    """
    return operator if domain in ("", "ai.onnx") else f"{domain}::{operator}"


def rule(
    *operators: str, reads_output: bool = False, straight_through: bool = False, domain: str = ""
) -> Callable[[Function], Function]:
    """Makes a function the gradient rule of operators.

    Args:
        *operators: Names of operators.
        reads_output: True if the function computes with the value of an output of its node (its shape and type do not
            count), or if the rule of an operator before it does.
        straight_through: True if the operators round, and the function takes them for what they round.
        domain: The operators' domain; "" for ONNX's own.

    Returns:
        A decorator, which hands the function back.

    Raises:
        ValueError: An operator has a rule already.
    """

    def add(function: Function) -> Function:
        for operator in operators:
            register(Rule(key_of(domain, operator), function, reads_output, straight_through=straight_through))
        return function

    return add


def constant(*operators: str, domain: str = "") -> None:
    """Says of operators that no gradient passes them.

    Args:
        *operators: Names of operators whose outputs do not change when an input changes a little.
        domain: Their domain; "" for ONNX's own.

    Raises:
        ValueError: An operator has a rule already.
    """
    for operator in operators:
        register(Rule(key_of(domain, operator), lambda b, node, grads, needs: [None] * len(needs), constant=True))


def rule_of(node: ir.Node) -> Rule | None:
    """The rule of a node's operator; None if it has none.

    Args:
        node: A node.
    """
    found = RULES.get(key_of(node.domain, node.op_type))
    if found is None and node.op_type in RULES and RULES[node.op_type].constant:
        return RULES[node.op_type]  # rounding and comparing stop a gradient in every domain
    return found


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


def optional(node: ir.Node, index: int) -> ir.Value | None:
    """An input of a node, or None where it is left out.

    Args:
        node: The node.
        index: The input's place.
    """
    return node.inputs[index] if index < len(node.inputs) else None


def axes_of(node: ir.Node, index: int, rank: int) -> list[int]:
    """The axes that a node works along: its input at a place, its attribute ``axes`` in older versions, or all.

    Args:
        node: The node.
        index: The place of the input.
        rank: How many axes there are.

    Returns:
        The axes, each counted from the front.

    Raises:
        InputError: Only a run knows them.
    """
    given = optional(node, index)
    if given is None:
        found = list(node.attributes["axes"].as_ints()) if "axes" in node.attributes else []
    else:
        content = known(given)
        if content is None:
            raise InputError(f"the axes of {node.name!r} are not a constant, so it cannot be differentiated.")
        found = [int(axis) for axis in np.atleast_1d(content)]
    if not found:
        return [] if number(node, "noop_with_empty_axes", 0) else list(range(rank))
    return [axis % rank for axis in found]
