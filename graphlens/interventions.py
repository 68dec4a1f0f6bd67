"""Interventions as data: what to change at a hook point, as records that can be compared, printed, hashed and saved."""

from __future__ import annotations

from graphlens.edits.files import FORMAT, FORMAT_VERSION, from_json, load, save, to_json
from graphlens.edits.kinds import (
    KINDS,
    Ablate,
    Intervention,
    Patch,
    Scale,
    Selection,
    Steer,
    checked,
    hooks_of,
    unregister,
)
from graphlens.edits.schema import schema

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "KINDS",
    "Ablate",
    "Intervention",
    "Patch",
    "Scale",
    "Selection",
    "Steer",
    "checked",
    "from_json",
    "hooks_of",
    "load",
    "save",
    "schema",
    "to_json",
    "unregister",
]
