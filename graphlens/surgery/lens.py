"""The logit lens as outputs of the graph: the ending of the model, computed of the residual stream after every block.

It alone knows how the ending is repeated: one copy of it, which all rows of the lens go through as a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from graphlens.errors import InputError
from graphlens.file.io_names import LOGITS
from graphlens.file.names import in_block
from graphlens.file.sae_names import OUTPUT
from graphlens.surgery.cut import cut
from graphlens.surgery.graph import finish, install, numbered, read_manifest, values_by_name
from graphlens.surgery.sae_splicing import carried_on

POSITIONS = "lens/positions"
PROBABILITIES, TOKENS = "lens/probabilities", "lens/tokens"


def lens_rows(model: ir.Model) -> list[str]:
    """The hook points that a logit lens reads: the residual stream before the first block and after each one.

    Args:
        model: A hooked decoder.

    Returns:
        Names of hook points, ``n_layers + 1`` of them.
    """
    layers = range(read_manifest(model).config.n_layers)
    return [in_block(0, "hook_resid_pre"), *(in_block(layer, "hook_resid_post") for layer in layers)]


def with_lens(model: ir.Model, count: int) -> ir.Model:
    """A copy of a decoder that also says what each layer would predict: ``ln_final`` and unembedding of its residual.

    What the copy's gates do to the residual stream shows in the lens, those of an SAE's features too. The last row is the
    model's own prediction.

    Args:
        model: A hooked decoder, with gates or without.
        count: How many tokens each row names, the likeliest first; no more than the vocabulary has.

    Returns:
        The copy. It has the required input ``lens/positions``, int64 [m]: at which positions to look. Its new outputs, for
        ``lens_rows`` and a batch of one sequence, are ``lens/probabilities`` float32 [rows, m, count] and ``lens/tokens``
        int64 [rows, m, count].

    Raises:
        InputError: The end of this model reads more than the residual stream.
        UnknownHookPoint: The model lacks one of ``lens_rows``.
    """
    model = model.clone()
    manifest, rows, values = read_manifest(model), lens_rows(model), values_by_name(model)
    last = f"{rows[-1]}.{OUTPUT}"
    piece, frontier = cut(model, [last if last in manifest.hooks else rows[-1]], [LOGITS])
    if frontier:
        raise InputError(
            f"{manifest.config.model_name} has no logit lens: what follows its last block reads {frontier[0]!r} besides the "
            "residual stream."
        )
    graph, tape = model.graph, Tape()
    positions = ir.Value(name=POSITIONS, shape=ir.Shape(["lens_positions"]), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.append(positions)
    found = [tape.op("Gather", [values[carried_on(manifest.hooks, row)], positions], {"axis": 1}) for row in rows]
    stream = tape.op("Concat", found, {"axis": 0})
    install(graph, tape, numbered("lens/rows/"))
    logits = _ending(graph, piece.graph, stream, values)
    tape = Tape()
    logits = tape.op("Cast", [logits], {"to": ir.DataType.FLOAT})
    probabilities = tape.op("Softmax", [logits], {"axis": -1})
    wanted = min(count, manifest.config.d_vocab_out)
    most = tape.initializer(ir.tensor(np.asarray([wanted], np.int64)), name="lens/count")
    top, tokens = tape.op_multi_out("TopK", [probabilities, most], {"axis": -1}, num_outputs=2)
    install(graph, tape, numbered("lens/end/"), lambda node, place: f"{node.name}/{place}")
    for name, value, dtype in ((PROBABILITIES, top, ir.DataType.FLOAT), (TOKENS, tokens, ir.DataType.INT64)):
        value.name, value.type = name, ir.TensorType(dtype)
        value.shape = ir.Shape([len(rows), "lens_positions", wanted])
        graph.outputs.append(value)
    return finish(model, manifest)


def _ending(graph: ir.Graph, piece: ir.Graph, stream: ir.Value, values: dict[str, ir.Value]) -> ir.Value:
    """Copies the nodes of a piece into a graph, to compute from another value than the piece's input.

    Args:
        graph: Changed in place.
        piece: Has one input and one output.
        stream: The value to compute from.
        values: The graph's own values by name. A weight of the piece that the graph has is shared.

    Returns:
        What the copy computes.
    """
    copies: dict[ir.Value, ir.Value] = {piece.inputs[0]: stream}
    for name, weight in piece.initializers.items():
        own: Sequence[ir.Value] = [values[name]] if name in values else []
        if not own:
            new = ir.Value(name=f"lens/{name}", shape=weight.shape, type=weight.type, const_value=weight.const_value)
            graph.initializers[f"lens/{name}"] = new
            own = [new]
        copies[weight] = own[0]
    for node in piece:
        outputs = [ir.Value(name=f"lens/{value.name}", type=value.type) for value in node.outputs]
        inputs = [None if value is None else copies[value] for value in node.inputs]
        attributes = list(node.attributes.values())
        graph.append(ir.Node(node.domain, node.op_type, inputs, attributes, outputs=outputs, name=f"lens/{node.name}"))
        copies.update(zip(node.outputs, outputs, strict=True))
    return copies[piece.outputs[0]]
