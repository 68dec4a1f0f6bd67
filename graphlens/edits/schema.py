"""The JSON Schema of files of interventions, and a reader of the part of JSON Schema that it uses.

Knows alone how a value is held against the schema. The sentence for a value that does not fit stands in the schema itself,
as ``errorMessage``, in which ``{found}`` is the value and ``{field}`` the field that it was given for.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from graphlens.file.manifest import Json

SCHEMA_FILE = Path(__file__).with_name("interventions.schema.json")
Schema = Mapping[str, "Json"]
_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),  # 1.0 is none: what is counted is written without a point
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


@dataclass(frozen=True)
class Fault:
    """The first place where a value does not fit.

    Attributes:
        path: The keys and indices that lead to it.
        found: What is there.
        message: The schema's sentence for it; empty where the schema has none.
        keyword: What it breaks: "required", "additionalProperties" and so on.
        name: With "required" and "additionalProperties", the property.
    """

    path: tuple[str | int, ...]
    found: Json
    message: str
    keyword: str
    name: str = ""

    def under(self, key: str | int) -> Fault:
        """The same, seen from one step further out."""
        return replace(self, path=(key, *self.path))


@functools.cache
def _whole() -> dict[str, Json]:
    found: dict[str, Json] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    return found


def schema() -> dict[str, Json]:
    """The JSON Schema (draft 2020-12) of a file of interventions, for editors and for programs in other languages.

    Returns:
        A copy: what is done to it changes nothing.

    >>> schema()["properties"]["format"]["const"]
    'graphlens.interventions'
    """
    found: dict[str, Json] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    return found


def definition(name: str) -> Schema:
    """A part of the schema by its name among ``$defs``: "ablate", "selection" and so on; an empty one where there is none."""
    return _mapping(_mapping(_whole()["$defs"]).get(name, {}))


def built_in() -> frozenset[str]:
    """The names of the kinds that the schema tells of; those of one's own are told by their classes."""
    kind = _mapping(definition("intervention")["properties"])["kind"]
    return frozenset(map(str, _list(_mapping(kind)["enum"])))


def fault(value: Json, node: Schema | None = None) -> Fault | None:
    """The first thing in a value that does not fit the schema; None where it fits.

    Args:
        value: What JSON holds.
        node: The part of the schema that it is held against; None for all of it.

    Raises:
        RecursionError: The value is nested too deeply.
    """
    node = _whole() if node is None else node
    found = next(_faults(value, node), None)
    if found is None or found.message:
        return found
    return replace(found, message=str(node.get("errorMessage", "")))


def _mapping(value: Json) -> dict[str, Json]:
    assert isinstance(value, dict), "the schema is our own"
    return value


def _list(value: Json) -> list[Json]:
    assert isinstance(value, list), "the schema is our own"
    return value


def _is(value: Json, names: Json) -> bool:
    """True for a value of one of the types. A bool is no number, as in JSON."""
    wanted = names if isinstance(names, list) else [names]
    return any(
        isinstance(value, _TYPES[str(name)]) and (name == "boolean" or not isinstance(value, bool)) for name in wanted
    )


def _faults(value: Json, node: Schema) -> Iterator[Fault]:
    """What of a value does not fit one node, in the order in which it is told."""

    def here(keyword: str, name: str = "") -> Fault:
        return Fault((), value, str(node.get("errorMessage", "")), keyword, name)

    if "$ref" in node:
        inner = fault(value, definition(str(node["$ref"]).removeprefix("#/$defs/")))
        if inner is not None:
            yield inner if inner.message else replace(inner, message=str(node.get("errorMessage", "")))
    if "type" in node and not _is(value, node["type"]):
        yield here("type")
    if "const" in node and not _same(value, node["const"]):
        yield here("const")
    if "enum" in node and not any(_same(value, each) for each in _list(node["enum"])):
        yield here("enum")
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = node.get("minimum"), node.get("maximum")
        if (isinstance(low, int) and value < low) or (isinstance(high, int) and value > high):
            yield here("minimum" if isinstance(low, int) and value < low else "maximum")
    if isinstance(value, dict):
        yield from _of_object(value, node, here("required"))
    if isinstance(value, list):
        yield from _of_array(value, node, here("minItems"))
    if "anyOf" in node and all(fault(value, _mapping(each)) for each in _list(node["anyOf"])):
        yield next(_nearest(value, node), None) or here("anyOf")
    for each in _list(node.get("allOf", [])):
        part = _mapping(each)
        if "if" not in part:
            inner = fault(value, part)
        else:
            inner = None if fault(value, _mapping(part["if"])) else fault(value, _mapping(part["then"]))
        if inner is not None:
            yield inner
    if "not" in node and fault(value, _mapping(node["not"])) is None:
        yield here("not")


def _same(value: Json, other: Json) -> bool:
    """True for equal values of JSON, where true is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _of_object(value: dict[str, Json], node: Schema, here: Fault) -> Iterator[Fault]:
    """What of an object does not fit: what it has of its properties, what it lacks, what it has besides."""
    properties = _mapping(node.get("properties", {}))
    if node.get("additionalProperties") is False:
        for name in sorted(value.keys() - properties.keys()):
            yield replace(here, keyword="additionalProperties", name=name)
    for needed in _list(node.get("required", [])):
        if needed not in value:
            yield replace(here, name=str(needed))
    for name, part in properties.items():
        inner = fault(value[name], _mapping(part)) if name in value else None
        if inner is not None:
            yield inner.under(name)


def _of_array(value: list[Json], node: Schema, here: Fault) -> Iterator[Fault]:
    """What of an array does not fit: how many items it has, and each item."""
    least, most = node.get("minItems", 0), node.get("maxItems", len(value))
    assert isinstance(least, int)
    assert isinstance(most, int)
    if not least <= len(value) <= most:
        yield replace(here, keyword="minItems" if len(value) < least else "maxItems")
    first = _list(node.get("prefixItems", []))
    rest = node.get("items", {})
    for index, item in enumerate(value):
        part = first[index] if index < len(first) else rest
        inner = fault(item, _mapping(part))
        if inner is not None:
            yield inner.under(index)


def _nearest(value: Json, node: Schema) -> Iterator[Fault]:
    """What is wrong by the alternative that a value was meant as: an object that has what that one requires."""
    for each in _list(node["anyOf"]):
        part = _mapping(each)
        if "$ref" in part:
            part = dict(definition(str(part["$ref"]).removeprefix("#/$defs/")))
        if isinstance(value, dict) and value.keys() & set(map(str, _list(part.get("required", [])))):
            inner = fault(value, part)
            if inner is not None and inner.message:
                yield inner
