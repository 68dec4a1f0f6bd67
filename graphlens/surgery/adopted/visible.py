"""Which hook points a graph shows whose fused operators are left as they are."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from graphlens.surgery.graph import values_by_name
from graphlens.surgery.match.records import Match


def visible(found: Match, model: ir.Model) -> Match:
    """What was found in an expanded graph, as far as another one shows it, whose fused operators were left.

    Expanding keeps the names of the original's values, so a value of both graphs is the same in both.

    Args:
        found: What was found in the expanded graph.
        model: The other one.

    Returns:
        The same without what lies inside of fused operators, which is missing.
    """
    values = values_by_name(model)
    hooks = {
        name: view
        for name, view in found.hooks.items()
        if view.value in values and (view.like is None or view.like in values)
    }
    hidden = {
        name: "it is inside an operator that --keep-fused leaves as it is." for name in found.hooks if name not in hooks
    }
    weights = {name: weight for name, weight in found.weights.items() if weight.tensor in model.graph.initializers}
    return replace(found, hooks=hooks, weights=weights, missing={**found.missing, **hidden})
