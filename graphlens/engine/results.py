"""What a run gives, and whether its session can give what is asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from graphlens.errors import InputError
from graphlens.runtime.sessions import Runnable
from graphlens.runtime.types import Array, DeviceValue

LAST = "last"  # the output of a run of which only the last position is read: it may come alone


@dataclass(frozen=True)
class Results:
    """What a run gave.

    Attributes:
        output: The logits [b, pos, d_vocab], or the residual [b, pos, d_model] where the plan stops early. None if it
            was not asked for.
        values: Activations by hook name.
        present: The keys and values of a KV cache by output name, still on the device that computed them.
        straight_through: What its gradients passed as if it did not round: see ``surgery.straight_through``.
    """

    output: Array | None
    values: dict[str, Array]
    present: dict[str, DeviceValue]
    straight_through: Mapping[str, int]


def ensure_readable(session: Runnable, wanted: Collection[str], path: Path) -> None:
    """Makes sure that a session has the outputs that a run wants.

    Args:
        session: The session.
        wanted: The names of outputs.
        path: The graph file, for the error.

    Raises:
        InputError: It has not.
    """
    if not session.readable.issuperset(wanted):
        lost = [name for name in wanted if name not in session.readable]
        raise InputError(
            f"{lost[0]!r} ({len(lost)} of {len(wanted)} asked for) is not an output of {path}: the file was pruned, "
            "stripped or exposes other hook points. Ask for those it has, or export the model again."
        )
