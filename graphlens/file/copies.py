"""Files of their own for a folder: copies that share the original's blocks where the system can, copies, or hardlinks."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from graphlens.errors import ExportError
from graphlens.file.folder import to_disk
from graphlens.file.leftovers import partial_of, size_of

Announce = Callable[[str], None]
"""Takes a line of text for people."""
LARGE = 100_000_000  # bytes of a file whose copying is announced before it begins
_FICLONE = 0x40049409  # Linux's request for a copy that shares its blocks with the original until one is changed
# What a file system or its rules answer where there is no hardlink.
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)


@dataclass(frozen=True)
class Placed:
    """How files came into a folder.

    Attributes:
        copied: The bytes that were written for them.
        shared: How each of the others shares its bytes with the original: name -> "hardlinked" or "cloned".
    """

    copied: int
    shared: Mapping[str, str]

    def line(self, folder: Path) -> str:
        """How much was written into a folder altogether, as text for people: "551.2 MB written"."""
        rest = sum(size_of(folder / name) for name in self.shared)
        others = "".join(
            f"; {name} {how} ({size_of(folder / name) / 1e6:,.1f} MB)" for name, how in self.shared.items()
        )
        return f"{(size_of(folder) - rest) / 1e6:,.1f} MB written{others}"


def place(files: Mapping[str, Path], folder: Path, link: bool = False, announce: Announce = lambda _: None) -> Placed:
    """Gives a folder files of its own, each of which is there whole or not at all.

    A copy shares the original's blocks where the file system can do that, so that it takes no space and no time. A
    hardlink is the same file under a second name: onnx refuses to read weights that have two.

    Args:
        files: Name in the folder -> the original. Symlinks are followed. What has the name already is replaced.
        folder: The folder.
        link: True makes hardlinks where the file system has them.
        announce: Called with a line of text before a large file is copied, or one that cannot be hardlinked.

    Returns:
        How they came there.

    Raises:
        ExportError: There is not enough room for the copies. Nothing is copied then.
        OSError: They cannot be written, or there is no such file.
    """
    shared: dict[str, str] = {}
    waiting: dict[str, Path] = {}
    for name, source in files.items():
        original = source.resolve(strict=True)
        if link and _linked(original, folder / name):
            shared[name] = "hardlinked"
        elif not link and clone(original, folder / name):
            shared[name] = "cloned"
        else:
            waiting[name] = original
    sizes = {name: original.stat().st_size for name, original in waiting.items()}
    ensure_room(folder, sum(sizes.values()), can_link=not link)
    for name, original in waiting.items():
        why = ": it cannot be hardlinked there" if link else ""
        if why or sizes[name] >= LARGE:
            announce(f"Copying {name} ({sizes[name] / 1e6:,.0f} MB){why}")
        _copied(original, folder / name)
    return Placed(sum(sizes.values()), shared)


def ensure_room(folder: Path, size: int, can_link: bool = False) -> None:
    """Makes sure that so many bytes can be written into a folder, before the first of them is.

    Args:
        folder: The folder, which is there.
        size: Bytes.
        can_link: True if a hardlink would do instead, for the error.

    Raises:
        ExportError: Less is free.
    """
    import shutil  # slow to load, and not needed to open a model

    free = shutil.disk_usage(folder).free
    if size > free:
        shown = folder.parent if folder.name.endswith(".partial") else folder
        other = ", or hardlink the weights instead of copying them (--link, link=True)" if can_link else ""
        raise ExportError(
            f"{shown}: {size / 1e6:,.1f} MB would be written there, and {free / 1e6:,.1f} MB are free. Free some space, "
            f"choose another folder{other}."
        )


def _linked(original: Path, target: Path) -> bool:
    """Gives a file a second name; False where the file system has no hardlinks. Never a symlink: ONNX Runtime refuses
    one that leaves the folder."""
    partial = partial_of(target)
    try:
        os.link(original, partial)
        os.replace(partial, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        return False
    finally:
        # Of two names of one file a rename makes none vanish.
        partial.unlink(missing_ok=True)
    return True


def clone(original: Path, target: Path) -> bool:
    """Copies a file so that the copy shares its blocks with the original until one of the two is changed.

    Args:
        original: The file.
        target: The copy, which is there whole or not at all.

    Returns:
        False where the system or the file system cannot do that. Nothing is written then.
    """
    if sys.platform != "linux":
        return False
    import fcntl

    partial = partial_of(target)
    try:
        with original.open("rb") as source, partial.open("xb") as copy:
            try:
                fcntl.ioctl(copy.fileno(), _FICLONE, source.fileno())
            except OSError:  # each file system has its own answer, and copying has still to be tried
                return False
        to_disk(partial)
        os.replace(partial, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
    return True


def _copied(original: Path, target: Path) -> None:
    """Copies a file."""
    import shutil  # slow to load, and not needed to open a model

    partial = partial_of(target)
    try:
        shutil.copyfile(original, partial)
        to_disk(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
