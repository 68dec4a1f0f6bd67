"""An SAE as an edit of a model: which one, with or without its error term, and at which tokens not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self, cast

from graphlens.errors import InputTypeError, checked_number

if TYPE_CHECKING:
    from graphlens.edits.sae import Sae

_MOST_TOKEN = 2**31 - 1  # a graph's tokens may be int32


@dataclass(frozen=True)
class SplicedSae:
    """An SAE that a model runs with. Two are equal if the graphs that they make are.

    Attributes:
        sae: The SAE.
        key: Its digest, which stands for it in comparisons.
        error_term: True if what the SAE does not reconstruct is added to its output.
        excluded: The ids of tokens at which the SAE is left out, sorted.
        beside: True if its output stands for nothing: its hook points can be read, and the model computes what it did.
    """

    sae: Sae = field(compare=False, repr=False)
    key: str
    error_term: bool = False
    excluded: tuple[int, ...] = ()
    beside: bool = False

    @classmethod
    def of(cls, sae: Sae, error_term: bool = False, excluded: Iterable[int] = (), beside: bool = False) -> Self:
        """The record of an SAE.

        Args:
            sae: See above, as for what follows.
            error_term: See there.
            excluded: See there; in any order.
            beside: See there.

        Raises:
            InputTypeError: (a TypeError) What is given is no Sae.
            InputError: A token's id is no whole number.
        """
        from graphlens.edits.sae import Sae  # here: every plan knows this record, and few runs have an SAE

        if not isinstance(sae, Sae):
            raise InputTypeError(
                f"an SAE is a graphlens.Sae, not a {type(sae).__name__}: open it with Sae.from_folder or Sae.from_pretrained."
            )
        ids = sorted({checked_number(each, "a token to leave out", least=0, most=_MOST_TOKEN) for each in excluded})
        flags = checked_number(error_term, "error_term", bool), checked_number(beside, "beside", bool)
        return cls(sae, sae.key(), flags[0], tuple(ids), flags[1])

    @property
    def hook(self) -> str:
        """The hook point that it reads."""
        return self.sae.cfg.hook

    @property
    def writes(self) -> str:
        """The hook point whose value it stands for, and that its own hook points are named by."""
        return self.sae.cfg.writes

    @property
    def without_weights(self) -> Self:
        """An equal record to be kept as a key, which keeps no weights in memory and can make no graph."""
        return replace(self, sae=cast("Sae", None))
