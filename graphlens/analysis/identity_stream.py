"""The identities outside attention: the residual stream as a sum, embeddings, the activation function, the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from graphlens.analysis.identity_norms import EMBEDDED
from graphlens.analysis.identity_terms import ACTIVATIONS, SAME_ACTIVATION, Floats, largest, per_feature, typical
from graphlens.file.names import in_block

if TYPE_CHECKING:
    from graphlens.analysis.identities import Checker


def stream(c: Checker) -> None:
    """Adds the identities of the residual stream, the MLPs and the logits."""
    _embeddings(c)
    for layer in range(c.facts.n_layers):
        _block(c, layer)
        _activation(c, layer)
    _end(c)


def _sum(c: Checker, name: str, layer: int | None, terms: tuple[str, ...], result: str) -> None:
    """Adds "the terms' sum = result", where all are there."""
    given = [c.get(term) for term in terms]
    right = c.get(result)
    if right is None or any(term is None for term in given):
        return
    arrays = [np.asarray(term) for term in given]
    try:
        total = sum(arrays[1:], arrays[0])
    except ValueError:  # of other sizes: no sum at all
        total = np.empty(0)
    if total.shape != right.shape:
        c.add(name, layer, (*terms, result), np.empty(0), 1.0)
        return
    real = c.real(right.shape[1])[..., None]
    least = min(typical(np.broadcast_to(term, right.shape), real) for term in arrays)
    size = sum((np.abs(term) for term in arrays), np.abs(right)) + least
    c.add(name, layer, (*terms, result), total, size, real)


def _affine(c: Checker, name: str, layer: int | None, normalized: str, result: str, less: str | None = None) -> None:
    """Adds "normalized x w + b = result", less another term; w and b are fitted to the tokens, feature by feature."""
    n, right, term = c.get(normalized), c.get(result), None if less is None else c.get(less)
    if n is None or right is None or (less is not None and term is None):
        return
    hooks = (normalized, *([less] if less else []), result)
    summand = np.zeros_like(right) if term is None else term
    if n.shape != right.shape or summand.shape != right.shape or n.ndim != 3:
        c.add(name, layer, hooks, np.empty(0), 1.0)
        return
    real = np.broadcast_to(c.real(n.shape[1]), n.shape[:2])
    fitted = per_feature(n, right - summand, real[..., None])
    if fitted is None:
        return
    factor, plus = fitted
    if typical(n * factor, real[..., None]) <= 1e-6 * typical(right, real[..., None]):
        c.add(name, layer, hooks, np.empty(0), 1.0)  # what fits has nothing of the norm in it
        return
    size = np.abs(n * factor) + np.abs(plus) + np.abs(right) + np.abs(summand)
    size = size + typical(right - summand, real[..., None])
    # Of two hook points alone, either may be the other one's copy.
    clears = hooks[1:] if less else ()
    c.add(name, layer, hooks, n * factor + plus + summand, size, real[..., None], clears=clears)


def _first(c: Checker) -> str:
    return in_block(0, "hook_resid_pre")


def _embeddings(c: Checker) -> None:
    """How the residual stream begins."""
    first = _first(c)
    if "hook_full_embed" in c.values:
        _sum(c, "embeddings = first pre", None, ("hook_full_embed",), first)
        _affine(c, "w normalized embeddings + b = embeddings", None, "embed.ln.hook_normalized", "hook_full_embed")
        return
    if all(name in c.values for name in EMBEDDED[:2]):
        _sum(c, "embed + pos + token type = first pre", None, tuple(x for x in EMBEDDED if x in c.values), first)
        return
    terms = {"hook_embed": "embed"}
    if "hook_pos_embed" in c.values and not c.facts.late_positions:
        terms["hook_pos_embed"] = "pos_embed"
    if EMBEDDED[2] in c.values:  # of an encoder with a decoder's blocks
        terms[EMBEDDED[2]] = "token type"
    _sum(c, " + ".join(terms.values()) + " = first pre", None, tuple(terms), first)
    _affine(c, "w normalized embeddings + b = embeddings", None, "embed.ln.hook_normalized", "hook_embed")


def _block(c: Checker, layer: int) -> None:
    """The sums of a block, and how it goes on."""
    pre, out, mid, fed, post, normed = (
        in_block(layer, name)
        for name in (
            *("hook_resid_pre", "hook_attn_out", "hook_resid_mid"),
            *("hook_mlp_out", "hook_resid_post", "hook_normalized_resid_post"),
        )
    )
    here = c.values.keys()
    following = in_block(layer + 1, "hook_resid_pre")
    after = normed if normed in here else post
    if c.facts.parallel_attn_mlp:
        _sum(c, "pre + attn + mlp = post", layer, (pre, out, fed), post)
        _sum(c, "pre + attn + mlp = next pre", layer, (pre, out, fed), following)
    elif fed not in here and mid not in here:
        _sum(c, "pre + attn = post", layer, (pre, out), post)
        _sum(c, "pre + attn = next pre", layer, (pre, out), following)
    else:
        _sum(c, "pre + attn = mid", layer, (pre, out), mid)
        if c.facts.residual_norms:
            normalized = in_block(layer, "ln1.hook_normalized")
            _affine(c, "w normalized mid + b + mlp = post", layer, normalized, post, fed)
        else:
            _sum(c, "mid + mlp = post", layer, (mid, fed), post)
            # These leave one hook point out, and so clear the others where that one is wrong.
            _sum(c, "pre + attn + mlp = post", layer, (pre, out, fed), post)
            _sum(c, "mid + mlp = next pre", layer, (mid, fed), following)
    if c.facts.residual_norms:
        _affine(c, "w normalized post + b = post", layer, in_block(layer, "ln2.hook_normalized"), normed)
    if following in here:
        _sum(c, "post = next pre", layer, (after,), following)
    for norm, result in (("ln1", out), ("ln2", fed)):
        post_norm = in_block(layer, f"{norm}_post.hook_normalized")
        own = in_block(layer, f"{norm}.hook_normalized")
        given = post_norm if post_norm in here else own if c.facts.post_norm_only else None
        if given is not None:
            _affine(c, f"w {norm} + b = {'attn' if norm == 'ln1' else 'mlp'}", layer, given, result)
    neurons, given = (in_block(layer, f"mlp.{name}") for name in ("ln.hook_normalized", "hook_post"))
    _affine(c, "w normalized neurons + b = post", layer, neurons, given)


def _activation(c: Checker, layer: int) -> None:
    """act(pre) = post, times pre_linear where there is one; the name says which activation function it is."""
    names = [in_block(layer, f"mlp.hook_{part}") for part in ("pre", "pre_linear", "mid", "post")]
    pre, linear, mid, post = (c.get(name) for name in names)
    result = names[2] if mid is not None else names[3]
    right = post if mid is None else mid
    if pre is None or right is None:
        return
    hooks = (names[0], *([names[1]] if linear is not None else []), result)
    asked = SAME_ACTIVATION.get(c.facts.act_fn or "", c.facts.act_fn)
    tried = [asked] if asked in ACTIVATIONS else list(ACTIVATIONS)
    if pre.shape != right.shape or (linear is not None and linear.shape != right.shape):
        c.add(f"{asked or 'act'}(pre) = post", layer, hooks, np.empty(0), 1.0)
        return
    real = np.broadcast_to(c.real(pre.shape[1]) if pre.ndim == 3 else np.ones(pre.shape[:1], bool), pre.shape[:-1])
    if linear is None and bool((pre == right).all()):  # which ReLU makes of its own result
        c.add("pre is not post", layer, hooks, np.ones(1), 1.0, clears=(), found=np.zeros(1))
        return
    times: Floats | float = 1.0 if linear is None else linear
    size = np.abs(pre * times) + np.abs(right)
    best: tuple[float, str, Floats] | None = None
    for name in tried:
        assert name is not None
        wanted = ACTIVATIONS[name](pre) * times
        if c.facts.late_mlp_bias:
            wanted = wanted + np.median((right - wanted)[real], axis=0)
        residual = largest(wanted - right, size + 1e-6 * typical(right, real[..., None]), real[..., None])
        if residual is not None and (best is None or residual < best[0]):
            best = residual, name, wanted
    if best is not None:
        _, name, wanted = best
        words = f"{name}(pre){'' if linear is None else ' x pre_linear'} = {'post' if mid is None else 'mid'}"
        c.add(words, layer, hooks, wanted, size + 1e-6 * typical(right, real[..., None]), real[..., None])


def _end(c: Checker) -> None:
    """From the last block to the logits."""
    last = in_block(c.facts.n_layers - 1, "hook_resid_post")
    normed = in_block(c.facts.n_layers - 1, "hook_normalized_resid_post")
    if "mlm_head.ln.hook_normalized" in c.values:  # also where a last norm stands before the head (ModernBERT)
        _affine(c, "w mlm_head.ln + b = unembed.in", None, "mlm_head.ln.hook_normalized", "unembed.hook_in")
    elif "ln_final.hook_normalized" in c.values:
        _affine(c, "w ln_final + b = unembed.in", None, "ln_final.hook_normalized", "unembed.hook_in")
    elif "ln_final.hook_scale" not in c.values and c.facts.kind != "encoder":
        _sum(c, "last post = unembed.in", None, (normed if normed in c.values else last,), "unembed.hook_in")
    given = c.get("unembed.hook_out")
    if given is None or c.logits is None:
        return
    logits, wanted = c.logits.astype(np.float64), given * c.facts.logit_scale
    if c.facts.logit_softcap is not None:
        wanted = c.facts.logit_softcap * np.tanh(wanted / c.facts.logit_softcap)
    if logits.shape != wanted.shape:
        c.add("unembed.out = logits", None, ("unembed.hook_out",), np.empty(0), 1.0)
        return
    real = c.real(logits.shape[1])[..., None]
    size = np.abs(logits) + 1e-3 * typical(logits, real)
    c.add("unembed.out = logits", None, ("unembed.hook_out",), wanted, size, real, found=logits)
