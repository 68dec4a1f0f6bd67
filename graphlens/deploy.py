"""Folders for those who run a model without graphlens: baked, drivable and stripped files, adapters, live pages."""

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
from graphlens.pipelines.page import write_page, write_page_file

__all__ = [
    "EDITED_FILE",
    "GATES_KEY",
    "LAYOUTS",
    "bake_model",
    "write_adapter",
    "write_drivable",
    "write_page",
    "write_page_file",
    "write_stripped",
]
