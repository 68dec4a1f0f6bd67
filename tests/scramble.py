"""A graph that computes the same and says nothing by names: what matching must find in it is the same too."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from graphlens.surgery.match import Match, MatchedWeight, View


def scrambled(model: ir.Model, seed: int = 0) -> tuple[ir.Model, dict[str, str]]:
    """A copy with every value, node and dimension renamed, initializers shuffled, nodes in another topological order, and no
    metadata, documentation or value types but those of its inputs and outputs.

    Args:
        model: A model; it is not changed.
        seed: Which scramble.

    Returns:
        (the copy, new name of a value or node -> its old one)
    """
    rng = random.Random(seed)
    copy = model.clone()
    graph = copy.graph
    copy.metadata_props.clear()
    copy.producer_name = copy.doc_string = copy.domain = copy.producer_version = None
    graph.metadata_props.clear()
    graph.doc_string, graph.name = None, "g"
    _reorder(graph, rng)
    old = _rename(graph, rng)
    _anonymous_sizes(graph)
    return copy, old


def _reorder(graph: ir.Graph, rng: random.Random) -> None:
    """Puts the nodes into a random order in which each comes after what it reads, and shuffles the initializers."""
    nodes = list(graph)
    waits = {
        node: {one.producer() for one in node.inputs if one is not None and one.producer() is not None}
        for node in nodes
    }
    readers: dict[ir.Node, list[ir.Node]] = {node: [] for node in nodes}
    for node, before in waits.items():
        for other in before:
            assert other is not None
            readers[other].append(node)
    ready = [node for node, before in waits.items() if not before]
    order = []
    while ready:
        node = ready.pop(rng.randrange(len(ready)))
        order.append(node)
        for reader in readers[node]:
            waits[reader].discard(node)
            if not waits[reader]:
                ready.append(reader)
    assert len(order) == len(nodes)
    graph.remove(nodes)
    graph.extend(order)
    initializers = list(graph.initializers.values())
    rng.shuffle(initializers)
    graph.initializers.clear()
    for value in initializers:
        graph.initializers.add(value)


def _rename(graph: ir.Graph, rng: random.Random) -> dict[str, str]:
    """Gives every value and node a name that says nothing."""
    old: dict[str, str] = {}
    outputs = {id(value) for value in graph.outputs}
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    numbers = list(range(len(values)))
    rng.shuffle(numbers)
    for number, value in zip(numbers, values, strict=True):
        name = f"v{number}"
        old[name] = str(value.name)
        value.name = name
        value.metadata_props.clear()
        value.doc_string = None
        if value.producer() is not None and id(value) not in outputs:
            value.shape = None
    for number, node in enumerate(graph):
        name = f"n{number}"
        old[name] = str(node.name)
        node.name = name
        node.metadata_props.clear()
        node.doc_string = None
    return old


def _anonymous_sizes(graph: ir.Graph) -> None:
    """Takes the names of sizes that a run chooses away: each is one of its own."""
    count = 0
    for value in [*graph.inputs, *graph.outputs]:
        if value.shape is None:
            continue
        sizes: list[int | str] = []
        for size in value.shape:
            count += 1
            sizes.append(size if isinstance(size, int) else f"s{count}")
        value.shape = ir.Shape(sizes)


def with_old_names(match: Match, old: Mapping[str, str]) -> Match:
    """A match of a scrambled graph in the names of the graph that it was made of.

    Args:
        match: The match.
        old: What ``scrambled`` gave.
    """

    def view(one: View) -> View:
        return replace(
            one,
            value=old[one.value],
            nodes=tuple(old[name] for name in one.nodes),
            like=None if one.like is None else old[one.like],
            tokens=None if one.tokens is None else old[one.tokens],
        )

    def weight(one: MatchedWeight) -> MatchedWeight:
        quantised = one.quantised
        if quantised is not None:
            zero = None if quantised.zero_point is None else old[quantised.zero_point]
            quantised = replace(quantised, scale=old[quantised.scale], zero_point=zero)
        return replace(one, tensor=old[one.tensor], quantised=quantised)

    def port(name: str | None) -> str | None:
        return None if name is None else old[name]

    ports = match.ports
    return replace(
        match,
        hooks={name: view(one) for name, one in match.hooks.items()},
        weights={name: weight(one) for name, one in match.weights.items()},
        ports=replace(
            ports,
            input=old[ports.input],
            attention_mask=port(ports.attention_mask),
            position_ids=port(ports.position_ids),
            token_type_ids=port(ports.token_type_ids),
            logits=port(ports.logits),
            hidden=port(ports.hidden),
            past={key: old[name] for key, name in ports.past.items()},
            present={key: old[name] for key, name in ports.present.items()},
        ),
    )
