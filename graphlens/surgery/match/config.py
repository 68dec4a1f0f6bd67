"""The architecture that the structure of a graph says."""

from __future__ import annotations

from graphlens.surgery.match.assembled import Found
from graphlens.surgery.match.records import Kind, Number


def kind_of(found: Found) -> Kind:
    """What kind of transformer was found: "decoder", "encoder" or "vision".

    Args:
        found: It.
    """
    if found.beginning.pixels is not None:
        return "vision"
    ending = found.ending
    if found.blocks[0].normalises or ending.dense is not None or found.beginning.types is not None:
        return "encoder"
    return "decoder"


def config_of(found: Found) -> dict[str, Number]:
    """Fields of ``ModelConfig`` that structure says.

    Args:
        found: The transformer.
    """
    return {"n_layers": len(found.blocks)}
