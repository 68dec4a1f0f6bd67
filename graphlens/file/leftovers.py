"""What is being written and by whom, as far as names tell, and how what dead processes left of it is removed."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ABANDONED = 24 * 3600  # seconds in which nobody wrote to what another machine's process began: it died
LOCK_WAIT = 60  # seconds; what is done under a lock takes milliseconds
# Who writes a file: machine, process, and a number of its own. See partial_of and provisional.
_MARK = re.compile(
    r"(?P<name>.*)\.(?P<machine>[0-9a-f]{8})-(?P<process>[0-9]+)-[0-9a-f]{16}(?P<end>\.[^.]*)", re.DOTALL
)


def partial_of(target: Path) -> Path:
    """Where to write what becomes a file or folder at the end: a new name in the same folder.

    Args:
        target: The file or folder.

    Returns:
        ``.{target}.{machine}-{process}-{random}.partial``, by which ``remove_stale`` sees who writes it.
    """
    return target.with_name(f".{_cut(target.name)}.{_mark()}.partial")


def provisional(target: Path) -> Path:
    """A second name for a file that changes together with another, which names it.

    The new content gets this name first, so that no moment passes in which the old one of the two meets the new other.

    Args:
        target: The file.

    Returns:
        ``{target}.{machine}-{process}-{random}{ending}``. ``remove_stale`` removes it when its process is no more and no
        other file names it.
    """
    return target.with_name(f"{_cut(target.stem)}.{_mark()}{target.suffix or '.bin'}")


def _cut(name: str) -> str:
    """The beginning of a name: a name of full length would be too long with more behind it."""
    return os.fsencode(name)[:160].decode(errors="ignore")


def _mark() -> str:
    return f"{_machine()}-{os.getpid()}-{os.urandom(8).hex()}"


def remove_stale(folder: Path) -> None:
    """Removes what killed processes left in a folder: partial files and folders, and provisional names nothing uses.

    Those of this machine's running processes stay. Of another machine's processes nothing is known here (a container is
    a machine): what they left goes when nothing was written to it for a day. What cannot be removed stays.

    Args:
        folder: The folder.
    """
    try:
        entries = [(entry, _MARK.fullmatch(entry.name)) for entry in os.scandir(folder)]
    except OSError:
        return
    for entry, mark in entries:
        if mark is None or (mark["end"] == ".partial" and not mark["name"].startswith(".")):
            continue
        path = Path(entry.path)
        ours = mark["machine"] == _machine()
        if is_running(int(mark["process"])) if ours else _written(path) > time.time() - ABANDONED:
            continue
        if mark["end"] != ".partial" and _is_named(path, mark["name"]):
            continue
        remove(path)


def remove(path: Path) -> None:
    """Removes a file or a folder as far as that is possible; a link is removed, and not what it leads to."""
    import shutil  # slow to load, and not needed to open a model

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink()


def remove_whole(path: Path) -> None:
    """Removes a file or folder that others look for, so that it is gone at once: nobody finds half of it.

    Args:
        path: The file or folder. Where there is none, or it cannot be removed, nothing happens.
    """
    doomed = partial_of(path)
    with contextlib.suppress(OSError):
        os.replace(path, doomed)
        remove(doomed)


def clear(folder: Path) -> int:
    """Removes a folder of the cache with all that lies in it, but for what a running process is making there.

    Args:
        folder: The folder.

    Returns:
        How many bytes the removed files had.
    """
    before = size_of(folder)
    remove_stale(folder)
    for path in folder.iterdir() if folder.is_dir() else ():
        if not path.name.endswith(".partial"):
            remove_whole(path)
    with contextlib.suppress(OSError):  # not empty: something is being made there
        folder.rmdir()
    return before - size_of(folder)


def size_of(path: Path) -> int:
    """The bytes of a file, or of all files in a folder; what vanishes meanwhile counts nothing."""
    total = 0
    for item in (path, *path.rglob("*")):
        with contextlib.suppress(OSError):
            total += item.lstat().st_size if item.is_file() else 0
    return total


def _written(path: Path) -> float:
    """When something was last written to a file, or in a folder: seconds since 1970."""
    times = [0.0]
    for item in (path, *path.rglob("*")):
        with contextlib.suppress(OSError):
            times.append(item.lstat().st_mtime)
    return max(times)


def _is_named(path: Path, stem: str) -> bool:
    """True if a graph or a JSON file beside a file names it, or one that cannot be read may do so."""
    for other in path.parent.iterdir():
        if other == path or not (other.suffix in (".onnx", ".json") or other.name.startswith(stem)):
            continue
        try:
            if other.is_file() and os.fsencode(path.name) in other.read_bytes():
                return True
        except OSError:
            return True
    return False


def _machine() -> str:
    """A mark of this machine, under whose name its processes have their ids. A container counts as a machine."""
    import hashlib  # both are slow to load, and not needed to open a model
    import platform

    try:
        processes = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        processes = 0
    return hashlib.sha256(f"{platform.node()} {processes}".encode()).hexdigest()[:8]


def is_running(process: int) -> bool:
    """False if no process of this machine has that id, or only a dead one that nobody has asked after."""
    if sys.platform == "win32":
        return True  # there, os.kill ends the process that it is asked about
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    try:
        state = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except (OSError, IndexError):
        return True
    return state not in (b"Z", b"X")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes and threads that ask for the same lock out of a folder during the ``with`` block.

    The lock ends with its process. Where the system or the file system has no locks, nothing is kept out.

    Args:
        folder: The folder.

    Raises:
        TimeoutError: Another process held the lock for a minute.
    """
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        handle = -1
    try:
        end = time.monotonic() + LOCK_WAIT
        while handle >= 0:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TimeoutError(errno.ETIMEDOUT, "another process is writing there", str(folder)) from None
                time.sleep(0.01)
                continue
            except OSError:
                pass  # no locks on this file system
            break
        yield
    finally:
        if handle >= 0:
            os.close(handle)
