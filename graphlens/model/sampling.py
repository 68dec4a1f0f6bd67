"""How the next token is chosen from logits, and what is told of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from graphlens.analysis.arrays import Array, ArrayInput, ArrayT, UserArray, as_array, is_tensor
from graphlens.analysis.numerics import softmax
from graphlens.errors import InputError, checked_number

if TYPE_CHECKING:
    from numpy.random import Generator

    Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sampling:
    """What is asked of the choice, by the arguments' names of ``generate``; see there.

    Attributes:
        top_k: Draw from that many likeliest tokens.
        top_p: Draw from the likeliest tokens that reach this probability together.
        temperature: 0 takes the likeliest token.
        freq_penalty: Subtracted from a token's score for each time that it occurred.
        repetition_penalty: Divides the logits above 0 of tokens that occurred, and multiplies those below.
    """

    top_k: int | None = None
    top_p: float | None = None
    temperature: float = 1.0
    freq_penalty: float = 0.0
    repetition_penalty: float = 1.0

    def check(self) -> None:
        """Checks the numbers.

        Raises:
            InputError: For one that cannot be.
        """
        checked_number(self.temperature, "temperature", float, least=0)
        checked_number(self.freq_penalty, "freq_penalty", float)
        if not checked_number(self.repetition_penalty, "repetition_penalty", float, least=0) > 0:
            raise InputError(
                f"repetition_penalty={self.repetition_penalty!r}: it must be more than 0; 1 changes nothing."
            )
        if self.top_k is not None:
            checked_number(self.top_k, "top_k", least=1)
        if self.top_p is not None and not checked_number(self.top_p, "top_p", float, most=1) > 0:
            raise InputError(f"top_p={self.top_p!r}: top_p must be more than 0.")


class _Random(Protocol):
    """Where draws come from: one of NumPy's generators, or ``numpy.random`` itself, which ``numpy.random.seed`` governs."""

    def gumbel(self, *, size: tuple[int, ...]) -> Array: ...


# Chooses a token for each row of logits [b, V], given the tokens so far [b, p]: int64 [b].
Sampler: TypeAlias = "Callable[[Array, Tokens, Sampling], Tokens]"


def sampler(seed: int | None) -> Sampler:
    """What draws on the NumPy face.

    Args:
        seed: The draws are those of a generator of this seed; None leaves them to ``numpy.random.seed``.
    """
    rng = cast("_Random", np.random if seed is None else np.random.default_rng(seed))
    return lambda logits, tokens, how: sample(logits, tokens, rng, how)


def penalised(logits: Array, tokens: Tokens, penalty: float) -> Array:
    """Logits with a repetition penalty, as transformers has it.

    Args:
        logits: [b, V].
        tokens: int64 [b, p], those so far.
        penalty: Divides the logits above 0 of the tokens that occur, and multiplies those below; 1 changes nothing.

    Returns:
        [b, V], a copy unless nothing changes.
    """
    if penalty == 1 or not tokens.size:
        return logits
    changed = np.where(logits > 0, logits / penalty, logits * penalty).astype(logits.dtype)
    return np.where(_counts(tokens, logits.shape[-1]) > 0, changed, logits)


def _counts(tokens: Tokens, size: int) -> Tokens:
    """How often each id up to ``size`` occurs in each row, [b, size]. Ids beyond are never drawn, where d_vocab_out is less."""
    return np.array([np.bincount(row, minlength=size)[:size] for row in tokens], np.int64).reshape(len(tokens), size)


def sample(logits: Array, tokens: Tokens, rng: Generator | _Random, how: Sampling = Sampling()) -> Tokens:
    """Draws one token for each row of logits.

    In this order: repetition penalty, divide by the temperature, subtract the frequency penalty times each token's count, keep
    the ``top_k`` likeliest, of those the likeliest that reach ``top_p``.

    Args:
        logits: [b, V].
        tokens: int [b, p], those so far, for the penalties.
        rng: Where the draws come from.
        how: What is asked of the choice.

    Returns:
        int64 [b].
    """
    logits = penalised(logits, tokens, how.repetition_penalty)
    if how.temperature == 0:
        return np.asarray(logits.argmax(-1), np.int64)
    scores = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # of a tiny temperature: all but the likeliest token become -inf, as they should
        scores = (scores - scores.max(-1, keepdims=True)) / how.temperature
    if how.freq_penalty:
        scores -= float(how.freq_penalty) * _counts(tokens, scores.shape[-1])
    if how.top_k is not None and how.top_k < scores.shape[-1]:
        least = np.partition(scores, -how.top_k, axis=-1)[:, -how.top_k, None]
        scores = np.where(scores < least, -np.inf, scores)
    if how.top_p is not None and how.top_p < 1:
        order = np.argsort(-scores, axis=-1, kind="stable")
        ordered = np.take_along_axis(softmax(scores), order, -1)
        beyond = ordered.cumsum(-1) - ordered >= how.top_p  # the token that crosses top_p is kept
        drop = np.zeros_like(beyond)
        np.put_along_axis(drop, order, beyond, -1)
        scores = np.where(drop, -np.inf, scores)
    # The largest of scores + Gumbel noise is a draw from their softmax.
    return np.asarray((scores + rng.gumbel(size=scores.shape)).argmax(-1), np.int64)


def sample_logits(
    final_logits: ArrayT,
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
    freq_penalty: float = 0.0,
    repetition_penalty: float = 1.0,
    tokens: ArrayInput | UserArray | None = None,
) -> ArrayT:
    """Draws one token for each row of logits, as ``generate`` does. TransformerLens: ``utils.sample_logits``.

    ``torch.manual_seed`` governs the draws from a tensor, ``numpy.random.seed`` those from an array.

    Args:
        final_logits: [b, V], an array or a tensor.
        top_k: Draw from that many likeliest tokens; applies before ``top_p``.
        top_p: Draw from the likeliest tokens that reach this probability together.
        temperature: The logits are divided by it; 0 takes the likeliest token.
        freq_penalty: Subtracted from a token's score for each time that it occurs in ``tokens``.
        repetition_penalty: Divides the logits above 0 of tokens that occur there, and multiplies those below.
        tokens: int [b, p], which the penalties need.

    Returns:
        int64 [b].

    Raises:
        InputError: For another shape, a number that cannot be, and a penalty without tokens.
    """
    how = Sampling(top_k, top_p, temperature, freq_penalty, repetition_penalty)
    how.check()
    if len(final_logits.shape) != 2:
        raise InputError(f"final_logits must be [batch, vocabulary], not {list(final_logits.shape)}.")
    rows, size = final_logits.shape
    if tokens is None:
        if freq_penalty or repetition_penalty != 1:
            raise InputError("a penalty needs the tokens so far: pass tokens=, int [batch, pos].")
        tokens = np.zeros((rows, 0), np.int64)
    ids = as_array(cast(ArrayInput, tokens))
    bad = ids.ndim != 2 or len(ids) != rows or ids.dtype.kind not in "iu"
    if bad or (ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < size):
        raise InputError(f"tokens must be ids [batch, pos], {rows} rows of whole numbers from 0 to {size - 1}.")
    if is_tensor(final_logits):
        from graphlens.model import torch_sampling

        return cast(ArrayT, torch_sampling.draw(final_logits, ids.astype(np.int64), how))
    return cast(ArrayT, sample(np.asarray(final_logits), ids.astype(np.int64), cast(_Random, np.random), how))


class GenerateOutput(dict[str, object]):
    """What ``generate(output_logits=True)`` gives where transformers' own is not there: the same, by name and by index.

    Attributes:
        sequences: Token ids [b, prompt + new], whatever ``return_type`` is.
        logits: [b, V] for each new token, before anything is done to them.
    """

    def __init__(self, sequences: object, logits: Sequence[object]) -> None:
        super().__init__(sequences=sequences, logits=tuple(logits))

    def __getattr__(self, name: str) -> object:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no {name!r}: there is sequences, and logits.") from None

    def __getitem__(self, key: str | int) -> object:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]
