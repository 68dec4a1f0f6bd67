"""The table of rules that expand fused operators: how a rule gets into it, and what a reader is told of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from graphlens.surgery.unfusing.building import Builder

Function = Callable[[Builder, ir.Node], list[ir.Value | None]]
"""Makes the values that take the place of a node's outputs; None for one that nothing reads."""
RUNTIME = "ONNX Runtime"
SCHEMA = "NumPy, from its schema"


@dataclass(frozen=True)
class Rule:
    """How a fused operator is expanded.

    Attributes:
        operator: Its name, with its domain before "::" unless it is a standard one.
        function: Expands a node of it.
        variants: What of the operator is expanded, in words.
        checked: What the tests compare the expansion with: the fused operator in ONNX Runtime, or NumPy written from the
            operator's published schema where ONNX Runtime has no CPU kernel for it.
    """

    operator: str
    function: Function
    variants: str
    checked: str


RULES: dict[str, Rule] = {}
"""Operator -> its rule."""


def name_of(domain: str, op_type: str) -> str:
    """An operator's name in the table: "com.microsoft::Attention", "Attention".

    Args:
        domain: Its domain; "" and "ai.onnx" are ONNX's own.
        op_type: Its name there.
    """
    return op_type if domain in ("", "ai.onnx") else f"{domain}::{op_type}"


def rule(*operators: str, variants: str, checked: str = RUNTIME) -> Callable[[Function], Function]:
    """Makes a function the rule of operators.

    Args:
        *operators: Their names, as ``name_of`` gives them.
        variants: See ``Rule``.
        checked: See ``Rule``.

    Returns:
        A decorator, which hands the function back.

    Raises:
        ValueError: An operator has a rule already.
    """

    def add(function: Function) -> Function:
        for operator in operators:
            if operator in RULES:
                raise ValueError(f"the operator {operator} has a rule already: two would hide one another.")
            RULES[operator] = Rule(operator, function, variants, checked)
        return function

    return add
