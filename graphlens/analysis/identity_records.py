"""Which hook points of a run the arithmetic between its activations proves, and which it does not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from graphlens.file.names import split_name


@dataclass(frozen=True)
class Identity:
    """An equation between activations of one run, and how well it holds.

    Attributes:
        name: The equation in words: "softmax(scores) = pattern".
        layer: The block; None outside the blocks.
        hooks: The hook points that take part.
        residual: The largest difference between both sides, relative to the sizes of what is added up.
        allowed: The largest residual that rounding explains.
        clears: Those of the hook points that are right if it holds: wrong activations of the others may fulfil it too.
    """

    name: str
    layer: int | None
    hooks: tuple[str, ...]
    residual: float
    allowed: float
    clears: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """True if both sides are equal but for rounding."""
        return self.residual <= self.allowed

    def __str__(self) -> str:
        where = "" if self.layer is None else f" in block {self.layer}"
        return f"{self.name}{where}: {self.residual:.1e} (allowed {self.allowed:.1e})"


def worst(probes: Iterable[Sequence[Identity]]) -> list[Identity]:
    """The identities of several runs as those of one: each with its largest residual.

    Args:
        probes: The identities of each run.

    Returns:
        Each identity of any run once, in order of first appearance.
    """
    found: dict[tuple[str, int | None, tuple[str, ...]], Identity] = {}
    for identities in probes:
        for identity in identities:
            key = (identity.name, identity.layer, identity.hooks)
            known = found.get(key)
            if known is None or identity.residual / identity.allowed > known.residual / known.allowed:
                found[key] = identity
    return list(found.values())


def failing(identities: Sequence[Identity], hooks: Iterable[str] = ()) -> dict[str, str]:
    """The hook points that are not to be named, and why.

    The rule, applied until nothing changes:

    1. An identity that holds clears the hook points that it can (``Identity.clears``), unless one of its hook points fails
       already.
    2. An identity that does not hold fails those of its hook points that no other identity clears; one of a single hook point
       fails that. So a wrong ``attn_out`` leaves ``resid_pre`` and ``resid_mid`` their names: the norms that read them hold.
    3. Where each of its hook points is cleared, identities contradict each other (two layers are swapped, say). All hook
       points of the blocks concerned fail then: which of them are wrong cannot be told. An identity that could clear some of
       its hook points alone fails those, or all its own where it could clear none.
    4. A hook point fails too where each identity that holds for it has a hook point that fails.

    Args:
        identities: Those of one run, or of several as ``worst`` gives them.
        hooks: The hook points of the model, for rule 3; those of the identities are known.

    Returns:
        Hook point -> the reason, a sentence.
    """
    known = list(dict.fromkeys([*(hook for identity in identities for hook in identity.hooks), *hooks]))
    by_hook: dict[str, list[Identity]] = {}
    for identity in identities:
        for hook in identity.hooks:
            by_hook.setdefault(hook, []).append(identity)
    broken = [identity for identity in identities if not identity.passed]
    failed: dict[str, str] = {}
    while True:
        before = len(failed)
        for identity in broken:
            for hook in identity.hooks:
                if len(identity.hooks) == 1 or not _cleared(hook, by_hook[hook], failed):
                    failed.setdefault(hook, f"{identity} does not hold.")
        for hook, own in by_hook.items():
            if hook not in failed and not any(each.passed and not failed.keys() & set(each.hooks) for each in own):
                beside = next(other for each in own for other in each.hooks if other in failed)
                failed[hook] = f"all that could prove it reads {beside}, which fails."
        if len(failed) > before:
            continue
        # Only now: what looks like a contradiction may be explained by a hook point that fails a round later.
        contradiction = next((each for each in broken if not failed.keys() & set(each.hooks)), None)
        if contradiction is None:
            return failed
        reason = f"{contradiction} does not hold, though others hold for each of its hook points: they contradict."
        for hook in _contradicted(contradiction, known):
            failed[hook] = reason


def _contradicted(identity: Identity, known: Sequence[str]) -> list[str]:
    """The hook points that fail with an identity that does not hold, though others clear all of its hook points."""
    if len(identity.clears) < len(identity.hooks):  # it says little of the others
        return list(identity.clears or identity.hooks)
    layers = {split_name(hook)[0] for hook in identity.hooks} - {None}
    return [hook for hook in known if hook in identity.hooks or split_name(hook)[0] in layers]


def _cleared(hook: str, own: Sequence[Identity], failed: Mapping[str, str]) -> bool:
    """True if one of a hook point's identities holds, clears it, and has no hook point that fails."""
    return any(each.passed and hook in each.clears and not failed.keys() & set(each.hooks) for each in own)


def unchecked(identities: Sequence[Identity], hooks: Iterable[str]) -> list[str]:
    """The hook points that no identity says anything about, in the order given.

    Args:
        identities: See ``failing``.
        hooks: The hook points of the model.
    """
    seen = {hook for identity in identities for hook in identity.hooks}
    return [hook for hook in hooks if hook not in seen]
