"""Files from strangers: what a model file may contain before anything is asked to run it.

ONNX Runtime follows whatever a file says: external data, nested functions, custom operators. Each limit here closes a
known way to read outside the folder, to exhaust memory or time, or to run foreign code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
import onnx_ir as ir

from graphlens.errors import ModelFileError
from graphlens.file.inside import inside
from graphlens.surgery import operators
from graphlens.surgery.operators import OPERATORS, FileKind
from graphlens.surgery.sizes import check_sizes

OLDEST_OPSET = 13
MAX_GRAPH_BYTES = 2**31 - 1  # protobuf's own limit
MAX_NODES = 50_000  # ONNX Runtime opens 10,000 in about a second; 80 layers with a gate at each hook point have 40,000
MAX_FUNCTION_NODES = 2_000  # that calls of functions come to: nested, they take it longer, a second for so many
MAX_DEPTH = 8
MAX_FUNCTION_DEPTH = 64
MAX_TENSOR_BYTES = 1 << 40
_MEMORY_MARKERS = ("*/_ORT_MEM_ADDR_/*", "_ORT_MEM_ADDR_")
# Where the numbers of a tensor stand that are not raw bytes: the field, and how many entries of it each number takes.
_STORED_IN: dict[ir.DataType, tuple[str, float]] = {
    ir.DataType.FLOAT: ("float_data", 1),
    ir.DataType.COMPLEX64: ("float_data", 2),
    ir.DataType.DOUBLE: ("double_data", 1),
    ir.DataType.COMPLEX128: ("double_data", 2),
    ir.DataType.INT64: ("int64_data", 1),
    ir.DataType.UINT64: ("uint64_data", 1),
    ir.DataType.UINT32: ("uint64_data", 1),
    ir.DataType.STRING: ("string_data", 1),
    **dict.fromkeys(
        (
            ir.DataType.INT32,
            ir.DataType.INT16,
            ir.DataType.UINT16,
            ir.DataType.INT8,
            ir.DataType.UINT8,
            ir.DataType.BOOL,
        ),
        ("int32_data", 1),
    ),
    **dict.fromkeys((ir.DataType.FLOAT16, ir.DataType.BFLOAT16), ("int32_data", 1)),
}


@dataclass(frozen=True)
class CheckReport:
    """What a check of a model file saw.

    Attributes:
        nodes: The number of nodes, functions expanded.
        embedded_bytes: The size of the tensors inside the graph file.
        external_bytes: The size of those in weights files.
        external_files: The names of the weights files, sorted.
        added_operators: The operators in it that graphlens itself writes into no file, sorted; empty unless its graph
            was edited.
    """

    nodes: int
    embedded_bytes: int
    external_bytes: int
    external_files: tuple[str, ...]
    added_operators: tuple[str, ...] = ()


def check_size(file: Path) -> None:
    """Refuses a graph file that is too large to be one.

    Args:
        file: The graph file.

    Raises:
        ModelFileError: It is larger than protobuf allows.
    """
    size = file.stat().st_size
    if size > MAX_GRAPH_BYTES:
        raise ModelFileError(f"{file}: {size:,} bytes, more than an ONNX graph can have ({MAX_GRAPH_BYTES:,}).")


def check_graph(model: ir.Model, file: Path, kind: FileKind | None = "edited") -> CheckReport:
    """Refuses a model that reaches outside its folder, explodes when expanded or run, or needs foreign code.

    Args:
        model: The model; its weights need not be read.
        file: The graph file that it came from.
        kind: Who may have written it: "exported" allows the operators that graphlens writes, "edited" those besides that
            its users may add. See OPERATORS. None is for a file that is looked at and not run: any operator of any opset,
            and tensors of text.

    Returns:
        What the check saw.

    Raises:
        ModelFileError: The model is refused; the node or tensor is named.
    """
    for domain, name, _ in model.functions:
        if operators.is_reserved(domain):
            raise ModelFileError(
                f"{file}: it defines a function {domain}::{name} in a domain that is ONNX's own. Refused."
            )
    nodes, seen = 0, set[str]()
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node, depth in _nodes(graph, 0):
            nodes += 1
            if nodes > MAX_NODES:
                raise ModelFileError(f"{file}: more than {MAX_NODES:,} nodes. graphlens refuses to open it.")
            if depth > MAX_DEPTH:
                raise ModelFileError(f"{file}: subgraphs nested more than {MAX_DEPTH} deep.")
            if node.op_identifier() in model.functions:
                continue
            if kind is not None and not operators.is_allowed(node.domain, node.op_type, kind):
                why = operators.why_not(node.domain, node.op_type)
                raise ModelFileError(f"{file}: node {node.name!r} {why}")
            seen.add(node.op_type)
    expanded = _expanded_nodes(model, file)
    embedded = external = 0
    sizes: dict[str, int] = {}  # of the weights files, by location
    for tensor in _tensors(model, file):
        if kind is None and tensor.dtype == ir.DataType.STRING and not isinstance(tensor, ir.ExternalTensor):
            continue
        size = _tensor_bytes(tensor, file)
        if isinstance(tensor, ir.ExternalTensor):
            _check_external(tensor, size, file.parent, sizes)
            external += size
        else:
            embedded += size
        if embedded + external > MAX_TENSOR_BYTES:
            raise ModelFileError(f"{file}: its tensors claim more than {MAX_TENSOR_BYTES:,} bytes.")
    if kind is not None:
        check_sizes(model, file, embedded + external)
    opset = model.opset_imports.get("")
    if kind is not None and (opset is None or not OLDEST_OPSET <= opset <= onnx.defs.onnx_opset_version()):
        raise ModelFileError(
            f"{file}: its operators are those of opset {opset}; graphlens opens {OLDEST_OPSET} to "
            f"{onnx.defs.onnx_opset_version()}. Refused."
        )
    _check_order(model.graph, set(), file)
    return CheckReport(expanded, embedded, external, tuple(sorted(sizes)), tuple(sorted(seen - OPERATORS["exported"])))


def _check_order(graph: ir.Graph, around: set[ir.Value], file: Path, depth: int = 0) -> None:
    """Refuses a graph in which a value is used that nothing computed before; ``around``: the values of the graphs outside."""
    known = around | {*graph.inputs, *graph.initializers.values()}
    for node in graph:
        lost = next((value for value in node.inputs if value is not None and value not in known), None)
        if lost is not None:
            raise ModelFileError(
                f"{file}: node {node.name!r} uses {lost.name!r}, which nothing before it computes. Refused."
            )
        for subgraph in _subgraphs(node) if depth < MAX_DEPTH else ():
            _check_order(subgraph, known, file, depth + 1)
        known.update(node.outputs)
    lost = next((value for value in graph.outputs if value not in known), None)
    if lost is not None:
        raise ModelFileError(f"{file}: the output {lost.name!r} is computed by nothing. Refused.")


def _nodes(graph: ir.Graph | ir.Function, depth: int) -> Iterator[tuple[ir.Node, int]]:
    """Each node of a graph and its subgraphs, with how deep it is nested."""
    for node in graph:
        yield node, depth
        if depth > MAX_DEPTH:
            return
        for subgraph in _subgraphs(node):
            yield from _nodes(subgraph, depth + 1)


def _subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs among a node's attributes: the branches of an If, say."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _expanded_nodes(model: ir.Model, file: Path) -> int:
    """Nodes after every function call is inlined, counted without inlining: a doubling chain is found in linear time."""
    functions = model.functions
    known: dict[ir.OperatorIdentifier, tuple[int, int]] = {}  # function -> (nodes, depth) when inlined
    open_calls: list[ir.OperatorIdentifier] = []

    def measure(graph: ir.Graph | ir.Function) -> tuple[int, int]:
        total = called = depth = 0
        for node, _ in _nodes(graph, 0):
            if node.op_identifier() not in functions:
                total += 1
                continue
            inlined, below = call(node.op_identifier())
            called, depth = called + inlined, max(depth, below)
            if called > MAX_FUNCTION_NODES:
                raise ModelFileError(f"{file}: its functions expand to over {MAX_FUNCTION_NODES:,} nodes.")
        return total + called, depth

    def call(key: ir.OperatorIdentifier) -> tuple[int, int]:
        if key in open_calls:
            raise ModelFileError(f"{file}: the function {key[0]}::{key[1]} calls itself.")
        if key not in known:
            open_calls.append(key)
            if len(open_calls) > MAX_FUNCTION_DEPTH:
                raise ModelFileError(f"{file}: its functions nest too deep (more than {MAX_FUNCTION_DEPTH}).")
            nodes, depth = measure(functions[key].graph)
            open_calls.pop()
            if depth >= MAX_FUNCTION_DEPTH:
                raise ModelFileError(f"{file}: its functions nest too deep (more than {MAX_FUNCTION_DEPTH}).")
            known[key] = nodes, depth + 1
        return known[key]

    for key in functions:
        call(key)
    return measure(model.graph)[0]


def check_structure(proto: onnx.ModelProto, file: Path) -> None:
    """Refuses what onnx-ir could not make a model of, or only in a long time: before it is asked to.

    Args:
        proto: The model as it was read.
        file: The graph file that it came from.

    Raises:
        ModelFileError: There are sparse initializers, which onnx-ir drops without a word, in whatever subgraph or function;
            or too many nodes, or subgraphs nested too deep; or names that are no text,
            or tensors that do not fit their shape.
    """
    _ensure_text(_names_of_model(proto), file)
    waiting: list[tuple[Iterable[onnx.NodeProto], int]] = [(function.node, 0) for function in proto.functions]
    graphs, count = [(proto.graph, 0)], 0
    while graphs or waiting:
        if graphs:
            graph, depth = graphs.pop()
            if graph.sparse_initializer:
                raise _sparse(file)
            _ensure_text(_names_of_graph(graph), file)
            for tensor in graph.initializer:
                _ensure_filled(tensor, file)
            waiting.append((graph.node, depth))
        nodes, depth = waiting.pop()
        for node in nodes:
            count += 1
            if count > MAX_NODES:
                raise ModelFileError(f"{file}: more than {MAX_NODES:,} nodes. graphlens refuses to open it.")
            _ensure_text((node.name, node.op_type, node.domain, node.overload, *node.input, *node.output), file)
            _ensure_text(_notes(node), file)
            for attribute in node.attribute:
                _ensure_text((attribute.name, attribute.ref_attr_name, attribute.doc_string), file)
                for tensor in (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors):
                    _ensure_filled(tensor, file)
                inner = [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
                if inner and depth + 1 > MAX_DEPTH:
                    raise ModelFileError(f"{file}: subgraphs nested more than {MAX_DEPTH} deep.")
                graphs += [(graph, depth + 1) for graph in inner]


def _ensure_text(names: Iterable[str], file: Path) -> None:
    """Refuses names that are not text: protobuf hands out bytes for them, as a damaged file has."""
    for name in names:
        if not isinstance(name, str):
            raise ModelFileError(f"{file}: {name!r:.60} stands for a name in it and is no text: the file is damaged.")


def _ensure_filled(tensor: onnx.TensorProto, file: Path) -> None:
    """Refuses a tensor inside the graph file that has more or fewer numbers than its shape says."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError as error:
        raise ModelFileError(
            f"{file}: tensor {tensor.name!r} is of a type that ONNX does not have. Refused."
        ) from error
    count = math.prod(tensor.dims)
    if tensor.HasField("raw_data"):
        wanted = count if dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED) else math.ceil(count * dtype.itemsize)
        found = len(tensor.raw_data)
    elif dtype not in _STORED_IN:
        return
    else:
        field, numbers = _STORED_IN[dtype]
        wanted, found = math.ceil(count * numbers), len(getattr(tensor, field))
    if min(tensor.dims, default=0) < 0 or found != wanted:
        raise ModelFileError(
            f"{file}: tensor {tensor.name!r} has the shape {list(tensor.dims)}, and the bytes that it holds do not fit it. "
            "The file is damaged."
        )


def _notes(
    item: onnx.NodeProto | onnx.GraphProto | onnx.ModelProto | onnx.ValueInfoProto | onnx.TensorProto,
) -> Iterator[str]:
    """What a part of a file says about itself: its doc string and metadata."""
    yield item.doc_string
    for entry in item.metadata_props:
        yield from (entry.key, entry.value)


def _names_of_model(proto: onnx.ModelProto) -> Iterator[str]:
    """The texts of a model that are not in its graph."""
    yield from (proto.producer_name, proto.producer_version, proto.domain, *_notes(proto))
    yield from (opset.domain for opset in proto.opset_import)
    for function in proto.functions:
        yield from (function.name, function.domain, *function.input, *function.output, *function.attribute)
        yield from (opset.domain for opset in function.opset_import)


def _names_of_graph(graph: onnx.GraphProto) -> Iterator[str]:
    """The texts of a graph that are not in its nodes."""
    yield from (graph.name, *_notes(graph))
    for tensor in graph.initializer:
        yield from (tensor.name, *_notes(tensor))
        for entry in tensor.external_data:
            yield from (entry.key, entry.value)
    for value in (*graph.input, *graph.output, *graph.value_info):
        yield from (value.name, *_notes(value), value.type.denotation)
        for size in value.type.tensor_type.shape.dim:
            yield from (size.dim_param, size.denotation)


def _tensors(model: ir.Model, file: Path) -> Iterator[ir.TensorProtocol]:
    """Every tensor of a model: initializers and attributes, those of subgraphs and functions included."""
    graphs: list[ir.Graph] = [model.graph, *(function.graph for function in model.functions.values())]
    while graphs:
        graph = graphs.pop()
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
        for node in graph:
            graphs.extend(_subgraphs(node))
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR:
                    yield attribute.as_tensor()
                elif attribute.type == ir.AttributeType.TENSORS:
                    yield from attribute.as_tensors()
                elif attribute.type in (ir.AttributeType.SPARSE_TENSOR, ir.AttributeType.SPARSE_TENSORS):
                    raise _sparse(file)


def _sparse(file: Path) -> ModelFileError:
    return ModelFileError(f"{file}: sparse tensors are not part of hooked files; graphlens refuses to open them.")


def _tensor_bytes(tensor: ir.TensorProtocol, file: Path) -> int:
    """The size that a tensor claims to have."""
    if tensor.dtype in (ir.DataType.UNDEFINED, ir.DataType.STRING):
        raise ModelFileError(f"{file}: tensor {tensor.name!r} holds no numbers (its type is {tensor.dtype}).")
    sizes = tuple(tensor.shape.numpy()) if isinstance(tensor.shape, ir.Shape) else tuple(tensor.shape)
    if any(not isinstance(size, int) or size < 0 for size in sizes):
        raise ModelFileError(f"{file}: tensor {tensor.name!r} has the impossible shape {list(sizes)}.")
    elements: float = tensor.dtype.itemsize
    for size in sizes:
        elements *= int(str(size))
    return math.ceil(elements)


def _check_external(tensor: ir.ExternalTensor, size: int, folder: Path, sizes: dict[str, int]) -> None:
    """Refuses a tensor whose data do not lie, whole, in a file of the folder. ``sizes`` keeps those of the files found right."""
    location = str(tensor.location)
    if location not in sizes:
        sizes[location] = _size_of(location, tensor, folder)
    offset, length = tensor.offset or 0, tensor.length if tensor.length is not None else size
    if offset < 0 or length != size or offset + length > sizes[location]:
        raise ModelFileError(
            f"{folder / location}: tensor {tensor.name!r} asks for bytes {offset:,} to {offset + length:,}, which do not fit "
            f"its shape or the file ({sizes[location]:,} bytes). The file was shortened or the graph altered."
        )


def _size_of(location: str, tensor: ir.ExternalTensor, folder: Path) -> int:
    """The size of the file that a tensor's data lie in, which is in the folder."""
    posix, windows = PurePosixPath(location), PureWindowsPath(location)
    if any(location.startswith(marker) for marker in _MEMORY_MARKERS):
        raise ModelFileError(f"{folder}: tensor {tensor.name!r} points into ONNX Runtime's own memory.")
    if not location or posix.is_absolute() or windows.anchor or ".." in (*posix.parts, *windows.parts):
        raise ModelFileError(f"{folder}: tensor {tensor.name!r} lies outside the folder ({location!r}). Refused.")
    path = folder / location
    try:
        inside(folder, location)
    except FileNotFoundError as error:
        raise ModelFileError(f"{path}: the weights file is missing. Put it back, or export the model again.") from error
    return path.stat().st_size
