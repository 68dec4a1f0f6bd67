"""Interventions as files: JSON, with the arrays in a safetensors file beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graphlens.edits.kinds import KINDS, Intervention, checked
from graphlens.errors import InputError

Array = npt.NDArray[Any]
FORMAT, FORMAT_VERSION = "graphlens.interventions", 1


def to_json(interventions: Iterable[Intervention] | Intervention) -> tuple[str, dict[str, Array]]:
    """(JSON text, arrays by the names that the text refers to them by)."""
    tensors: dict[str, Array] = {}
    records = []
    for index, item in enumerate(checked(interventions)):
        record: dict[str, Any] = {"kind": item.kind}
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
    """The interventions that ``to_json`` wrote. Raises InputError for what is none, or of a newer version."""
    try:
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']!r}, not {FORMAT!r}")
        version, records = int(data["version"]), list(data["interventions"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{where}: not a file of interventions ({type(error).__name__}: {error}).") from error
    if version > FORMAT_VERSION:
        raise InputError(
            f"{where}: version {version}, and this graphlens reads up to {FORMAT_VERSION}. Update graphlens."
        )
    return [_from_record(record, tensors or {}, f"{where}, intervention {i}") for i, record in enumerate(records)]


def _from_record(record: Any, tensors: Mapping[str, Array], where: str) -> Intervention:
    if not isinstance(record, dict) or record.get("kind") not in KINDS:
        found = record.get("kind") if isinstance(record, dict) else record
        raise InputError(f"{where}: kind {found!r}; there is {', '.join(KINDS)}.")
    kind = KINDS[record["kind"]]
    known = {field.name for field in fields(kind)}
    given = {name: _from_value(value, tensors, where) for name, value in record.items() if name != "kind"}
    if set(given) - known:
        raise InputError(f"{where}: {kind.__name__} has no {sorted(set(given) - known)[0]!r}.")
    try:
        return kind(**given)
    except TypeError as error:
        raise InputError(f"{where}: {error}.") from error


def _from_value(value: Any, tensors: Mapping[str, Array], where: str) -> Any:
    if not isinstance(value, dict):
        return value
    if set(value) == {"tensor"}:
        if value["tensor"] not in tensors:
            raise InputError(f"{where}: the tensor {value['tensor']!r} is missing from the safetensors file beside it.")
        return tensors[value["tensor"]]
    if set(value) == {"slice"} and isinstance(value["slice"], list) and len(value["slice"]) == 3:
        return slice(*value["slice"])
    if set(value) == {"number"}:
        return float(value["number"])
    raise InputError(f"{where}: {value!r} is neither a number, a tensor nor a slice.")


def save(interventions: Iterable[Intervention] | Intervention, path: str | os.PathLike[str]) -> Path:
    """Writes ``path`` (JSON) and, where there are arrays, the same name with ``.safetensors`` beside it; returns the
    JSON file's path."""
    from safetensors.numpy import save_file

    text, tensors = to_json(interventions)
    target = Path(path)
    beside = target.with_suffix(".safetensors")
    if tensors:
        save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, beside)
    else:
        beside.unlink(missing_ok=True)  # an earlier save's: its arrays would go with another text
    target.write_text(text, encoding="utf-8")
    return target


def load(path: str | os.PathLike[str]) -> list[Intervention]:
    """Reads what ``save`` wrote. Raises InputError for a file that is missing, malformed or newer."""
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
