"""Any values of any ONNX model as outputs: ``graphlens expose``. Nothing is matched, and only types that lack are looked up."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from graphlens.errors import ExportError, InputError, ModelFileError
from graphlens.file.copies import place
from graphlens.file.folder import MODEL_FILE, make_folder, replacing, user_path, writing
from graphlens.file.large_tensors import copy_with, graph_outputs
from graphlens.file.leftovers import remove
from graphlens.file.manifest import METADATA_KEY
from graphlens.pipelines.value_types import Found, ask_runtime
from graphlens.surgery.files import save, weights_files
from graphlens.surgery.foreign import check_foreign, read_foreign, refuse_original
from graphlens.surgery.outputs import with_values
from graphlens.surgery.values import Values

_TYPES = {
    dtype.name.lower(): dtype for dtype in ir.DataType
}  # ONNX Runtime's words are those of ONNX, in small letters


@dataclass(frozen=True)
class Shown:
    """A value that can be made an output.

    Attributes:
        name: Its name.
        operator: The operator that computes it.
        type: Its type as the file states it, "FLOAT[batch, 7]"; "" where it does not.
        is_output: True if it is an output already.
    """

    name: str
    operator: str
    type: str
    is_output: bool


@dataclass(frozen=True)
class Exposed:
    """What ``expose`` wrote.

    Attributes:
        file: The graph file.
        added: The values that became outputs.
        already: Those that matched and were outputs before.
        unranked: Those of ``added`` whose number of axes nobody knows before a run: onnx.checker wants one of each.
    """

    file: Path
    added: tuple[str, ...]
    already: tuple[str, ...]
    unranked: tuple[str, ...] = ()


def list_values(model: str | os.PathLike[str], like: Iterable[str] | str = "*") -> list[Shown]:
    """The values of a model that shell patterns match.

    Args:
        model: An ONNX file that any program wrote, or a folder with one.
        like: One pattern or several: ``*``, ``?``, ``[...]``; ``*`` matches dots and slashes too.

    Returns:
        What ``expose`` would make outputs, in the order in which it is computed.

    Raises:
        ModelFileError: The file is damaged, or no ONNX model.
        InputError: A pattern matches no value.
    """
    opened, _ = read_foreign(model, light=True)
    values = Values.of(opened)
    found = []
    for name in values.matching(_patterns(like)):
        value = values.computed[name]
        node = value.producer()
        assert node is not None, "what a node computes"
        found.append(Shown(name, node.op_type, _stated(value), value.is_graph_output()))
    return found


def _stated(value: ir.Value) -> str:
    """A value's type and shape, as its file states them."""
    if value.type is None:
        return ""
    kind = str(value.dtype) if isinstance(value.type, ir.TensorType) and value.dtype is not None else str(value.type)
    if value.shape is None:
        return kind
    return f"{kind}[{', '.join('?' if _unknown(size) else str(size) for size in value.shape)}]"


def _unknown(size: int | ir.SymbolicDim) -> bool:
    return isinstance(size, ir.SymbolicDim) and size.value is None


def _patterns(like: Iterable[str] | str) -> list[str]:
    """Patterns as a list, which is not empty."""
    found = [like] if isinstance(like, str) else list(like) if isinstance(like, Iterable) else []
    if not found or not all(isinstance(each, str) and each for each in found):
        raise InputError(f"like={like!r}: name the values, as names or shell patterns.")
    return found


def expose(
    model: str | os.PathLike[str],
    like: Iterable[str] | str,
    out: str | os.PathLike[str],
    *,
    link: bool = False,
) -> Exposed:
    """Writes a copy of any ONNX model that returns values of its graph besides its own outputs.

    The values are what the graph computes, so an optimiser cannot fuse them away: an output has to be there. The
    original stays as it is.

    Args:
        model: An ONNX file that any program wrote, or a folder with one.
        like: Names of values, or shell patterns: ``*``, ``?``, ``[...]``; ``*`` matches dots and slashes too.
        out: The file to write, which ends in ``.onnx``, or a folder for a ``model.onnx``. Weights files are copied to
            beside it, unless it lies beside them.
        link: True hardlinks weights files instead of copying them; onnx.load refuses such files.

    Returns:
        What was written.

    Raises:
        ModelFileError: The file is damaged, no ONNX model, or lacks weights; or types are missing in it and ONNX Runtime
            does not open it to infer them.
        InputError: A pattern matches no value of the main graph, or ``out`` is the original.
        ExportError: ``out`` is there already, or cannot be written.
    """
    opened, file = read_foreign(model, light=True)
    report = check_foreign(opened, file)
    names = Values.of(opened).matching(_patterns(like))
    target = user_path(out)
    if target.suffix != ".onnx":
        target = target / MODEL_FILE
    refuse_original(file, target)
    weights = {name: source for name, source in weights_files(opened).items() if name != file.name}
    _refuse_others(weights, target)
    outputs = {str(value.name) for value in opened.graph.outputs}
    added = [name for name in names if name not in outputs]
    extended = with_values(opened, added)
    unranked = _state_types(extended, added, file, report.embedded_bytes + report.external_bytes)
    if METADATA_KEY in opened.metadata_props:  # its seal is of every byte
        hooked, _ = read_foreign(file)
        stated = {value.name: value for value in extended.graph.outputs}
        hooked = with_values(hooked, added)
        for value in hooked.graph.outputs:
            value.type, value.shape = stated[value.name].type, stated[value.name].shape
        save(hooked, target, link)
    else:
        _write(file, target, [value for value in extended.graph.outputs if value.name in set(added)], weights, link)
    return Exposed(target, tuple(added), tuple(name for name in names if name in outputs), tuple(unranked))


def _write(file: Path, target: Path, outputs: Iterable[ir.Value], weights: Mapping[str, Path], link: bool) -> None:
    """Writes a copy of a graph file with more outputs, every other byte as it was, and its weights files beside it."""
    folder = target.parent
    with contextlib.ExitStack() as undo, writing(target):
        if not folder.exists():
            undo.callback(remove, folder)
        make_folder(folder)
        missing = {name: source for name, source in weights.items() if not (folder / name).exists()}
        for name in missing:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            undo.callback((folder / name).unlink, missing_ok=True)
        place(missing, folder, link)
        with replacing(target) as made:
            copy_with(file, made, graph_outputs(ir.to_proto(value).SerializeToString() for value in outputs))
        undo.pop_all()


def _refuse_others(weights: Mapping[str, Path], target: Path) -> None:
    """Makes sure that no file of another model is replaced: neither the graph nor weights of the same name."""
    if target.exists():
        raise ExportError(f"{target}: exists. Choose another file or folder.")
    for name, source in weights.items():
        beside = target.parent / name
        if beside.exists() and not beside.samefile(source):
            raise ExportError(f"{beside}: exists, and the weights go into a file of this name. Choose another folder.")


def _state_types(model: ir.Model, names: list[str], file: Path, weights: int) -> list[str]:
    """Gives new outputs the types and shapes that the file does not state, in place; returns those without a known rank."""
    added = {str(value.name): value for value in model.graph.outputs if value.name in set(names)}
    open_ones = [
        name
        for name, value in added.items()
        if value.type is None or (isinstance(value.type, ir.TensorType) and value.shape is None)
    ]
    if not open_ones:
        return []
    for name, found in ask_runtime(file, open_ones, weights).items():
        value = added[name]
        value.type = _type(found, name, file)
        if isinstance(value.type, ir.TensorType):
            value.shape = None if found.shape is None else ir.Shape(found.shape)
    return [name for name in open_ones if isinstance(added[name].type, ir.TensorType) and added[name].shape is None]


_WRAPPED = re.compile(r"(seq|optional|sparse_tensor|tensor)\((.*)\)")


def _type(found: Found, name: str, file: Path) -> ir.TypeProtocol:
    """A type in ONNX Runtime's words as onnx-ir's."""

    def parsed(text: str) -> ir.TypeProtocol:
        match = _WRAPPED.fullmatch(text)
        kind, inner = match.groups() if match else ("", "")
        if kind == "tensor" and inner in _TYPES:
            return ir.TensorType(_TYPES[inner])
        if kind == "seq":
            return ir.SequenceType(parsed(inner))
        if kind == "optional":
            return ir.OptionalType(parsed(inner))
        raise ModelFileError(
            f"{file}: the value {name!r} is a {found.type}, and graphlens writes no output of that type."
        )

    return parsed(found.type)
