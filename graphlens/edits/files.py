"""Interventions as files: JSON, with the arrays in a safetensors file beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from graphlens.edits.kinds import KINDS, Intervention, checked
from graphlens.edits.record import Array
from graphlens.edits.schema import Schema, built_in, definition, fault, schema
from graphlens.errors import InputError
from graphlens.file.folder import user_path
from graphlens.file.manifest import Json
from graphlens.file.pair import ENDING, read_pair, write_pair

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
    if not isinstance(tensors, (Mapping, NoneType)):
        raise InputError(f"tensors is a dict of name -> array, not {type(tensors).__name__}.")
    try:
        data: Json = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{where}: not a file of interventions: it is no JSON ({error}).") from error
    try:
        _ensure_fits(data, where)
    except RecursionError as error:
        raise InputError(f"{where}: not a file of interventions: its lists are nested too deeply.") from error
    assert isinstance(data, dict)
    records = data["interventions"]
    assert isinstance(records, list)
    return [_from_record(record, tensors or {}, f"{where}, intervention {i}") for i, record in enumerate(records)]


def _ensure_fits(data: Json, where: str) -> None:
    """Raises InputError for what does not fit the schema, in the schema's words. See schema.py."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:  # before anything else: it is another program's
        found = data.get("format") if isinstance(data, dict) else data
        raise InputError(f"{where}: {_said(str(schema()['errorMessage']), found)}")
    records, file = data.get("interventions"), {"version": None, "interventions": None, **data}
    wrong = fault({**file, "interventions": [] if isinstance(records, list) else records})
    if wrong is not None:
        raise InputError(f"{where}: {_said(wrong.message, wrong.found)}")
    assert isinstance(records, list)
    for i, record in enumerate(records):
        _ensure_record_fits(record, f"{where}, intervention {i}")


def _ensure_record_fits(record: Json, where: str) -> None:
    """Raises InputError for an intervention that does not fit the schema, or for one of one's own that is not its class's."""
    named = record.get("kind") if isinstance(record, dict) else record
    kind = KINDS.get(named) if isinstance(named, str) else None
    if kind is None:
        raise InputError(f"{where}: {_said(str(definition('intervention')['errorMessage']), named)}")
    wrong = fault(record, definition(kind.kind) if kind.kind in built_in() else _schema_of(kind))
    if wrong is None:
        return
    if wrong.keyword in ("required", "additionalProperties") and not wrong.path:
        verb = "needs" if wrong.keyword == "required" else "has no"
        raise InputError(f"{where}: {kind.__name__} {verb} {wrong.name!r}.")
    field = str(wrong.path[0]) if wrong.path else ""
    raise InputError(f"{where}, {field}: {_said(wrong.message, wrong.found, field)}")


def _schema_of(kind: type[Intervention]) -> Schema:
    """The schema of a kind of one's own: the fields of its class, of which only those of every kind are told more of."""
    shared = definition("ablate")["properties"]
    assert isinstance(shared, dict)
    known = {name: shared[name] for name in shared.keys() - {"kind", "value"}}
    operand: Json = {"$ref": "#/$defs/operand"}
    properties: dict[str, Json] = {"kind": {"const": kind.kind}}
    for field in fields(kind):
        properties[field.name] = operand if field.name == kind.operand else known.get(field.name, {})
    required: list[Json] = [field.name for field in fields(kind) if field.default is MISSING]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _said(message: str, found: Json, field: str = "") -> str:
    """A sentence of the schema about a value."""
    return message.format(found=f"{found!r:.80}", field=field, kinds=", ".join(KINDS))


def _from_record(record: Json, tensors: Mapping[str, Array], where: str) -> Intervention:
    """One intervention of a file, which fits the schema."""
    assert isinstance(record, dict)
    given: dict[str, Any] = {
        name: _from_value(value, tensors, f"{where}, {name}") for name, value in record.items() if name != "kind"
    }
    try:
        return KINDS[str(record["kind"])](**given)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _from_value(value: Json, tensors: Mapping[str, Array], where: str) -> Json | Array | slice:
    """The value of one field, which fits the schema."""
    match value:
        case {"tensor": str(name)}:
            if name not in tensors:
                raise InputError(f"{where}: the tensor {name!r} is missing from the safetensors file beside it.")
            return tensors[name]
        case {"slice": [start, stop, step]}:
            return slice(start, stop, step)
        case {"number": str(number)}:
            return float(number)
    return value


def save(interventions: Iterable[Intervention] | Intervention, path: str | os.PathLike[str]) -> Path:
    """Writes interventions to a JSON file, and their arrays to a safetensors file beside it.

    The two change as one: whatever happens meanwhile, ``load`` finds what was saved before or what is saved now.

    Args:
        interventions: A list of interventions, or one alone.
        path: The JSON file. That of the arrays has the same name with the ending ``.safetensors``; where there are no
            arrays, one from an earlier save is removed.

    Returns:
        The JSON file's path.

    Raises:
        InputError: If one of them is no intervention, if ``path`` is the name of the arrays, if something else has that
            name, or if the files cannot be written. Links are followed, and a file's permissions stay. A pipe or a device
            is written in place, and so is a file in a folder that cannot be written.
    """
    text, tensors = to_json(interventions)
    target = _named(path)

    def with_keys(more: Mapping[str, Json]) -> str:
        return json.dumps({**json.loads(text), **more}, indent=2, allow_nan=False) + "\n"

    try:
        write_pair(target, FORMAT, with_keys, tensors)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error}).") from error
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
    from safetensors.numpy import load as unpacked

    source = _named(path)
    try:
        text, data = read_pair(source)
        tensors = {} if data is None else unpacked(data)
    except (OSError, SafetensorError, AttributeError, KeyError) as error:  # the last two: a dtype that NumPy lacks
        raise InputError(f"{source}: cannot be read ({error}).") from error
    return from_json(text, tensors, str(source))


def _named(path: str | os.PathLike[str]) -> Path:
    """The JSON file. Raises InputError for the name of the arrays."""
    found = user_path(path)
    if found.suffix.lower() == ENDING:
        raise InputError(
            f"{found}: the arrays of interventions get this name. Name their JSON file: {found.with_suffix('.json')}."
        )
    return found
