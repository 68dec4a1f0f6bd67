"""Knows what the static quantisers of a graph do to its hook points in a run: that they round, and what they leave nothing of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from graphlens.analysis.identity_rounding import rounding
from graphlens.errors import ModelFileError
from graphlens.pipelines.adopt_probe import open_written
from graphlens.surgery.adoptable import STILL
from graphlens.surgery.unfusing.unrounded import DOMAINS, MOVES, content_of

if TYPE_CHECKING:
    from graphlens.analysis.identity_records import Identity
    from graphlens.file.manifest import HookEntry
    from graphlens.file.safetensors import Array
    from graphlens.pipelines.adopt_probe import Probe

_SHOWN = 4  # hook points that a note names


@dataclass(frozen=True)
class Quantisers:
    """The static quantisers of a graph with hook points.

    Attributes:
        by_hook: Hook point -> the QuantizeLinear that its activation went through last, moved perhaps.
        there: True if the graph has any.
    """

    by_hook: Mapping[str, ir.Node]
    there: bool

    @classmethod
    def of(cls, model: ir.Model, hooks: Mapping[str, HookEntry]) -> Quantisers:
        """Those of a graph.

        Args:
            model: The graph.
            hooks: Its hook map.
        """
        values = {value.name: value for node in model.graph for value in node.outputs}
        found = ((name, _before(values.get(entry.value))) for name, entry in hooks.items())
        there = any(node.op_type == "QuantizeLinear" for node in model.graph)
        return cls({name: node for name, node in found if node is not None}, there)

    @property
    def values(self) -> list[str]:
        """The names of the values before and behind each quantiser, which ``identities`` looks at."""
        nodes = dict.fromkeys(self.by_hook.values())
        return list(
            dict.fromkeys(str(value.name) for node in nodes for value in (node.inputs[0], node.outputs[0]) if value)
        )

    def identities(self, arrays: Mapping[str, Array]) -> Iterator[Identity]:
        """That each hook point holds what its quantiser is given, to half a step.

        Args:
            arrays: What a run gave for ``values``.
        """
        for hook, node in self.by_hook.items():
            given, scale = node.inputs[0], content_of(node.inputs[1])
            zero_point = content_of(node.inputs[2] if len(node.inputs) > 2 else None)
            if given is None or scale is None or zero_point is None:
                continue
            axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
            before, integers = arrays[str(given.name)], arrays[str(node.outputs[0].name)]
            found = rounding(hook, before, integers, scale, zero_point, axis)
            if found is not None:
                yield found


def _before(value: ir.Value | None) -> ir.Node | None:
    """The quantiser that a value went through last; None where it is as it was computed."""
    while value is not None:
        node = value.producer()
        if node is None or node.domain not in DOMAINS:
            return None
        if node.op_type == "QuantizeLinear":
            return node
        if node.op_type not in MOVES | {"DequantizeLinear"}:
            return None
        value = node.inputs[0]
    return None


def ensure_finite(model: ir.Model, original: Path) -> None:
    """Refuses a graph with a quantiser that no number passes.

    Args:
        model: The graph, fused operators expanded.
        original: The file that it came from, for errors.

    Raises:
        ModelFileError: The scale of a quantiser is infinite, zero or no number.
    """
    for node in model.graph:
        scale = content_of(node.inputs[1]) if node.op_type == "QuantizeLinear" and len(node.inputs) > 1 else None
        if scale is not None and not (np.isfinite(scale) & (scale > 0)).all():
            raise ModelFileError(
                f"{original}: the scale of its quantiser {node.name!r} is {float(scale.reshape(-1)[0])}, so that no number "
                "passes it, and ONNX Runtime computes something else there with each graph. Quantise it again with a mask of "
                f"-1e4 (not -inf or -3.4e38), or without this node (nodes_to_exclude). {STILL}"
            )


def lost(rounded: Mapping[str, Array], unrounded: Mapping[str, Array], file: str) -> list[str]:
    """Where quantisers leave nothing of an activation, in a sentence: a range that is too wide for it rounds it to one number.

    Args:
        rounded: Hook name -> what it holds in a run of the graph.
        unrounded: What it holds in the same run without quantisers.
        file: The original's name.
    """
    found = [name for name, value in rounded.items() if _is_one(value) and not _is_one(unrounded[name])]
    if not found:
        return []
    shown = ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
    return [
        f"{file} rounds all that {shown} should hold to one number: nothing is left of it there, as in the original."
    ]


def _is_one(value: Array) -> bool:
    """True if an activation is one and the same number throughout."""
    return bool(value.size) and bool((value == value.flat[0]).all())


def runs(
    model: ir.Model, names: Sequence[str], probes: Iterable[Probe], folder: Path, original: Path
) -> list[dict[str, Array]]:
    """What a graph computes on probes, each of which is run once.

    Args:
        model: The graph of a hooked file; its weights lie in ``folder``.
        names: The values to fetch, outputs or not.
        probes: The probes.
        folder: See above.
        original: The file that it came from, for errors.

    Returns:
        Name -> array, for each probe.
    """
    session = open_written(model, folder, str(original), names)
    return [dict(zip(names, session.run(names, probe.hooked()), strict=True)) for probe in probes]
