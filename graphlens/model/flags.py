"""What a model's graph has besides its file's: which flags are set, and which SAEs it runs with."""

from __future__ import annotations

from graphlens.engine.plan import Plan
from graphlens.errors import InputError, checked_number
from graphlens.model.attached_saes import AttachedSaes

_EXCLUDE_EACH_OTHER = {"use_attn_in": "use_split_qkv_input", "use_split_qkv_input": "use_attn_in"}


class Flags:
    """The flags that are set, and the SAEs that are attached: each adds hook points to the graph.

    Attributes:
        saes: The SAEs.
    """

    def __init__(self) -> None:
        self._on: set[str] = set()
        self.saes = AttachedSaes()

    def set(self, flag: str, on: bool) -> None:
        """Sets or unsets a flag.

        Args:
            flag: Its name in the configuration ("use_attn_result", say).
            on: True sets it.

        Raises:
            InputError: For one that excludes another that is set.
        """
        on, other = checked_number(on, flag, bool), _EXCLUDE_EACH_OTHER.get(flag)
        if on and other in self._on:
            raise InputError(f"{flag} and {other} exclude each other: call model.set_{other}(False) first.")
        (self._on.add if on else self._on.discard)(flag)

    @property
    def names(self) -> tuple[str, ...]:
        """The flags that are set, sorted."""
        return tuple(sorted(self._on))

    def plan(self) -> Plan:
        """The plan of whole runs with all of it."""
        return Plan(self.names, self.saes.now)
