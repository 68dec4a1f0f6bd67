"""Gradient rules: one for each operator, in a file by subject."""

from __future__ import annotations

from graphlens.surgery.rules import (  # noqa: F401  (they register their rules)
    elementwise,
    entries,
    products,
    quantised,
    reductions,
    shapes,
)
from graphlens.surgery.rules.builder import Builder, Gradient, dims, rank, width
from graphlens.surgery.rules.registry import RULES, Rule, number, rule, rule_of

__all__ = ["RULES", "Builder", "Gradient", "Rule", "dims", "number", "rank", "rule", "rule_of", "width"]
