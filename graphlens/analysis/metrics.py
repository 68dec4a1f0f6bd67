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

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, cast

import numpy as np

from graphlens.analysis.arrays import Array, ArrayInput
from graphlens.analysis.metric import Metric, Needs, Normalised, Positions, TokenIds, normalised
from graphlens.analysis.metric_inputs import checked, kept, log_probability, one_hot
from graphlens.analysis.numerics import log_softmax, softmax
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
class CrossEntropy(Metric):
    """-log p(target), in nats, at ``position``; lower is better.

    Attributes:
        target: A token id, ids [b], the text of a single token, or a list of b such texts. With ``position=None`` the
            prompts' own tokens [b, p]: a prompt's value is then the mean loss of each next token, as
            ``utils.lm_cross_entropy_loss`` has it.
        position: Where to read the logits: an int, ints [b], or None for every position.
        reduction: "mean" over the prompts, or "none".
    """

    label: ClassVar[str] = "cross-entropy"
    token_fields: ClassVar[tuple[str, ...]] = ("target",)
    anywhere: ClassVar[bool] = True

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

    def _positions(self, length: int) -> Array | None:
        if self.position is not None:
            return super()._positions(length)
        if self._prompts.shape[1] != length:
            raise InputError(f"CrossEntropy.target has {self._prompts.shape[1]} tokens a prompt; the logits, {length}.")
        return np.arange(length - 1)  # what follows the last token is not known

    def _values(self, scores: Array) -> Array:
        losses: Array = -log_probability(scores, self._expected()).mean(-1)
        return losses

    def _slopes(self, scores: Array) -> Array:
        slopes: Array = (softmax(scores) - one_hot(self._expected(), scores)) / scores.shape[1]
        return slopes


@dataclass(frozen=True, eq=False, repr=False)
class KLDivergence(Metric):
    """D_KL(softmax(reference) || softmax(logits)), in nats: 0 where both predict the same.

    Attributes:
        reference: float logits [b, p, V], or [b, V] at the position.
        position: Where to compare: an int, ints [b], or None for the mean over all positions.
        reduction: "mean" over the prompts, or "none".

    Raises:
        InputError: For a reference that holds NaN or infinities.
    """

    label: ClassVar[str] = "KL divergence"
    anywhere: ClassVar[bool] = True

    reference: ArrayInput
    position: Positions | None = -1
    reduction: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        axes, wanted = ((3,), "[b, p, V]") if self.position is None else ((2, 3), "[b, p, V] or [b, V]")
        reference = checked(self.reference, "KLDivergence.reference", "f", axes, f"floating point {wanted}")
        if not np.isfinite(reference).all():
            raise InputError("KLDivergence.reference holds NaN or infinities.")
        self._set("reference", kept(reference, reference.dtype))

    @property
    def _logits(self) -> Array:
        """The reference as the constructor has kept it."""
        return cast(Array, self.reference)

    @property
    def _count(self) -> int:
        return 1 if self.position is not None else int(self._logits.shape[1])

    def _positions(self, length: int) -> Array | None:
        found = self._logits.shape[-2] if self._logits.ndim == 3 else length
        if found != length:
            raise InputError(f"KLDivergence.reference has {found} positions; there are {length} in the logits.")
        return None if self.position is None else super()._positions(length)

    def check(self, d_vocab: int) -> None:
        """Raises InputError unless the reference is of a vocabulary of ``d_vocab``."""
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
        divergences: Array = (probabilities * ratio).sum(-1).mean(-1)
        return divergences

    def _slopes(self, scores: Array) -> Array:
        slopes: Array = (softmax(scores) - np.exp(self._expected)) / scores.shape[1]
        return slopes
