"""The page of an attribution graph in Chromium: nodes, the edges of the one that is picked, and its lists."""

from __future__ import annotations

import numpy as np
import pytest

from graphlens import AttributionGraph
from graphlens.attribution import GraphNode
from graphlens.views.attribution_view import attribution
from tests.pages.conftest import Opened
from tests.pages.dom import numbers, texts

NODES = (
    GraphNode("feature", 0, 0, 17, 1.5),
    GraphNode("feature", 1, 2, 5, 0.25),
    GraphNode("feature", 1, 2, 6, 0.5),
    GraphNode("error", 0, 1, -1, 2.0),
    GraphNode("token", -1, 0, 3, 1.0),
    GraphNode("token", -1, 1, 4, 1.0),
    GraphNode("token", -1, 2, 4, 1.0),
    GraphNode("logit", 2, 2, 9, 0.75),
    GraphNode("logit", 2, 2, 8, 0.2),
)
# From, to, effect.
EDGES = [(4, 0, 1.5), (0, 1, -0.5), (3, 1, 0.125), (0, 2, 0.25), (1, 7, 2.0), (2, 7, -3.0), (6, 7, 0.75), (1, 8, 1.0)]
NOTHING = np.full(len(NODES), np.nan)


@pytest.fixture
def graph() -> AttributionGraph:
    sources, targets, weights = (np.asarray(column) for column in zip(*EDGES, strict=True))
    words = ("<b>\u202eA", " b", "\n")
    outputs = ("", "", "", "", *words, "<script>", " x")
    return AttributionGraph(
        words, NODES, sources.astype(np.int32), targets.astype(np.int32), weights.astype(np.float32), NOTHING, NOTHING,
        NOTHING, outputs, {"prompt": "<i>prompt"},
    )  # fmt: skip


def test_the_likeliest_logit_is_picked_and_others_can_be(graph: AttributionGraph, shown: Opened) -> None:
    page = shown(graph.view())
    assert numbers(page, "svg path[data-edge]").tolist() == [-3.0, 2.0, 0.75]
    assert len(texts(page, "svg .mark")) == len(NODES)
    assert numbers(page, "td[data-label]").tolist() == [-3.0, 2.0, 0.75]
    assert page.value("document.querySelector('svg .mark.on').dataset.node") == graph.label(7)
    page.value("document.querySelector('[data-node=\"L1F5@2\"]').focus()")
    page.key("Enter")
    assert numbers(page, "td[data-label]").tolist() == [-0.5, 0.125, 2.0, 1.0]  # in, then out
    dashed = "[...document.querySelectorAll('svg path[data-edge]')].map((e) => getComputedStyle(e).strokeDasharray !== 'none')"
    assert page.value(dashed) == [True, False, False, False]
    page.key("Enter")
    assert page.value("document.querySelectorAll('svg path[data-edge]').length") == 0
    # Whoever acts stands below whom it acts on, tokens stand in the order of the prompt, and all are inside the picture.
    found = page.value(
        "Object.fromEntries([...document.querySelectorAll('svg .mark')].map((e) => [e.dataset.node, (({x, y}) => [x, y])"
        "(e.getBoundingClientRect())]))"
    )
    assert isinstance(found, dict)
    places = [found[graph.label(at)] for at in range(len(NODES))]
    for source, target, _ in EDGES:
        assert places[source][1] > places[target][1]
    assert places[4][0] < places[5][0] < places[6][0]
    assert len({tuple(place) for place in places}) == len(NODES)


def test_the_slider_leaves_the_nodes_of_most_influence(graph: AttributionGraph, shown: Opened) -> None:
    page = shown(attribution(graph, nodes=2))
    order = [at for at in np.argsort(-graph.influence, kind="stable") if NODES[at].kind in ("feature", "error")]
    nodes = page.value("[...document.querySelectorAll('svg .mark')].map((e) => e.dataset.node)")
    assert isinstance(nodes, list)
    assert set(nodes) == {graph.label(int(at)) for at in [*order[:2], 4, 5, 6, 7, 8]}
    page.choose("Nodes of most influence", 4)
    assert len(texts(page, "svg .mark")) == len(NODES)


def test_what_a_token_holds_is_shown_as_text(graph: AttributionGraph, shown: Opened) -> None:
    page = shown(graph.view(), dark=True)
    assert page.value("document.querySelectorAll('section b, section i, section script').length") == 0
    assert r"\u{202e}" in " ".join(texts(page, "svg text.word"))
    assert "<i>prompt" in " ".join(texts(page, "p"))
