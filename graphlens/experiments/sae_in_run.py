"""The SAE that an experiment is about: attached for its length unless it is there already, and where its values are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graphlens.analysis.arrays import ArrayT
from graphlens.edits.spliced_sae import SplicedSae
from graphlens.errors import InputError, InputTypeError
from graphlens.file.sae_names import ERROR, INPUT, OUTPUT

if TYPE_CHECKING:
    from graphlens.edits.sae import Sae
    from graphlens.model.hooked_transformer import HookedTransformer

FEATURES, RECONS = "hook_sae_acts_post", "hook_sae_recons"


@dataclass(frozen=True)
class InRun:
    """An SAE that is attached, by the names of its hook points.

    Attributes:
        spliced: The SAE, and how it is attached.
    """

    spliced: SplicedSae

    @property
    def sae(self) -> Sae:
        """The SAE."""
        return self.spliced.sae

    @property
    def features(self) -> str:
        """The hook point of its features."""
        return f"{self.spliced.writes}.{FEATURES}"

    @property
    def input(self) -> str:
        """The hook point of what it reads."""
        return f"{self.spliced.writes}.{INPUT}"

    @property
    def recons(self) -> str:
        """The hook point of what it makes of its features."""
        return f"{self.spliced.writes}.{RECONS}"

    @property
    def output(self) -> str:
        """The hook point of what goes on into the model."""
        return f"{self.spliced.writes}.{OUTPUT}"

    @property
    def error(self) -> str | None:
        """The hook point of what it does not reconstruct; None where it is attached without."""
        return f"{self.spliced.writes}.{ERROR}" if self.spliced.error_term else None

    @property
    def numbers(self) -> tuple[int, ...]:
        """What its features are called: their numbers, in the wider SAE where these are some of it."""
        return self.sae.features or tuple(range(self.sae.cfg.d_sae))


@contextmanager
def in_run(
    model: HookedTransformer[ArrayT], saes: Sequence[Sae | str] | Sae | str, use_error_term: bool | None = None
) -> Iterator[list[InRun]]:
    """Attaches SAEs for the length of a ``with`` block.

    Args:
        model: The model.
        saes: SAEs; or, for those that are attached already, the names of the hook points that they read, or stand for.
        use_error_term: Whether SAEs that are given come with their error term; None for True. Those that are attached stay as
            they are.

    Yields:
        Each SAE as it is attached, in the order given.

    Raises:
        UnknownHookPoint: The model lacks a hook point of an SAE's.
        InputError: No SAE is attached to a hook point, one does not fit the model, or none is given.
    """
    from graphlens.edits.sae import Sae  # here: every sweep knows this module, and few have an SAE

    given: list[Sae | str] = [saes] if isinstance(saes, Sae | str) or not isinstance(saes, Sequence) else list(saes)
    wrong = [one for one in given if not isinstance(one, Sae | str)]
    if wrong:
        raise InputTypeError(
            f"an SAE is a graphlens.Sae or the hook point of one that is attached, not {wrong[0]!r:.60}."
        )
    if not given:
        raise InputError("no SAE is given: pass one, or the hook point of one that is attached.")
    error_term = True if use_error_term is None else use_error_term
    new = [one for one in given if isinstance(one, Sae)]
    with model.saes(new, use_error_term=error_term):
        there = model.runner.flags.saes.by_hook
        by_name = {**{one.writes: one for one in there.values()}, **there}
        found = []
        for one in given:
            name = one if isinstance(one, str) else one.cfg.hook
            if name not in by_name:
                has = f"SAEs are attached to {', '.join(there)}" if there else "no SAE is attached"
                raise InputError(
                    f"there is no SAE at {name!r}: {has}. Pass the SAE itself, or call model.add_sae first."
                )
            found.append(InRun(by_name[name]))
        if len({one.spliced.writes for one in found}) < len(found):
            raise InputError("two of the SAEs given read the same hook point: give each once.")
        yield found
