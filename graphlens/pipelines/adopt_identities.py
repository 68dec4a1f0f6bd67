"""Whether the hook points that matching found hold what their names say: identities between them, on probe runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from graphlens.analysis.identities import Facts, Identity, Quantiser, failing, identities, worst
from graphlens.errors import ModelFileError
from graphlens.file.io_names import LOGITS, past_input
from graphlens.pipelines.adopt_probe import Probe, open_written, padded_probe, stepped

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
        failed: Hook point -> which identity failed there, in a sentence.
        residuals: Identity that holds -> its largest residual, relative.
        notes: What else they showed, a sentence each.
    """

    kept: Mapping[str, View]
    model: ir.Model
    hooks: Mapping[str, HookEntry]
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
        assert ports.logits is not None, "it was looked for"
        expected = source.run([ports.logits], probe.original(ports, graph.seen))[0]
        _ensure_same(arrays[LOGITS], expected, probe, allowed, original)
    del source
    facts = Facts.of({**match.config, "n_layers": config.n_layers}, match.kind)
    rounded = quantisers(graph.model, match.hooks)
    every = worst(
        identities(
            {name: arrays[entry.value] for name, entry in hooks.items()},
            facts,
            mask=probe.mask,
            past=_past(probe, config.n_layers),
            quantisers=rounded,
            logits=arrays[LOGITS],
        )
        for probe, arrays in zip(runs, given, strict=True)
    )
    failed = failing(every, hooks)
    kept = {name: view for name, view in match.hooks.items() if name not in failed}
    return Proof(
        kept,
        *((model, hooks) if not failed else graph.named(kept)),
        failed,
        {_shown(each): each.residual for each in every if each.passed},
        _padding_notes(runs[0], given[0][LOGITS], original),
    )


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


def _past(probe: Probe, n_layers: int) -> dict[int, tuple[Array, Array]] | None:
    """The keys and values that a probe begins with, [b, past, heads, d_head] each."""
    if not probe.past:
        return None
    pairs = ((probe.past[past_input(layer, part)] for part in ("key", "value")) for layer in range(n_layers))
    return {layer: (next(pair).transpose(0, 2, 1, 3), next(pair).transpose(0, 2, 1, 3)) for layer, pair in enumerate(pairs)}


def _padding_notes(probe: Probe, logits: Array, original: Path) -> tuple[str, ...]:
    """What a prompt that is padded on the left gets: other logits, where the file counts padding as positions."""
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


def quantisers(model: ir.Model, hooks: Mapping[str, View]) -> dict[str, Quantiser]:
    """The hook points that are read off a quantiser of activations (QDQ), with its step and range.

    Args:
        model: The matched graph.
        hooks: Hook point -> where it is.
    """
    producers = {str(value.name): node for node in model.graph for value in node.outputs}
    found = {}
    for name, view in hooks.items():
        node = producers.get(view.value)
        if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None:
            continue
        before = node.inputs[0].producer()
        if before is None or before.op_type != "QuantizeLinear":
            continue
        step = _number(before.inputs[1])
        zero = _number(before.inputs[2]) if len(before.inputs) > 2 else 0.0
        kind = node.inputs[0].dtype or (before.inputs[2].dtype if len(before.inputs) > 2 and before.inputs[2] else None)
        if step is None or zero is None:
            continue
        limits = np.iinfo(np.uint8 if kind is None else kind.numpy())
        found[name] = Quantiser(step, (limits.min - zero) * step, (limits.max - zero) * step)
    return found


def _number(value: ir.Value | None) -> float | None:
    """The number that a constant holds; None for any other value."""
    tensor = None if value is None else value.const_value
    return None if tensor is None or tensor.size != 1 else float(tensor.numpy().reshape(()))
