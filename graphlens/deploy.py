"""Folders for those who run a model without graphlens: baked, drivable and stripped files, and adapters."""

from __future__ import annotations

from graphlens.pipelines.deploy import (
    EDITED_FILE,
    GATES_KEY,
    LAYOUTS,
    bake_model,
    write_adapter,
    write_drivable,
    write_stripped,
)

__all__ = [
    "EDITED_FILE",
    "GATES_KEY",
    "LAYOUTS",
    "bake_model",
    "write_adapter",
    "write_drivable",
    "write_stripped",
]
