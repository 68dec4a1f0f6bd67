"""In which layouts SAEs lie in folders: a register of those that can be read, and which one a folder has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from graphlens.errors import InputError, ModelFileError
from graphlens.file.sae_config import SaeConfig
from graphlens.file.safetensors import Array, SafetensorsFile, TensorEntry, as_float
from graphlens.file.settings import read_settings

if TYPE_CHECKING:
    from graphlens.file.manifest import Json

Files: TypeAlias = Mapping[str, tuple[Path, TensorEntry]]
"""Weight -> the safetensors file that it lies in as it is, and where in it; weights that are made in memory are absent."""
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")


class Asked(NamedTuple):
    """What a user says of an SAE that its files do not, or in place of what they do."""

    hook: str | None = None
    hook_out: str | None = None
    model_name: str | None = None


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


@dataclass(frozen=True)
class Layout:
    """How one library lays SAEs out in folders.

    Attributes:
        name: Whose layout it is.
        files: The files that it is known by: all of them lie in the folder.
        beside: Further files that are read where they are there; "../" before those of the folder above.
        read: Reads a folder. It raises ModelFileError or InputError.
        holds: What of the library's is read, for the documentation.
        hook: What tells the hook point, for the documentation.
        fetched: False for what is no SAE, and is not downloaded as one.
    """

    name: str
    files: tuple[str, ...]
    beside: tuple[str, ...]
    read: Callable[[Path, Asked], StoredSae]
    holds: str = ""
    hook: str = ""
    fetched: bool = True


_registered: dict[str, Layout] = {}


def register(layout: Layout) -> Layout:
    """Adds a layout to those that can be read.

    Args:
        layout: The layout.

    Raises:
        InputError: There is one of that name, or one known by the same files.
    """
    for other in _registered.values():
        if other.name == layout.name or other.files == layout.files:
            raise InputError(f"{layout.name}: the layout {other.name!r} has this name, or is known by the same files.")
    _registered[layout.name] = layout
    return layout


def layouts() -> tuple[Layout, ...]:
    """All layouts that can be read, in the order in which a folder is tried."""
    return tuple(_registered.values())


def read_folder(folder: Path, asked: Asked) -> StoredSae:
    """Reads the SAE in a folder.

    Args:
        folder: The folder.
        asked: What the user says of it.

    Raises:
        ModelFileError: There is no such folder, none of the layouts is in it, or a file in it is damaged.
        InputError: It does not say which hook point the SAE reads, and neither did the user.
    """
    if not folder.is_dir():
        raise ModelFileError(f"{folder}: no such folder. An SAE lies in a folder: {_known()}.")
    there = {path.name for path in folder.iterdir()}
    for layout in layouts():
        if there.issuperset(layout.files):
            return _read(layout, folder, asked)
    raise ModelFileError(f"{folder}: {refusal(sorted(there))}")


def _read(layout: Layout, folder: Path, asked: Asked) -> StoredSae:
    """Reads a folder of a known layout; what its settings may not be is said of the folder."""
    try:
        return layout.read(folder, asked)
    except ModelFileError:
        raise
    except InputError as error:
        raise ModelFileError(f"{folder}: {error}") from error


def refusal(names: Iterable[str]) -> str:
    """Why files are no SAE that can be read, and what to do.

    Args:
        names: The files' names.
    """
    files = list(names)
    pickles = [name for name in files if name.endswith(PICKLES)]
    if pickles:
        return (
            f"{pickles[0]} is a pickle, which runs code when it is opened: graphlens reads none. Convert it once, where you "
            f"trust it: safetensors.torch.save_file(torch.load({pickles[0]!r}, weights_only=True), "
            f"'{Path(pickles[0]).stem}.safetensors'); SAELens's SAE.save_model(folder) writes a folder that is read."
        )
    for layout in layouts():
        if not layout.fetched and set(layout.files) <= set(files):
            return f"these are {layout.name}, which are no SAE of one hook point: {layout.holds}, of a local folder."
    return f"no SAE that can be read ({', '.join(files)[:200] or 'nothing in it'}). Folders hold: {_known()}."


def _known() -> str:
    """The files of each layout, for an error."""
    return "; ".join(f"{' and '.join(layout.files)} ({layout.name})" for layout in layouts())


class Tensors:
    """The tensors of a safetensors file as an SAE's weights: float32, and where they lie.

    Args:
        path: The file.

    Attributes:
        names: What the file holds.
        weights: What ``take`` and ``put`` gathered.
        files: Where it lies, as far as it is in the file as it is.
    """

    def __init__(self, path: Path) -> None:
        self._file = SafetensorsFile(path)
        self.names = set(self._file.entries)
        self.weights: dict[str, Array] = {}
        self.files: dict[str, tuple[Path, TensorEntry]] = {}

    def array(self, name: str) -> Array:
        """One tensor, float32: a view of the mapped file, or a copy where the file has another dtype.

        Args:
            name: Its name in the file.

        Raises:
            ModelFileError: The file lacks it, or what it says of it does not fit.
        """
        try:
            found = as_float(self._file, name)
        except ModelFileError:
            raise
        except ValueError as error:
            raise ModelFileError(
                f"{self._file.path}: tensor {name!r} has other bytes than its shape ({error})."
            ) from error
        return found if found.dtype == np.float32 else found.astype(np.float32)

    def take(self, weight: str, name: str, transposed: bool = False) -> None:
        """Makes a tensor of the file a weight.

        Args:
            weight: The weight's name.
            name: The tensor's.
            transposed: True if the file has the axes the other way around.

        Raises:
            ModelFileError: The file lacks it.
        """
        array = self.array(name)
        self.weights[weight] = array.T if transposed else array
        if not transposed and self._file.entries[name].dtype == "F32":
            self.files[weight] = (self._file.path, self._file.entries[name])

    def first(self, *names: str) -> str | None:
        """The first of some names that the file has; None for none."""
        return next((name for name in names if name in self.names), None)

    def put(self, weight: str, array: Array) -> None:
        """Adds a weight that was computed, or puts it in the place of one.

        Args:
            weight: Its name.
            array: Its values.
        """
        self.weights[weight] = np.asarray(array, np.float32)
        self.files.pop(weight, None)

    def stored(self, cfg: SaeConfig) -> StoredSae:
        """The SAE, once all its weights are there.

        Args:
            cfg: Its settings.
        """
        return StoredSae(cfg, self.weights, self.files)


def settings_of(path: Path) -> dict[str, Json]:
    """What a JSON file of settings says, which has to be there.

    Args:
        path: The file.

    Raises:
        ModelFileError: It is absent, or no JSON object.
    """
    found = read_settings(path)
    if not found:
        raise ModelFileError(f"{path}: it is absent or empty. Put the original file back.")
    return found


def text_in(settings: Mapping[str, Json], *names: str) -> str | None:
    """The first text among some settings; None where none is text."""
    return next((value for name in names if isinstance(value := settings.get(name), str) and value), None)


def whole_in(settings: Mapping[str, Json], *names: str) -> int | None:
    """The first whole number among some settings; None where none is one."""
    return next((value for name in names if type(value := settings.get(name)) is int), None)
