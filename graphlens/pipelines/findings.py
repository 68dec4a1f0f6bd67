"""What adopting would find in a file, told from its graph alone: nothing is run, so shapes are inferred."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from graphlens.analysis.identities import Facts, identities
from graphlens.errors import GraphlensError
from graphlens.file.names import axes_of
from graphlens.surgery.adoptable import STILL, making_sense
from graphlens.surgery.adopted.inputs import ensure_ports_fit
from graphlens.surgery.adopted.originals import ensure_dynamic

if TYPE_CHECKING:
    from graphlens.surgery.match.records import Match

# Sizes of activations that stand in for a model's own, to see which identities there are between its hook points.
_SMALL = {
    "batch": 1,
    "1": 1,
    "d_model": 4,
    "head_index": 2,
    "key_value_head_index": 2,
    "d_head": 2,
    "d_mlp": 3,
    "d_vocab": 5,
}
_POSITIONS = 2
_ACT, _NORM = re.compile(r"^\w+\(pre\)"), re.compile(r"^[\w.]+: ")


@dataclass(frozen=True)
class Findings:
    """What adopting would find.

    Attributes:
        kind: "decoder", "encoder" or "vision".
        config: What structure says of the architecture: n_layers, n_heads, d_model, ...
        hooks: The hook points that are there, in firing order.
        missing: Those that are not -> why.
        weights: How many weights were found under TransformerLens's names.
        identities: Identity -> in how many places adopting could check it.
        expanded: Fused operator -> how many of its nodes are expanded first.
        kept: Fused operator that is left as it is -> why.
        has_logits: False for a file that ends in hidden states.
        notes: What else a reader should know, a sentence each.
        refused: Why adopting would stop all the same, in a sentence; None where nothing says so before a run.
    """

    kind: str
    config: Mapping[str, object]
    hooks: tuple[str, ...]
    missing: Mapping[str, str]
    weights: int
    identities: Mapping[str, int]
    expanded: Mapping[str, int]
    kept: Mapping[str, str]
    has_logits: bool
    notes: tuple[str, ...]
    refused: str | None


def findings(model: ir.Model, file: Path) -> Findings:
    """What adopting would find in a model.

    Args:
        model: A model as it was read, which has passed the checks.
        file: Its graph file.

    Raises:
        ModelFileError: It is no transformer that graphlens knows.
    """
    from graphlens.surgery.match import match  # matching is many modules, and most files need none
    from graphlens.surgery.unfusing.channels import BLOCKS
    from graphlens.surgery.unfusing.expand import unfuse

    with making_sense(file):
        unfused = unfuse(model, block=BLOCKS[0])  # nothing is computed: any will do
        unfused.model.graph.sort()
        found = match(unfused.model, None, unfused.origin)
    return Findings(
        found.kind,
        dict(found.config),
        tuple(found.hooks),
        dict(found.missing),
        len(found.weights),
        checkable(found),
        dict(unfused.expanded),
        dict(unfused.kept),
        found.ports.logits is not None,
        found.notes,
        _refusal(unfused.model, found, file),
    )


def _refusal(model: ir.Model, found: Match, file: Path) -> str | None:
    """Why adopting stops at a graph although its hook points were found."""
    try:
        ensure_ports_fit(model, found.ports, str(file))
        ensure_dynamic(model, found.ports, file)
    except GraphlensError as error:
        return str(error).removeprefix(f"{file}: ").removesuffix(STILL).rstrip()
    return None


def checkable(found: Match) -> dict[str, int]:
    """The identities between hook points that adopting could check -> in how many places.

    Args:
        found: The hook points.
    """
    random = np.random.default_rng(0)
    values = {}
    for name in found.hooks:
        sizes = [_SMALL.get(axis, _POSITIONS) for axis in axes_of(name)]
        values[name] = random.normal(size=sizes).astype(np.float32)
    known = {name: value for name, value in found.config.items() if name not in ("eps", "rotary_dim")}
    each = identities(values, Facts.of(known, found.kind), logits=values.get("unembed.hook_out"))
    return dict(Counter(_general(identity.name) for identity in each))


def _general(name: str) -> str:
    """An identity's name without what is not known before a run, and without which norm it is of."""
    return _NORM.sub("norm: ", _ACT.sub("act(pre)", name))
