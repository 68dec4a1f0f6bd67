"""Whether SAEs fit a model and each other, before any graph is made of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from graphlens.errors import InputError

if TYPE_CHECKING:
    from graphlens.edits.spliced_sae import SplicedSae
    from graphlens.engine.engine import Engine
    from graphlens.engine.plan import Plan


def ensure_fit(engine: Engine, plan: Plan, saes: Iterable[SplicedSae]) -> None:
    """Makes sure that a model can run with SAEs.

    Args:
        engine: The model.
        plan: The plan of whole runs without them.
        saes: All that it is to run with.

    Raises:
        UnknownHookPoint: The model lacks a hook point of one.
        InputError: One has another width than the activations, or two would stand for the same hook point.
    """
    from graphlens.surgery.sae_splicing import place_of

    there: dict[str, SplicedSae] = {}
    for one in saes:
        writes = place_of(one, engine.hooks(plan), engine.manifest).writes
        if writes in there:
            raise InputError(
                f"two SAEs would stand for {writes!r}: one reads {there[writes].hook!r}, the other {one.hook!r}. Take one away: "
                f"model.reset_saes({there[writes].hook!r})."
            )
        there[writes] = one
