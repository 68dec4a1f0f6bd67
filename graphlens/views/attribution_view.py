"""An attribution graph as a view: tokens from left to right, layers from below, and the edges of the node that is picked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from graphlens.errors import InputError
from graphlens.views.encoded import Json, packed
from graphlens.views.labelled import Array
from graphlens.views.pages import View

MOST_NODES, MOST_EDGES = 3000, 200_000  # of a page


class Node(Protocol):
    """A node: what it is, and where."""

    @property
    def kind(self) -> str:
        """Whether it is a "feature", an "error", a "token" or a "logit"."""

    @property
    def layer(self) -> int:
        """Its block; -1 for a token."""

    @property
    def position(self) -> int:
        """Which token it belongs to."""

    @property
    def value(self) -> float:
        """Its activation, probability or norm."""


class Graph(Protocol):
    """An attribution graph: nodes, edges as arrays, and the influence of each node."""

    @property
    def tokens(self) -> Sequence[str]:
        """The text of each token."""

    @property
    def nodes(self) -> Sequence[Node]:
        """The nodes."""

    @property
    def sources(self) -> Array:
        """The node that each edge begins at."""

    @property
    def targets(self) -> Array:
        """The node that each edge ends at."""

    @property
    def weights(self) -> Array:
        """The effect of each edge."""

    @property
    def influence(self) -> Array:
        """Each node's share in the logits."""

    @property
    def metadata(self) -> Mapping[str, Json]:
        """What else is known: the prompt."""

    def label(self, node: int) -> str:
        """What a node is called."""


def attribution(graph: Graph, *, nodes: int = 60, title: str = "Attribution graph", says: tuple[str, ...] = ()) -> View:
    """Draws an attribution graph: ``views.attribution(attribution_graph(...).prune())``.

    Args:
        graph: The graph, pruned.
        nodes: How many features and errors are drawn at first, those of most influence; a slider goes up to all.
        title: The line above it.
        says: What a reader should know.

    Returns:
        The view.

    Raises:
        InputError: It has more nodes or edges than a page holds, or no edge.
    """
    if len(graph.nodes) > MOST_NODES or len(graph.weights) > MOST_EDGES:
        raise InputError(
            f"a page holds {MOST_NODES:,} nodes and {MOST_EDGES:,} edges, and this graph has {len(graph.nodes):,} and "
            f"{len(graph.weights):,}: prune it first, graph.prune().page(...)."
        )
    if not len(graph.weights):
        raise InputError("this graph has no edges: there is nothing to draw. Prune it less.")
    data: dict[str, Json] = {
        "tokens": list(graph.tokens),
        "nodes": [[node.kind, node.layer, node.position, graph.label(at)] for at, node in enumerate(graph.nodes)],
        "values": packed([node.value for node in graph.nodes], "f8"),
        "influence": packed(graph.influence, "f8"),
        "sources": packed(graph.sources, "i4"),
        "targets": packed(graph.targets, "i4"),
        "weights": packed(np.asarray(graph.weights), "f4"),
        "start": nodes,
    }
    prompt = graph.metadata.get("prompt")
    about = (f"Prompt: {prompt}",) if prompt else ()
    return View("attribution", title, data, (*about, *says), 700)
