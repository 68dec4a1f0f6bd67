"""Whether the hook points that matching found hold what their names say: identities between them, on probe runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from graphlens.analysis.identities import Facts, Identity, failing, identities, worst
from graphlens.errors import ModelFileError
from graphlens.file.io_names import LOGITS, past_input
from graphlens.pipelines.adopt_probe import Probe, image_probe, open_written, padded_probe, stepped
from graphlens.pipelines.adopt_quantisers import quantisers

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphlens.file.manifest import HookEntry
    from graphlens.file.safetensors import Array
    from graphlens.pipelines.adopt import Unnamed
    from graphlens.surgery.match.records import View

# Of the largest logit: in floats, in half precision, and where activations are rounded to integers.
_EXACT, _HALF, _ROUNDED = 1e-4, 1e-2, 2e-2
_ROUNDING = ("DynamicQuantizeLinear", "QuantizeLinear")


@dataclass(frozen=True)
class Proof:
    """What the probes said.

    Attributes:
        kept: The hook points that may be named -> where they are.
        model: The graph with these hook points.
        hooks: Its hook map.
        probe: The prompts that all hook points were seen on.
        activations: What those that hold held there.
        allowed: How far apart logits may be, relative to the largest, by the rounding that the original does.
        failed: Hook point -> which identity failed there, in a sentence.
        residuals: Identity that holds -> its largest residual, relative.
        notes: What else they showed, a sentence each.
    """

    kept: Mapping[str, View]
    model: ir.Model
    hooks: Mapping[str, HookEntry]
    probe: Probe
    activations: Mapping[str, Array]
    allowed: float
    failed: Mapping[str, str] = field(default_factory=dict)
    residuals: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def proved(graph: Unnamed, untouched: ir.Model, folder: Path, original: Path) -> Proof:
    """Runs a matched graph and its original on probes, with padding and with past, and looks at every hook point.

    Args:
        graph: The matched graph.
        untouched: The original's graph; its weights lie in ``folder`` too.
        folder: The folder of the weights.
        original: The file that it came from, for errors.

    Returns:
        The hook points whose identities hold, and which fail.

    Raises:
        ModelFileError: The graph gives other logits than its original.
    """
    match, config = graph.match, graph.config
    ports = match.ports
    model, hooks = graph.named(match.hooks)
    if match.kind == "vision":
        runs = [image_probe(graph.seen[ports.input].shape[1:], config.n_ctx)]
    else:
        runs = [padded_probe(ports, config.d_vocab, config.n_token_types, config.n_ctx)]
    # One session after the other: each maps the weights, and two would count twice.
    session = open_written(model, folder, str(original))
    if ports.past:
        later = stepped(session, runs[0], config.n_layers)
        runs += [] if later is None else [later]
    fetched = list(dict.fromkeys([LOGITS, *(entry.value for entry in hooks.values())]))
    given = [dict(zip(fetched, session.run(fetched, probe.hooked()), strict=True)) for probe in runs]
    del session
    source = open_written(untouched, folder, str(original))
    allowed = _ROUNDED if any(node.op_type in _ROUNDING for node in untouched.graph) else _EXACT
    if any(saw.dtype == "float16" for saw in graph.seen.values()):
        allowed = max(allowed, _HALF)
    for probe, arrays in zip(runs, given, strict=True):
        expected = source.run([graph.result], probe.original(ports, graph.seen))[0]
        _ensure_same(arrays[LOGITS], expected, probe, allowed, original)
    del source
    facts = Facts.of({**match.config, "n_layers": config.n_layers}, match.kind)
    rounded = quantisers(graph.model, match.hooks, _values(given[0], hooks))
    notes, rows = _padding_notes(runs[0], given[0][LOGITS], original), slice(None)
    if notes:
        rows = slice(
            0, None, 2
        )  # without the prompt that is padded on the left: its padding is attended to, or counted
    every = worst(
        identities(
            {name: value[rows] for name, value in _values(arrays, hooks).items()},
            facts,
            mask=None if probe.mask is None else probe.mask[rows],
            past=_past(probe, config.n_layers, rows),
            quantisers=rounded,
            logits=None if ports.logits is None else arrays[LOGITS][rows],
        )
        for probe, arrays in zip(runs, given, strict=True)
    )
    failed = failing(every, hooks)
    kept = {name: view for name, view in match.hooks.items() if name not in failed}
    return Proof(
        kept,
        *((model, hooks) if not failed else graph.named(kept)),
        runs[0],
        {name: given[0][hooks[name].value] for name in kept},
        allowed,
        failed,
        {_shown(each): each.residual for each in every if each.passed},
        notes,
    )


def _values(arrays: Mapping[str, Array], hooks: Mapping[str, HookEntry]) -> dict[str, Array]:
    """What hook points hold, of what a run gave."""
    return {name: arrays[entry.value] for name, entry in hooks.items()}


def _shown(identity: Identity) -> str:
    return identity.name if identity.layer is None else f"{identity.name} in block {identity.layer}"


def _ensure_same(found: Array, expected: Array, probe: Probe, allowed: float, original: Path) -> None:
    """Refuses a graph that gives other logits than its original at a real token."""
    length = probe.tokens.shape[1]
    real = np.ones(probe.tokens.shape, bool) if probe.mask is None else probe.mask[:, -length:] != 0
    if found.ndim == 3:
        found, expected = found[real], expected[real]
    size = float(np.abs(expected).max(initial=0)) or 1.0
    apart = float(np.abs(found.astype(np.float64) - expected).max(initial=0)) / size
    if not apart <= allowed:
        raise ModelFileError(
            f"{original}: once its fused operators are expanded it gives other logits than as it is (by {apart:.1e} of the "
            f"largest, and {allowed:.0e} is allowed). This is a defect of graphlens: please report it with the file's "
            "exporter. --keep-fused leaves the operators as they are."
        )


def _past(probe: Probe, n_layers: int, rows: slice) -> dict[int, tuple[Array, Array]] | None:
    """The keys and values that a probe begins with, [b, past, heads, d_head] each."""
    if not probe.past:
        return None
    pairs = ((probe.past[past_input(layer, part)][rows] for part in ("key", "value")) for layer in range(n_layers))
    return {
        layer: (next(pair).transpose(0, 2, 1, 3), next(pair).transpose(0, 2, 1, 3)) for layer, pair in enumerate(pairs)
    }


def _padding_notes(probe: Probe, logits: Array, original: Path) -> tuple[str, ...]:
    """What a prompt that is padded on the left gets: other logits, where the file counts padding as positions."""
    if probe.pixels is not None:
        return ()
    if probe.mask is None:
        return (f"{original.name} takes no attention_mask: prompts of different lengths cannot be run together.",)
    if logits.ndim != 3:
        return ()
    left, right = logits[1][probe.mask[1] != 0], logits[2][probe.mask[2] != 0]
    if np.abs(left.astype(np.float64) - right).max() <= _ROUNDED * (np.abs(right).max() or 1):
        return ()
    return (
        f"{original.name} counts padding as positions: a prompt padded on the left is computed as another than the same "
        "prompt alone, as in the original. Pad on the right.",
    )
