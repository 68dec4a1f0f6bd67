"""The two files of a sweep's result: JSON for names and metadata, safetensors for the arrays."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphlens.analysis.arrays import Array
from graphlens.errors import InputError
from graphlens.file.folder import user_path
from graphlens.file.manifest import Json
from graphlens.file.pair import read_pair, write_pair

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
    given = user_path(path)
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
        The JSON's path. Until it is in place, an earlier save is valid as it was; see ``write_pair``.

    Raises:
        InputError: Where they cannot be written.
    """

    def text(more: Mapping[str, Json]) -> str:
        whole = {"format": FORMAT, "version": FORMAT_VERSION, **record, **more}
        return json.dumps(whole, indent=1, sort_keys=True, allow_nan=False) + "\n"

    target, _ = saved_files(path)
    try:
        write_pair(target, FORMAT, text, arrays)
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
        text, data = read_pair(source)
        record = json.loads(text)
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise InputError(f"{source}: this is not the result of a sweep.")
        version = record.get("version")
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise InputError(
                f"{source}: version {version}, and this graphlens reads up to {FORMAT_VERSION}. Update it."
            )
        if data is None:
            raise InputError(f"{beside}: missing, or of another save than {source.name}: the digest differs.")
        return record, load(data)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: no such file. A result is two: {source.name}, {beside.name}.") from error
    except (
        OSError,
        ValueError,
        RecursionError,
        SafetensorError,
        AttributeError,
        KeyError,
    ) as error:  # the last two: a dtype that NumPy lacks
        raise InputError(f"{source}: damaged, it cannot be read ({type(error).__name__}: {error}).") from error
