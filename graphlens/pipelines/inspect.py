"""What an ONNX file is: who made it, what is in it, and what graphlens could find in it. Nothing is run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx_ir as ir

from graphlens.errors import GraphlensError, ModelFileError
from graphlens.file.manifest import METADATA_KEY
from graphlens.file.written import said_of
from graphlens.pipelines.findings import Findings, findings
from graphlens.surgery.adoptable import STILL, obstacle, remarks
from graphlens.surgery.anatomy import STANDARD, Anatomy, anatomy
from graphlens.surgery.foreign import check_foreign, read_foreign
from graphlens.surgery.graph import manifest_in
from graphlens.surgery.quantised import quantisation

_NUMBER = re.compile(r"\d+")
_STANDARD_FUSED = frozenset(
    {"Attention", "GroupNormalization", "LayerNormalization", "RMSNormalization", "RotaryEmbedding"}
)
_OPERATORS_SHOWN, _PORTS_SHOWN = 12, 12


@dataclass(frozen=True)
class Port:
    """An input or an output of a file, or several that differ in a number of their names only.

    Attributes:
        name: Its name; with ``N`` in the place of the number where there are several.
        count: How many there are.
        type: Their type and shape: "int64 [batch, sequence]".
        optional: True for an input that a run may leave out.
    """

    name: str
    count: int
    type: str
    optional: bool = False


@dataclass(frozen=True)
class Inspection:
    """What is in an ONNX file.

    Attributes:
        file: The graph file.
        hooked: What graphlens wrote into it, in a sentence; None for another program's file.
        producer: Who made it, with the version.
        ir_version: The version of the format.
        opsets: Domain -> version of its operators; "ai.onnx" is ONNX's own.
        nodes: How many nodes there are, branches and functions included.
        operators: Operator -> how many nodes; ``domain::name`` outside of ONNX's own domain; the most frequent first.
        fused: Those of them that compute several steps at once.
        quantised: How it is quantised, in sentences; empty for a float file.
        inputs: The inputs.
        outputs: The outputs.
        parameters: How many numbers its weights are.
        embedded_bytes: The bytes of the weights inside the graph file.
        external: File of weights -> its size in bytes; None for one that is missing.
        found: What adopting would find; None where it could not.
        obstacles: Why it cannot be adopted, in sentences.
        remarks: What is worth knowing, in sentences.
        written: What graphlens wrote for other runtimes (baked, drivable, plain), in a sentence; None for all other files.
    """

    file: Path
    hooked: str | None
    producer: str
    ir_version: int
    opsets: Mapping[str, int]
    nodes: int
    operators: Mapping[str, int]
    fused: Mapping[str, int]
    quantised: tuple[str, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    parameters: int
    embedded_bytes: int
    external: Mapping[str, int | None]
    found: Findings | None
    obstacles: tuple[str, ...]
    remarks: tuple[str, ...]
    written: str | None = None

    def to_json(self) -> dict[str, object]:
        """Everything as JSON has it: dicts, lists, text and numbers."""
        return {**asdict(self), "file": str(self.file)}

    def lines(self) -> list[str]:
        """The same in lines of text for people."""
        used = {name.rpartition("::")[0] or "ai.onnx" for name in self.operators}
        opsets = ", ".join(f"{domain} {version}" for domain, version in self.opsets.items() if domain in used)
        rows: list[tuple[str, str]] = []
        if self.hooked is not None:
            rows.append(("graphlens", self.hooked))
        if self.written is not None:
            rows.append(("graphlens", self.written))
        rows.append(("made by", f"{self.producer}; format {self.ir_version}; opsets {opsets}"))
        rows.append(("weights", self._weights()))
        rows += [("inputs", line) for line in _ports(self.inputs)]
        rows += [("outputs", line) for line in _ports(self.outputs)]
        rows.append(("operators", f"{self.nodes:,}: {_counts(self.operators, _OPERATORS_SHOWN)}"))
        if self.fused:
            rows.append(("fused", _counts(self.fused, _OPERATORS_SHOWN)))
        rows += [("quantised", line) for line in self.quantised] or [("quantised", "no")]
        if self.found is not None:
            rows += [("adopt", line) for line in _finding_lines(self.found)]
        rows += [("in the way", line) for line in self.obstacles]
        if self.obstacles:
            rows.append(("still works", STILL))
        rows += [("note", line) for line in self.remarks]
        lines, last = [str(self.file)], ""
        for title, text in rows:
            lines.append(f"  {'' if title == last else title:<11}  {text}")
            last = title
        return lines

    def _weights(self) -> str:
        """How large the weights are and where they lie."""
        parts = [f"{self.parameters:,} numbers"]
        if self.embedded_bytes:
            parts.append(f"{_bytes(self.embedded_bytes)} in the graph file")
        for name, size in list(self.external.items())[:4]:
            parts.append(f"{name}: {'missing' if size is None else _bytes(size)}")
        if len(self.external) > 4:
            parts.append(f"{len(self.external) - 4} more files")
        return "; ".join(parts)


def _bytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"


def _counts(counts: Mapping[str, int], most: int) -> str:
    """Operators with how many there are, the first ones of them."""
    shown = ", ".join(f"{count:,} {name}" for name, count in list(counts.items())[:most])
    return shown + (f", and {len(counts) - most} other kinds" if len(counts) > most else "")


def _ports(ports: Iterable[Port]) -> list[str]:
    """Inputs or outputs as lines."""
    lines = [
        f"{port.name}  {port.type}"
        + (f"  (x {port.count})" if port.count > 1 else "")
        + ("  optional" if port.optional else "")
        for port in ports
    ]
    return [*lines[:_PORTS_SHOWN], *([f"... {len(lines) - _PORTS_SHOWN} more"] if len(lines) > _PORTS_SHOWN else [])]


def _finding_lines(found: Findings) -> list[str]:
    """What adopting would find, as lines."""
    config = ", ".join(f"{name} {value}" for name, value in found.config.items())
    names = [_NUMBER.sub("N", name, count=1) if name.startswith("blocks.") else name for name in found.hooks]
    lines = [
        f"{found.kind}: {config}",
        f"{len(found.hooks):,} hook points: {', '.join(dict.fromkeys(names))}",
        f"{found.weights:,} weights by TransformerLens's names",
    ]
    if found.expanded:
        lines.append(f"expands {_counts(found.expanded, _OPERATORS_SHOWN)}")
    if found.identities:
        each = "; ".join(f"{name} ({count})" for name, count in found.identities.items())
        lines.append(f"can check {sum(found.identities.values()):,} identities: {each}")
    lines += [f"lacks {name}: {why}" for name, why in _grouped(found.missing).items()]
    lines += [f"keeps {why}" for why in found.kept.values()]
    return [*lines, *found.notes]


def _grouped(missing: Mapping[str, str]) -> dict[str, str]:
    """Missing hook points, those of all blocks that have one reason in one line."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, why in missing.items():
        groups.setdefault((_NUMBER.sub("N", name, count=1) if name.startswith("blocks.") else name, why), []).append(
            name
        )
    return {names[0] if len(names) == 1 else key: why for (key, why), names in groups.items()}


def inspect_file(model: str | os.PathLike[str]) -> Inspection:
    """Says what an ONNX file is, whoever made it: what is in it, and what ``adopt`` would find.

    Args:
        model: An ONNX file, or a folder with one. Weights files need not be there.

    Returns:
        What is in it.

    Raises:
        ModelFileError: It is no ONNX model, damaged, or too large to be looked at.
    """
    opened, file = read_foreign(model, light=True)
    obstacles: list[str] = []
    try:
        check_foreign(opened, file)
    except ModelFileError as error:
        obstacles.append(_short(error, file))
    made_of = anatomy(opened)
    hooked = _hooked(opened, file)
    found = None
    if hooked is None:
        why = obstacle(opened, made_of)
        if why is not None:
            obstacles.append(why)
        if not obstacles:
            found = _look(opened, file, obstacles)
    external, embedded, parameters = _sizes(opened, file)
    return Inspection(
        file,
        hooked,
        " ".join(filter(None, (opened.producer_name, opened.producer_version)))
        or "a program that does not say its name",
        opened.ir_version,
        {"ai.onnx" if domain in STANDARD else domain: version for domain, version in opened.opset_imports.items()},
        sum(made_of.operators.values()),
        made_of.operators,
        _fused(opened, made_of),
        tuple(quantisation(opened).lines()),
        _collected(opened, opened.graph.inputs),
        _collected(opened, opened.graph.outputs),
        parameters,
        embedded,
        external,
        found,
        tuple(obstacles),
        remarks(opened, file) if found is not None else (),
        None if hooked is not None else said_of(opened.metadata_props, opened.producer_name),
    )


def _short(error: GraphlensError, file: Path) -> str:
    """What an error says, without the file's name before it."""
    return str(error).removeprefix(f"{file}: ").removesuffix(STILL).rstrip()


def _hooked(model: ir.Model, file: Path) -> str | None:
    """What graphlens says in a file about itself; None for a file of another program."""
    if METADATA_KEY not in model.metadata_props:
        return None
    try:
        manifest = manifest_in(model.metadata_props, str(file))
    except ModelFileError as error:
        return f"a hooked file of graphlens whose manifest cannot be read: {_short(error, file)}"
    config, adopted = manifest.config, manifest.adopted
    what = "a hooked file" if adopted is None else f"a hooked file, adopted from {adopted.file} of {adopted.producer}"
    return (
        f"{what}: {manifest.source}, {config.n_layers} layers, {config.n_heads} heads, {len(manifest.hooks):,} hook points "
        "(graphlens hooks lists them). Open it with HookedTransformer.from_onnx; there is nothing to adopt."
    )


def _fused(model: ir.Model, made_of: Anatomy) -> dict[str, int]:
    """The operators of a file that compute several steps at once."""
    functions = {f"{function.domain}::{function.name}" for function in model.functions.values()}
    return {
        name: count
        for name, count in made_of.operators.items()
        if (name in _STANDARD_FUSED or "::" in name) and name not in functions
    }


def _sizes(model: ir.Model, file: Path) -> tuple[dict[str, int | None], int, int]:
    """(file of weights -> its size or None, bytes inside the graph file, how many numbers all weights are)."""
    external: dict[str, int | None] = {}
    embedded = parameters = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            continue
        sizes = [size if isinstance(size, int) else 0 for size in tensor.shape]
        count = 1
        for size in sizes:
            count *= max(size, 0)
        parameters += count
        if (
            isinstance(tensor, ir.ExternalTensor) and tensor.location != file.name
        ):  # what is large stays in the file unread
            name = str(tensor.location)
            path = file.parent / name
            external[name] = path.stat().st_size if _lies_beside(name) and path.is_file() else None
        elif tensor.dtype not in (ir.DataType.STRING, ir.DataType.UNDEFINED):
            embedded += int(count * tensor.dtype.itemsize)
    return external, embedded, parameters


def _lies_beside(name: str) -> bool:
    """False for a name that leads out of the folder: what lies there is not looked at."""
    return not os.path.isabs(name) and ".." not in Path(name).parts and "\0" not in name and ":" not in name


def _collected(model: ir.Model, values: Iterable[ir.Value]) -> tuple[Port, ...]:
    """Inputs or outputs, those in one line that differ in a number only."""
    groups: dict[tuple[str, str, bool], list[str]] = {}
    for value in values:
        optional = value.name in model.graph.initializers
        groups.setdefault((_NUMBER.sub("N", str(value.name)), _typed(value), optional), []).append(str(value.name))
    return tuple(
        Port(names[0] if len(names) == 1 else pattern, len(names), kind, optional)
        for (pattern, kind, optional), names in groups.items()
    )


def _typed(value: ir.Value) -> str:
    """A type and a shape as text: "int64 [batch, sequence]"."""
    if value.type is None:
        return "of no stated type"
    kind = (
        value.dtype.name.lower()
        if isinstance(value.type, ir.TensorType) and value.dtype is not None
        else str(value.type)
    )
    if value.shape is None:
        return kind
    sizes = (size if isinstance(size, int) else size.value for size in value.shape)
    return f"{kind} [{', '.join('?' if size is None else str(size) for size in sizes)}]"


def _look(model: ir.Model, file: Path, obstacles: list[str]) -> Findings | None:
    """What adopting would find; None, with the reason among the obstacles, where that cannot be told."""
    try:
        found = findings(model, file)
    except GraphlensError as error:
        obstacles.append(_short(error, file))
        return None
    if found.refused is not None:
        obstacles.append(found.refused)
    return found
