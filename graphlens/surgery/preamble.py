"""The head of a hooked graph: how positions and masks come from input_ids and the optional inputs.

The body reads four values: input_ids [b, s], ``positions`` int64 [b, s], ``mask`` bool [b, 1, q, k] and ``token_mask``
bool [b, s]. Keeping their computation apart lets another head (with a KV cache, say) feed the same body.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from graphlens.surgery.hooked_graph import ATTENTION_MASK, INPUT_IDS, POSITION_IDS, optional_input

BODY_INPUTS = ("positions", "mask", "token_mask")


def attach_preamble(model: ir.Model) -> ir.Model:
    """A copy of a traced body with the plain head: it runs from ``input_ids`` alone.

    ``attention_mask`` int64 [b, s] (1 = real token) defaults to ones. ``position_ids`` int64 [b, s] default to
    max(cumsum(attention_mask) - 1, 0); a negative entry asks for that default too.
    """
    model = model.clone()
    graph = model.graph
    body = {value.name: value for value in graph.inputs}
    input_ids = body[INPUT_IDS]
    for name in BODY_INPUTS:
        graph.inputs.remove(body[name])
    one, minus_one = np.ones((1, 1), np.int64), np.full((1, 1), -1, np.int64)
    attention_mask = optional_input(graph, ATTENTION_MASK, one, ["mask_batch", "mask_sequence"])
    position_ids = optional_input(graph, POSITION_IDS, minus_one, ["position_batch", "position_sequence"])

    tape = Tape()

    def constant(value: int | list[int], name: str) -> ir.Value:
        return tape.initializer(ir.tensor(np.asarray(value, np.int64)), name=f"preamble/{name}")

    zero, unit = constant(0, "zero"), constant(1, "one")
    shape = tape.op("Shape", [input_ids])
    full = tape.op("Expand", [attention_mask, shape])
    token_mask = tape.op("Cast", [full], {"to": ir.DataType.BOOL})
    counted = tape.op("Sub", [tape.op("CumSum", [full, unit]), unit])
    computed = tape.op("Max", [counted, zero])
    positions = tape.op("Where", [tape.op("Less", [position_ids, zero]), computed, position_ids])
    length = tape.op("Squeeze", [tape.op("Shape", [input_ids], {"start": 1, "end": 2})])
    index = tape.op("Range", [zero, length, unit])
    causal = tape.op("LessOrEqual", [index, tape.op("Unsqueeze", [index, constant([1], "column")])])
    keys = tape.op("Unsqueeze", [token_mask, constant([1, 2], "keys")])
    mask = tape.op("And", [causal, keys])

    for name, value in zip(BODY_INPUTS, (positions, mask, token_mask), strict=True):
        value.shape, value.type = body[name].shape, body[name].type
        body[name].replace_all_uses_with(value)
        value.name = name
    for initializer in tape.initializers:
        graph.initializers[str(initializer.name)] = initializer
    first = graph[0]
    for node_index, node in enumerate(tape.nodes):
        node.name = f"preamble/{node.op_type}_{node_index}"
        for output in node.outputs:
            output.name = output.name if output.name in BODY_INPUTS else f"preamble/{node.op_type}_{node_index}"
    graph.insert_before(first, list(tape.nodes))
    return model
