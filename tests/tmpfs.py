"""A small file system in memory, to be filled up: only root can mount one."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

FILLER = "filler"


@contextlib.contextmanager
def mounted(place: Path, size: int) -> Iterator[Path]:
    """Mounts a file system of so many bytes, or skips the test where that may not be."""
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"file systems cannot be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def leave(disk: Path, size: int) -> Path:
    """Fills a disk until so many bytes are free."""
    filler = disk / FILLER
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(shutil.disk_usage(disk).free - size, 1))
    assert shutil.disk_usage(disk).free <= size + 4096
    return filler
