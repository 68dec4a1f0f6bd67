"""How fast this machine multiplies matrices: what a sweep's ratios to libraries on torch depend on.

One product of the MLP's size, [tokens, d_model] times [d_model, 4 d_model], in bare ONNX Runtime, beside NumPy's OpenBLAS.
"""

from __future__ import annotations

from functools import partial

from tools.bench.harness import Case, Findings, Row, Setup, rounds, timed

TOKENS = (16, 120, 960, 3840)


def run(setup: Setup) -> Findings:
    """GFLOP/s; a sweep that recomputes n tokens of a block does about 24 n d_model² operations there."""
    import numpy as np
    import onnx_ir as ir
    import onnxruntime

    width = setup.model.d_model
    weight = np.random.default_rng(0).standard_normal((width, 4 * width)).astype(np.float32)
    source = ir.Input("x", shape=ir.Shape(["n", width]), type=ir.TensorType(ir.DataType.FLOAT))
    kept = ir.Value(name="w", const_value=ir.tensor(weight))
    node = ir.node("MatMul", [source, kept])
    node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.FLOAT
    graph = ir.Graph([source], node.outputs, nodes=[node], initializers=[kept], opset_imports={"": 18}, name="product")
    session = onnxruntime.InferenceSession(
        ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    rows = []
    for tokens in TOKENS:
        x = np.random.default_rng(1).standard_normal((tokens, width)).astype(np.float32)
        work = {"numpy": partial(np.matmul, x, weight), "ort": partial(session.run, ["y"], {"x": x})}
        found = rounds({name: timed(call) for name, call in work.items()}, setup.repeats, warmup=3)
        done = 8 * tokens * width * width / 1e6  # of 1e9 operations a second, by milliseconds
        speeds = {name: [done / time for time in times] for name, times in found.items()}
        rows.append(Row(f"{tokens} tokens", "GFLOP/s", speeds["ort"], speeds["numpy"]))
    return Findings(rows, "numpy.matmul (OpenBLAS)")


CASE = Case(run, repeats=31)
