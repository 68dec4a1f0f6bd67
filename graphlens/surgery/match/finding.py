"""Matches a whole graph: its blocks one after the other, and each hook point's view."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from graphlens.surgery.match.assembled import assemble
from graphlens.surgery.match.named import named
from graphlens.surgery.match.parts import Found
from graphlens.surgery.match.records import Match


def match(
    model: ir.Model, shapes: Mapping[str, tuple[int, ...]] | None = None, origin: Mapping[str, str] | None = None
) -> Match:
    """Finds the hook points, weights and architecture of a transformer in a graph. Runs nothing.

    Args:
        model: A model with standard operators: what ``unfuse`` makes of a file. It is not changed.
        shapes: Name of a value -> its shape in a run of the caller's. Without it shapes are inferred.
        origin: Name of a node that unfusing made -> that of the node of the original file that it comes from.

    Returns:
        What was found, and what was not with the reason.

    Raises:
        ModelFileError: The graph is no decoder, encoder or vision transformer that graphlens knows; what was found instead
            is named.
    """
    found: Found = assemble(model, shapes)
    return named(found, origin or {})
