"""A JSON file and the arrays beside it, which change as one: whoever reads finds the old two or the new two, never a mix."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from graphlens.errors import InputError, ModelFileError
from graphlens.file.folder import write_through, write_whole
from graphlens.file.inside import inside, read_regular
from graphlens.file.leftovers import locked, provisional, remove, remove_stale
from graphlens.file.manifest import Json
from graphlens.file.safetensors import Array, SafetensorsFile

ENDING = ".safetensors"
DIGEST, FILE = "safetensors_sha256", "safetensors_file"  # keys in the JSON: of the arrays' bytes, and where they lie
_READS = 20  # of files that change while they are read


def write_pair(
    target: Path, format: str, text: Callable[[Mapping[str, Json]], str], arrays: Mapping[str, Array | float]
) -> None:
    """Writes a JSON file and the arrays that belong to it, in ``target``'s name with the ending ``.safetensors``.

    What was there before is valid until the new JSON is in place, and then the new is. The JSON holds the digest of the
    arrays. While they are replaced it names a file that has them under another name, which is left only by a process
    that is killed then; the next save removes it.

    Args:
        target: The JSON file. Links are followed, and a file's permissions stay. What is no ordinary file (a pipe), or
            lies in a folder that cannot be written, is written in place.
        format: What the two hold. It is written into both, and only arrays that have it are replaced.
        text: Makes the JSON's text, with these keys and values added to it.
        arrays: The arrays by name. Where there are none, those of an earlier save are removed.

    Raises:
        InputError: The file of the arrays would replace one that is something else.
        OSError: They cannot be written.
    """
    from safetensors.numpy import save

    beside = target.with_suffix(ENDING)
    plain = {name: np.ascontiguousarray(array).reshape(np.shape(array)) for name, array in arrays.items()}
    ours = _is_ours(target, beside, format)
    if not plain:
        write_through(target, text({}).encode("utf-8"))
        if ours:
            remove(beside)
        return remove_stale(target.parent)
    if not ours:
        raise InputError(
            f"{beside}: the arrays would be written there, but it is no file of {format}. Choose another name."
        )
    data = save(plain, metadata={"format": format})
    digest = hashlib.sha256(data).hexdigest()
    last = text({DIGEST: digest}).encode("utf-8")
    place = Path(os.path.realpath(beside))
    with locked(target.parent):
        if not (target.exists() and place.is_file() and os.access(place.parent, os.W_OK)):
            first = not place.exists()
            try:
                write_through(beside, data)
                write_through(target, last)
            except OSError:
                if first:
                    remove(place)  # nothing names it
                raise
        elif hashlib.sha256(place.read_bytes()).hexdigest() == digest:
            write_through(target, last)
        else:
            aside = provisional(place)
            try:
                write_whole(aside, data, place.stat().st_mode)
                write_through(target, text({DIGEST: digest, FILE: aside.name}).encode("utf-8"))
            except OSError:
                remove(aside)
                raise
            # It is saved. If the rest fails, a longer name is all that shows.
            with contextlib.suppress(OSError):
                write_through(beside, data)
                write_through(target, last)
                remove(aside)
    remove_stale(target.parent)


def read_pair(target: Path) -> tuple[str, bytes | None]:
    """Reads what ``write_pair`` wrote, or an earlier version that knew no digest.

    Args:
        target: The JSON file. What it holds is the caller's to check.

    Returns:
        The JSON, and the bytes of the arrays; None where it needs none.

    Raises:
        InputError: The JSON is no text, or the arrays are damaged or another save's.
        OSError: A file is missing or cannot be read.
    """
    beside = target.with_suffix(ENDING)
    for _ in range(_READS):
        written = read_regular(target)
        try:
            text = written.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{target}: damaged, or no JSON: it is not text in UTF-8 ({error}).") from error
        record = _record(text)
        digest = record.get(DIGEST)
        if digest is None:
            return text, read_regular(
                inside(beside.parent, beside.name)
            ) if b'"tensor"' in written and beside.is_file() else None
        path = _arrays_of(target, beside, record)
        try:
            data = read_regular(inside(path.parent, path.name))
        except FileNotFoundError:
            data = None
        if data is not None and hashlib.sha256(data).hexdigest() == digest:
            return text, data
        if target.read_bytes() != written:
            continue  # another process saved meanwhile
        if data is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        raise InputError(f"{path}: damaged, or of another save than {target.name}: the digest differs.")
    raise InputError(f"{target}: it is being written again and again, so that it cannot be read.")


def _record(text: str | bytes) -> dict[str, Json]:
    """What a JSON object holds; nothing where it is something else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _arrays_of(target: Path, beside: Path, record: Mapping[str, Json]) -> Path:
    """Where the arrays of a JSON file lie: beside it, under their own name or, after a save was killed, another."""
    named = record.get(FILE)
    if named is None:
        return beside
    if not isinstance(named, str) or named in ("", ".", "..") or set(named) & set("/\\:\0"):
        raise InputError(f"{target}: {FILE} is {named!r}, not the name of a file beside it.")
    return Path(os.path.realpath(beside)).with_name(named)


def _is_ours(target: Path, beside: Path, format: str) -> bool:
    """True if the file of the arrays is absent, or holds those of an earlier save."""
    if not os.path.lexists(beside):
        return True
    with contextlib.suppress(ModelFileError, OSError):
        metadata = _record(SafetensorsFile(beside).header[8:]).get("__metadata__")
        if isinstance(metadata, dict) and metadata.get("format") == format:
            return True
    # Earlier versions wrote no format into it: the JSON tells.
    try:
        text = target.read_bytes() if target.is_file() else b""
    except OSError:
        return False
    record = _record(text)
    return record.get("format") == format and (DIGEST in record or b'"tensor"' in text)
