"""Expands fused operators of a graph into standard ones, so that what they compute inside has a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class Unfused:
    """What unfusing did.

    Attributes:
        model: The model with standard operators, opset 20 or later. The original is unchanged.
        expanded: Operator -> how many of its nodes were expanded.
        kept: Operator -> why it was left as it is (asked for, or no rule), in a sentence.
        origin: The name of each node that a rule made -> the name of the node of the original that it comes from.
    """

    model: ir.Model
    expanded: Mapping[str, int]
    kept: Mapping[str, str]
    origin: Mapping[str, str]
