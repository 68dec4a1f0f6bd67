"""Fingerprints of weights files: is this the file the graph was made for? Answered at every open, in milliseconds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from graphlens.errors import ModelFileError
from graphlens.file.manifest import WeightFile
from graphlens.file.safetensors import SafetensorsFile

_SAMPLES = 8  # windows per tensor
_WINDOW = 16  # bytes per window
_CHUNK = 1 << 22


def _samples_digest(file: SafetensorsFile) -> str:
    """SHA-256 of evenly strided windows of every tensor, first and last included.

    Plain reads: through a memory map each window would pull a large chunk of the file into this process.
    """
    digest = hashlib.sha256()
    with file.path.open("rb", buffering=0) as raw:
        for name in sorted(file.entries):
            entry = file.entries[name]
            room = max(entry.length - _WINDOW, 0)
            for index in range(_SAMPLES):
                raw.seek(entry.offset + room * index // (_SAMPLES - 1))
                digest.update(raw.read(min(_WINDOW, entry.length)))
    return digest.hexdigest()


def sha256_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """The SHA-256 of a whole file.

    Args:
        path: The file.
        progress: Told the number of bytes of each chunk that was read.

    Returns:
        The digest, as hexadecimal digits.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return digest.hexdigest()


def quick_fingerprint(path: Path) -> WeightFile:
    """What an open compares: the fingerprint without the digest of the whole file, which is left empty.

    Args:
        path: A safetensors file. A few KB of it are read.

    Returns:
        The fingerprint.

    Raises:
        ModelFileError: The file is missing or malformed.
    """
    file = SafetensorsFile(path)
    return WeightFile(file.size, hashlib.sha256(file.header).hexdigest(), _samples_digest(file), "")


def fingerprint(path: Path) -> WeightFile:
    """The whole fingerprint.

    Args:
        path: A safetensors file. All of it is read.

    Returns:
        The fingerprint.

    Raises:
        ModelFileError: The file is missing or malformed.
    """
    return replace(quick_fingerprint(path), sha256=sha256_file(path))


def verify_weights(folder: Path, files: Mapping[str, WeightFile], whole: bool = False) -> None:
    """Compares the weights files of a folder with their recorded fingerprints.

    Args:
        folder: The folder.
        files: File name -> its recorded fingerprint.
        whole: True compares all bytes too, and not only samples of each tensor.

    Raises:
        ModelFileError: A file is missing, shortened or another model's.
    """
    for name, expected in files.items():
        path = folder / name
        found = quick_fingerprint(path)
        if found.size != expected.size:
            raise ModelFileError(
                f"{path}: {found.size:,} bytes where the graph expects {expected.size:,}. Export the model again."
            )
        if (found.header_sha256, found.samples_sha256) != (expected.header_sha256, expected.samples_sha256):
            raise ModelFileError(
                f"{path}: these are not the weights this graph was exported with (fingerprints differ). "
                "Put the original file back, or export the model again."
            )
        if whole and sha256_file(path) != expected.sha256:
            raise ModelFileError(f"{path}: its SHA-256 differs from the one recorded at export: the file was altered.")
