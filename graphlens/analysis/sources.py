"""What a sweep puts in an activation's place: another run's, zero, its mean, or itself with noise."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from graphlens.analysis.arrays import as_array, working
from graphlens.errors import InputError, UnknownHookPoint

Array = npt.NDArray[Any]


class Source(Protocol):
    """Where patched values come from."""

    def value(self, hook: str, corrupted: Array, mask: Array | None) -> Array:
        """What replaces the activation ``corrupted`` [b, pos, ...] at a hook point (``mask`` int [b, pos] is 0 at
        padding): an array that broadcasts to it."""


@dataclass(frozen=True)
class Cache:
    """The activations of another run by hook name, usually the clean one: activation patching, resample ablation."""

    activations: Mapping[str, Any]

    def value(self, hook: str, corrupted: Array, mask: Array | None) -> Array:
        """The cached activation. Raises UnknownHookPoint where there is none, InputError for one of another shape."""
        try:
            found = as_array(self.activations[hook])
        except UnknownHookPoint as error:
            raise UnknownHookPoint(f"the clean cache: {error}") from error
        except KeyError as error:
            raise UnknownHookPoint(
                f"the clean cache has no {hook!r}, which this sweep patches. Cache it in the clean run: names_filter "
                "must let it through."
            ) from error
        if found.ndim == corrupted.ndim - 1:  # a cache whose batch axis was removed
            found = found[None]
        # A mean may lack a batch; positions are never spread: a prompt of one token would fit every other.
        sizes = zip(found.shape, corrupted.shape, strict=found.ndim == corrupted.ndim)
        if found.ndim != corrupted.ndim or any(a != b and (axis or a != 1) for axis, (a, b) in enumerate(sizes)):
            raise InputError(
                f"{hook!r} has shape {list(found.shape)} in the clean cache and {list(corrupted.shape)} in the corrupted "
                "run. Clean and corrupted prompts must have the same number of tokens (or be padded to it on the left)."
            )
        return found


@dataclass(frozen=True)
class Zero:
    """Zero ablation."""

    def value(self, hook: str, corrupted: Array, mask: Array | None) -> Array:
        """Zero."""
        return np.zeros((1,) * corrupted.ndim, corrupted.dtype)


@dataclass(frozen=True)
class Mean:
    """Mean ablation: the activation's mean over this batch's prompts and positions, padding left out."""

    def value(self, hook: str, corrupted: Array, mask: Array | None) -> Array:
        """The mean [1, 1, ...]; at scores and patterns over the batch alone. Masked scores keep their -inf."""
        if ".hook_attn_scores" in hook or ".hook_pattern" in hook:
            return np.asarray(corrupted.mean(0, keepdims=True))
        if mask is None:
            return np.asarray(corrupted.mean((0, 1), keepdims=True))
        weight = mask.astype(corrupted.dtype).reshape(*mask.shape, *(1,) * (corrupted.ndim - 2))
        return np.asarray((corrupted * weight).sum((0, 1), keepdims=True) / weight.sum())


@dataclass(frozen=True)
class Noise:
    """The activation plus Gaussian noise of ``scale`` times its own standard deviation, as in causal tracing (Meng et al.
    2022, which takes 3 at the embeddings). Seeded by ``seed`` and the hook's name, whatever the order of sites."""

    scale: float = 3.0
    seed: int = 0

    def value(self, hook: str, corrupted: Array, mask: Array | None) -> Array:
        """The noised activation."""
        digest = int.from_bytes(hashlib.sha256(hook.encode()).digest()[:8], "little")
        rng = np.random.default_rng([self.seed, digest])
        finite = working(corrupted)[np.isfinite(corrupted)]
        deviation = float(finite.std()) if finite.size else 0.0
        noise = rng.standard_normal(corrupted.shape)
        if ".hook_pattern" in hook:  # no noise where nobody looks: the mask must stay causal
            noise = np.where(corrupted == 0, 0, noise)
        return (corrupted + self.scale * deviation * noise).astype(corrupted.dtype)


_NAMED: Mapping[str, type[Any]] = {"zero": Zero, "mean": Mean, "noise": Noise}


def as_source(source: Any) -> Source:
    """A Source from a cache (any mapping from hook names), "zero", "mean", "noise", or a Source. Raises InputError."""
    if isinstance(source, str):
        if source not in _NAMED:
            raise InputError(f"source {source!r}: there is {', '.join(map(repr, _NAMED))}, or a cache of activations.")
        found: Source = _NAMED[source]()
        return found
    if isinstance(source, Mapping) or (hasattr(source, "keys") and hasattr(source, "__getitem__")):
        return Cache(source)
    if hasattr(source, "value"):
        given: Source = source
        return given
    raise InputError(
        f"a source is a cache of activations, 'zero', 'mean', 'noise' or Noise(...), not {type(source).__name__}."
    )
