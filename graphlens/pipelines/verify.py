"""Verification: what must hold of an exported file before it is called good, tried on the file itself."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graphlens.analysis.numerics import log_softmax
from graphlens.engine.engine import Engine
from graphlens.errors import VerificationError
from graphlens.file.names import axis_sizes
from graphlens.pipelines.memory import peak_memory
from graphlens.views.progress import steps

Array = npt.NDArray[Any]
TOLERANCE = 1e-4  # times max(1, max|reference|)
_BATCH, _LENGTH = 2, 11
_EFFECT_LENGTH = 5  # a perturbed hook point needs at least 4 positions to be sure of an effect
_NO_EFFECT = 1e-6  # times max(1, max|logits|)


@dataclass(frozen=True)
class Verification:
    """What a verification found: the largest difference of the logits from transformers' (absolute, and allowed), how
    many hook points were tried, the peak memory of the step in bytes, and its seconds."""

    logits_difference: float
    allowed: float
    hook_points: int
    peak_bytes: int
    seconds: float

    def lines(self) -> list[str]:
        """The findings, for people."""
        return [
            f"Logits differ from transformers' by at most {self.logits_difference:.1e} (allowed {self.allowed:.1e})",
            f"{self.hook_points} hook points: shapes, finite values, causal patterns and causal effect hold",
            f"Verified in {self.seconds:.1f} s, peak memory {self.peak_bytes / 1e6:,.0f} MB",
        ]


def verify_export(model: Path, checkpoint: Path) -> Verification:
    """Verifies a hooked file against the checkpoint folder it came from, on seeded random tokens.

    Logits equal transformers' (log-probabilities for processed weights, which centre the unembedding); every hook
    point has its shape and finite values; patterns are causal and sum to 1; the future changes nothing; and changing
    the value at each hook point changes the logits. Raises VerificationError on the first that does not hold.
    """
    started = time.perf_counter()
    with peak_memory() as peak:
        engine = Engine(model, "cpu")
        config = engine.manifest.config
        rng = np.random.default_rng(0)
        length = min(_LENGTH, config.n_ctx)
        tokens = rng.integers(0, config.d_vocab, (_BATCH, length))
        results = engine.run({"input_ids": tokens}, engine.hook_names)
        logits, values = results.output, results.values
        assert logits is not None
        _check_finite(values)
        _check_shapes(engine, values, length)
        _check_patterns(values)
        _check_future(engine, tokens, logits)
        del values
        difference, allowed = _compare(logits, _reference(checkpoint, tokens), bool(engine.manifest.processing))
        with steps("Trying every hook point", len(engine.hook_names)) as progress:
            few = tokens[:1, :_EFFECT_LENGTH]
            before = engine.run({"input_ids": few}, ()).output
            assert before is not None
            for name in engine.hook_names:
                _check_effect(engine, name, few, before, rng)
                progress.advance()
    return Verification(difference, allowed, len(engine.hook_names), peak.bytes, time.perf_counter() - started)


def _reference(checkpoint: Path, tokens: Array) -> Array:
    """transformers' logits [b, p, V] in float32, by its own attention."""
    import torch
    import transformers

    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        )
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens)).logits.numpy()  # type: ignore[no-any-return]


def _check_finite(values: dict[str, Array]) -> None:
    for name, value in values.items():
        bad = np.isnan(value) | (np.isinf(value) & (value > 0))
        if not name.endswith("hook_attn_scores"):
            bad |= np.isinf(value)
        if bad.any():
            raise VerificationError(
                f"{name!r} holds {int(bad.sum())} values that are NaN or infinite. The weights are damaged, or overflow "
                "in float32; look at them before exporting."
            )


def _compare(logits: Array, reference: Array, processed: bool) -> tuple[float, float]:
    if processed:
        logits, reference = log_softmax(logits), log_softmax(reference)
    allowed = TOLERANCE * max(1.0, float(np.abs(reference).max()))
    difference = float(np.abs(logits - reference).max())
    if not difference <= allowed:
        raise VerificationError(
            f"the exported logits differ from transformers' by {difference:.2e}, more than the {allowed:.1e} allowed. "
            "This is a defect of the exporter: please report it with the model's config.json."
        )
    return difference, allowed


def _check_shapes(engine: Engine, values: dict[str, Array], length: int) -> None:
    sizes = axis_sizes(engine.manifest.config)
    sizes |= {"batch": _BATCH, "pos": length, "query_pos": length, "key_pos": length}
    for name, entry in engine.manifest.hooks.items():
        expected = tuple(sizes[axis] for axis in entry.axes)
        if values[name].shape != expected or str(values[name].dtype) != entry.dtype:
            raise VerificationError(
                f"{name!r} has shape {list(values[name].shape)} and dtype {values[name].dtype}, not {list(expected)} "
                f"and {entry.dtype}. This is a defect of the exporter: please report it."
            )


def _check_patterns(values: dict[str, Array]) -> None:
    for name, pattern in values.items():
        if not name.endswith("attn.hook_pattern"):
            continue
        if np.abs(pattern.sum(-1) - 1).max() > 1e-4:
            raise VerificationError(f"{name!r}: its rows do not sum to 1, so it is not an attention pattern.")
        if np.triu(np.ones(pattern.shape[-2:], bool), 1).any() and np.abs(np.triu(pattern, 1)).max() != 0:
            raise VerificationError(f"{name!r}: attends to later positions, so the attention is not causal.")


def _check_future(engine: Engine, tokens: Array, logits: Array) -> None:
    changed = tokens.copy()
    changed[:, -1] = (changed[:, -1] + 1) % engine.manifest.config.d_vocab
    other = engine.run({"input_ids": changed}, ()).output
    assert other is not None
    scale = max(1.0, float(np.abs(logits).max()))
    if logits.shape[1] > 1 and np.abs(other[:, :-1] - logits[:, :-1]).max() > 1e-5 * scale:
        raise VerificationError("changing the last token changed earlier logits: the model is not causal.")


def _check_effect(engine: Engine, name: str, tokens: Array, logits: Array, rng: np.random.Generator) -> None:
    def disturb(activation: Array) -> Array:
        # Different noise at every element: softmax and LayerNorm absorb a constant. Masked scores stay masked.
        spread = float(np.std(activation[np.isfinite(activation)])) or 1.0
        noise = rng.standard_normal(activation.shape).astype(activation.dtype) * np.asarray(spread, activation.dtype)
        return np.where(np.isfinite(activation), activation + noise, activation)

    changed = engine.run({"input_ids": tokens}, (), {name: disturb}).output
    assert changed is not None
    if not np.abs(changed - logits).max() > _NO_EFFECT * max(1.0, float(np.abs(logits).max())):
        raise VerificationError(
            f"changing the value at {name!r} does not change the logits. Either this hook point is not where it should "
            "be, or the checkpoint ignores it (weights of zero after it); --no-verify exports it all the same."
        )
