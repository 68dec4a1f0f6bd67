"""Blocks that are copied in the graph are the blocks that tracing gives, node for node, for every family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import transformers

from graphlens.errors import ExportError
from graphlens.export import build
from graphlens.export.families import Spec, family_for
from graphlens.export.repeat import repeat_blocks, traced_layers
from graphlens.export.trace import trace
from graphlens.file.manifest import HookEntry
from tests.families import encoders
from tests.families.variants import CHOSEN, VARIANTS

LAYERS = 5
_SIZES = ("num_hidden_layers", "num_layers", "n_layer")  # as configs call it
_LOCAL, _FULL = "sliding_attention", "full_attention"
# Variants whose configs say more of each layer.
_MORE: Mapping[str, Mapping[str, Any]] = {
    "gemma3": {"layer_types": [_LOCAL, _LOCAL, _FULL, _LOCAL, _FULL]},
    "gpt-neo": {"num_layers": 6, "attention_types": [[["global", "local"], 3]]},
    "qwen2-window": {"max_window_layers": 2},
}


def config_of(name: str) -> Any:
    """A config like the variant's, of more layers."""
    if name in encoders.ENCODERS:
        return encoders.config_of(name, num_hidden_layers=LAYERS)
    variant = VARIANTS[name]
    (size,) = (key for key in _SIZES if key in variant.arguments)
    return getattr(transformers, variant.config)(**{**variant.arguments, size: LAYERS, **_MORE.get(name, {})})


def spec_of(name: str, config: Any) -> Spec:
    """What a model of it computes."""
    family = family_for({"model_type": config.model_type})
    assert family is not None
    return family.spec_of(config, name)


def finished(model: ir.Model, spec: Spec) -> tuple[ir.Model, dict[str, HookEntry]]:
    """A graph as an export goes on with it, and its hook points."""
    hooks = build.name_hook_points(model, spec.n_layers)
    build.tidy(model)
    return model, hooks


def constant(value: ir.Value) -> tuple[Any, ...] | None:
    """What an initializer holds, or its name and sizes where it is a weight; None for what is computed or given."""
    if value.producer() is not None or value.is_graph_input():
        return None
    if value.const_value is None:
        return value.name, tuple(value.shape or ())
    held = value.const_value.numpy()
    return str(held.dtype), held.shape, held.tobytes()


def assert_same(one: ir.Model, other: ir.Model) -> None:
    """The same nodes in the same order, reading the same: values are told apart by where they come from."""
    known: dict[ir.Value, ir.Value] = dict(zip(one.graph.inputs, other.graph.inputs, strict=True))
    assert [value.name for value in one.graph.inputs] == [value.name for value in other.graph.inputs]
    pairs = list(zip(one.graph, other.graph, strict=True))
    for first, second in pairs:
        at = f"{first.name} ({first.outputs[0].name})"
        assert (first.domain, first.op_type) == (second.domain, second.op_type), at
        assert first.attributes.keys() == second.attributes.keys(), at
        for key, attribute in first.attributes.items():
            wanted, found = attribute.value, second.attributes[key].value
            if isinstance(wanted, ir.TensorProtocol):
                np.testing.assert_array_equal(wanted.numpy(), found.numpy(), at)
            else:
                assert wanted == found, at
        assert len(first.inputs) == len(second.inputs), at
        for wanted, found in zip(first.inputs, second.inputs, strict=True):
            if wanted is None or found is None:
                assert wanted is found, at
            elif (held := constant(wanted)) is not None:
                assert held == constant(found), at
                assert known.setdefault(wanted, found) is found, f"{at}: constants are shared otherwise"
            else:
                assert known[wanted] is found, at
        for wanted, found in zip(first.outputs, second.outputs, strict=True):
            assert (wanted.shape, wanted.dtype) == (found.shape, found.dtype), at
            known[wanted] = found
    assert [known[value] for value in one.graph.outputs] == list(other.graph.outputs)
    assert len(one.graph.initializers) == len(other.graph.initializers)
    assert len(set(known.values())) == len(known)


@pytest.mark.parametrize("name", [*CHOSEN, "bert"])
def test_copied_blocks_are_the_traced_ones(name: str) -> None:
    config = config_of(name)
    spec = spec_of(name, config)
    layers = traced_layers(spec)
    assert len(layers) < spec.n_layers or spec.attention.by_layer
    whole = trace(config, spec)
    build.optimise(whole)
    some = trace(config, spec, layers)
    build.optimise(some)
    repeat_blocks(some, spec)
    (expected, hooks), (found, others) = finished(whole, spec), finished(some, spec)
    assert {hook: entry.value for hook, entry in hooks.items()} == {hook: entry.value for hook, entry in others.items()}
    assert list(hooks) == list(others)
    assert hooks == others
    assert_same(expected, found)


def test_every_kind_of_layer_is_traced_twice() -> None:
    specs = {name: spec_of(name, config_of(name)) for name in ("llama", "gemma3", "gpt-neo", "gpt2-by-layer")}
    assert traced_layers(specs["llama"]) == (0, 1)
    assert traced_layers(specs["gemma3"]) == (0, 1, 2, 4)
    assert traced_layers(specs["gpt-neo"]) == (0, 1, 2, 3)
    assert traced_layers(specs["gpt2-by-layer"]) == tuple(range(LAYERS))  # each has a scale of its own


def test_a_block_that_others_read_from_is_not_copied() -> None:
    """As an optimiser would leave it that merges what two blocks compute."""
    config = config_of("llama")
    spec = spec_of("llama", config)
    model = trace(config, spec, traced_layers(spec))
    build.optimise(model)
    marks = {node.attributes["name"].as_string(): node for node in model.graph if node.op_type == "HookPoint"}
    inner = marks["blocks.1.attn.hook_z"].outputs[0]
    final = marks["ln_final.hook_scale"]
    model.graph.insert_after(final, node := ir.Node("", "Identity", [inner]))
    marks["unembed.hook_in"].replace_input_with(0, node.outputs[0])
    with pytest.raises(ExportError, match=r"internal error: .* of blocks\.1 is read outside of the block"):
        repeat_blocks(model, spec)
