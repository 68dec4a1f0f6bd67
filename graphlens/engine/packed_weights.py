"""One packed copy of a model's weights for all its sessions, in the cache folder.

ONNX Runtime lays matrices out for its kernels when a session opens, and each session keeps a copy of its own (some 400 MB
for GPT-2 small). It can also save that copy once and map it into every session over graphs with the same weights. The
saved copy depends on the machine and on ONNX Runtime's version, so it lives in the cache and never in an exported folder.
Without it everything works, but slower and with more memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from graphlens.engine.machine import processor
from graphlens.errors import ExportError, InputError, ModelFileError, RunError
from graphlens.file.digests import digest_of, fresh_digest
from graphlens.file.folder import MODEL_FILE, cache_root, staged_folder, write_whole
from graphlens.file.inside import inside, read_regular
from graphlens.file.leftovers import remove_stale, remove_whole, size_of
from graphlens.runtime.sessions import save_optimised, version
from graphlens.views.progress import note, spinner

if TYPE_CHECKING:
    import onnx_ir as ir

FORMAT = 2
LEAST = 64_000_000  # bytes of weights: below, private copies cost less than the disk they would save
LIMIT = 16_000_000_000  # bytes of the cache's packed files; GRAPHLENS_PACKED_LIMIT overrides it, 0 packs nothing
WEIGHTS, TABLE = "weights.bin", "table.json"  # a folder holds these two and ONNX Runtime's own graph, as MODEL_FILE
_CHUNK = 1 << 24  # bytes compared at once
_SMALL = 1 << 16  # bytes of a weight that is not worth packing
ExternalData = dict[str, str]  # ONNX's own keys and values: location, offset, length and the packed layouts


@dataclass(frozen=True)
class Packed:
    """A packed copy of a model's weights.

    Attributes:
        folder: Where it lies.
        weights: Where each weight lies in the copy, by the weight's name in the graph.
    """

    folder: Path
    weights: dict[str, ExternalData]

    def bind(self, model: ir.Model) -> bytes | None:
        """The bytes of a graph that takes its weights from this copy.

        Returns:
            The serialised graph, or None if it has a large weight that the copy lacks.
        """
        import onnx_ir as ir

        from graphlens.file.held import HeldTensor
        from graphlens.surgery.files import mapped

        tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
        proto = ir.to_proto(model)
        for initializer in proto.graph.initializer:
            if not initializer.external_data:
                continue
            entries = self.weights.get(initializer.name)
            if entries is None:
                tensor = tensors[initializer.name]
                if isinstance(tensor, HeldTensor):  # sessions are given it
                    continue
                if not isinstance(tensor, ir.ExternalTensor) or tensor.nbytes > _SMALL:
                    return None
                initializer.CopyFrom(ir.to_proto(mapped(tensor)))  # what is not worth packing goes into the graph
                continue
            del initializer.external_data[:]
            for key, value in entries.items():
                entry = initializer.external_data.add()
                entry.key, entry.value = key, value
        data: bytes = proto.SerializeToString()
        return data


def packed_folder(model: Path) -> Path:
    """Where the packed copy for a graph file lives, whether it was made or not.

    The folder's name is a digest of the graph file (which holds the fingerprints of its weights), of ONNX Runtime's
    version and of the processor.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, version(), platform.machine(), processor()]).encode())
    digest.update(digest_of(model).encode())
    return cache_root() / "packed" / digest.hexdigest()[:24]


def find(model: Path) -> Packed | None:
    """The packed copy for a graph file, if there is one that holds what was written. One that is damaged is removed."""
    folder = packed_folder(model)
    if not folder.is_dir():
        return None
    try:
        table = _read(folder, digest_of)
    except (OSError, ModelFileError):
        # Nothing else would tell: ONNX Runtime computes with whatever it finds there.
        note(f"{folder}: the packed weights are damaged. Removed; they are made again.")
        remove_whole(folder)
        return None
    with contextlib.suppress(OSError):  # of a cache that belongs to another user
        os.utime(folder)  # the one used longest ago is the first to go
    remove_stale(folder.parent)
    return Packed(folder, table)


def verify(model: Path) -> int | None:
    """Reads every byte of the packed copy for a graph file.

    Returns:
        Its size in bytes, or None if there is none.

    Raises:
        ModelFileError: It does not hold what was written.
    """
    folder = packed_folder(model)
    try:
        _read(folder, fresh_digest)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelFileError(f"{folder}: the packed weights cannot be read ({error.strerror or error}).") from error
    return size_of(folder)


def _read(folder: Path, digest: Callable[[Path], str]) -> dict[str, ExternalData]:
    """The table of a packed copy. Raises ModelFileError where it or the weights are not what was written."""
    try:
        found = json.loads(read_regular(inside(folder, TABLE)))
        table: dict[str, ExternalData] = found["weights"]
        if found["seal"] == _seal(table, digest(inside(folder, WEIGHTS))):
            return table
    except ModelFileError:  # it says what the file is, and is a ValueError too
        raise
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ModelFileError(f"{folder}: these packed weights are damaged. Remove them: graphlens cache-clear.")


def _seal(table: dict[str, ExternalData], weights: str) -> str:
    """What both files of a packed copy are known by: a digest of the table and of the digest of the weights file."""
    return hashlib.sha256(json.dumps([table, weights], sort_keys=True).encode()).hexdigest()


def make(model: Path, weights: int) -> Packed | None:
    """Makes the packed copy for a graph file.

    Args:
        model: The graph file.
        weights: How many bytes its weights have.

    Returns:
        The copy, or None if the weights are too few to be worth it, the copy does not fit the limit or the disk, or it
        cannot be written.

    Raises:
        InputError: The environment variable ``GRAPHLENS_PACKED_LIMIT`` is not a number.
    """
    limit = _limit()
    need = int(2.2 * weights)
    if weights < LEAST or need > limit:
        return None
    target = packed_folder(model)
    root = target.parent
    # A cache that cannot be written must not keep a run from happening: the sessions then pack for themselves.
    with contextlib.suppress(OSError, ExportError, ModelFileError, RunError):
        root.mkdir(parents=True, exist_ok=True)
        _evict(root, limit - need)
        if shutil.disk_usage(root).free < need + LEAST:
            return None
        with (
            spinner(f"Packing weights into {root} (once; removed by graphlens cache-clear)"),
            staged_folder(target, finished=TABLE) as stage,
        ):
            save_optimised(model, stage / MODEL_FILE, WEIGHTS)
            table = _table(stage / MODEL_FILE, stage / WEIGHTS, model)
            seal = _seal(table, digest_of(stage / WEIGHTS))
            write_whole(stage / TABLE, json.dumps({"weights": table, "seal": seal}).encode())
        return find(model)
    return None


def _limit() -> int:
    """How many bytes all packed copies together may take."""
    asked = os.environ.get("GRAPHLENS_PACKED_LIMIT", str(LIMIT))
    try:
        return int(float(asked))
    except (ValueError, OverflowError) as error:
        raise InputError(
            f"GRAPHLENS_PACKED_LIMIT={asked!r}: give a number of bytes, 0 for no packed weights."
        ) from error


def discard(packed: Packed) -> None:
    """Removes a packed copy that ONNX Runtime refuses, because it is damaged or of another machine after all."""
    remove_whole(packed.folder)


def _table(graph: Path, weights: Path, original: Path) -> dict[str, ExternalData]:
    """Where each weight lies in the packed file, for those weights whose plain bytes are the original's."""
    import onnx

    saved = {item.name: item for item in onnx.load(graph, load_external_data=False).graph.initializer}
    packed = np.memmap(weights, np.uint8, mode="r")
    found: dict[str, ExternalData] = {}
    for item in onnx.load(original, load_external_data=False).graph.initializer:
        mine = {entry.key: entry.value for entry in item.external_data}
        other = saved.get(item.name)
        theirs = {} if other is None else {entry.key: entry.value for entry in other.external_data}
        if other is None or not mine or not theirs or (other.dims, other.data_type) != (item.dims, item.data_type):
            continue
        start, begin, length = int(mine.get("offset", 0)), int(theirs["offset"]), int(theirs["length"])
        source = np.memmap(original.parent / mine["location"], np.uint8, mode="r", offset=0)
        if int(mine["length"]) != length or not _same(source[start : start + length], packed[begin : begin + length]):
            continue
        entries = {key: value for key, value in theirs.items() if not key.startswith("prepacked")}
        blobs = [value for key, value in theirs.items() if key.startswith("prepacked")]
        # A matrix of a Gemm in this graph may be one of a MatMul in another: the layout is the same.
        forms = list(dict.fromkeys(f"{kind}+{blob.partition('+')[2]}" for blob in blobs for kind in ("Gemm", "MatMul")))
        found[item.name] = {**entries, **{f"prepacked_{index}": form for index, form in enumerate(forms)}}
    return found


def _same(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> bool:
    """Whether two files hold the same bytes, read a piece at a time."""
    return all(
        np.array_equal(one[at : at + _CHUNK], other[at : at + _CHUNK]) for at in range(0, max(len(one), 1), _CHUNK)
    )


def _evict(root: Path, room: int) -> None:
    """Removes packed copies, the one used longest ago first, until they take at most ``room`` bytes."""
    # What killed processes left goes first. What others are writing counts, and stays.
    remove_stale(root)
    sizes = {path: size_of(path) for path in root.iterdir()}
    finished = (path for path in sizes if path.is_dir() and not path.name.startswith("."))
    for folder in sorted(finished, key=lambda path: path.stat().st_mtime):
        if sum(sizes.values()) <= room:
            return
        remove_whole(folder)
        del sizes[folder]
