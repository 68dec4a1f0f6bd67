"""Where the files of a harvest lie, each there whole or not at all: a folder of this machine, or objects behind a URL."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from graphlens.errors import ExportError, InputError, ModelFileError
from graphlens.file.digests import fresh_digest
from graphlens.file.folder import make_folder, refuse_occupied, to_disk, write_whole
from graphlens.file.inside import read_regular
from graphlens.file.leftovers import partial_of, remove_stale
from graphlens.file.remote import failing, fetched, fetched_content, filesystem, local_path, make_room, scratch, url_of

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


class HarvestFolder:
    """A folder of this machine.

    Args:
        path: The folder. There need be none.

    Attributes:
        place: The folder as a user names it.
        at_once: Whether the room must be enough for all files together.
    """

    at_once = True

    def __init__(self, path: Path) -> None:
        self.place: Path | str = path
        self._path = path

    def __str__(self) -> str:
        return str(self.place)

    def at(self, name: str) -> str:
        """A file of it in words.

        Args:
            name: The file's name, as for the other methods.
        """
        return str(self._path / name)

    def make(self) -> None:
        """Makes the folder. Raises InputError where that cannot be."""
        make_folder(self._path)

    @property
    def everywhere(self) -> str:
        """Its name for processes that began elsewhere: the path in full."""
        return os.path.abspath(self._path)

    def tidy(self) -> None:
        """Removes what killed processes left in it."""
        remove_stale(self._path)

    def names(self) -> list[str]:
        """What lies in it."""
        return sorted(path.name for path in self._path.iterdir()) if self._path.is_dir() else []

    def refuse_occupied(self) -> None:
        """Raises ExportError where it is there and not empty."""
        refuse_occupied(self._path)

    def has(self, name: str) -> bool:
        """True if there is such a file."""
        return (self._path / name).is_file()

    def read(self, name: str) -> bytes:
        """A file's content. Raises OSError, FileNotFoundError where there is none."""
        return read_regular(self._path / name)

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, in the place of one that is there. Raises OSError."""
        write_whole(self._path / name, data)

    def remove(self, name: str) -> None:
        """Removes a file, if there is one."""
        (self._path / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def becoming(self, name: str) -> Iterator[Path]:
        """A new file of this machine that becomes another at the end, whole, or vanishes on an error. Raises OSError."""
        place = self._path / name
        partial = partial_of(place)
        try:
            yield partial
            to_disk(partial)
            os.replace(partial, place)
            to_disk(place.parent)
        finally:
            partial.unlink(missing_ok=True)

    def sealed(self, name: str) -> tuple[str, int]:
        """The SHA-256 and the size of a file that ``becoming`` has just made."""
        return fresh_digest(self._path / name), (self._path / name).stat().st_size

    def digest(self, name: str) -> str:
        """The SHA-256 of a file, every byte of which is read."""
        return fresh_digest(self._path / name)

    def mapped(self, name: str, digest: str | None = None) -> Path:
        """A file of this machine with the content of one, to be mapped.

        Args:
            name: The file's name.
            digest: What it must hold; None where that is not known.
        """
        return self._path / name

    @contextlib.contextmanager
    def beside(self, name: str) -> Iterator[Path]:
        """A new file of this machine for what is needed for a while; it is gone after the ``with`` block."""
        partial = partial_of(self._path / name)
        try:
            yield partial
        finally:
            partial.unlink(missing_ok=True)

    def room(self, wanted: int) -> int:
        """Free bytes for new files. See ``at_once``.

        Args:
            wanted: How many are needed: of what need not be kept, so much is removed.
        """
        return shutil.disk_usage(self._path).free

    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self._path.iterdir() if path.is_file())


class RemoteFolder(HarvestFolder):
    """Objects behind a URL. Each is written to the cache's disk and put there by one request, and fetched to be mapped.

    Args:
        url: The URL that their names begin with.
    """

    at_once = False

    def __init__(self, url: str) -> None:
        self.place = url.rstrip("/")
        self._root = filesystem(url)[1]
        self._sealed: dict[str, tuple[str, int]] = {}

    def at(self, name: str) -> str:
        """An object in words: its URL."""
        return f"{self.place}/{name}"

    @property
    def _system(self) -> AbstractFileSystem:
        """Asked for each time: one that a process has from before a fork does nothing there."""
        return filesystem(str(self.place))[0]

    def _key(self, name: str) -> str:
        return f"{self._root}/{name}"

    @property
    def everywhere(self) -> str:
        """The URL."""
        return str(self.place)

    def tidy(self) -> None:
        """Does nothing: an object that is not whole is not there."""

    def make(self) -> None:
        """Does nothing: there are no folders, and a bucket that is missing is found by the first write."""

    def names(self) -> list[str]:
        """What lies there. Raises InputError where that cannot be asked."""
        try:
            with failing(str(self)):
                found = self._system.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InputError(f"{self}: cannot be looked into ({error.strerror or error}).") from error
        names = {str(path).rstrip("/").rpartition("/")[2] for path in found if str(path).rstrip("/") != self._root}
        return sorted(names - {""})

    def refuse_occupied(self) -> None:
        """Raises ExportError where there is any object."""
        if self.names():
            raise ExportError(f"{self}: there are objects already. Choose another place.")

    def has(self, name: str) -> bool:
        """True if there is such an object. Raises InputError where that cannot be asked."""
        try:
            with failing(self.at(name)):  # not isfile, which calls missing what could not be asked for
                return str(self._system.info(self._key(name))["type"]) == "file"
        except FileNotFoundError:
            return False
        except OSError as error:
            raise InputError(f"{self.at(name)}: cannot be looked for ({error.strerror or error}).") from error

    def read(self, name: str) -> bytes:
        """An object's content. Raises OSError, FileNotFoundError where there is none."""
        with failing(self.at(name)):
            return bytes(self._system.cat_file(self._key(name)))

    def write(self, name: str, data: bytes) -> None:
        """Puts an object, in the place of one that is there. Raises OSError."""
        with failing(self.at(name)):
            self._system.pipe_file(self._key(name), data)

    def remove(self, name: str) -> None:
        """Removes an object, if there is one. Raises OSError."""
        with failing(self.at(name)), contextlib.suppress(FileNotFoundError):
            self._system.rm_file(self._key(name))

    @contextlib.contextmanager
    def becoming(self, name: str) -> Iterator[Path]:
        """A new file of this machine that is put as an object at the end, unless there was an error. Raises OSError."""
        with self.beside(name) as partial:
            yield partial
            self._sealed[name] = fresh_digest(partial), partial.stat().st_size
            with failing(self.at(name)):
                self._system.put_file(str(partial), self._key(name))

    def sealed(self, name: str) -> tuple[str, int]:
        """The SHA-256 and the size of what was put."""
        return self._sealed[name]

    def digest(self, name: str) -> str:
        """The SHA-256 of an object, every byte of which is fetched. Raises ModelFileError where it cannot be."""
        digest = hashlib.sha256()
        try:
            with failing(self.at(name)), self._system.open(self._key(name), "rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
        except OSError as error:
            raise ModelFileError(f"{self.at(name)}: cannot be read ({error.strerror or error}).") from error
        return digest.hexdigest()

    def mapped(self, name: str, digest: str | None = None) -> Path:
        """A file of the cache with the content of an object. Raises ModelFileError where it cannot be had, or is another."""
        if digest is not None:
            return fetched_content(self.at(name), digest)
        try:
            return fetched(self.at(name))
        except InputError as error:
            raise ModelFileError(str(error)) from error

    @contextlib.contextmanager
    def beside(self, name: str) -> Iterator[Path]:
        """A new file of the cache for what is needed for a while."""
        partial = partial_of(scratch() / name)
        try:
            yield partial
        finally:
            partial.unlink(missing_ok=True)

    def room(self, wanted: int) -> int:
        """Free bytes of the cache's disk, on which a shard at a time lies. Files that were fetched make room for it."""
        return make_room(scratch(), wanted)

    def size(self) -> int:
        """Bytes of all objects. Raises InputError where that cannot be asked."""
        try:
            with failing(str(self)):
                return sum(int(item["size"] or 0) for item in self._system.ls(self._root, detail=True))
        except OSError as error:
            raise InputError(f"{self}: cannot be looked into ({error.strerror or error}).") from error


def folder_of(out: str | os.PathLike[str]) -> HarvestFolder:
    """The folder of a harvest as a user names it.

    Args:
        out: A path, or a URL that fsspec knows: "s3://bucket/acts".

    Raises:
        InputError: It is neither.
        RuntimeUnavailable: The package for such a URL is not installed.
    """
    url = url_of(out)
    return HarvestFolder(local_path(out)) if url is None else RemoteFolder(url)
