"""What a file holds, as a SHA-256 of every byte: taken once, and remembered until the file is touched."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import NamedTuple

from graphlens.errors import ModelFileError
from graphlens.file.folder import cache_root, write_whole
from graphlens.file.inside import open_regular, read_regular
from graphlens.file.leftovers import remove_stale

_CHUNK = 1 << 22
_SMALL = 1 << 18  # bytes that are hashed as fast as a record is read
MOST = 1_000  # records in the cache; the oldest go first
TAKEN: dict[Mark, str] = {}  # what this process knows


class Mark(NamedTuple):
    """What changes when a file is written or replaced.

    Attributes:
        size: Bytes.
        mtime_ns: When its content was changed, as far as it says.
        ctime_ns: When the file system last changed anything about it, in nanoseconds.
        inode: Its number in the file system.
        device: The file system's number.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, path: Path) -> Mark | None:
        """The mark of a file; None where there is none.

        Args:
            path: The file. Links are followed.
        """
        try:
            return cls._from(os.stat(path))
        except OSError:
            return None

    @classmethod
    def _from(cls, stat: os.stat_result) -> Mark:
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev)

    @classmethod
    def of_open(cls, descriptor: int) -> Mark:
        """The mark of an open file.

        Args:
            descriptor: Its number in this process.
        """
        return cls._from(os.fstat(descriptor))


def digest_of(path: Path) -> str:
    """The SHA-256 of a file's content. It is read again only if the file was touched since it was last taken.

    What is remembered lies in the cache folder; where that cannot be written, each process takes the digest anew. It is
    the file's under whatever name: renaming it or giving it a hardlink loses nothing.

    Args:
        path: A regular file. Links are followed.

    Returns:
        The digest, as hexadecimal digits.

    Raises:
        ModelFileError: It is no regular file, or it was written to meanwhile.
        OSError: It cannot be read.
    """
    now = Mark.of(path)
    if now is not None and now.size > _SMALL:
        known = TAKEN.get(now) or _remembered(now)
        if known is not None:
            TAKEN[now] = known
            return known
    return fresh_digest(path)


def fresh_digest(path: Path) -> str:
    """The same as ``digest_of``, but every byte is read now.

    Args:
        path: A regular file. Links are followed.

    Returns:
        The digest, as hexadecimal digits.

    Raises:
        ModelFileError: It is no regular file, or it was written to meanwhile.
        OSError: It cannot be read.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        # Whoever has the file mapped may write into a page again that is dirty already, and its times stay: they move at
        # the first write into a page that is on the disk.
        with contextlib.suppress(OSError):
            os.fsync(file.fileno())
        before = Mark.of_open(file.fileno())
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
        after = Mark.of_open(file.fileno())
    if (before.size, before.mtime_ns) != (after.size, after.mtime_ns):
        raise ModelFileError(f"{path}: something is writing to this file. Try again when it is finished.")
    sha256 = digest.hexdigest()
    if after.size > _SMALL and settled(after):
        TAKEN[after] = sha256
        _remember(after, sha256)
    return sha256


def settled(mark: Mark) -> bool:
    """False if a file was touched so lately that another write may leave the same mark: a file system's clock ticks.

    Args:
        mark: The file's mark.
    """
    changed = mark.mtime_ns if os.name == "nt" else mark.ctime_ns  # there, ctime is when the file was created
    tick = 50_000_000 if changed % 1_000_000_000 else 2_000_000_000  # ns; some file systems count whole seconds
    return time.time_ns() - changed > tick


def _place(mark: Mark) -> Path:
    """The file in the cache that holds the record of a file."""
    return cache_root() / "digests" / f"{mark.device:x}-{mark.inode:x}.json"


def _remembered(mark: Mark) -> str | None:
    """The digest of a file that has this mark still; None where there is no record of it, or none that can be read."""
    try:
        data = json.loads(read_regular(_place(mark)))
        return str(data["sha256"]) if Mark(**data["mark"]) == mark else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ModelFileError):
        return None


def _remember(mark: Mark, sha256: str) -> None:
    """Keeps a record. A cache that cannot be written must not keep a file from being read."""
    place = _place(mark)
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(place.parent)
        records = list(place.parent.glob("*.json"))
        if len(records) >= MOST:
            for record in sorted(records, key=lambda path: path.stat().st_mtime)[: MOST // 2]:
                record.unlink(missing_ok=True)
        said = {name: getattr(mark, name) for name in Mark.__annotations__}
        write_whole(place, json.dumps({"mark": said, "sha256": sha256}).encode())
