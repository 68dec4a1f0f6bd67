"""Which file an entry of a folder is: a regular file, that lies in the folder or where its links may lead."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from graphlens.errors import ModelFileError


def inside(folder: Path, name: str | os.PathLike[str]) -> Path:
    """The path of a folder's entry, once it is known to be a regular file that belongs to the folder.

    A link is followed where it stays inside the folder. In a snapshot of the Hugging Face hub's cache, whose files are
    links to ``blobs``, it may lead anywhere inside the repository's own folder of the cache.

    Args:
        folder: The folder.
        name: The entry's name, relative to the folder.

    Returns:
        The entry itself; a link in it is not resolved.

    Raises:
        ModelFileError: It is no regular file, or a link leaves the folder.
        FileNotFoundError: There is no such entry.
    """
    path = folder / name
    try:
        found = path.resolve(strict=True)
    except RuntimeError as error:  # Python's own, until 3.13, for a link that leads to itself
        raise not_regular(path) from error
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # too long, below a file, with a NUL in it
        raise ModelFileError(f"{str(path)!a:.300}: not the path of a file ({error!s:.200}). Refused.") from error
    if not found.is_relative_to(root_of(folder)):
        raise ModelFileError(
            f"{path}: a link that leaves the folder ({found}). Refused: put a copy or a hardlink of the file in its place."
        )
    if not found.is_file():
        raise not_regular(path)
    return path


def root_of(folder: Path) -> Path:
    """The folder that links in a folder may not leave: itself, or the repository's folder in the hub's cache.

    Args:
        folder: The folder.
    """
    own = folder.resolve()
    for parent in own.parents:
        # The layout of the hub's cache: models--{owner}--{name}/snapshots/{commit}/..., beside blobs/.
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return parent.parent
    return own


def not_regular(path: Path) -> ModelFileError:
    """The error for what is no regular file.

    Args:
        path: The pipe, device or folder.
    """
    return ModelFileError(f"{path}: not a regular file. Refused.")


def open_regular(path: Path) -> BinaryIO:
    """Opens a file to be read, if it is a regular one: a pipe would keep its reader waiting for ever.

    Args:
        path: The file. Links are followed.

    Raises:
        ModelFileError: It is a pipe, a device or a folder.
        OSError: It cannot be opened.
    """
    # Only Windows has O_BINARY, and only the others have O_NONBLOCK.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    if not stat.S_ISREG(path.stat().st_mode):  # to open a device may do something, and Windows opens no folder
        raise not_regular(path)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise not_regular(path)
    return open(descriptor, "rb")


def read_regular(path: Path, most: int | None = None) -> bytes:
    """The content of a regular file.

    Args:
        path: The file. Links are followed.
        most: How many bytes it may have; None for any number.

    Raises:
        ModelFileError: It is a pipe, a device or a folder, or larger.
        OSError: It cannot be read.
    """
    with open_regular(path) as file:
        data = file.read(-1 if most is None else most + 1)
    if most is not None and len(data) > most:
        raise ModelFileError(f"{path}: more than {most:,} bytes, too many for such a file. Refused.")
    return data
