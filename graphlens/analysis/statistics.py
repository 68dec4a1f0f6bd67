"""How sure a mean over prompts is: its standard error, a bootstrap interval, and the p-value of a sign-flip test."""

from __future__ import annotations

import itertools

import numpy as np

from graphlens.analysis.arrays import Array

AT_ONCE = 1 << 24  # numbers that are held for a step


def standard_error(values: Array) -> Array:
    """The standard error of the mean along the last axis: the sample's standard deviation over the root of its size.

    Args:
        values: float [..., n].

    Returns:
        float64 [...]; NaN of a single value.
    """
    count = values.shape[-1]
    if count < 2:
        return np.full(values.shape[:-1], np.nan)
    found: Array = values.std(-1, ddof=1, dtype=np.float64) / np.sqrt(count)
    return found


def bootstrap_interval(values: Array, confidence: float, resamples: int, seed: int) -> tuple[Array, Array]:
    """The percentile interval of the mean along the last axis (Efron 1979): values drawn again, with replacement.

    Every entry of the leading axes sees the same draws, as all sites of a sweep are measured on the same prompts.

    Args:
        values: float [..., n].
        confidence: Between 0 and 1: what share of the drawn means lies in the interval.
        resamples: How many means are drawn.
        seed: Of the draws.

    Returns:
        (lowest, highest), each float64 [...].
    """
    count = values.shape[-1]
    drawn = np.random.default_rng(seed).integers(0, count, (resamples, count))
    shares = np.zeros((resamples, count))
    np.add.at(shares, (np.arange(resamples)[:, None], drawn), 1 / count)
    ends = ((1 - confidence) / 2, (1 + confidence) / 2)
    flat = values.reshape(-1, count)
    parts = [np.quantile(part @ shares.T, ends, axis=1) for part in _parts(flat, resamples)]
    low, high = np.concatenate(parts, 1).reshape(2, *values.shape[:-1])
    return low, high


def sign_flip_p(values: Array, resamples: int, seed: int) -> Array:
    """The two-sided p-value of "the mean along the last axis is 0": how often the mean is as far from 0 with signs at random.

    Under the hypothesis a prompt's effect is as likely to be the one way as the other (Fisher 1935; a paired permutation test).
    All patterns of signs are tried where they are no more than ``resamples``, which makes it exact; else so many are drawn, and
    the observed one counts among them, so that p is never 0.

    Args:
        values: float [..., n].
        resamples: How many patterns are tried at most.
        seed: Of the draws.

    Returns:
        float64 [...], between 0 and 1.
    """
    count = values.shape[-1]
    exact = count < 63 and 2**count <= resamples
    if exact:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=count)))
    else:
        signs = np.random.default_rng(seed).choice((1.0, -1.0), (resamples, count))
    flat = values.reshape(-1, count).astype(np.float64)
    # Rounding must not tell two equal means apart: half of all patterns are the other half's negatives.
    near = 1e-12 * np.abs(flat).sum(1, keepdims=True)
    found = []
    for part, slack in zip(_parts(flat, len(signs)), _parts(near, len(signs)), strict=True):
        as_far = np.abs(part @ signs.T) >= np.abs(part.sum(1, keepdims=True)) - slack
        found.append(as_far.mean(1) if exact else (1 + as_far.sum(1)) / (1 + len(signs)))
    return np.concatenate(found).reshape(values.shape[:-1])


def _parts(rows: Array, each: int) -> list[Array]:
    """Rows in parts, so that ``each`` numbers for every row of a part are not too many at once."""
    some = max(1, AT_ONCE // each)
    return [rows[start : start + some] for start in range(0, len(rows), some)]
