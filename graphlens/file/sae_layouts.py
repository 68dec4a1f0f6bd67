"""In which layouts SAEs lie in folders: a register of those that can be read, and what each gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from graphlens.file.sae_config import SaeConfig
from graphlens.file.safetensors import Array, TensorEntry

Files = Mapping[str, tuple[Path, TensorEntry]]
"""Weight -> the safetensors file that it lies in, and where in it; weights that are made in memory are absent."""


@dataclass(frozen=True)
class StoredSae:
    """An SAE as a file has it.

    Attributes:
        cfg: Its settings.
        weights: Its weights, as ``cfg.shapes`` has them, float32; memory-mapped where the file allows.
        files: Where they lie.
    """

    cfg: SaeConfig
    weights: Mapping[str, Array]
    files: Files = field(default_factory=dict)
