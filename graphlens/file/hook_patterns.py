"""Which hook points a shell-style pattern means."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence

from graphlens.errors import UnknownHookPoint


def match_glob(names: Sequence[str], pattern: str) -> list[str]:
    """The names that a shell-style pattern matches.

    Args:
        names: The names of a model's hook points.
        pattern: ``*``, ``?`` and ``[...]`` as in a shell, except that ``*`` also matches dots.

    Raises:
        UnknownHookPoint: It matches none.
    """
    picked = fnmatch.filter(names, pattern)
    if not picked:
        near = difflib.get_close_matches(pattern.replace("*", ""), names, n=3, cutoff=0.3)
        hint = f" Nearest: {', '.join(map(repr, near))}." if near else ""
        raise UnknownHookPoint(f"The pattern {pattern!r} matches no hook point of this model.{hint}")
    return picked
