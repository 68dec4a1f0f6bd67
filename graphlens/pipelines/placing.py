"""The weights of an export: the checkpoint's own files where they are float32 already, else one that is converted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from graphlens.export.checkpoint import FLOATS, Checkpoint
from graphlens.file.folder import link_or_copy
from graphlens.file.safetensors import SafetensorsFile, TensorEntry, write_safetensors

CONVERTED_FILE = "weights.safetensors"
DTYPE = "float32"
_FLOAT32 = "F32"


@dataclass(frozen=True)
class PlacedWeights:
    """The weights files of an export.

    Attributes:
        entries: File -> key -> where the tensor lies in it.
        copied_bytes: Bytes that were written rather than linked.
    """

    entries: Mapping[str, Mapping[str, TensorEntry]]
    copied_bytes: int

    def at(self, file: str, key: str) -> tuple[str, str]:
        """Where a tensor of the checkpoint is in the export, as (file, key)."""
        return (CONVERTED_FILE if CONVERTED_FILE in self.entries else file), key


def place_weights(checkpoint: Checkpoint, stage: Path, announce: Callable[[str], None]) -> PlacedWeights:
    """Gives a folder the weights of a checkpoint in float32.

    float32 files are linked, or copied across file systems; other checkpoints become one new float32 file.

    Args:
        checkpoint: The checkpoint.
        stage: The folder, which may be the checkpoint's own.
        announce: Called with a line of text about what is copied or converted.
    """
    if all(entry.dtype == _FLOAT32 for _, entry in checkpoint.tensors.values()):
        return _linked(checkpoint, stage, announce)
    announce("Converting the weights to float32")
    return _converted(checkpoint, stage)


def _linked(checkpoint: Checkpoint, stage: Path, announce: Callable[[str], None]) -> PlacedWeights:
    """The checkpoint's own files, linked or copied into ``stage`` unless they are there."""
    entries: dict[str, dict[str, TensorEntry]] = {file: {} for file in checkpoint.files}
    for key, (file, entry) in checkpoint.tensors.items():
        entries[file][key] = entry
    copied = 0
    for file in entries:
        if stage.resolve() != checkpoint.folder.resolve() and link_or_copy(checkpoint.folder / file, stage / file):
            size = (stage / file).stat().st_size
            announce(f"Copied {file} ({size / 1e6:,.0f} MB): it cannot be hardlinked into {stage.parent}")
            copied += size
    return PlacedWeights(entries, copied)


def _converted(checkpoint: Checkpoint, stage: Path) -> PlacedWeights:
    """One float32 file in ``stage`` with every float tensor of the checkpoint."""
    floats = {key: place for key, place in checkpoint.tensors.items() if place[1].dtype in FLOATS}
    wanted = {
        key: TensorEntry(_FLOAT32, entry.shape, 0, int(np.prod(entry.shape)) * 4) for key, (_, entry) in floats.items()
    }
    path = stage / CONVERTED_FILE
    path.unlink(missing_ok=True)  # an earlier export into this folder made one
    write_safetensors(path, wanted, (_as_float32(checkpoint.folder / file, key) for key, (file, _) in floats.items()))
    return PlacedWeights({CONVERTED_FILE: dict(SafetensorsFile(path).entries)}, path.stat().st_size)


def _as_float32(path: Path, key: str) -> npt.NDArray[np.float32]:
    """One tensor of a safetensors file in float32."""
    file = SafetensorsFile(path)
    array = file.array(key)
    if file.entries[key].dtype == "BF16":
        # bfloat16 is the upper half of a float32.
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)
