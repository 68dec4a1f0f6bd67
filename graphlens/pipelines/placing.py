"""The weights of an export: the checkpoint's own files where they are float32 already, else one that is converted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graphlens.export.checkpoint import FLOATS, Checkpoint
from graphlens.file.copies import Announce, Placed, ensure_room, place
from graphlens.file.safetensors import SafetensorsFile, TensorEntry, as_float, write_safetensors

CONVERTED_FILE = "weights.safetensors"
DTYPE = "float32"
_FLOAT32 = "F32"


@dataclass(frozen=True)
class PlacedWeights:
    """The weights files of an export.

    Attributes:
        entries: File -> key -> where the tensor lies in it.
        files: How they came into the folder.
    """

    entries: Mapping[str, Mapping[str, TensorEntry]]
    files: Placed

    @property
    def copied_bytes(self) -> int:
        """Bytes that were written, and not hardlinked or cloned."""
        return self.files.copied

    def at(self, file: str, key: str) -> tuple[str, str]:
        """Where a tensor of the checkpoint is in the export, as (file, key)."""
        return (CONVERTED_FILE if CONVERTED_FILE in self.entries else file), key


def is_float32(checkpoint: Checkpoint) -> bool:
    """True if all of a checkpoint's weights are float32, so that its files serve as they are."""
    return all(entry.dtype == _FLOAT32 for _, entry in checkpoint.tensors.values())


def place_weights(checkpoint: Checkpoint, stage: Path, announce: Announce, link: bool = False) -> PlacedWeights:
    """Gives a folder the weights of a checkpoint in float32.

    float32 files are copied; other checkpoints become one new float32 file.

    Args:
        checkpoint: The checkpoint.
        stage: The folder.
        announce: Called with a line of text about what is copied or converted.
        link: True hardlinks float32 files where the file system can.

    Raises:
        ExportError: There is not enough room.
    """
    if is_float32(checkpoint):
        entries: dict[str, dict[str, TensorEntry]] = {file: {} for file in checkpoint.files}
        for key, (file, entry) in checkpoint.tensors.items():
            entries[file][key] = entry
        return PlacedWeights(
            entries, place({file: checkpoint.folder / file for file in entries}, stage, link, announce)
        )
    announce("Converting the weights to float32")
    return _converted(checkpoint, stage)


def _converted(checkpoint: Checkpoint, stage: Path) -> PlacedWeights:
    """One new float32 file in ``stage`` with every float tensor of the checkpoint."""
    floats = {key: place for key, place in checkpoint.tensors.items() if place[1].dtype in FLOATS}
    wanted = {
        key: TensorEntry(_FLOAT32, entry.shape, 0, int(np.prod(entry.shape)) * 4) for key, (_, entry) in floats.items()
    }
    ensure_room(stage, sum(entry.length for entry in wanted.values()))
    path = stage / CONVERTED_FILE
    arrays = (as_float(SafetensorsFile(checkpoint.folder / file), key) for key, (file, _) in floats.items())
    write_safetensors(path, wanted, (array.astype(np.float32, copy=False) for array in arrays))
    return PlacedWeights({CONVERTED_FILE: dict(SafetensorsFile(path).entries)}, Placed(path.stat().st_size, {}))
