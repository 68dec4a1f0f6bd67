"""The parity matrix of a variant: logits beside transformers', every hook point read and edited beside TransformerLens 3.9's.

Differences are shares of max(1, max|reference|). Shared by the test and by ``python -m tests.families``.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

TOLERANCE = 5e-5
SHAPES = ((2, 11), (1, 1), (3, 23))
LENGTHS = (9, 4, 1)  # of the rows of a padded batch


@dataclass(frozen=True)
class Difference:
    """The largest difference of one hook point, or of the logits of one input."""

    what: str
    share: float


def relative(found: Any, reference: Any, what: str) -> float:
    """max|found - reference| / max(1, max|reference|); -inf must stand at the same places."""
    found, reference = np.asarray(found), np.asarray(reference)
    assert found.shape == reference.shape, f"{what}: {found.shape} instead of {reference.shape}"
    masked = np.isneginf(reference)
    assert np.array_equal(np.isneginf(found), masked), f"{what}: other entries are masked"
    if masked.all():
        return 0.0
    kept = reference[~masked].astype(np.float64)
    return float(np.abs(found[~masked] - kept).max() / max(1.0, np.abs(kept).max()))


def prompt(vocabulary: int, batch: int, length: int) -> np.ndarray:
    """Random tokens [batch, length]."""
    return np.random.default_rng(batch * 100 + length).integers(1, vocabulary, (batch, length))


def padding(side: str) -> np.ndarray:
    """Which tokens of a padded batch are real, int64 [len(LENGTHS), max(LENGTHS)]."""
    index, lengths = np.arange(max(LENGTHS)), np.asarray(LENGTHS)[:, None]
    real = index >= max(LENGTHS) - lengths if side == "left" else index < lengths
    return real.astype(np.int64)


def inputs(vocabulary: int) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    """(what it is, tokens, which of them are real where not all) of every input of the matrix."""
    for batch, length in SHAPES:
        yield f"{batch}x{length}", prompt(vocabulary, batch, length), None
    for side in ("left", "right"):
        mask = padding(side)
        yield f"{side}-padded", prompt(vocabulary, *mask.shape), mask


def reference_logits(model: Any, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """transformers' logits, its positions counted without padding."""
    options = {}
    if mask is not None:
        options["attention_mask"] = torch.from_numpy(mask)
        if "position_ids" in inspect.signature(model.forward).parameters:
            options["position_ids"] = torch.from_numpy(np.maximum(mask.cumsum(-1) - 1, 0))
    return np.asarray(model(torch.from_numpy(tokens), **options).logits)


def against_transformers(ours: Any, model: Any) -> Iterator[Difference]:
    """The logits of every input, of real tokens."""
    for what, tokens, mask in inputs(ours.cfg.d_vocab):
        options = {} if mask is None else {"attention_mask": mask}
        found, expected = ours(tokens, **options), reference_logits(model, tokens, mask)
        real = slice(None) if mask is None else mask.astype(bool)
        yield Difference(f"logits {what}", relative(found[real], expected[real], what))


def edit_of(name: str, array: np.ndarray) -> np.ndarray:
    """A change that is different at every element, the same for everything compared."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if array.dtype.kind == "i":  # of experts: another token's
        return np.roll(array, 1, axis=0)
    if "hook_scale" in name:  # stays positive
        return array * (1 + 0.5 * rng.random(array.shape)).astype(array.dtype)
    return array * array.dtype.type(0.5) + rng.standard_normal(array.shape).astype(array.dtype)


def edited(ours: Any, tokens: np.ndarray, name: str) -> np.ndarray:
    """Our logits with ``edit_of`` at a hook point."""

    def edit(activation: np.ndarray, hook: Any) -> np.ndarray:
        return edit_of(name, activation)

    return np.asarray(ours.run_with_hooks(tokens, fwd_hooks=[(name, edit)]))


def against_lens(ours: Any, lens: Any, tokens: np.ndarray, edits: bool = True) -> Iterator[Difference]:
    """Every hook point of a run, read and edited, beside TransformerLens's."""
    logits, cache = ours.run_with_cache(tokens)
    expected, lens_cache = lens.run_with_cache(torch.from_numpy(tokens))
    # TransformerLens has hook points in each expert besides, of the tokens that it was chosen for alone.
    lens_cache = {name: value for name, value in lens_cache.items() if ".experts." not in name}
    yield Difference("logits", relative(logits, expected, "logits"))
    yield from read(cache, {name: value.numpy() for name, value in lens_cache.items()})
    assert list(cache) == list(lens_cache), "hook points, or their order, differ"
    for name in lens_cache if edits else ():

        def edit(activation: torch.Tensor, hook: Any, name: str = name) -> torch.Tensor:
            return torch.from_numpy(edit_of(name, activation.numpy()))

        changed = lens.run_with_hooks(torch.from_numpy(tokens), fwd_hooks=[(name, edit)])
        yield Difference(f"an edit at {name}", relative(edited(ours, tokens, name), changed, name))


def read(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> Iterator[Difference]:
    """The activations that both have."""
    for name in expected:
        assert name in found, f"no hook point {name!r}"
        yield Difference(name, relative(found[name], expected[name], name))
