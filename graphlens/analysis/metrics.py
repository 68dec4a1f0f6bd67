"""Metrics as data: what to measure of the logits, as records that say which positions and tokens they need.

A sweep asks a metric what it needs, computes no other logits, and hands these to ``of``; called on whole logits, a
metric does the same by itself.

>>> metric = LogitDiff(correct=2, incorrect=0)
>>> float(metric(np.array([[[0.0, 1.0, 5.0], [1.0, 2.0, 4.0]]])))
3.0
>>> metric.normalised(clean=5.0, corrupted=1.0)
Normalised(metric=LogitDiff(correct=2, incorrect=0), clean=5.0, corrupted=1.0)
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import ClassVar, Self, cast

import numpy as np

from graphlens.analysis.arrays import Array, ArrayInput
from graphlens.analysis.metric import Metric, Positions, TokenIds
from graphlens.analysis.metric_inputs import Needs, checked, kept, log_probability, one_hot, real_tokens
from graphlens.analysis.normalised_metric import Normalised, normalised
from graphlens.analysis.numerics import counted_pairs, log_softmax, softmax
from graphlens.errors import InputError

__all__ = [
    "CrossEntropy",
    "KLDivergence",
    "LogitDiff",
    "Metric",
    "Needs",
    "Normalised",
    "Probability",
    "TokenIds",
    "normalised",
]


@dataclass(frozen=True, eq=False, repr=False)
class LogitDiff(Metric):
    """The logit of ``correct`` minus that of ``incorrect``: their log odds, in nats.

    Attributes:
        correct: A token id, ids [b], the text of a single token, or a list of b such texts.
        incorrect: Likewise.
        position: Where to read the logits: an int, or ints [b].
        reduction: "mean" over the prompts, or "none".
    """

    label: ClassVar[str] = "logit difference"
    token_fields: ClassVar[tuple[str, ...]] = ("correct", "incorrect")

    correct: TokenIds
    incorrect: TokenIds
    position: Positions = -1
    reduction: str = "mean"

    @property
    def linear(self) -> bool:
        """True: the derivative is 1 and -1 whatever the logits."""
        return True

    def _columns(self, batch: int) -> Array:
        return np.stack([np.broadcast_to(self._known(field), (batch,)) for field in self.token_fields], axis=1)

    def _values(self, scores: Array) -> Array:
        difference: Array = scores[..., 0, 0] - scores[..., 0, 1]
        return difference

    def _slopes(self, scores: Array) -> Array:
        return np.broadcast_to([1.0, -1.0], scores.shape)


@dataclass(frozen=True, eq=False, repr=False)
class Probability(Metric):
    """The probability of ``token``.

    Attributes:
        token: A token id, ids [b], the text of a single token, or a list of b such texts.
        position: Where to read the logits: an int, or ints [b].
        reduction: "mean" over the prompts, or "none".
    """

    label: ClassVar[str] = "probability"
    token_fields: ClassVar[tuple[str, ...]] = ("token",)

    token: TokenIds
    position: Positions = -1
    reduction: str = "mean"

    def _values(self, scores: Array) -> Array:
        return np.exp(log_probability(scores, self._known("token"))[..., 0])

    def _slopes(self, scores: Array) -> Array:
        every = softmax(scores)
        hit = one_hot(self._known("token"), scores)
        slopes: Array = (every * hit).sum(-1, keepdims=True) * (hit - every)
        return slopes


@dataclass(frozen=True, eq=False, repr=False)
class MeanOfPositions(Metric):
    """What metrics have in common whose value may be a mean over the positions of a prompt (``position=None``).

    Attributes:
        mask: [b, p], 1 at real tokens, 0 at padding, which counts for nothing; None where there is none.
    """

    anywhere: ClassVar[bool] = True

    _: KW_ONLY
    mask: ArrayInput | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask is None:
            return
        real = real_tokens(self.mask, self._called("mask"))
        self._set("mask", real)
        if self.position is not None:
            self._ensure_real(real)
        if self.position is None and not self._counts.all() and (self.reduction == "none" or not self._counts.any()):
            row = int(np.flatnonzero(self._counts == 0)[0])
            raise InputError(f"{self._called('mask')} leaves nothing of prompt {row} to take a mean over.")

    def masked(self, mask: ArrayInput | None) -> Self:
        """The metric of prompts with padding, none of which counts; one that has a mask already keeps it.

        Args:
            mask: [b, p], 1 at real tokens, 0 at padding; None where there is none.

        Raises:
            InputError: For a mask of other prompts, where ``position`` is padding, and where there is nothing to average.
        """
        return self if mask is None or self.mask is not None else replace(self, mask=mask)

    def _counted(self, real: Array) -> Array:
        """Which of the positions that are read count, bool [b, n], where ``real`` [b, p] are the real tokens."""
        raise NotImplementedError

    @property
    def _weights(self) -> Array | None:
        """1 where a position counts and 0 elsewhere, [b, n]; None where all do."""
        if self.mask is None or self.position is not None:
            return None
        return self._counted(cast(Array, self.mask)).astype(np.float64)

    @property
    def _counts(self) -> Array:
        """How many positions of each prompt count, [b]; of a metric with a mask."""
        weights = self._weights
        assert weights is not None
        return np.asarray(weights.sum(-1))

    @property
    def _shares(self) -> Array | None:
        # The mean is that over all positions that count, as of a loss: a long prompt counts for more.
        return None if self._weights is None else self._counts / self._counts.sum()

    def _mean(self, values: Array) -> Array:
        """The mean [..., b] of values [..., b, n] over the positions that count."""
        weights = self._weights
        if weights is None:
            return np.asarray(values.mean(-1))
        return np.asarray(np.where(weights, values, 0).sum(-1) / np.maximum(self._counts, 1))

    def _mean_slopes(self, slopes: Array) -> Array:
        """The derivatives of that mean, where those of each position's value are given [b, n, V]."""
        weights = self._weights
        if weights is None:
            return np.asarray(slopes / slopes.shape[1])
        return np.asarray(slopes * (weights / np.maximum(self._counts, 1)[:, None])[..., None])

    def _ensure_length(self, length: int) -> None:
        """Raises InputError for a mask of prompts of another length."""
        if self.mask is not None and cast(Array, self.mask).shape[1] != length:
            raise InputError(
                f"{self._called('mask')} has {cast(Array, self.mask).shape[1]} positions; there are {length}."
            )


@dataclass(frozen=True, eq=False, repr=False)
class CrossEntropy(MeanOfPositions):
    """-log p(target), in nats, at ``position``; lower is better.

    Attributes:
        target: A token id, ids [b], the text of a single token, or a list of b such texts. With ``position=None`` the
            prompts' own tokens [b, p]: a prompt's value is then the mean loss of each next token, and the mean is that
            over all tokens, as ``utils.lm_cross_entropy_loss`` has it. A pair with padding in it does not count.
        position: Where to read the logits: an int, ints [b], or None for every position.
        reduction: "mean" over the prompts, or "none".
        mask: The attention mask [b, p], 0 at padding. A sweep, and all else that runs the model, puts in that of its run.
    """

    label: ClassVar[str] = "cross-entropy"
    token_fields: ClassVar[tuple[str, ...]] = ("target",)

    target: TokenIds
    position: Positions | None = -1
    reduction: str = "mean"

    @property
    def _prompts(self) -> Array:
        """The prompts' tokens [b, p], where ``position`` is None."""
        return cast(Array, self.target)

    def _expected(self) -> int | Array:
        """The tokens that are to come: an id or ids [b], or for every position [b, p-1]."""
        following: int | Array = self._prompts[:, 1:] if self.position is None else self._known("target")
        return following

    @property
    def _count(self) -> int:
        return 1 if self.position is not None else int(self._prompts.shape[1]) - 1

    def _counted(self, real: Array) -> Array:
        if real.shape != self._prompts.shape:
            raise InputError(
                f"CrossEntropy.mask has shape {list(real.shape)}; its target, {list(self._prompts.shape)}."
            )
        return counted_pairs(real, real.shape)

    def _positions(self, length: int) -> Array | None:
        self._ensure_length(length)
        if self.position is not None:
            return super()._positions(length)
        if self._prompts.shape[1] != length:
            raise InputError(f"CrossEntropy.target has {self._prompts.shape[1]} tokens a prompt; the logits, {length}.")
        return np.arange(length - 1)  # what follows the last token is not known

    def _values(self, scores: Array) -> Array:
        return self._mean(-log_probability(scores, self._expected()))

    def _slopes(self, scores: Array) -> Array:
        return self._mean_slopes(softmax(scores) - one_hot(self._expected(), scores))


@dataclass(frozen=True, eq=False, repr=False)
class KLDivergence(MeanOfPositions):
    """D_KL(softmax(reference) || softmax(logits)), in nats: 0 where both predict the same.

    Attributes:
        reference: float logits [b, p, V], or [b, V] at the position.
        position: Where to compare: an int, ints [b], or None for the mean over all positions but padding.
        reduction: "mean" over the prompts, or "none".
        mask: The attention mask [b, p], 0 at padding. A sweep, and all else that runs the model, puts in that of its run.

    Raises:
        InputError: For a reference that holds NaN or infinities.
    """

    label: ClassVar[str] = "KL divergence"

    reference: ArrayInput
    position: Positions | None = -1
    reduction: str = "mean"

    def __post_init__(self) -> None:
        axes, wanted = ((3,), "[b, p, V]") if self.position is None else ((2, 3), "[b, p, V] or [b, V]")
        reference = checked(self.reference, "KLDivergence.reference", "f", axes, f"floating point {wanted}")
        if not np.isfinite(reference).all():
            raise InputError("KLDivergence.reference holds NaN or infinities.")
        self._set("reference", kept(reference, reference.dtype))
        super().__post_init__()

    @property
    def _logits(self) -> Array:
        """The reference as the constructor has kept it."""
        return cast(Array, self.reference)

    @property
    def _count(self) -> int:
        return 1 if self.position is not None else int(self._logits.shape[1])

    def _counted(self, real: Array) -> Array:
        if real.shape != self._logits.shape[:2]:
            raise InputError(
                f"KLDivergence.mask has shape {list(real.shape)}; its reference, {list(self._logits.shape)}."
            )
        return real

    def _positions(self, length: int) -> Array | None:
        self._ensure_length(length)
        found = self._logits.shape[-2] if self._logits.ndim == 3 else length
        if found != length:
            raise InputError(f"KLDivergence.reference has {found} positions; there are {length} in the logits.")
        return None if self.position is None else super()._positions(length)

    def check(self, d_vocab: int) -> None:
        """Refuses a vocabulary that the reference is not of.

        Args:
            d_vocab: The number of its tokens.

        Raises:
            InputError: Where the reference has another number.
        """
        if self._logits.shape[-1] != d_vocab:
            raise InputError(f"KLDivergence.reference has {self._logits.shape[-1]} tokens; there are {d_vocab}.")

    @cached_property
    def _expected(self) -> Array:
        """The reference's log-probabilities [b, n, V]: a sweep asks for them again and again."""
        known, logits = self._logits.ndim == 2, self._logits
        wanted = logits[:, None] if known else self.needs(*logits.shape[:2]).gather(logits)
        return log_softmax(wanted.astype(np.float64))

    def _values(self, scores: Array) -> Array:
        probabilities = np.exp(self._expected)
        # Where the probability is 0, so is the term, even against a logit of -inf.
        ratio = np.where(probabilities > 0, self._expected - log_softmax(scores), 0)
        return self._mean((probabilities * ratio).sum(-1))

    def _slopes(self, scores: Array) -> Array:
        return self._mean_slopes(softmax(scores) - np.exp(self._expected))
