"""Attention as a view: every head's pattern, what each token looks at, and four figures of each head."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from graphlens.errors import InputError, checked_number
from graphlens.views.encoded import Json, floats, packed, packed_size, shape_of
from graphlens.views.labelled import Array
from graphlens.views.pages import View
from graphlens.views.words import chosen, model_of, one_prompt, real_positions, sent, words

_PATTERN = re.compile(r"blocks\.(\d+)\.attn\.hook_pattern")
MOST = 12_000_000  # bytes of a page for the patterns
MOST_HEADS = 8192  # that one grid draws
_ROUNDING = 2e-3  # of a sum of weights in half precision


def attention(
    cache: Mapping[str, object],
    tokens: object,
    *,
    prompt: int = 0,
    layers: Sequence[int] | slice | None = None,
    heads: Sequence[int] | slice | None = None,
    positions: Sequence[int] | slice | None = None,
    title: str = "Attention",
) -> View:
    """Shows where every head looks: ``views.attention(cache, tokens)`` in a notebook, or ``.save("attention.html")``.

    Args:
        cache: An ActivationCache, or a dictionary of ``blocks.L.attn.hook_pattern`` [*b, head, query, key].
        tokens: The text of each token, the prompt that ran, or ids [p].
        prompt: Which prompt of a batch. Its padding is left out.
        layers: Which of the layers that are cached; None for all, by their place among those.
        heads: Which heads; None for all.
        positions: Which positions, as queries and as keys, in their order; the figures of each head are over all there are.
        title: The line above it.

    Returns:
        The view. Weights are those of the cache, as float32.

    Raises:
        InputError: Where there are no patterns, tokens do not fit them, or there is more than a page holds: the sentence has the
            sizes.
    """
    found = {int(match[1]): name for name in cache if (match := _PATTERN.fullmatch(name))}
    if not found:
        raise InputError(
            "this cache has no attention patterns (blocks.L.attn.hook_pattern): run with a names_filter that keeps them, or none."
        )
    numbers = sorted(found)
    wanted = [numbers[i] for i in chosen(layers, len(numbers), "layers")]
    shapes = {layer: shape_of(cache[found[layer]])[-3:] for layer in wanted}
    if len(set(shapes.values())) > 1:
        raise InputError(
            f"the layers' patterns differ in shape ({sorted(set(shapes.values()))}): show them by layers=[...]."
        )
    count, queries, keys = shapes[wanted[0]]
    offset = keys - queries  # with a KV cache, the first keys have no query
    real = real_positions(cache, prompt, keys)
    texts = words(tokens, keys, model_of(cache), real)
    shown = np.unique(chosen(positions, len(real), "positions"))  # keys that have no query come first
    columns = real[shown]
    rows = columns[columns >= offset] - offset
    if not rows.size:
        raise InputError(f"positions={positions!r} has no position at which there is a query: the first is {offset}.")
    picked = chosen(heads, count, "heads")
    _ensure_fits(len(wanted), len(picked), len(rows), len(columns))
    patterns, figures, sums = [], [], []
    for layer in wanted:
        one = one_prompt(floats(cache[found[layer]], found[layer]), 3, prompt, found[layer])[picked]
        whole = one[:, real[real >= offset] - offset][:, :, real].astype(np.float64)
        figures.append(_figures(whole, int((real < offset).sum())))
        with np.errstate(invalid="ignore"):  # infinities of both signs sum to no number
            sums.append(whole.sum(-1))
        patterns.append(one[:, rows][:, :, columns].astype(np.float32))
    part = "" if len(shown) == len(real) else f" over all {len(real)} positions, {len(shown)} of which are shown"
    says = (
        f"Attention weights of the run. {_summed(np.stack(sums))}{part}.",
        "Entropy in nats: the mean over the queries of -sum p ln p. To itself, to the one before, to the first: the mean weight "
        "that a query gives to that token; the first query is left out of the last two.",
    )
    tokens_shown = {int(place): texts[place] for place in shown}
    return _view(np.stack(patterns), np.stack(figures, 1), wanted, picked, tokens_shown, title, says)


def _summed(sums: Array) -> str:
    """What the rows of all maps sum to, as a sentence without its end."""
    finite = sums[np.isfinite(sums)]
    if not finite.size:
        return "No row of a map has a finite sum"
    some = "Each row of a map" if finite.size == sums.size else "Each row that is finite"
    if np.abs(finite - 1).max() < _ROUNDING:
        return f"{some} sums to 1"
    return f"{some} sums to between {finite.min():.4g} and {finite.max():.4g}, and not to 1"


def _view(
    patterns: Array,
    figures: Array,
    layers: Sequence[int],
    heads: Array,
    texts: Mapping[int, str],
    title: str,
    says: tuple[str, ...],
) -> View:
    """The view of patterns [layer, head, query, key] and the figures [4, layer, head], of tokens by their place."""
    queries, keys = patterns.shape[2:]
    below = np.tri(queries, keys, dtype=bool)
    # Where no token looks ahead, half of the numbers are zeros that need not be sent.
    triangle = queries == keys and not patterns[..., ~below].any()
    data: dict[str, Json] = {
        "tokens": sent(list(texts.values())),
        "places": list(texts),
        "layers": [int(layer) for layer in layers],
        "numbers": heads.tolist(),
        "queries": queries,
        "offset": keys - queries,
        "triangle": triangle,
        "patterns": packed(patterns[..., below] if triangle else patterns),
        "statistics": dict(zip(_NAMES, (packed(figure, "f8") for figure in figures), strict=True)),
    }
    return View("attention", title, data, says, 620)


_NAMES = ("entropy", "to itself", "to the one before", "to the first")


def _figures(patterns: Array, offset: int) -> Array:
    """The figures of heads.

    Args:
        patterns: float64 [head, query, key].
        offset: The first key that has a query.

    Returns:
        float64 [4, head], in the order of _NAMES.
    """
    p = patterns
    queries = np.arange(p.shape[1])
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    later = queries[queries + offset > 0]
    none = np.full(len(p), np.nan)
    with np.errstate(invalid="ignore"):  # weights that are not finite have no entropy: NaN
        entropy = -(p * logs).sum(-1).mean(-1)
    return np.stack(
        [
            entropy,
            p[:, queries, queries + offset].mean(-1),
            p[:, later, later + offset - 1].mean(-1) if later.size else none,
            p[:, later, 0].mean(-1) if later.size else none,
        ]
    )


def _ensure_fits(layers: int, heads: int, queries: int, keys: int) -> None:
    """Raises InputError for more than a page holds."""
    numbers = layers * heads * queries * keys
    size = packed_size(numbers)
    if size > MOST or layers * heads > MOST_HEADS:
        fits = checked_number(int((MOST * 3 / 16 / (layers * heads)) ** 0.5), "positions", least=0)
        raise InputError(
            f"{layers} layers x {heads} heads x {queries} x {keys} positions are {numbers:,} weights, {size / 1e6:,.0f} MB of "
            f"a page (at most {MOST / 1e6:.0f} MB, and {MOST_HEADS:,} heads): choose some with layers=, heads= or positions=; of "
            f"all these heads {fits} positions fit."
        )
