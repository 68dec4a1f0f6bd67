"""How much of the logits each node and edge of an attribution graph accounts for, and which of them are kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphlens.analysis.arrays import Array

_TINY = 1e-10  # what a node's incoming effects sum to at least, where shares are taken of them


@dataclass(frozen=True)
class Edges:
    """The edges of a graph without circles.

    Attributes:
        count: How many nodes there are.
        sources: int32[edge]: where each begins.
        targets: int32[edge]: where it ends.
        weights: float[edge]: its effect.
    """

    count: int
    sources: Array
    targets: Array
    weights: Array

    def chosen(self, kept: Array) -> Edges:
        """Some of the edges.

        Args:
            kept: bool[edge].
        """
        return Edges(self.count, self.sources[kept], self.targets[kept], self.weights[kept])

    def into(self) -> Array:
        """float64[node]: the sum of the effects that arrive at each node."""
        return np.bincount(self.targets, self.weights, self.count)

    def shares(self) -> Array:
        """float64[edge]: the size of each effect as a share of the sizes of all that arrive at the same node."""
        sizes = np.abs(self.weights).astype(np.float64)
        whole = np.maximum(np.bincount(self.targets, sizes, self.count), _TINY)
        found: Array = sizes / whole[self.targets]
        return found


def influence(edges: Edges, start: Array) -> Array:
    """What each node adds to the logits along all ways, by shares: ``start @ ((I - A)^-1 - I)`` of the matrix of shares A.

    Ameisen et al. 2025. The graph has no circles, so the sum over the lengths of ways ends.

    Args:
        edges: The edges.
        start: float64[node]: what each logit counts; 0 elsewhere.

    Returns:
        float64[node].
    """
    shares = edges.shares()
    arriving, total = start, np.zeros(edges.count)
    for _ in range(edges.count + 1):
        arriving = np.bincount(edges.sources, shares * arriving[edges.targets], edges.count)
        if not arriving.any():
            break
        total += arriving
    return total


def cumulated(scores: Array) -> Array:
    """For each score, the share of the whole that it and all larger ones make.

    Args:
        scores: float64[n], none of them negative.

    Returns:
        float64[n], up to 1.
    """
    order = np.argsort(-scores, kind="stable")
    found = np.empty(len(scores))
    found[order] = np.cumsum(scores[order]) / max(float(scores.sum()), _TINY)
    return found


def strongest(scores: Array, share: float) -> Array:
    """The fewest entries that make a share of the sum of all, those that equal the last of them included.

    Args:
        scores: float64[n], none of them negative.
        share: From 0 to 1.

    Returns:
        bool[n].
    """
    if not scores.size:
        return np.zeros(0, bool)
    ordered = np.sort(scores)[::-1]
    last = int(np.searchsorted(np.cumsum(ordered) / max(float(ordered.sum()), _TINY), share))
    found: Array = scores >= ordered[min(last, len(ordered) - 1)]
    return found


def kept(
    edges: Edges, start: Array, ends: Array, features: Array, nodes: float, links: float
) -> tuple[Array, Array, Array]:
    """Which nodes and edges are left of a graph after pruning by influence.

    Args:
        edges: The edges.
        start: float64[node]: what each logit counts; 0 elsewhere.
        ends: bool[node]: tokens and logits, which stay.
        features: bool[node]: features, which stay if something arrives at them.
        nodes: The share of all influence that the nodes which stay have.
        links: The same of the edges between them.

    Returns:
        (bool[node], bool[edge], float64[node]: each node's place among the influence of all, from ``cumulated``).
    """
    reached = influence(edges, start)
    stay = strongest(reached, nodes) | ends
    between = np.flatnonzero(stay[edges.sources] & stay[edges.targets])
    part = edges.chosen(between)
    scores = part.shares() * (influence(part, start) + start)[part.targets]
    drawn = np.zeros(len(edges.weights), bool)
    drawn[between[strongest(scores, links)]] = True
    while True:  # what has lost its last edge goes, and with it the edges to it
        leads = np.zeros(edges.count, bool)
        leads[edges.sources[drawn]] = True
        fed = np.zeros(edges.count, bool)
        fed[edges.targets[drawn]] = True
        left = stay & (ends | (leads & (fed | ~features)))
        drawn &= left[edges.sources] & left[edges.targets]
        if (left == stay).all():
            return stay, drawn, cumulated(reached)
        stay = left
