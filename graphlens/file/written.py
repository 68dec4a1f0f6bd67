"""What files that graphlens wrote for other runtimes say of themselves: baked, drivable, or the plain model.

Knows alone the metadata by which such a file is recognised; hooked files have a manifest instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal

EDITS_KEY = "graphlens.interventions"  # the edits inside a baked file, as JSON without the arrays
GATES_KEY = "graphlens.gates"  # the hook points that a drivable file's inputs change
MADE_KEY = "graphlens.made"  # what wrote the file
PRODUCER = "graphlens"

Made = Literal["baked", "drivable", "plain"]
_SHOWN = 3  # edits or gates that a sentence names


def made_as(metadata: Mapping[str, str], producer: str | None = None) -> Made | None:
    """What a file without hook points is that graphlens wrote; None for another program's.

    Args:
        metadata: The model's ``metadata_props``.
        producer: Its ``producer_name``.
    """
    if GATES_KEY in metadata:
        return "drivable"
    if EDITS_KEY in metadata:
        return "baked"
    return "plain" if metadata.get(MADE_KEY) == "plain" or producer == PRODUCER else None


def said_of(metadata: Mapping[str, str], producer: str | None = None) -> str | None:
    """What a file without hook points is that graphlens wrote, in a sentence without a subject; None for another program's.

    Args:
        metadata: The model's ``metadata_props``.
        producer: Its ``producer_name``.
    """
    match made_as(metadata, producer):
        case "drivable":
            names = _names(metadata[GATES_KEY])
            return f"a drivable file of graphlens: its inputs change {names}, and it returns no hook points"
        case "baked":
            return f"a baked file of graphlens: it has edits inside ({_names(metadata[EDITS_KEY])}), and no hook points"
        case "plain":
            return (
                "a file that graphlens wrote for other runtimes (strip, or bake without edits): it has no hook points"
            )
    return None


def advice_for(metadata: Mapping[str, str], producer: str | None = None) -> str:
    """What one who wants hook points does with such a file, in a sentence."""
    source = "Use the hooked folder that it was made of"
    match made_as(metadata, producer):
        case "drivable":
            return f"{source}, or write it again with the hook points kept (--keep-hooks)."
        case "baked":
            return f"{source}, or bake it again with the hook points kept (--keep-hooks)."
    return f"{source}; graphlens adopt finds hook points in a plain file anew."


def _names(text: str) -> str:
    """The first hook points that a file's metadata tell of, which a stranger may have written."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return "what cannot be read"
    if isinstance(data, dict) and isinstance(edits := data.get("interventions"), list):
        found = [f"{edit.get('kind')} at {edit.get('hook')}" for edit in edits if isinstance(edit, dict)]
    else:
        found = list(data) if isinstance(data, dict) else []
    shown = ", ".join(f"{name:.80}" for name in found[:_SHOWN])
    return f"{shown} and {len(found) - _SHOWN} more" if len(found) > _SHOWN else shown or "nothing"
