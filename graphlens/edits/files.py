"""Interventions as files: JSON, with the arrays in a safetensors file beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from graphlens.edits.kinds import KINDS, Intervention, checked
from graphlens.edits.record import Array
from graphlens.errors import InputError
from graphlens.file.folder import write_through
from graphlens.file.manifest import Json

FORMAT, FORMAT_VERSION = "graphlens.interventions", 1


def to_json(interventions: Iterable[Intervention] | Intervention) -> tuple[str, dict[str, Array]]:
    """Writes interventions as JSON text, which holds no arrays but only names of them.

    Args:
        interventions: A list of interventions, or one alone.

    Returns:
        (the text, the arrays by the names that the text has for them). The same interventions give the same text.

    Raises:
        InputError: If one of them is no intervention.
    """
    tensors: dict[str, Array] = {}
    records: list[Json] = []
    for index, item in enumerate(checked(interventions)):
        record: dict[str, Json] = {"kind": item.kind}
        for field in fields(item):
            value = getattr(item, field.name)
            if field.name not in ("hook", item.operand) and value == field.default:
                continue
            if isinstance(value, np.ndarray):
                name = f"{index}.{field.name}"
                tensors[name] = value
                value = {"tensor": name}
            elif isinstance(value, slice):
                value = {"slice": [value.start, value.stop, value.step]}
            elif isinstance(value, float) and not np.isfinite(value):
                value = {"number": str(value)}  # JSON has no NaN or infinities
            record[field.name] = value
        records.append(record)
    data = {"format": FORMAT, "version": FORMAT_VERSION, "interventions": records}
    return json.dumps(data, indent=2, allow_nan=False) + "\n", tensors


def from_json(text: str, tensors: Mapping[str, Array] | None = None, where: str = "this JSON") -> list[Intervention]:
    """Reads what ``to_json`` wrote.

    Args:
        text: The JSON text.
        tensors: The arrays that the text names.
        where: How an error calls the text: a file's path, say.

    Returns:
        The interventions, equal to those that were written.

    Raises:
        InputError: If the text is something else, is damaged, or was written by a newer version.
    """
    try:
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']!r}, not {FORMAT!r}")
        version, records = int(data["version"]), list(data["interventions"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{where}: not a file of interventions ({type(error).__name__}: {error}).") from error
    if version > FORMAT_VERSION:
        raise InputError(
            f"{where}: version {version}, and this graphlens reads up to {FORMAT_VERSION}. Update graphlens."
        )
    return [_from_record(record, tensors or {}, f"{where}, intervention {i}") for i, record in enumerate(records)]


def _from_record(record: Json, tensors: Mapping[str, Array], where: str) -> Intervention:
    """One intervention of a file."""
    named = record.get("kind") if isinstance(record, dict) else record
    kind = KINDS.get(named) if isinstance(named, str) else None
    if kind is None or not isinstance(record, dict):
        raise InputError(f"{where}: kind {named!r}; there is {', '.join(KINDS)}.")
    unknown = record.keys() - {"kind", *(field.name for field in fields(kind))}
    if unknown:
        raise InputError(f"{where}: {kind.__name__} has no {sorted(unknown)[0]!r}.")
    try:
        given: dict[str, Any] = {
            name: _from_value(value, tensors, where) for name, value in record.items() if name != "kind"
        }
        return kind(**given)
    except InputError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{where}: {error}.") from error


def _from_value(value: Json, tensors: Mapping[str, Array], where: str) -> Json | Array | slice:
    """The value of one field."""
    if not isinstance(value, dict):
        return value
    match value:
        case {"tensor": str(name), **rest} if not rest:
            if name not in tensors:
                raise InputError(f"{where}: the tensor {name!r} is missing from the safetensors file beside it.")
            return tensors[name]
        case {"slice": [start, stop, step], **rest} if not rest:
            return slice(start, stop, step)
        case {"number": str() | int() | float() as number, **rest} if not rest:
            return float(number)
    raise InputError(f"{where}: {value!r} is neither a number, a tensor nor a slice.")


def save(interventions: Iterable[Intervention] | Intervention, path: str | os.PathLike[str]) -> Path:
    """Writes interventions to a JSON file, and their arrays to a safetensors file beside it.

    Args:
        interventions: A list of interventions, or one alone.
        path: The JSON file. That of the arrays has the same name with the ending ``.safetensors``; where there are no
            arrays, one from an earlier save is removed.

    Returns:
        The JSON file's path.

    Raises:
        InputError: If one of them is no intervention.
        OSError: If the files cannot be written. Each is written whole or not at all, where it is an ordinary file in a
            folder that can be written; links are followed, and a file's permissions stay.
    """
    from safetensors.numpy import save as packed

    text, tensors = to_json(interventions)
    target = Path(path)
    beside = target.with_suffix(".safetensors")
    if tensors:
        write_through(beside, packed({name: np.ascontiguousarray(array) for name, array in tensors.items()}))
    else:
        beside.unlink(missing_ok=True)  # an earlier save's: its arrays would go with another text
    write_through(target, text.encode("utf-8"))
    return target


def load(path: str | os.PathLike[str]) -> list[Intervention]:
    """Reads what ``save`` wrote.

    Args:
        path: The JSON file.

    Returns:
        The interventions, equal to those that were saved.

    Raises:
        InputError: If a file is missing, damaged, something else, or of a newer version.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    source = Path(path)
    beside = source.with_suffix(".safetensors")
    try:
        text = source.read_text(encoding="utf-8")
        tensors = load_file(beside) if beside.is_file() else {}
    except (OSError, UnicodeDecodeError, SafetensorError) as error:
        raise InputError(f"{source}: cannot be read ({error}).") from error
    return from_json(text, tensors, str(source))
