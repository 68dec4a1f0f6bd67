"""The graph that a job needs besides a file's own: with the hook points of flags, and with SAEs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from graphlens.edits.kinds import Intervention
from graphlens.edits.sae_training import warn_of_another_model
from graphlens.edits.spliced_sae import SplicedSae
from graphlens.file.names import FLAGGED, canonical, split_name

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphlens.edits.sae import Sae

Saes: TypeAlias = "Sae | SplicedSae | Iterable[Sae | SplicedSae]"
"""SAEs as a user gives them: a plain one is put in without an error term."""


def flags_for(hooks: Iterable[str]) -> set[str]:
    """The flags that hook points need."""
    names = (split_name(hook)[1] for hook in hooks)
    return {FLAGGED[name] for name in names if name in FLAGGED}


def flags_of(items: Sequence[Intervention]) -> set[str]:
    """The flags that the hook points of interventions need."""
    return flags_for(canonical(item.hook) for item in items)


def grown(graph: ir.Model, flags: Iterable[str], saes: Saes = ()) -> ir.Model:
    """A graph with the hook points of flags, and with SAEs.

    Args:
        graph: A hooked graph.
        flags: The flags.
        saes: The SAEs.

    Returns:
        A copy; the graph itself where nothing is asked for.

    Raises:
        InputError: A flag or an SAE does not fit the model.
        UnknownHookPoint: The model lacks a hook point of an SAE's.
    """
    from graphlens import surgery

    graph = surgery.with_flagged(graph, flags)
    given = saes if isinstance(saes, Iterable) else [saes]
    records = [one if isinstance(one, SplicedSae) else SplicedSae.of(one) for one in given]
    for one in records:
        warn_of_another_model(one.sae, surgery.read_manifest(graph))
    return surgery.with_saes(graph, records) if records else graph
