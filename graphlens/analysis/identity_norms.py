"""The identities of norms: the scale, and what is divided by it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from graphlens.analysis.identity_terms import Bools, Floats, largest, typical
from graphlens.file.names import in_block, split_name

if TYPE_CHECKING:
    from graphlens.analysis.identities import Checker

EMBEDDED = ("embed.hook_embed", "embed.hook_pos_embed", "embed.hook_token_type_embed")
_ENDS = (".hook_scale", ".hook_normalized")
_TELLING = 100  # how many times what is allowed a term must be for the identity to tell whether it is right


@dataclass(frozen=True)
class _Norm:
    """One norm of a run.

    Attributes:
        name: Its name, "blocks.0.ln1".
        source: The hook points whose sum it reads; none where what it reads does not show.
        read: That sum, [..., features], or None.
        scale: Its hook_scale [..., 1], or None.
        normalized: Its hook_normalized [..., features], or None.
        real: Which entries of [...] count.
    """

    name: str
    source: tuple[str, ...]
    read: Floats | None
    scale: Floats | None
    normalized: Floats | None
    real: Bools

    def moments(self, centred: bool) -> tuple[Floats, Floats]:
        """What is left of the input less its mean (or not), and the mean of its squares [..., 1]."""
        assert self.read is not None
        x = self.read - self.read.mean(-1, keepdims=True) if centred else self.read
        return x, np.square(x).mean(-1, keepdims=True)


def norms(c: Checker) -> None:
    """Adds the identities of all norms; those of one role (all ``ln1``, say) subtract the mean, or all do not."""
    names = dict.fromkeys(name.removesuffix(end) for name in c.values for end in _ENDS if name.endswith(end))
    roles: dict[str, list[_Norm]] = {}
    for name in names:
        norm = _read(c, name)
        if norm is not None:
            roles.setdefault(split_name(name)[1], []).append(norm)
    chosen = {role: _centred(c, role, group) for role, group in roles.items()}
    eps = c.facts.eps if c.facts.eps is not None else _eps(roles, chosen)
    for role, group in roles.items():
        for norm in group:
            _add(c, norm, chosen[role], eps)


def _source(c: Checker, name: str) -> tuple[str, ...]:
    """The hook points whose sum a norm reads."""
    facts = c.facts
    layer, own = split_name(name)
    block = "" if layer is None else in_block(layer, "")
    if own in ("ln1", "ln2"):
        if facts.post_norm_only:
            return ()
        if facts.residual_norms:
            return (block + ("hook_resid_mid" if own == "ln1" else "hook_resid_post"),)
        return (block + ("hook_resid_pre" if own == "ln1" or facts.parallel_attn_mlp else "hook_resid_mid"),)
    if own in ("attn.q_norm", "attn.k_norm"):
        return (f"{block}attn.hook_{own[5]}",)
    if own == "mlp.ln":
        return (block + "mlp.hook_mid",)
    if own == "embed.ln":
        return tuple(name for name in EMBEDDED if name in c.values)
    if own == "ln_final":
        last, normed = (
            in_block(facts.n_layers - 1, name) for name in ("hook_resid_post", "hook_normalized_resid_post")
        )
        return (normed if normed in c.values else last,)
    return ()


def _read(c: Checker, name: str) -> _Norm | None:
    """A norm with what it reads and gives; None where it shows nothing that can be compared."""
    scale, normalized = (c.get(name + end) for end in _ENDS)
    source = _source(c, name)
    parts = [c.get(hook) for hook in source]
    first = normalized if normalized is not None else scale
    assert first is not None
    read: Floats | None = None
    if parts and all(part is not None for part in parts):
        arrays = [np.asarray(part) for part in parts]
        read = sum(arrays[1:], arrays[0])
    # Queries and keys have batch, positions and heads in one axis, or all heads in the last.
    if read is not None and read.ndim == 4:
        batch, count, heads, width = read.shape
        if first.ndim == 2:
            read = read.reshape(-1, width)
            real = np.repeat(np.broadcast_to(c.real(count), (batch, count)).ravel(), heads)
        else:
            read, real = read.reshape(batch, count, -1), np.broadcast_to(c.real(count), (batch, count))
    elif first.ndim == 3:
        real = np.broadcast_to(c.real(first.shape[1]), first.shape[:2])
    else:
        return None
    if real.shape != first.shape[:-1]:
        real = np.ones(first.shape[:-1], np.bool_)
    return _Norm(name, source, read, scale, normalized, real)


def _centred(c: Checker, role: str, group: list[_Norm]) -> bool:
    """True if the norms of a role subtract the mean: as is known, or as fits better."""
    known = c.facts.centred
    if role == "ln_final" and c.facts.final_centred is not None:
        known = c.facts.final_centred
    if known is not None and role in ("ln1", "ln2", "ln_final"):
        return known
    misfit = {True: 0.0, False: 0.0}
    for norm in group:
        if norm.read is None or norm.normalized is None or norm.read.shape != norm.normalized.shape:
            continue
        for centred in misfit:
            x, mean = norm.moments(centred)
            fits = norm.scale is not None and norm.scale.shape == mean.shape
            scale = norm.scale if norm.scale is not None and fits else np.sqrt(mean)
            wanted = x / scale
            misfit[centred] += min(1.0, largest(wanted - norm.normalized, 1.0, norm.real[..., None]) or 0.0)
    return misfit[True] <= misfit[False]


def _eps(roles: dict[str, list[_Norm]], centred: dict[str, bool]) -> float:
    """What the norms of a file add to a variance: the middle one of what each shows."""
    found = []
    for role, group in roles.items():
        for norm in group:
            if norm.read is None or norm.scale is None or norm.scale.shape[:-1] != norm.read.shape[:-1]:
                continue
            _, mean = norm.moments(centred[role])
            found += list((np.square(norm.scale) - mean)[norm.real].ravel())
    known = [value for value in found if np.isfinite(value)]
    return max(0.0, float(np.median(known))) if known else 0.0


def _add(c: Checker, norm: _Norm, centred: bool, eps: float) -> None:
    """Adds the identities of one norm."""
    layer, own = split_name(norm.name)
    scale_hook, normalized_hook = (norm.name + end for end in _ENDS)
    real, n = norm.real[..., None], norm.normalized
    if norm.read is None:
        if norm.scale is not None and n is not None:
            square = np.square(n).mean(-1, keepdims=True)
            share, least = eps / np.square(norm.scale), _TELLING * c.allowed((normalized_hook,))
            if float(np.where(real, share, 0.0).max(initial=0.0)) < least:  # it says nothing of the scale
                name, wanted = f"{own}: mean of normalized^2 = 1 but for eps", np.clip(square, 1 - least, 1.0)
                c.add(name, layer, (normalized_hook,), wanted, 1.0, real, clears=(), found=square)
            else:
                name = f"{own}: mean of normalized^2 = 1 - eps / scale^2"
                c.add(name, layer, (scale_hook, normalized_hook), 1 - share, 1.0, real, clears=(), found=square)
        return
    x, mean = norm.moments(centred)
    subtracted = "x - mean" if centred else "x"
    own_scale = np.sqrt(mean + eps)
    if norm.scale is not None:
        name = f"{own}: sqrt(mean ({subtracted})^2 + eps) = scale"
        hooks = *norm.source, scale_hook
        c.add(name, layer, hooks, own_scale, np.abs(own_scale), real, clears=(scale_hook,))
    if n is None:
        return
    if x.shape != n.shape:
        c.add(f"{own}: ({subtracted}) / scale = normalized", layer, (*norm.source, normalized_hook), x, 1.0)
        return
    own_divisor = f"sqrt(mean ({subtracted})^2 + eps)"
    for divisor, scale, scale_hooks in (("scale", norm.scale, (scale_hook,)), (own_divisor, own_scale, ())):
        if scale is None or scale.shape[:-1] != x.shape[:-1]:
            continue
        size = (np.abs(norm.read) + np.abs(norm.read - x)) / np.abs(scale) + 0.1 * typical(n, real)
        # Without the scale, any multiple of the input gives the same.
        clears = None if scale_hooks else (normalized_hook,)
        hooks = *norm.source, *scale_hooks, normalized_hook
        c.add(f"{own}: ({subtracted}) / {divisor} = normalized", layer, hooks, x / scale, size, real, clears)
