"""The two files of a sweep's result: JSON for names and metadata, safetensors for the arrays."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from graphlens.analysis.arrays import Array
from graphlens.errors import InputError
from graphlens.file.folder import write_whole

FORMAT, FORMAT_VERSION = "graphlens.sweep_result", 1


def saved_files(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The paths of a saved result's two files.

    Args:
        path: Either file's path, or that without its ending ("a.b" has none).

    Returns:
        (JSON, safetensors).

    Raises:
        InputError: For a path that names no file.
    """
    given = Path(path)
    if not given.name:
        raise InputError(f"{str(path)!r} names no file.")
    stem = given.name.removesuffix(given.suffix) if given.suffix in (".json", ".safetensors") else given.name
    return given.with_name(f"{stem}.json"), given.with_name(f"{stem}.safetensors")


def write(path: str | os.PathLike[str], record: Mapping[str, Any], arrays: Mapping[str, Array | float]) -> Path:
    """Writes a result; the same result gives the same bytes.

    Args:
        path: Where, as ``saved_files`` takes it.
        record: What JSON can hold.
        arrays: The arrays by name; numbers become arrays of no axes.

    Returns:
        The JSON's path. It holds the digest of the other file, and each is put in place whole.

    Raises:
        InputError: Where they cannot be written.
    """
    from safetensors.numpy import save

    data = save({name: np.ascontiguousarray(array).reshape(np.shape(array)) for name, array in arrays.items()})
    digest = hashlib.sha256(data).hexdigest()
    whole = {"format": FORMAT, "version": FORMAT_VERSION, **record, "safetensors_sha256": digest}
    text = json.dumps(whole, indent=1, sort_keys=True, allow_nan=False) + "\n"
    target, beside = saved_files(path)
    try:
        write_whole(beside, data)
        write_whole(target, text.encode("ascii"))
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error}).") from error
    return target


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Array]]:
    """Reads what ``write`` wrote.

    Args:
        path: As ``saved_files`` takes it.

    Returns:
        (record, arrays).

    Raises:
        InputError: For files that are missing, damaged, not of the same save, or of a newer version.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    source, beside = saved_files(path)
    try:
        record = json.loads(source.read_bytes())
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise InputError(f"{source}: this is not the result of a sweep.")
        version = record.get("version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise InputError(
                f"{source}: version {version}, and this graphlens reads up to {FORMAT_VERSION}. Update it."
            )
        data = beside.read_bytes()
        if hashlib.sha256(data).hexdigest() != record.get("safetensors_sha256"):
            raise InputError(f"{beside}: damaged, or of another save than {source.name}: the digest differs.")
        return record, load(data)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: no such file. A result is two: {source.name}, {beside.name}.") from error
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise InputError(f"{source}: damaged, it cannot be read ({type(error).__name__}: {error}).") from error
