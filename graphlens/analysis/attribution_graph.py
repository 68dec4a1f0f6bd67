"""An attribution graph as a result: its nodes, the linear effects between them, what they add up to; pruned, shown, written."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from graphlens.analysis import graph_files
from graphlens.analysis.arrays import Array
from graphlens.analysis.influence import Edges, influence, kept
from graphlens.errors import checked_number

if TYPE_CHECKING:
    from rich.table import Table

    from graphlens.file.manifest import Json
    from graphlens.views.pages import View

FEATURE, ERROR, TOKEN, LOGIT = KINDS = ("feature", "error", "token", "logit")


class GraphNode(NamedTuple):
    """A node of an attribution graph.

    Attributes:
        kind: "feature", "error", "token" or "logit".
        layer: The block of a feature or an error; -1 for a token, the number of blocks for a logit.
        position: Which token of the prompt, from 0.
        number: Which feature of its transcoder; the id of a token or of a logit's token; -1 for an error.
        value: A feature's activation; a logit's probability; the norm of an error or of a token's embedding.
    """

    kind: str
    layer: int
    position: int
    number: int
    value: float


@dataclass(frozen=True, eq=False, repr=False)
class AttributionGraph:
    """Which features, errors and tokens make a model's prediction, by linear effects in the run of one prompt.

    Features and logits are targets: what each reads, a pre-activation or a logit less the mean of all logits, is the sum of the
    effects that arrive at it, ``biases`` and ``others``.

    Attributes:
        tokens: The text of each token of the prompt.
        nodes: The nodes: features by layer, position and number, then errors, tokens and logits.
        sources: int32[edge]: the node that an edge begins at.
        targets: int32[edge]: the node that it ends at.
        weights: float32[edge]: the effect of the source on what the target reads.
        readings: float64[node]: what a target reads in the run; NaN for errors and tokens.
        biases: float64[node]: the part of it that biases and positions make, with every source at 0; NaN likewise.
        others: float64[node]: the part of sources that are no nodes, and of edges that were pruned; NaN likewise.
        outputs: The text of each node's token, for tokens and logits; "" for others.
        metadata: What JSON can hold: the model, the prompt, the transcoders, the settings.
        ranks: float64[node], of a pruned graph: the share of all influence that a node and those of more have in the whole one.
    """

    tokens: Sequence[str]
    nodes: Sequence[GraphNode]
    sources: Array
    targets: Array
    weights: Array
    readings: Array
    biases: Array
    others: Array
    outputs: Sequence[str]
    metadata: Mapping[str, Json] = field(default_factory=dict)
    ranks: Array | None = None

    @property
    def edges(self) -> Edges:
        """The edges as arrays."""
        return Edges(len(self.nodes), self.sources, self.targets, self.weights)

    def of_kind(self, kind: str) -> Array:
        """bool[node]: True for the nodes of a kind.

        Args:
            kind: "feature", "error", "token" or "logit".
        """
        return np.asarray([node.kind == kind for node in self.nodes], bool)

    @property
    def influence(self) -> Array:
        """float64[node]: each node's share in the logits along all ways, weighted by their probabilities."""
        return influence(self.edges, self._start)

    @property
    def gaps(self) -> Array:
        """float64[node]: what a target reads less the sum of all that arrives there; NaN for errors and tokens."""
        found: Array = self.readings - (self.edges.into() + self.biases + self.others)
        return found

    @property
    def _start(self) -> Array:
        return np.asarray([node.value if node.kind == LOGIT else 0.0 for node in self.nodes])

    def label(self, node: int) -> str:
        """What a node is called: "L1F17@3", "L1 error@3", "' John'@3", "logit ' Mary'".

        Args:
            node: Its place in ``nodes``.
        """
        kind, layer, position, number, _ = self.nodes[node]
        if kind == FEATURE:
            return f"L{layer}F{number}@{position}"
        if kind == ERROR:
            return f"L{layer} error@{position}"
        return f"{self.outputs[node]!r}@{position}" if kind == TOKEN else f"logit {self.outputs[node]!r}"

    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> AttributionGraph:
        """The part of the graph that makes most of the prediction (Ameisen et al. 2025).

        Args:
            node_threshold: The share of all influence that the nodes kept have. Tokens and logits always stay.
            edge_threshold: The share of the influence between them that the edges kept have.

        Returns:
            A smaller graph. ``others`` has what was left out, so that it still adds up.

        Raises:
            InputError: A threshold is not from 0 to 1.
        """
        shares = [
            checked_number(given, name, float, least=0.0, most=1.0)
            for given, name in ((node_threshold, "node_threshold"), (edge_threshold, "edge_threshold"))
        ]
        ends = self.of_kind(TOKEN) | self.of_kind(LOGIT)
        stay, drawn, ranks = kept(self.edges, self._start, ends, self.of_kind(FEATURE), *shares)
        others = self.others + self.edges.chosen(~drawn).into()
        settings = {**self.metadata, "node_threshold": shares[0], "edge_threshold": shares[1]}
        return replace(self.only(stay, drawn), others=others[stay], metadata=settings, ranks=ranks[stay])

    def only(self, nodes: Array, edges: Array) -> AttributionGraph:
        """Some nodes, and some of the edges between them; ``others`` is left as it is.

        Args:
            nodes: bool[node].
            edges: bool[edge]; none of them begins or ends at another node.
        """
        places = np.cumsum(nodes, dtype=np.int32) - 1
        chosen: list[int] = np.flatnonzero(nodes).tolist()
        return replace(
            self,
            nodes=tuple(self.nodes[each] for each in chosen),
            outputs=tuple(self.outputs[each] for each in chosen),
            sources=places[self.sources[edges]],
            targets=places[self.targets[edges]],
            weights=self.weights[edges],
            readings=self.readings[nodes],
            biases=self.biases[nodes],
            others=self.others[nodes],
            ranks=None if self.ranks is None else self.ranks[nodes],
        )

    def top(self, n: int = 10) -> list[tuple[str, str, float]]:
        """The edges of the largest effects: (source, target, effect), by label.

        Args:
            n: How many, 1 or more.

        Raises:
            InputError: For fewer.
        """
        most = checked_number(n, "n", least=1)
        order = np.argsort(-np.abs(self.weights), kind="stable")[:most]
        return [
            (self.label(self.sources[each]), self.label(self.targets[each]), float(self.weights[each]))
            for each in order
        ]

    def to_json(self, path: str | os.PathLike[str], slug: str | None = None, scan: str | None = None) -> Path:
        """Writes the graph as Neuronpedia and circuit-tracer's viewer read it. Prune it first: a page of theirs is slow of more.

        Args:
            path: Where; ".json" is added where it has no ending.
            slug: What it is called there, in letters, digits and hyphens; made of the prompt by default.
            scan: The model's name there ("gemma-2-2b"); this model's name by default.

        Returns:
            The path written.

        Raises:
            InputError: It cannot be written, or ``slug`` holds another character.
        """
        return graph_files.write(self, path, slug, scan)

    def view(self) -> View:
        """The graph as a view: tokens from left to right, layers from below, edges of a node that is picked."""
        from graphlens.views.attribution_view import attribution

        return attribution(self)

    def page(self, path: str | os.PathLike[str]) -> Path:
        """Writes the graph as one HTML file, which needs nothing else.

        Args:
            path: Where; ".html" is added where it has no ending.

        Returns:
            The path written.

        Raises:
            InputError: It cannot be written, or is too large to open well: prune it first.
        """
        return self.view().save(path)

    def table(self, n: int = 20) -> Table:
        """The strongest nodes as a table for a terminal: influence, and what arrives from where.

        Args:
            n: How many, 1 or more.

        Raises:
            InputError: For fewer.
        """
        from graphlens.views.tables import plain_table

        most, scores = checked_number(n, "n", least=1), self.influence
        order = [each for each in np.argsort(-scores, kind="stable") if self.nodes[each].kind != LOGIT][:most]
        rows = [(self.label(each), self.nodes[each].value, float(scores[each])) for each in order]
        return plain_table(repr(self), ("node", "activation or norm", "influence"), rows)

    def __rich__(self) -> Table:
        return self.table()

    def _repr_html_(self) -> str:
        from graphlens.views.pages import in_notebook

        return in_notebook(self)

    def __repr__(self) -> str:
        counts = [(int(self.of_kind(kind).sum()), kind) for kind in KINDS]
        said = ", ".join(f"{count:,} {kind}{'' if count == 1 else 's'}" for count, kind in counts)
        return f"AttributionGraph({said}; {len(self.weights):,} edges)"
