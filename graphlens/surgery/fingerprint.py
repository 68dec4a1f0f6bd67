"""Fingerprints of weights files: is this the file the graph was made for?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from graphlens.errors import ModelFileError
from graphlens.file.digests import digest_of, fresh_digest
from graphlens.file.inside import inside
from graphlens.file.manifest import WeightFile
from graphlens.file.safetensors import SafetensorsFile


def fingerprint(path: Path) -> WeightFile:
    """The fingerprint of a file: all of it is read, unless its digest is remembered and the file was not touched since.

    Args:
        path: A weights file.

    Returns:
        The fingerprint.

    Raises:
        ModelFileError: The file is missing, or no regular file.
    """
    return WeightFile(path.stat().st_size, digest_of(path))


def verify_weights(folder: Path, files: Mapping[str, WeightFile], whole: bool = False) -> None:
    """Compares the weights files of a folder with their recorded fingerprints.

    Args:
        folder: The folder.
        files: File name -> its recorded fingerprint.
        whole: True reads every byte now, False only of files that were touched since they were last read whole.

    Raises:
        ModelFileError: A file is missing, damaged or another model's.
    """
    for name, expected in files.items():
        try:
            path = inside(folder, name)
            size = path.stat().st_size
            if size != expected.size:
                raise ModelFileError(
                    f"{path}: {size:,} bytes where the graph expects {expected.size:,}. Export the model again."
                )
            SafetensorsFile(path)  # it says what is wrong with a damaged file
            found = (fresh_digest if whole else digest_of)(path)
        except FileNotFoundError as error:
            raise ModelFileError(f"{folder / name}: the weights file is missing. Export the model again.") from error
        except OSError as error:
            raise ModelFileError(f"{folder / name}: cannot be read ({error.strerror or error}).") from error
        if found != expected.sha256:
            raise ModelFileError(
                f"{path}: these are not the weights this graph was exported with (their SHA-256 differs). "
                "Put the original file back, or export the model again."
            )
