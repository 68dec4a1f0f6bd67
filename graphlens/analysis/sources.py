"""What a sweep puts in an activation's place: another run's, zero, its mean, a harvest's, or itself with noise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeGuard, cast

import numpy as np

from graphlens.analysis.arrays import Array, ArrayInput, as_array, working
from graphlens.errors import InputError, InputTypeError, UnknownHookPoint, checked_number, is_one_of

if TYPE_CHECKING:
    from graphlens.analysis.harvest import Harvest


class Source(Protocol):
    """Where patched values come from."""

    def value(self, hook: str, corrupted: Array, mask: Array | None) -> Array:
        """What replaces an activation.

        Args:
            hook: The hook point.
            corrupted: The activation [b, pos, ...] of the run that is patched.
            mask: int [b, pos], 0 at padding; None where there is none.

        Returns:
            An array that broadcasts to ``corrupted``.
        """


class ByName(Protocol):
    """Activations by hook name: an ActivationCache, TransformerLens's too, or a dict."""

    def keys(self) -> Iterable[str]:
        """The hook names."""

    def __getitem__(self, hook: str, /) -> ArrayInput:
        """The activation of a hook point."""


# What names a source: activations by hook name, "zero", "mean", "noise", or a Source itself.
SourceInput: TypeAlias = str | ByName | Source


@dataclass(frozen=True)
class Cache:
    """The activations of another run: activation patching from the clean run, or resample ablation.

    Attributes:
        activations: The activations by hook name.
    """

    activations: ByName

    def value(self, hook: str, corrupted: Array, mask: Array | None) -> Array:
        """The cached activation.

        Args:
            hook: The hook point's name.
            corrupted: The corrupted run's activation there, [b, ...].
            mask: Int [b, p], 1 at real tokens; of no effect here.

        Returns:
            The activation, [b or 1, ...] as the corrupted run's.

        Raises:
            UnknownHookPoint: Where the cache has none.
            InputError: For one of another shape.
        """
        if not _is_by_name(self.activations):
            raise InputError(
                f"a cache of activations goes by hook name, which {type(self.activations).__name__} does not."
            )
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
    """Zero ablation: 0 in place of the activation."""

    def value(self, hook: str, corrupted: Array, mask: Array | None) -> Array:
        """A 0 that broadcasts to the activation.

        Args:
            hook: The hook point's name; of no effect, as ``mask``.
            corrupted: The activation of the run that is patched, [b, ...].
            mask: See there.

        Returns:
            [1, ...] with as many axes, of the activation's dtype.
        """
        return np.zeros((1,) * corrupted.ndim, corrupted.dtype)


@dataclass(frozen=True)
class Mean:
    """Mean ablation: the activation's mean over this batch's prompts and positions, padding left out."""

    def value(self, hook: str, corrupted: Array, mask: Array | None) -> Array:
        """The mean of the activation.

        Args:
            hook: The hook point's name.
            corrupted: The activation of the run that is patched, [b, p, ...], of scores and patterns [b, head, pos, pos].
            mask: Int [b, p], 1 at real tokens; None where all are.

        Returns:
            [1, 1, ...]; at scores and patterns over the batch alone, [1 or b, head, pos, pos]: there an entry whose query or
            key is padding is in no mean and stays as it is. Masked scores keep their -inf.
        """
        if ".hook_attn_scores" in hook or ".hook_pattern" in hook:
            if mask is None:
                return np.asarray(corrupted.mean(0, keepdims=True))
            both = _real(hook, mask, corrupted.ndim)
            total = np.where(both, working(corrupted), 0).sum(0, keepdims=True) / np.maximum(both.sum(0), 1)
            return np.where(both, total.astype(corrupted.dtype), corrupted)
        if mask is None:
            return np.asarray(corrupted.mean((0, 1), keepdims=True))
        rows = working(corrupted)[mask.astype(bool)]  # [token, ...]
        return np.asarray(rows.mean(0).astype(corrupted.dtype))[None, None]


@dataclass(frozen=True)
class HarvestMean:
    """Mean ablation with the means of a harvest: of many texts, and so the same for any prompts, one at a time or many.

    Attributes:
        harvest: The harvest, with activations or made with ``reduce="mean"``.
        by: None for the mean of all its tokens, or "position" for the mean at each place in a row. A prompt's places count from
            its first token, padding left out.
    """

    harvest: Harvest
    by: str | None = None
    _known: dict[str, Array] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not hasattr(self.harvest, "mean") or not hasattr(self.harvest, "plan"):
            raise InputTypeError(f"HarvestMean takes a graphlens.Harvest, not {type(self.harvest).__name__}.")
        if not is_one_of(self.by, (None, "position")):
            raise InputError(f"by={self.by!r}: a mean is over all tokens (None), or that of each 'position'.")
        if self.harvest.plan.projected:  # as many directions as numbers would fit, and mean something else
            raise InputError(
                f"{self.harvest.path} holds products with directions (project=), and no activations that could be put in the "
                "place of a model's. Harvest without project."
            )

    @property
    def model_name(self) -> str:
        """The name of the model that was harvested."""
        return str(self.harvest.plan.model["name"])

    @property
    def processing(self) -> tuple[str, ...]:
        """How the weights of the harvest's model were processed."""
        return tuple(map(str, cast("Sequence[str]", self.harvest.plan.model["processing"])))

    def read(self, hook: str) -> Array:
        """The mean at a hook point, which is read off the harvest once: a sweep over many prompts asks again and again.

        Args:
            hook: The hook point.

        Returns:
            [*shape]; by position [positions, *shape].

        Raises:
            InputKeyError: The hook point was not harvested.
        """
        if hook not in self._known:
            self._known[hook] = self.harvest.mean(hook, by=self.by)
        return self._known[hook]

    def value(self, hook: str, corrupted: Array, mask: Array | None) -> Array:
        """The mean of the hook point's activations.

        Args:
            hook: The hook point's name.
            corrupted: The activation of the run that is patched, [b, p, ...].
            mask: Int [b, p], 1 at real tokens; None where all are.

        Returns:
            [1, 1, ...]; by position [1 or b, p, ...].

        Raises:
            InputKeyError: The hook point was not harvested.
            InputError: The harvest is of a model of another shape, or has no mean for one of the positions.
        """
        mean = self.read(hook)
        inner = mean.shape if self.by is None else mean.shape[1:]
        if inner != corrupted.shape[2:]:
            raise InputError(
                f"{hook!r}: the harvest holds {list(inner)} for each token, and this model gives {list(corrupted.shape[2:])}."
            )
        if self.by is None:
            return mean[None, None].astype(corrupted.dtype)
        places = np.arange(corrupted.shape[1])[None] if mask is None else np.maximum(mask.cumsum(1) - 1, 0)
        most = int(places.max()) + 1
        if most > len(mean) or not np.isfinite(mean[np.unique(places)]).all():
            raise InputError(
                f"{hook!r}: the harvest has no mean for each of {most} positions. Harvest texts as long, keep_bos=True and "
                "positions='all', or take the mean of all tokens: by=None."
            )
        return np.asarray(mean[places].astype(corrupted.dtype))


@dataclass(frozen=True)
class Noise:
    """The activation plus Gaussian noise, as in causal tracing (Meng et al. 2022, which takes ``scale`` 3 at the embeddings).

    Attributes:
        scale: The noise's standard deviation, in those of the activation.
        seed: Seeds the noise together with the hook's name, so it does not depend on the order of sites.
    """

    scale: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        checked_number(self.scale, "scale", float)
        checked_number(self.seed, "seed", least=0)

    def value(self, hook: str, corrupted: Array, mask: Array | None) -> Array:
        """The noised activation.

        Args:
            hook: The hook point's name, of which the noise depends too.
            corrupted: The activation of the run that is patched, [b, p, ...].
            mask: Int [b, p], 1 at real tokens, of which the standard deviation is; None where all are.

        Returns:
            The activation with noise, of its shape and dtype. Where a pattern is 0 it stays 0.
        """
        digest = int.from_bytes(hashlib.sha256(hook.encode()).digest()[:8], "little")
        rng = np.random.default_rng([self.seed, digest])
        counted = np.isfinite(corrupted)
        if mask is not None:
            counted &= _real(hook, mask, corrupted.ndim)
        finite = working(corrupted)[counted]
        deviation = float(finite.std()) if finite.size else 0.0
        noise = rng.standard_normal(corrupted.shape)
        if ".hook_pattern" in hook:  # no noise where nobody looks: the mask must stay causal
            noise = np.where(corrupted == 0, 0, noise)
        return (corrupted + self.scale * deviation * noise).astype(corrupted.dtype)


def ensure_same_side(source: Source, mask: Array | None) -> None:
    """Refuses a cache of prompts that are padded on the other side than those that are patched: no position is the same.

    Args:
        source: Where patched values come from. Only a cache that knows its padding is checked.
        mask: int [b, pos] of the prompts that are patched, 0 at padding; None where there is none.

    Raises:
        InputError: If the one is padded on the left and the other on the right.
    """
    theirs = getattr(getattr(source, "activations", None), "mask", None)
    if theirs is None or mask is None or theirs.shape[1] != mask.shape[1]:
        return
    theirs, ours = _sides(theirs), _sides(mask)
    if theirs != ours and theirs | ours == {"left", "right"}:
        raise InputError(
            f"the clean cache is of prompts padded on the {' and '.join(sorted(theirs))}, and those that are patched are "
            f"padded on the {' and '.join(sorted(ours))}: their positions are not the same tokens'. Make the cache with "
            f"run_with_cache(..., padding_side={min(ours)!r})."
        )


def _sides(mask: Array) -> set[str]:
    """The sides on which some prompt has padding."""
    ends = {"left": mask[:, 0], "right": mask[:, -1]}
    return {side for side, column in ends.items() if not column.all()}


def _real(hook: str, mask: Array, rank: int) -> Array:
    """Which entries of an activation are of real tokens, at scores and patterns of a real query and key.

    Args:
        hook: The hook point.
        mask: int [b, pos], 0 at padding.
        rank: How many axes the activation has.

    Returns:
        bool that broadcasts to the activation.
    """
    real = mask.astype(bool)
    if ".hook_attn_scores" in hook or ".hook_pattern" in hook:
        return np.asarray((real[:, :, None] & real[:, None, :])[:, None])
    return real.reshape(*real.shape, *(1,) * (rank - 2))


_NAMED: Mapping[str, Callable[[], Source]] = {"zero": Zero, "mean": Mean, "noise": Noise}


def _is_by_name(source: ByName | Source) -> TypeGuard[ByName]:
    """True for activations by hook name."""
    return isinstance(source, Mapping) or (hasattr(source, "keys") and hasattr(source, "__getitem__"))


def _is_source(source: ByName | Source) -> TypeGuard[Source]:
    """True for a source."""
    return hasattr(source, "value")


def as_source(source: SourceInput) -> Source:
    """The Source that an argument means.

    Args:
        source: Activations by hook name, "zero", "mean", "noise", or a Source.

    Raises:
        InputError: For anything else.
    """
    if isinstance(source, str):
        if source not in _NAMED:
            raise InputError(f"source {source!r}: there is {', '.join(map(repr, _NAMED))}, or a cache of activations.")
        return _NAMED[source]()
    if _is_by_name(source):
        return Cache(source)
    if _is_source(source):
        return source
    if hasattr(source, "plan") and hasattr(source, "mean"):
        raise InputError("a harvest is many activations of each hook point: give its means, HarvestMean(harvest).")
    raise InputError(
        f"a source is a cache of activations, 'zero', 'mean', 'noise' or Noise(...), not {type(source).__name__}."
    )
