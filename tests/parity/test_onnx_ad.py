"""Our gradients against another differentiator of ONNX graphs, onnx-ad, at every hook point of the embedded model."""

from __future__ import annotations

import numpy as np
import onnx_ad
import onnx_ir as ir
import onnxruntime

from graphlens import HookedTransformer, embedded_model, surgery
from graphlens.metrics import LogitDiff
from graphlens.surgery.files import mapped
from graphlens.surgery.splice import Scope

TOKENS = np.array([[5, 90, 411, 7, 23], [8, 8, 300, 65, 12]])


def test_gradients_agree_with_onnx_ad() -> None:
    """An additive input at each hook point, whose gradient is the hook point's; the weights in the graph."""
    plain = surgery.load(embedded_model())
    entries = surgery.read_manifest(plain).hooks
    hooks = list(
        {entry.value: name for name, entry in reversed(entries.items()) if name != "unembed.hook_out"}.values()
    )
    inputs = {hook: f"delta_{index}" for index, hook in enumerate(hooks)}

    def added(value: ir.Value, scope: Scope) -> ir.Value:
        given = ir.Value(name=inputs[scope.hook], shape=value.shape, type=value.type)
        scope.graph.inputs.append(given)
        return scope.op("Add", [value, given])

    model = surgery.strip(surgery.splice(plain, dict.fromkeys(hooks, added)))
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(np.array(mapped(value.const_value).numpy()), name=name)
    for value in [value for value in model.graph.inputs if value.name in model.graph.initializers]:
        model.graph.inputs.remove(value)
    reverse = onnx_ad.reverse(ir.to_proto(model), inputs=list(inputs.values()), outputs=["logits"], layout="onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(reverse.SerializeToString(), options, providers=["CPUExecutionProvider"])

    ours = HookedTransformer.from_onnx(embedded_model(), "cpu")
    _, cache = ours.run_with_cache(TOKENS)
    seed = np.zeros((2, 5, 800, 1), np.float32)
    seed[:, -1, 5], seed[:, -1, 7] = 0.5, -0.5
    feeds = {"input_ids": TOKENS, "adj_logits": seed, **{inputs[hook]: np.zeros_like(cache[hook]) for hook in hooks}}
    expected = session.run([f"adj_{inputs[hook]}" for hook in hooks], feeds)
    found = ours.gradients(TOKENS, LogitDiff(5, 7), hooks)
    assert len(hooks) > 60
    for hook, other in zip(hooks, expected, strict=True):
        scale = float(np.abs(other).max())
        assert scale > 0, hook
        assert float(np.abs(found[hook] - other[..., 0]).max()) <= 1e-4 * scale, hook
