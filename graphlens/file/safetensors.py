"""Safetensors files as bytes: where each tensor lies, views of it without a copy, and how to write one by streaming."""

from __future__ import annotations

import json
import os
import struct
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from graphlens.errors import InputKeyError, ModelFileError
from graphlens.file.digests import Mark
from graphlens.file.inside import inside, open_regular
from graphlens.file.manifest import WeightView
from graphlens.file.quantised import dequantised

Array = npt.NDArray[Any]
"""An array of any dtype and shape."""
# safetensors dtype name -> NumPy dtype; bfloat16 has none and stays raw 16-bit words.
NUMPY_DTYPES: Mapping[str, str] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorEntry:
    """One tensor's place: ``offset`` and ``length`` in bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


class _Described(TypedDict):
    """A tensor as a file's header describes it; offsets are from the header's end."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


class SafetensorsFile:
    """A safetensors file, mapped read-only on first use.

    Args:
        path: The file.

    Attributes:
        path: The file.
        size: Its size in bytes.
        header: Its first bytes: the header's length and the header.
        entries: Tensor name -> where it lies.

    Raises:
        ModelFileError: The file is missing, cut short or malformed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_regular(inside(path.parent, path.name)) as file:
                self.size = os.fstat(file.fileno()).st_size
                prefix = file.read(8)
                length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
                if not 2 <= length <= min(_MAX_HEADER, self.size - 8):
                    raise ModelFileError(f"{path}: not a safetensors file, or cut short (its header does not fit).")
                self.header = prefix + file.read(length)
        except FileNotFoundError as error:
            raise ModelFileError(f"{path}: the weights file is missing. Export the model again.") from error
        except OSError as error:
            raise ModelFileError(f"{path}: the weights file cannot be read ({error.strerror or error}).") from error
        try:
            self.entries = self._entries(json.loads(self.header[8:]), len(self.header))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelFileError(f"{path}: malformed safetensors header ({error}).") from error
        end = max((entry.offset + entry.length for entry in self.entries.values()), default=0)
        if end > self.size:
            raise ModelFileError(f"{path}: cut short: {self.size:,} bytes where its header promises {end:,}.")

    @staticmethod
    def _entries(header: Mapping[str, _Described], base: int) -> dict[str, TensorEntry]:
        """Each tensor's place in the file, checked: the header may be a stranger's."""
        entries = {}
        for name, info in header.items():
            if name == "__metadata__":
                continue
            start, stop = info["data_offsets"]
            if not all(type(number) is int for number in (start, stop, *info["shape"])):
                raise ValueError(f"tensor {name!r} has offsets or sizes that are not integers")
            entry = TensorEntry(info["dtype"], tuple(info["shape"]), base + start, stop - start)
            if start < 0 or stop < start or any(size < 0 for size in entry.shape):
                raise ValueError(f"tensor {name!r} has impossible offsets or sizes")
            entries[name] = entry
        return entries

    @cached_property
    def bytes(self) -> npt.NDArray[np.uint8]:
        """The whole file, mapped."""
        return np.memmap(self.path, dtype=np.uint8, mode="r")

    def array(self, name: str) -> Array:
        """One tensor in the mapped file.

        Args:
            name: The tensor's name.

        Returns:
            A read-only view of the file; bfloat16 as uint16 words.

        Raises:
            ModelFileError: The file holds no such tensor, or one of a dtype that graphlens cannot read.
        """
        if name not in self.entries:
            raise ModelFileError(f"{self.path}: holds no tensor {name!r}.")
        entry = self.entries[name]
        if entry.dtype not in NUMPY_DTYPES:
            raise ModelFileError(f"{self.path}: tensor {name!r} has dtype {entry.dtype}, which graphlens cannot read.")
        raw = self.bytes[entry.offset : entry.offset + entry.length]
        flat = np.frombuffer(raw, dtype=NUMPY_DTYPES[entry.dtype])
        flat.flags.writeable = False  # it is the base of all views of it, and the mapping itself may be written into
        return flat.reshape(entry.shape)


def as_float(file: SafetensorsFile, name: str) -> Array:
    """One tensor of floats as NumPy can compute with it.

    Args:
        file: The file.
        name: The tensor's name.

    Returns:
        A read-only view of the file; bfloat16, which NumPy lacks, as a float32 copy, exact.

    Raises:
        ModelFileError: The file holds no such tensor, or one of a dtype that graphlens cannot read.
    """
    array = file.array(name)
    if file.entries[name].dtype != "BF16":
        return array
    words = array.astype(np.uint32) << 16  # bfloat16 is the upper half of a float32
    words.flags.writeable = False  # it is the base of all views of it
    return words.view(np.float32)


def stored_numbers(file: SafetensorsFile, view: WeightView) -> Array:
    """The tensor that a weight is a view of, as numbers: integers of a quantised one become what they stand for.

    Args:
        file: The file.
        view: The view.

    Returns:
        A read-only view of the file, or a float32 array of its own for bfloat16 and for quantised tensors.

    Raises:
        ModelFileError: The file holds no such tensor, or its scales do not fit it.
    """
    how = view.quantised
    if how is None:
        return as_float(file, view.tensor)
    zero_point = None if how.zero_point is None else as_float(file, how.zero_point)
    try:
        return dequantised(file.array(view.tensor), how, as_float(file, how.scale), zero_point)
    except ValueError as error:
        raise ModelFileError(
            f"{file.path}: the scales {how.scale!r} do not fit the integers of {view.tensor!r} ({error}). Adopt the original "
            "again."
        ) from error


class _PrivateMapping(SafetensorsFile):
    """A safetensors file mapped copy-on-write where the system grants that, else read-only, and watched.

    torch has no read-only tensors: over a read-only mapping, a write through one would crash the process.

    Attributes:
        bytes: The whole file, mapped. It stays the same file when another is renamed to its path.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file = open_regular(path)
        weakref.finalize(self, self._file.close)
        self._mapped = Mark.of_open(self._file.fileno())
        try:
            self.bytes = np.memmap(self._file, dtype=np.uint8, mode="c")
        except OSError:  # a file larger than the memory that may be promised
            self.bytes = np.memmap(self._file, dtype=np.uint8, mode="r")

    def ensure_unwritten(self, verify: Callable[[], None] | None) -> None:
        """Raises ModelFileError if the file was written to since it was mapped; ``verify`` tells of one still in place."""
        now = Mark.of_open(self._file.fileno())
        if (now.size, now.mtime_ns) == (self._mapped.size, self._mapped.mtime_ns):
            return
        there = Mark.of(self.path)
        if verify is None or there is None or (there.inode, there.device) != (now.inode, now.device):
            raise ModelFileError(
                f"{self.path}: something wrote into this file since the model was opened. Put the original back, or export the "
                "model again, and open it anew."
            )
        verify()
        self._mapped = now  # touched, or written back


class WeightStore(Mapping[str, Array]):
    """A model's weights under TransformerLens's names, as read-only views of its mapped files, opened on first use.

    Values have the file's dtype, except bfloat16, which NumPy lacks: those are float32 copies, exact.

    Args:
        folder: The folder of the weights files.
        views: TransformerLens name -> the view that a weight is; a manifest's ``weights``.
        verify: Called when a file was opened, or touched since. It may refuse, if the file is no more the one that it was.

    Attributes:
        views: See above.
        opened: The files that were opened so far, by name.
    """

    def __init__(self, folder: Path, views: Mapping[str, WeightView], verify: Callable[[], None] | None = None) -> None:
        self._folder, self.views, self._verify = folder, views, verify
        self.opened: dict[str, _PrivateMapping] = {}

    def __contains__(self, name: object) -> bool:
        return name in self.views

    def __iter__(self) -> Iterator[str]:
        return iter(self.views)

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, name: str) -> Array:
        if name not in self.views:
            raise InputKeyError(
                f"this model's file does not say where its weight {name!r} lies. List what it has with list(model.weights)."
            )
        view = self.views[name]
        if view.file not in self.opened:
            mapping = _PrivateMapping(self._folder / view.file)
            if self._verify is not None:
                self._verify()  # after it was mapped, so that what was mapped is what is verified
            self.opened[view.file] = mapping
        self.opened[view.file].ensure_unwritten(self._verify)
        found = apply_view(stored_numbers(self.opened[view.file], view), view)
        found.flags.writeable = False  # a copy too: writing into it would change nothing
        return found


def apply_view(array: Array, view: WeightView) -> Array:
    """The view of a stored tensor that a weight is.

    Args:
        array: The stored tensor.
        view: How the weight is taken from it.

    Returns:
        A strided view: writing to it writes to ``array``. A copy where the view computes (``times``, ``plus``) or joins axes
        that lie apart.

    Raises:
        ModelFileError: The view does not fit the tensor.
    """
    found = _strided(array, view)
    if view.joined:
        found = found.reshape(-1, *found.shape[2:])
    if view.times is not None:
        found = found * np.asarray(view.times, found.dtype)
    return found if view.plus is None else found + np.asarray(view.plus, found.dtype)


def put_view(array: Array, view: WeightView, weight: Array) -> None:
    """Writes a weight to where it lies in a stored tensor.

    Args:
        array: The stored tensor, writable.
        view: How the weight is taken from it.
        weight: The new weight, of the shape that ``apply_view`` gives.
    """
    place = _strided(array, view)
    if view.plus is not None:
        weight = weight - np.asarray(view.plus, weight.dtype)
    if view.times is not None:
        weight = weight / np.asarray(view.times, weight.dtype)
    place[...] = weight.reshape(place.shape)


def _strided(array: Array, view: WeightView) -> Array:
    """What a view takes from a tensor, before axes are joined and anything is computed: a strided view of it."""
    stored = array.shape
    try:
        if view.take is not None:
            axis, part, parts = view.take
            size, left = divmod(stored[axis], parts)
            if left:
                raise ValueError(f"{stored[axis]} are not {parts} equal parts")
            array = _stretch(array, (axis, part * size, (part + 1) * size))
        if view.cut is not None:
            array = _stretch(array, view.cut)
        if view.shape is not None:
            shaped = array.view()
            shaped.shape = view.shape  # unlike reshape, this raises where it would have to copy
            array = shaped
        if view.within is not None:
            array = _stretch(array, view.within)
        if view.permute is not None:
            array = array.transpose(view.permute)
        if view.joined and array.ndim < 2:
            raise ValueError(f"{array.ndim} axes cannot be joined")
    except (ValueError, IndexError, AttributeError) as error:
        how = ", ".join(f"{part} {getattr(view, part)}" for part in ("take", "cut", "shape", "within", "permute"))
        raise ModelFileError(
            f"{view.file}: the manifest makes a weight of the tensor {view.tensor!r} by {how}, which does not fit its shape "
            f"{list(stored)} ({error}). Export the model again."
        ) from error
    return array


def _stretch(array: Array, where: tuple[int, int, int]) -> Array:
    """A stretch of one axis. Raises ValueError if the axis is not so long."""
    axis, start, stop = where
    if stop > array.shape[axis]:
        raise ValueError(f"axis {axis} has {array.shape[axis]} entries, not {stop}")
    return array[(slice(None),) * axis + (slice(start, stop),)]


def write_safetensors(path: Path, entries: Mapping[str, TensorEntry], arrays: Iterable[Array]) -> None:
    """Writes a safetensors file tensor by tensor, so that memory holds one of them at a time.

    Args:
        path: The file; it must not be there yet.
        entries: Tensor name -> its dtype, shape and length. Offsets are ignored.
        arrays: The content of each tensor, in the same order.
    """
    header: dict[str, _Described] = {}
    position = 0
    for name, entry in entries.items():
        header[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.length],
        }
        position += entry.length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays:
            np.ascontiguousarray(array).tofile(file)
