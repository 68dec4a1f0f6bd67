"""Where an adopted file comes from: what its manifest says about the original, and about what adopting made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields


@dataclass(frozen=True)
class Adopted:
    """The original of an adopted file, and what was found in it.

    Attributes:
        file: The original's file name, without its folder.
        sha256: The SHA-256 of its graph file. What lies in files beside that file is covered by ``data`` alone.
        size: Its bytes.
        producer: The program that wrote it, with its version, as the file says.
        expanded: Fused operator -> how many of its nodes were expanded.
        kept: Fused operator -> why it was left as it is, in a sentence.
        inputs: Those of the graph's inputs that the original has; a mask or positions that it lacks cannot be fed.
        nodes: Hook point -> the original's nodes whose result it is: what a quantiser's ``nodes_to_exclude`` takes.
        missing: Hook point that such a model has and this file does not show -> why, in a sentence.
        identities: How many identities between hook points were found to hold.
        worst: The largest residual among them, relative.
        notes: What else was found, a sentence each.
        headless: True if the original ends in hidden states and gives no logits: no run can be asked for its output.
        left_padding: "masked" if a prompt padded on the left is computed as the same prompt alone; "counted" if its padding
            counts as positions; "seen" if tokens attend to it.
        data: Each file of weights beside the graph file (external data), by the name that the graph has for it -> its SHA-256.
            Empty where all weights lie in the graph file, and in files that were adopted before this was written down.
        apart: True if prompts that run together do not change each other's numbers. False where activations are rounded by one
            scale of all that runs at once (dynamic quantisation), and where it was not written down.
    """

    file: str
    sha256: str
    size: int
    producer: str
    expanded: Mapping[str, int] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    nodes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    identities: int = 0
    worst: float = 0.0
    notes: tuple[str, ...] = ()
    headless: bool = False
    left_padding: str = "masked"
    data: Mapping[str, str] = field(default_factory=dict)
    apart: bool = False


def adopted_from(data: Mapping[str, object]) -> Adopted:
    """The record in a manifest's JSON.

    Args:
        data: What ``vars(Adopted(...))`` became in JSON, or what a stranger put in its place.

    Raises:
        KeyError, TypeError or ValueError: It is no such record.
    """
    plain: dict[str, type] = {
        **dict.fromkeys(("file", "sha256", "producer", "left_padding"), str),
        **dict.fromkeys(("size", "identities"), int),
        **{"worst": float, "headless": bool, "apart": bool},
    }
    found: dict[str, object] = {}
    for item in fields(Adopted):
        if item.name not in data and (item.default is not MISSING or item.default_factory is not MISSING):
            continue  # another version may not have written it
        value = data[item.name]
        kind = plain.get(item.name)
        if kind is not None:
            if type(value) is not kind:
                raise TypeError(f"adopted.{item.name} is {value!r:.60}, not {kind.__name__}")
            found[item.name] = value
        elif item.name in ("inputs", "notes"):
            found[item.name] = _texts(value, item.name)
        elif not isinstance(value, dict):
            raise TypeError(f"adopted.{item.name} is {value!r:.60}, not an object")
        elif item.name == "nodes":
            found[item.name] = {key: _texts(names, item.name) for key, names in value.items()}
        else:
            inner = int if item.name == "expanded" else str
            if any(type(entry) is not inner for entry in value.values()):
                raise TypeError(f"adopted.{item.name} holds what is no {inner.__name__}")
            found[item.name] = value
    return Adopted(**found)  # type: ignore[arg-type]  # each was looked at above


def _texts(value: object, name: str) -> tuple[str, ...]:
    """A list of texts as a tuple."""
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise TypeError(f"adopted.{name} is {value!r:.60}, not a list of texts")
    return tuple(value)
