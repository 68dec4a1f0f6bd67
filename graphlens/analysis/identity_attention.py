"""The identities inside attention: scores, pattern and z, and the rotation and norms of queries and keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from graphlens.analysis.identity_terms import (
    Bools,
    Floats,
    pairs_of,
    softmax_over,
    typical,
    visible,
)
from graphlens.file.names import in_block

if TYPE_CHECKING:
    from graphlens.analysis.identities import Checker

_UNKNOWN = 5  # numbers that are fitted for each rotated pair


def attention(c: Checker) -> None:
    """Adds the identities of all blocks' attention."""
    seen: dict[int, Bools] = {}
    for layer in range(c.facts.n_layers):
        found = _seen(c, layer)
        if found is not None:
            seen[layer] = found
        _pattern(c, layer, found)
        _z(c, layer, found)
    _scores(c, seen)
    for letter in "qk":
        _rotation(c, letter)


def _hook(layer: int, letter: str) -> str:
    """``attn.hook_z`` and the like of a block."""
    return in_block(layer, f"attn.hook_{letter}")


def _seen(c: Checker, layer: int) -> Bools | None:
    """Which scores of a block are not masked; None without scores."""
    scores = c.values.get(_hook(layer, "attn_scores"))
    if scores is None or scores.ndim != 4:
        return None
    # Whether padding is attended to is the file's affair: scores tell what is masked. Its queries are not looked at.
    return visible(scores, c.real(scores.shape[2])[:, None, :, None])


def _pattern(c: Checker, layer: int, seen: Bools | None) -> None:
    """softmax(scores) = pattern, and rows that sum to 1."""
    scores, pattern = (_hook(layer, letter) for letter in ("attn_scores", "pattern"))
    p = c.get(pattern)
    if p is None or p.ndim != 4:
        return
    rows = c.real(p.shape[2])[:, None, :, None]
    total = p.sum(-1, keepdims=True)
    looks = total > 0 if seen is None or seen.shape != p.shape else seen.any(-1, keepdims=True)
    if not c.facts.sink:
        summed = np.ones_like(total)
        c.add("rows of the pattern sum to 1", layer, (pattern,), summed, 1.0, rows & looks, clears=(), found=total)
    s = c.get(scores)
    if s is None or seen is None:
        return
    if s.shape != p.shape:
        c.add("softmax(scores) = pattern", layer, (scores, pattern), s, 1.0)
        return
    p = np.divide(p, total, out=np.zeros_like(p), where=total > 0) if c.facts.sink else p
    wanted = softmax_over(s, seen)
    highest = np.maximum(np.abs(p), wanted).max(-1, keepdims=True)
    given = p if c.facts.sink else None
    c.add("softmax(scores) = pattern", layer, (scores, pattern), wanted, highest, rows & looks, found=given)


def _heads_last(x: Floats) -> Floats:
    """[b, p, h, d] as [b, h, p, d]."""
    return np.swapaxes(x, 1, 2)


def _whole(c: Checker, layer: int, name: str, part: int, keys: int, heads: int) -> Floats | None:
    """Keys or values [b, h, key, d] of all tokens, a head for each query head; None where those of earlier ones lack.

    Args:
        c: The run.
        layer: The block.
        name: The hook point.
        part: 0 for keys, 1 for values.
        keys: How many tokens there are.
        heads: How many query heads.
    """
    x = c.get(name)
    if x is None or x.ndim != 4 or heads % x.shape[2]:
        return None
    if part == 1 and c.facts.clip is not None:
        x = np.clip(x, -c.facts.clip, c.facts.clip)
    if x.shape[1] != keys and layer in c.past:
        x = np.concatenate([c.past[layer][part].astype(np.float64), x], 1)
    if x.shape[1] != keys:
        return None
    return np.repeat(_heads_last(x), heads // x.shape[2], 1)


def _z(c: Checker, layer: int, seen: Bools | None) -> None:
    """pattern . v = z; and from the scores, which clears v and z where the pattern is wrong."""
    scores, pattern, value, z = (_hook(layer, letter) for letter in ("attn_scores", "pattern", "v", "z"))
    given = c.get(z)
    if given is None or given.ndim != 4:
        return
    p, s = c.get(pattern), c.get(scores)
    of_scores = None if s is None or seen is None or c.facts.sink else softmax_over(s, seen)
    for left, weights, first in (("pattern", p, pattern), ("softmax(scores)", of_scores, scores)):
        if weights is None or weights.ndim != 4:
            continue
        v = _whole(c, layer, value, 1, weights.shape[3], weights.shape[1])
        if v is None:
            continue
        # What padding holds may be no number, and its pattern is 0 then.
        keys: Bools = np.logical_and.reduce(np.isfinite(v), axis=-1)
        weights, v = np.where(keys[:, :, None, :], weights, 0.0), np.where(keys[..., None], v, 0.0)
        rows = c.real(given.shape[1])[:, :, None, None]
        if seen is not None and seen.shape == weights.shape:
            rows = rows & np.swapaxes(seen.any(-1), 1, 2)[..., None]
        size = _heads_last(np.matmul(np.abs(weights), np.abs(v)))
        wanted = _heads_last(np.matmul(weights, v))
        hooks = first, value, z
        c.add(f"{left} . v = z", layer, hooks, wanted, size + 1e-6 * typical(given, rows), rows)


def _scores(c: Checker, seen: dict[int, Bools]) -> None:
    """c q . k = scores with one c for the file, and the pattern from it, which clears q and k where the scores are wrong."""
    products: dict[int, tuple[tuple[str, str], Floats, Floats]] = {}
    for layer, visible_here in seen.items():
        names = _compared(c, layer)
        scores = c.get(_hook(layer, "attn_scores"))
        if names is None or scores is None:
            continue
        q = c.get(names[0])
        if q is None or q.ndim != 4 or q.shape[2] != scores.shape[1] or q.shape[1] != scores.shape[2]:
            continue
        k = _whole(c, layer, names[1], 0, scores.shape[3], scores.shape[1])
        if k is None:
            continue
        q = np.where(c.real(q.shape[1])[:, None, :, None], _heads_last(q), 0.0)
        k = np.swapaxes(np.where(np.isfinite(k), k, 0.0), 2, 3)
        divided = layer + 1 if c.facts.by_layer else 1
        products[layer] = (names, np.matmul(q, k) / divided, np.matmul(np.abs(q), np.abs(k)) / divided)
        assert visible_here.shape == scores.shape
    if not products:
        return
    factor = c.facts.scale if c.facts.scale is not None else _factor(c, products, seen)
    for layer, (names, product, size) in products.items():
        _compare_scores(c, layer, names, factor * product, abs(factor) * size, seen[layer])


def _compared(c: Checker, layer: int) -> tuple[str, str] | None:
    """The hook points of the queries and keys that are compared; None where they show only before their norm."""
    for query, key in (("rot_q", "rot_k"), ("q", "k")):
        names = _hook(layer, query), _hook(layer, key)
        if all(name in c.values for name in names):
            normed = query == "q" and in_block(layer, "attn.q_norm.hook_normalized") in c.values
            return None if normed or (query == "q" and c.facts.clip is not None) else names
    return None


def _uncapped(c: Checker, scores: Floats, seen: Bools) -> tuple[Floats, Bools]:
    """Scores before tanh squeezed them, and which of them tell it well."""
    cap = c.facts.softcap
    if cap is None:
        return scores, seen
    well = seen & (np.abs(scores) < 0.9 * cap)
    return np.where(well, cap * np.arctanh(np.where(well, scores / cap, 0.0)), 0.0), well


def _factor(c: Checker, products: dict[int, tuple[tuple[str, str], Floats, Floats]], seen: dict[int, Bools]) -> float:
    """The factor of the scores that fits the middle one of the blocks."""
    found = []
    for layer, (_, product, _) in products.items():
        scores = c.get(_hook(layer, "attn_scores"))
        assert scores is not None
        scores, well = _uncapped(c, scores, seen[layer])
        if c.facts.alibi:
            product, scores = (_without_slopes(c, x, well) for x in (product, scores))
        elif c.facts.biased:
            product, scores = (_without_bias(x, well) for x in (product, scores))
        x, y = product[well], scores[well]
        if x.size and float((x * x).sum()):
            found.append(float((x * y).sum() / (x * x).sum()))
    return float(np.median(found)) if found else 1.0


def _places(c: Checker, shape: tuple[int, ...]) -> tuple[Floats, Floats]:
    """Each query's and each key's position, [b or 1, query, key] both."""
    queries, keys = shape[-2:]
    at = np.cumsum(c.real(keys), 1) - 1.0
    query, key = np.broadcast_arrays(at[:, keys - queries :, None], at[:, None, :])
    return query, key


def _without_slopes(c: Checker, x: Floats, where: Bools) -> Floats:
    """What is left of [b, h, query, key] when what grows with the positions of query and key is taken away, head by head.

    A number for each prompt is taken away besides: where keys are counted with padding (MPT), a prompt's padding adds one.
    """
    query, key = _places(c, x.shape)
    left, prompts = x.copy(), np.eye(len(x))
    for head in range(x.shape[1]):
        seen = where[:, head]
        prompt, *_ = np.nonzero(seen)
        slopes = np.stack([np.broadcast_to(each, seen.shape)[seen] for each in (query, key)], 1)
        basis = np.concatenate([slopes, prompts[prompt]], 1)
        if len(basis) <= basis.shape[1]:
            continue
        fitted = np.linalg.lstsq(basis, x[:, head][seen], rcond=None)[0]
        left[:, head] -= fitted[0] * query + fitted[1] * key + fitted[2:, None, None]
    return left


def _without_bias(x: Floats, where: Bools) -> Floats:
    """What is left of [b, h, query, key] less its mean over the batch at each head, query and key."""
    count = where.sum(0)
    mean = np.divide(np.where(where, x, 0.0).sum(0), count, out=np.zeros(x.shape[1:]), where=count > 0)
    found: Floats = x - mean
    return found


def _compare_scores(c: Checker, layer: int, names: tuple[str, str], wanted: Floats, size: Floats, seen: Bools) -> None:
    """Adds the identities of a block's scores: those without a mask, as queries and keys give them."""
    hook, pattern = _hook(layer, "attn_scores"), _hook(layer, "pattern")
    scores = c.get(hook)
    assert scores is not None
    if c.facts.softcap is not None:
        cap = c.facts.softcap
        wanted, size = cap * np.tanh(wanted / cap), np.minimum(size, cap)
    if c.facts.alibi:
        difference = _without_slopes(c, wanted - scores, seen)
        size = size + np.where(seen, np.abs(scores), 0.0).max(initial=0.0)
        name = "c q . k + slope x distance = scores"
        c.add(name, layer, (*names, hook), difference + scores, size, seen)
        return
    if c.facts.biased:
        if bool((seen.sum(0) > 1).any()):  # one prompt is its own mean
            difference = _without_bias(wanted - scores, seen)
            size = size + np.where(seen, np.abs(scores), 0.0).max(initial=0.0)
            c.add("c q . k + bias = scores", layer, (*names, hook), difference + scores, size, seen)
        return
    size = size + 1e-6 * typical(wanted, seen)
    c.add("c q . k = scores", layer, (*names, hook), wanted, size, seen)
    p = c.get(pattern)
    if p is not None and p.shape == wanted.shape and not c.facts.sink:
        of_product = softmax_over(wanted, seen)
        # How much a score's rounding counts in the pattern: as much as the score is large.
        highest = np.maximum(np.abs(p), of_product).max(-1, keepdims=True)
        highest = highest * (1 + np.where(seen, size, 0.0).max(-1, keepdims=True))
        rows = c.real(p.shape[2])[:, None, :, None] & seen.any(-1, keepdims=True)
        c.add("softmax(c q . k) = pattern", layer, (*names, pattern), of_product, highest, rows)


def _rotation(c: Checker, letter: str) -> None:
    """|rotated| = c |not rotated| with one c for the file; with a norm between, pair by pair."""
    plain: dict[int, tuple[Floats, Floats, Bools]] = {}
    for layer in range(c.facts.n_layers):
        before, after = _hook(layer, letter), _hook(layer, f"rot_{letter}")
        x, y = c.get(before), c.get(after)
        if x is None or y is None or x.ndim != 4 or y.ndim != 4:
            continue
        if x.shape != y.shape:
            c.add(f"|rotated {letter}| = c |{letter}|", layer, (before, after), x, 1.0, clears=())
            continue
        real = np.broadcast_to(c.real(x.shape[1])[:, :, None], x.shape[:3])
        normed = in_block(layer, f"attn.{letter}_norm.hook_normalized")
        n = c.get(normed)
        if n is not None:
            if n.size == x.size:
                _rotation_of_norm(c, layer, letter, (normed, after), n.reshape(x.shape), y, real)
            continue
        if c.facts.clip is not None:
            x = np.clip(x, -c.facts.clip, c.facts.clip)
        plain[layer] = x, y, real
    _rotation_of_plain(c, letter, plain)


def _rotation_of_plain(c: Checker, letter: str, plain: dict[int, tuple[Floats, Floats, Bools]]) -> None:
    """|rotated| = c |not rotated|, and what is not rotated is the same."""
    norms = {}
    for layer, (x, y, real) in plain.items():
        size = c.facts.rotary_dim or x.shape[-1]
        if size < x.shape[-1]:
            hooks, rest = (_hook(layer, letter), _hook(layer, f"rot_{letter}")), y[..., size:]
            name = f"{letter} beyond the rotated dimensions stays"
            size_of_rest = np.abs(rest) + 1e-6 * typical(rest)
            same = x[..., size:]
            c.add(name, layer, hooks, same, size_of_rest, real[..., None], clears=(), found=rest)
        if _turns(x, y, real):
            hooks = _hook(layer, letter), _hook(layer, f"rot_{letter}")
            same = np.abs(x - y)[real].max() <= 1e-6 * typical(y, real[..., None])
            c.add(
                f"rotated {letter} is not {letter}",
                layer,
                hooks,
                np.full(1, float(same)),
                1.0,
                clears=(),
                found=np.zeros(1),
            )
        norms[layer] = np.linalg.norm(x[..., :size], axis=-1), np.linalg.norm(y[..., :size], axis=-1), real
    ratios = [
        float(np.median(after[real] / before[real]))
        for before, after, real in norms.values()
        if real.any() and before[real].all()
    ]
    factor = float(np.median(ratios)) if ratios else 1.0
    if abs(factor - 1) < 1e-6:
        factor = 1.0
    for layer, (before, after, real) in norms.items():
        hooks = _hook(layer, letter), _hook(layer, f"rot_{letter}")
        name = f"|rotated {letter}| = c |{letter}|"
        size = after + 1e-6 * typical(after, real)
        c.add(name, layer, hooks, factor * before, size, real, clears=(), found=after)


def _turns(x: Floats, y: Floats, real: Bools) -> bool:
    """True if rotation changes something: at position 0 it does not."""
    return bool(real[:, 1:].any()) and typical(x, real[..., None]) > 0 and typical(y, real[..., None]) > 0


def _rotation_of_norm(
    c: Checker, layer: int, letter: str, hooks: tuple[str, str], n: Floats, y: Floats, real: Bools
) -> None:
    """The square of each rotated pair is a sum over the pair before, since the norm's weights are not known.

    Without a bias it is w1^2 n1^2 + w2^2 n2^2; with one, linear terms and a number come besides.
    """
    size = c.facts.rotary_dim or n.shape[-1]
    together = in_block(layer, f"attn.{letter}_norm.hook_normalized")
    # A norm of all heads together has weights for each head.
    heads = [[head] for head in range(n.shape[2])] if c.values[together].ndim == 3 else [list(range(n.shape[2]))]
    if int(real[..., 0].sum()) * len(heads[0]) < 2 * _UNKNOWN:
        return
    best: tuple[Floats, Floats] | None = None
    for adjacent in (False, True):
        sides = [_turned(n[:, :, of][real[:, :, of]], y[:, :, of][real[:, :, of]], size, adjacent) for of in heads]
        wanted, turned = (np.concatenate([each[side] for each in sides]) for side in (0, 1))
        if best is None or np.abs(wanted - turned).max() < np.abs(best[0] - best[1]).max():
            best = wanted, turned
    assert best is not None
    wanted, turned = best
    name = f"|rotated {letter}| = |w normalized {letter} + b|, pair by pair"
    c.add(name, layer, hooks, wanted, turned + typical(turned), None, clears=(), found=turned)


def _turned(n: Floats, y: Floats, size: int, adjacent: bool) -> tuple[Floats, Floats]:
    """The squares of rotated pairs [rows, pairs]: as fitted to the pairs before, and as they are."""
    first, second = pairs_of(n, size, adjacent)
    one, two = pairs_of(y, size, adjacent)
    turned = np.square(one) + np.square(two)
    wanted = np.empty_like(turned)
    for pair in range(turned.shape[1]):
        a, b = first[:, pair], second[:, pair]
        basis = np.stack([a * a, b * b, a, b, np.ones_like(a)], 1)
        wanted[:, pair] = basis @ np.linalg.lstsq(basis, turned[:, pair], rcond=None)[0]
    return wanted, turned
