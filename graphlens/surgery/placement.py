"""Where initializers lie: each is one whole tensor of a safetensors file, with that tensor's dtype and shape."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from graphlens.errors import ModelFileError
from graphlens.file.inside import inside
from graphlens.file.safetensors import SafetensorsFile
from graphlens.file.stored import DATA_TYPES, in_files, place_of


def ensure_placed(model: ir.Model, folder: Path) -> None:
    """Refuses a model with an initializer that is not what its weights file says lies there.

    Shifted by some bytes, or with two sizes exchanged, it would be other weights, and nothing else would tell.

    Args:
        model: A hooked model.
        folder: The folder of its weights files.

    Raises:
        ModelFileError: An initializer is no tensor of its file, or has another dtype or shape; it is named.
    """
    tables: dict[str, dict[tuple[int, int], set[tuple[ir.DataType | None, tuple[int, ...]]]]] = {}
    for value, tensor in in_files(model):
        name, offset = place_of(tensor)
        if name not in tables:
            table = tables[name] = {}
            for entry in SafetensorsFile(inside(folder, name)).entries.values():
                # Tensors without elements may lie at one place.
                there = table.setdefault((entry.offset, entry.length), set())
                there.add((DATA_TYPES.get(entry.dtype), entry.shape))
        found = tables[name].get((offset, tensor.nbytes))
        shape = tuple(int(str(size)) for size in tensor.shape)
        if found is None:
            raise ModelFileError(
                f"{folder / name}: the graph takes {value.name!r} from bytes {offset:,} to {offset + tensor.nbytes:,}, where "
                "the file's own table has no tensor. The graph or the file was altered: export the model again."
            )
        if (tensor.dtype, shape) not in found:
            stored = " or ".join(f"{dtype} {list(sizes)}" for dtype, sizes in sorted(found, key=str))
            raise ModelFileError(
                f"{folder / name}: the graph takes {value.name!r} for {tensor.dtype} {list(shape)}, and the file's own table "
                f"says {stored}. The graph or the file was altered: export the model again."
            )
