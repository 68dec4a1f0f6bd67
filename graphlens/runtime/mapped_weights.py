"""Weights that stay in their files: mapped, read ahead of use, and let go of after it."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graphlens.runtime.sessions import as_device_value
from graphlens.runtime.types import Array, DeviceValue

_AHEAD = 1 << 22  # bytes asked of the disk at once


@dataclass(frozen=True)
class Place:
    """Where a weight lies.

    Attributes:
        file: The file.
        offset: Its first byte there.
        dtype: NumPy's name of its dtype; "uint16" for bfloat16 words.
        shape: Its sizes.
    """

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class _File:
    """A file that is mapped, and open for as long as anything uses it.

    Attributes:
        map: The mapping.
        number: The open file.
    """

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
        self.map = mmap.mmap(self.number, 0, access=mmap.ACCESS_READ)

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.close(self.number)


class MappedWeights:
    """The weights of one model, as ONNX Runtime can be fed with them. Nothing is read before a run reads it.

    Args:
        places: Where each weight lies, by initializer.
        held: The weights that are in memory, by initializer.
    """

    def __init__(self, places: Mapping[str, Place], held: Mapping[str, Array]) -> None:
        self._places = {name: place for name, place in places.items() if name not in held and place.size}
        self._files = {file: _File(file) for file in {place.file for place in self._places.values()}}
        empty = {name: np.zeros(place.shape, place.dtype) for name, place in places.items() if not place.size}
        mapped = {name: self._array(place) for name, place in self._places.items()}
        # The arrays are kept because the values alias their memory.
        self._arrays: dict[str, Array] = {**empty, **mapped, **held}
        self._values = {name: as_device_value(array) for name, array in self._arrays.items()}

    def _array(self, place: Place) -> Array:
        count = math.prod(place.shape)
        return np.frombuffer(self._files[place.file].map, place.dtype, count, place.offset).reshape(place.shape)

    def has(self, names: Iterable[str]) -> bool:
        """True if all of some weights are here.

        Args:
            names: The initializers.
        """
        return self._values.keys() >= set(names)

    def value(self, name: str) -> DeviceValue:
        """A weight, over the mapped file.

        Args:
            name: The initializer.
        """
        return self._values[name]

    def size(self, names: Iterable[str]) -> int:
        """How many bytes of some weights lie in files.

        Args:
            names: The initializers.
        """
        return sum(self._places[name].size for name in names if name in self._places)

    def read_ahead(self, names: Iterable[str]) -> None:
        """Has the system read weights into its cache, in a thread. It costs this process no memory.

        Args:
            names: The initializers.
        """
        places = [self._places[name] for name in names if name in self._places]
        if places and hasattr(os, "posix_fadvise"):
            threading.Thread(target=self._ask_for, args=(places,), name="graphlens-read-ahead", daemon=True).start()

    def _ask_for(self, places: Iterable[Place]) -> None:
        with contextlib.suppress(OSError):  # a file system that takes no advice
            for place in places:
                file = self._files[place.file].number
                for start in range(place.offset, place.offset + place.size, _AHEAD):
                    length = min(_AHEAD, place.offset + place.size - start)
                    os.posix_fadvise(file, start, length, os.POSIX_FADV_WILLNEED)

    def let_go(self, names: Iterable[str]) -> None:
        """Takes weights out of this process's memory. The system may keep them cached, and drops them when memory is short.

        Args:
            names: The initializers. Those of a run that goes on are read again.
        """
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        for place in (self._places[name] for name in names if name in self._places):
            start = place.offset // mmap.PAGESIZE * mmap.PAGESIZE
            with contextlib.suppress(OSError):
                self._files[place.file].map.madvise(mmap.MADV_DONTNEED, start, place.offset + place.size - start)
