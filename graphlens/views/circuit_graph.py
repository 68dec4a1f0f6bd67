"""A circuit as a view: components by layer with the strongest edges between them."""

from __future__ import annotations

import re

import numpy as np

from graphlens.errors import InputError, checked_number
from graphlens.views.encoded import Json, packed
from graphlens.views.labelled import Labelled
from graphlens.views.pages import View

MOST = 400  # edges in a page, the strongest
_NODE = re.compile(r"L(\d+)(?:H(\d+)(?:\.[qkv])?|MLP)")
_ENDS = ("embed", "logits")


def circuit(
    result: Labelled, *, edges: int = 30, name: str = "score", title: str = "Circuit", says: tuple[str, ...] = ()
) -> View:
    """Draws the strongest edges between components: ``views.circuit(edge_attribution(...))``.

    Args:
        result: A SweepResult with an axis "edge" whose labels are like "L0H1->L2H3.q".
        edges: How many edges are drawn at first; a slider goes up to the 400 strongest.
        name: What the scores are.
        title: The line above it.
        says: What a reader should know.

    Returns:
        The view. An edge into a head names its input (q, k, v); the graph draws one box for each head.

    Raises:
        InputError: For another result, and for edges of another form.
    """
    if result.axes != ("edge",):
        raise InputError(
            f"a circuit is drawn from an axis 'edge', and this result has {', '.join(result.axes) or 'none'}."
        )
    edges = checked_number(edges, "edges", least=1)
    finite = np.flatnonzero(np.isfinite(result.values))
    if not finite.size:
        raise InputError("none of the edges has a finite score: there is nothing to draw.")
    strongest = finite[np.argsort(-np.abs(result.values[finite]), kind="stable")][:MOST]
    nodes: dict[str, int] = {}
    drawn: list[Json] = []
    for index in strongest:
        label = result.labels["edge"][index]
        sender, arrow, receiver = label.partition("->")
        if not arrow or not all(part in _ENDS or _NODE.fullmatch(part) for part in (sender, receiver)):
            raise InputError(f"{label!r} is no edge: they look like 'L0H1->L2H3.q', 'embed->L0MLP', 'L1MLP->logits'.")
        ends = [nodes.setdefault(re.sub(r"\.[qkv]$", "", part), len(nodes)) for part in (sender, receiver)]
        drawn.append([*ends, label])
    data: dict[str, Json] = {
        "nodes": [_placed(node) for node in nodes],
        "edges": drawn,
        "values": packed(result.values[strongest], "f8"),
        "start": min(edges, len(drawn)),
        "total": len(result.values),
        "name": name,
    }
    more = (f"The {MOST} strongest of {len(result.values):,} edges are in the page.",) if len(finite) > MOST else ()
    return View("circuit", title, data, (*says, *more), 560)


def _placed(node: str) -> dict[str, Json]:
    """A component with its place: rows from the embeddings at the bottom; a layer's MLP comes after its heads."""
    match = _NODE.fullmatch(node)
    if match is None:
        return {"id": node, "kind": "end", "layer": "", "row": -1 if node == "embed" else 1_000_000, "column": 0}
    layer, is_mlp = int(match[1]), match[2] is None
    kind, column = ("mlp", 0) if is_mlp else ("head", int(match[2]))
    return {"id": node, "kind": kind, "layer": f"L{layer}", "row": 2 * layer + is_mlp, "column": column}
