"""Whether the hook points that matching found hold what their names say: identities between them, on probe runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from graphlens.analysis.identities import Facts, Identity, failing, identities, worst
from graphlens.errors import ModelFileError, RunError
from graphlens.file.io_names import LOGITS, past_input
from graphlens.pipelines.adopt_mask import ensure_masks, looks_ahead
from graphlens.pipelines.adopt_probe import LENGTH, Probe, image_probe, open_written, padded_probe, stepped
from graphlens.pipelines.adopt_quantisers import Quantisers, ensure_finite, lost, runs
from graphlens.surgery.adoptable import STILL
from graphlens.surgery.unfusing.unrounded import rounds_products, unrounded

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphlens.file.manifest import HookEntry
    from graphlens.file.safetensors import Array
    from graphlens.pipelines.adopt import Unnamed
    from graphlens.runtime.sessions import Session
    from graphlens.surgery.match.records import View

# How far what should be equal may be apart: in floats and in half precision, of the largest number; of the mean square where
# activations are rounded to integers, since one that lies near the middle of two falls to the other by the last bit of what it
# is computed from, and all later layers follow.
_EXACT, _HALF, _ROUNDED = 1e-4, 1e-2, 0.1
_LEFT = {
    "counted": "{} counts padding on the left as positions: a prompt padded there is computed as another than the same prompt "
    "alone, as in the original. Pad on the right.",
    "seen": "{} does not mask padding on the left, or reads positions from it, as the original does: runs of prompts padded "
    "there are refused. Pad on the right.",
}
_ROUNDING = ("DynamicQuantizeLinear", "QuantizeLinear")


@dataclass(frozen=True)
class Proof:
    """What the probes said.

    Attributes:
        kept: The hook points that may be named -> where they are.
        model: The graph with these hook points.
        hooks: Its hook map.
        probe: The prompts that all hook points were seen on.
        activations: What those that hold held there; where a graph rounds activations statically, without that rounding.
        result: The logits there, or the last hidden states, likewise.
        allowed: How far apart two results of that graph may be, relative to the largest.
        failed: Hook point -> which identity failed there, in a sentence.
        residuals: Identity that holds -> its largest residual, relative.
        notes: What else they showed, a sentence each.
        left_padding: See ``Adopted``.
        causal: False if tokens attend to later ones; None where that is not seen.
    """

    kept: Mapping[str, View]
    model: ir.Model
    hooks: Mapping[str, HookEntry]
    probe: Probe
    activations: Mapping[str, Array]
    result: Array
    allowed: float
    failed: Mapping[str, str] = field(default_factory=dict)
    residuals: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    left_padding: str = "masked"
    causal: bool | None = None


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
    allowed = _apart_at_most(untouched, graph)
    # One session after the other: each maps the weights, and two would count twice.
    tried = _tried(open_written(untouched, folder, str(original)), graph, original, allowed)
    model, hooks = graph.named(match.hooks)
    rounding = Quantisers.of(model, hooks)
    fetched = list(dict.fromkeys([LOGITS, *(entry.value for entry in hooks.values())]))
    given = runs(model, [*fetched, *rounding.values], tried.probes, folder, original)
    for probe, arrays, expected in zip(tried.probes, given, tried.results, strict=True):
        if expected is None:
            continue
        try:
            _ensure_same(arrays[LOGITS], expected, probe, allowed, original)
        except ModelFileError:
            ensure_finite(graph.model, original)  # what an infinite scale leaves is computed by chance
            raise
    notes = list(tried.notes)
    ahead: bool | None = None
    if match.kind != "vision":
        mask, causal = match.ports.attention_mask, config.is_causal
        first = _values(given[0], hooks)
        notes += ensure_masks(first, tried.probes[0], causal, rounding.there, mask, original)
        ahead = looks_ahead(first, tried.probes[0], rounding.there)
    rounded = worst(list(rounding.identities(arrays)) for arrays in given)
    if rounding.there or rounds_products(model):
        # Where activations are rounded on the way, only without that the arithmetic between them holds to the last bit.
        plain = unrounded(model)
        allowed, own = _apart_at_most(plain, graph), _values(given[0], hooks)
        given = runs(plain, fetched, tried.probes, folder, original)
        notes += lost(own, _values(given[0], hooks), original.name)
    facts = Facts.of({**match.config, "n_layers": config.n_layers}, match.kind)
    facts = replace(facts, biased=any("position bias" in note for note in match.notes))
    every = worst(
        identities(
            _values(arrays, hooks),
            facts,
            mask=probe.mask,
            past=_past(probe, config.n_layers),
            logits=None if match.ports.logits is None else arrays[LOGITS],
        )
        for probe, arrays in zip(tried.probes, given, strict=True)
    )
    # That an activation is rounded proves nothing of what it is: only where that fails it says something.
    failed = failing([*every, *(each for each in rounded if not each.passed)], hooks)
    kept = {name: view for name, view in match.hooks.items() if name not in failed}
    return Proof(
        kept,
        *((model, hooks) if not failed else graph.named(kept)),
        tried.probes[0],
        {name: given[0][hooks[name].value] for name in kept},
        given[0][LOGITS],
        allowed,
        failed,
        {_shown(each): each.residual for each in (*every, *rounded) if each.passed},
        tuple(notes),
        tried.left_padding,
        None if ahead is None else not ahead,
    )


def _apart_at_most(model: ir.Model, graph: Unnamed) -> float:
    """How far what should be equal in two runs of a graph may be apart."""
    allowed = _ROUNDED if any(node.op_type in _ROUNDING for node in model.graph) else _EXACT
    return max(allowed, _HALF) if any(saw.dtype == "float16" for saw in graph.seen.values()) else allowed


@dataclass(frozen=True)
class _Tried:
    """The probes that the original takes, what it gives on each (None: it does not run), and what they showed of it."""

    probes: list[Probe]
    results: Sequence[Array | None]
    notes: tuple[str, ...] = ()
    left_padding: str = "masked"


def _tried(source: Session, graph: Unnamed, original: Path, allowed: float) -> _Tried:
    """Runs the original on prompts with padding, and on the rest of a prompt after the past of its beginning.

    A prompt that is padded on the left is left out where the original gives another result for it than for the same prompt
    padded on the right: what it holds there proves nothing.
    """
    ports, config = graph.match.ports, graph.config
    if graph.match.kind == "vision":
        images = image_probe(graph.seen[ports.input].shape[1:], config.n_ctx)
        return _Tried([images], list(source.run([graph.result], images.original(ports, graph.seen))))
    # What a config.json says of the longest input, or nothing says, is no limit of the graph's.
    tabled = not {"hook_pos_embed", "embed.hook_pos_embed"}.isdisjoint(graph.match.hooks)
    probe = padded_probe(ports, config.d_vocab, config.n_token_types, config.n_ctx if tabled else LENGTH)
    run = _Original(source, graph)
    result, notes, left = run(probe), list[str](), "masked"
    if probe.mask is None:
        notes.append(f"{original.name} takes no attention_mask: prompts of different lengths cannot be run together.")
    else:
        left = "seen" if result is None or not _alike(probe, result, 3, allowed) else "masked"
        if left == "masked" and result is not None and not _alike(probe, result, 2, allowed):
            left = "counted"
        probe = probe.rows([0, 1, 2] if left == "masked" else [0, 2])
        result = run(probe)
        notes += [] if left == "masked" else [_LEFT[left].format(original.name)]
    if result is None:
        notes.append(
            f"{original.name} does not run on a probe without past, so its logits were not compared ({run.said})."
        )
    probes, results = [probe], [result]
    if ports.past and result is not None:
        # Without padding on the right, which no prompt that goes on has.
        several = probe.unpadded() if probe.mask is None or len(probe.tokens) < 3 else probe.rows([0, 1])
        for whole in (several, several.rows([0])):
            later = run.step(whole)
            if later is not None:
                probes.append(later[0])
                results.append(later[1])
                break
        else:
            notes.append(
                f"{original.name} does not go on after a past of several tokens, so steps were not compared ({run.said})."
            )
    return _Tried(probes, results, tuple(notes), left)


@dataclass
class _Original:
    """Runs of the original, which may refuse what a hooked file takes."""

    source: Session
    graph: Unnamed
    said: str = ""

    def __call__(self, probe: Probe) -> Array | None:
        """What it gives on a probe; None where it cannot run on it."""
        try:
            return self.source.run([self.graph.result], probe.original(self.graph.match.ports, self.graph.seen))[0]
        except RunError as error:
            self.said = (
                str(error.__cause__ or error).partition("Status Message: ")[2][:200] or "ONNX Runtime refuses it"
            )
            return None

    def step(self, whole: Probe) -> tuple[Probe, Array] | None:
        """The rest of a probe after the past of its beginning, with what the original gives; None where it cannot."""
        try:
            later = stepped(self.source, whole, self.graph.match.ports, self.graph.seen)
        except RunError:
            return None
        result = None if later is None else self(later)
        return None if later is None or result is None else (later, result)


def _alike(probe: Probe, result: Array, row: int, allowed: float) -> bool:
    """True if a prompt that is padded on the left is computed as the same prompt padded otherwise, which is in ``row``."""
    if result.ndim != 3 or probe.mask is None or result.shape[1] != probe.tokens.shape[1]:
        return True
    one, other = result[1][probe.mask[1] != 0], result[row][probe.mask[row] != 0]
    return _apart(one, other, allowed) <= allowed


def _values(arrays: Mapping[str, Array], hooks: Mapping[str, HookEntry]) -> dict[str, Array]:
    """What hook points hold, of what a run gave."""
    return {name: arrays[entry.value] for name, entry in hooks.items()}


def _shown(identity: Identity) -> str:
    return identity.name if identity.layer is None else f"{identity.name} in block {identity.layer}"


def _ensure_same(found: Array, expected: Array, probe: Probe, allowed: float, original: Path) -> None:
    """Refuses a graph that gives other logits than its original at a real token."""
    length = probe.tokens.shape[1]
    real = np.ones(probe.tokens.shape, bool) if probe.mask is None else probe.mask[:, -length:] != 0
    if expected.ndim == 3 and expected.shape[1] != length and probe.pixels is None:
        raise ModelFileError(
            f"{original}: it gives logits of {expected.shape[1]} of {length} tokens, and hook points, losses and generation are "
            f"of all. Export it without logits_to_keep (num_logits_to_keep). {STILL}"
        )
    if found.ndim == 3:
        found, expected = found[real], expected[real]
    apart = _apart(found, expected, allowed)
    if not apart <= allowed:
        raise ModelFileError(
            f"{original}: once its fused operators are expanded it gives other logits than as it is (by {apart:.1e}, and "
            f"{allowed:.0e} is allowed). This is a defect of graphlens: please report it with the file's exporter. --keep-fused "
            "leaves the operators as they are."
        )


def _apart(found: Array, expected: Array, allowed: float) -> float:
    """How far two results are apart: of the largest number, or of the mean square where activations are rounded."""
    difference, size = found.astype(np.float64) - expected, expected.astype(np.float64)
    if allowed >= _ROUNDED:
        return float(np.sqrt((difference**2).mean() / ((size**2).mean() or 1)))
    return float(np.abs(difference).max(initial=0)) / (float(np.abs(size).max(initial=0)) or 1.0)


def _past(probe: Probe, n_layers: int) -> dict[int, tuple[Array, Array]] | None:
    """The keys and values that a probe begins with, [b, past, heads, d_head] each."""
    if not probe.past:
        return None
    pairs = ((probe.past[past_input(layer, part)] for part in ("key", "value")) for layer in range(n_layers))
    return {
        layer: (next(pair).transpose(0, 2, 1, 3), next(pair).transpose(0, 2, 1, 3)) for layer, pair in enumerate(pairs)
    }
