"""Attribution graphs as files of Neuronpedia and circuit-tracer: what each node and link is called there."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from graphlens.analysis.influence import cumulated
from graphlens.errors import InputError
from graphlens.file.folder import replacing, user_path
from graphlens.file.version import __version__

if TYPE_CHECKING:
    from graphlens.analysis.attribution_graph import AttributionGraph
    from graphlens.file.manifest import Json

_TYPES = {
    "feature": "cross layer transcoder",  # per-layer ones are called so there too
    "error": "mlp reconstruction error",
    "token": "embedding",
    "logit": "logit",
}


def write(graph: AttributionGraph, path: str | os.PathLike[str], slug: str | None, scan: str | None) -> Path:
    """Writes a graph in their format, whole or not at all.

    Args:
        graph: The graph.
        path: Where; ".json" is added where it has no ending.
        slug: What it is called there; made of the prompt by default.
        scan: The model's name there; this model's name by default.

    Returns:
        The path written.

    Raises:
        InputError: It cannot be written, or ``slug`` holds another character than it may.
    """
    target = user_path(path)
    target = target if target.suffix else target.with_name(f"{target.name}.json")
    text = json.dumps(plain(graph, slug, scan), ensure_ascii=False, allow_nan=False)
    try:
        with replacing(target) as made:
            made.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error}).") from error
    return target


def plain(graph: AttributionGraph, slug: str | None = None, scan: str | None = None) -> dict[str, Json]:
    """A graph as JSON has it, in their format.

    Args:
        graph: The graph.
        slug: What it is called there; made of the prompt by default.
        scan: The model's name there; this model's name by default.

    Raises:
        InputError: ``slug`` holds another character than letters, digits, hyphens and underscores.
    """
    said = graph.metadata
    prompt = str(said.get("prompt", "".join(graph.tokens)))
    if slug is None:
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:60].strip("-") or "graph"
    if not re.fullmatch(r"[A-Za-z0-9_-]+", slug):
        raise InputError(f"slug={slug!r:.60}: it is made of letters, digits, hyphens and underscores.")
    ranks = cumulated(graph.influence) if graph.ranks is None else graph.ranks
    names = [_name(graph, each) for each in range(len(graph.nodes))]
    thresholds = {name: said[name] for name in ("node_threshold", "edge_threshold") if name in said}
    settings = {
        name: said[name] for name in ("max_n_logits", "desired_logit_prob", "max_feature_nodes") if name in said
    }
    metadata: dict[str, Json] = {
        "slug": slug,
        "scan": str(said.get("model", "")) if scan is None else scan,
        "transcoder_list": said.get("transcoders", []),
        "prompt_tokens": list(graph.tokens),
        "prompt": prompt,
        "schema_version": 1,
        "info": {"generator": {"name": "graphlens", "version": __version__}},
        "generation_settings": settings,
        "pruning_settings": thresholds,
    }
    if "node_threshold" in said:
        metadata["node_threshold"] = said["node_threshold"]
    best = max(
        (node.value for node in graph.nodes if node.kind == "logit"), default=0.0
    )  # the viewer marks the likeliest token
    nodes: list[Json] = [_node(graph, each, names[each], float(ranks[each]), best) for each in range(len(names))]
    links: list[Json] = [
        {"source": names[source], "target": names[target], "weight": weight}
        for source, target, weight in zip(
            graph.sources.tolist(), graph.targets.tolist(), graph.weights.astype(np.float64).tolist(), strict=True
        )
    ]
    state: dict[str, Json] = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    return {"metadata": metadata, "qParams": state, "nodes": nodes, "links": links}


def _name(graph: AttributionGraph, at: int) -> str:
    """A node's identifier: layer, feature or token, position."""
    kind, layer, position, index, _ = graph.nodes[at]
    first = "E" if kind == "token" else str(layer + 1 if kind == "logit" else layer)
    return f"{first}_{index}_{position}"


def _node(graph: AttributionGraph, at: int, name: str, rank: float, best: float) -> Json:
    """A node's record."""
    kind, layer, position, index, value = graph.nodes[at]
    first, number, _ = name.split("_")
    record: dict[str, Json] = {
        "node_id": name,
        # The viewer tells layer and feature from one number: Cantor's, of the two.
        "feature": (layer + index) * (layer + index + 1) // 2 + index
        if kind == "feature"
        else position
        if kind == "token"
        else index,
        "layer": first,
        "ctx_idx": position,
        "feature_type": _TYPES[kind],
        "token_prob": value if kind == "logit" else 0.0,
        "is_target_logit": kind == "logit" and value == best,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{'L' if kind == 'logit' else first}_{number}-{0 if kind == 'feature' else position}",
        "clerp": f'Output "{graph.outputs[at]}" (p={value:.3f})' if kind == "logit" else "",
        "influence": None if kind == "logit" else rank,
        "activation": value if kind == "feature" else None,
    }
    return record
