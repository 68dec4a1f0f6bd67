"""The driver that a RemoteBridge of TransformerLens 4 asks: logits, captures and interventions, without TransformerLens 4."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import graphlens
from graphlens.errors import InputError, RuntimeUnavailable, UnknownHookPoint
from graphlens.lens.remote import GraphlensDriver, hook_names
from graphlens.torch import HookedTransformer
from graphlens.transformer_lens4 import TransformerBridge, boot

TOKENS = torch.tensor([[3, 14, 15, 92, 6, 5], [35, 8, 97, 9, 3, 2]])
LOWEST = torch.finfo(torch.float32).min
Z, IN, PATTERN = "blocks.1.attn.o.hook_in", "blocks.1.hook_in", "blocks.1.attn.hook_pattern"
OURS = {Z: "blocks.1.attn.hook_z", IN: "blocks.1.hook_resid_pre", PATTERN: PATTERN}


@dataclass
class Result:
    """Stands for TransformerLens's ForwardResult."""

    logits: torch.Tensor | None = None
    captured: dict[str, torch.Tensor] = field(default_factory=dict)


@pytest.fixture(scope="module")
def driver() -> GraphlensDriver:
    model = TransformerBridge.from_onnx(graphlens.embedded_model(), "cpu")
    names = ["blocks.1.hook_in", "blocks.1.ln1.hook_out", "rotary_emb.hook_out"]
    return GraphlensDriver(model, SimpleNamespace(architecture="GPT2LMHeadModel"), None, Result, names)


def close(found: torch.Tensor | None, expected: torch.Tensor) -> None:
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-5)


def test_it_tells_what_it_has(driver: GraphlensDriver, model: HookedTransformer) -> None:
    assert driver.architecture == "GPT2LMHeadModel"
    assert driver.supports("intervention_callbacks")
    assert not driver.supports("gradients")
    assert {Z, IN, PATTERN, "embed.hook_out", "ln_final.hook_scale", "unembed.hook_out"} <= driver.supported_hook_points
    assert not {"hook_embed", "blocks.1.hook_resid_pre", "hook_unembed"} & driver.supported_hook_points
    assert driver.non_fireable_hook_points == {"blocks.1.ln1.hook_out", "rotary_emb.hook_out"}
    assert len(driver.supported_hook_points) >= len(model.hook_dict)


def test_logits_and_every_activation(driver: GraphlensDriver, model: HookedTransformer) -> None:
    expected, cache = model.run_with_cache(TOKENS)
    names = sorted(driver.supported_hook_points)
    found = driver.forward(TOKENS, capture=tuple(names), output_attentions=True)
    close(found.logits, expected)
    assert list(found.captured) == names
    for name, value in found.captured.items():
        own = cache[name]
        if name.endswith("scores"):
            assert torch.equal(value == LOWEST, torch.isneginf(own))
            own = own.masked_fill(torch.isneginf(own), LOWEST)
        assert torch.equal(value, own), name
    assert driver.forward(TOKENS, return_logits=False).logits is None
    close(driver.forward(TOKENS[0].tolist()).logits, expected[:1])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    close(driver.forward(TOKENS, attention_mask=mask).logits, model(TOKENS, attention_mask=mask))


def _at(change: Callable[[torch.Tensor], torch.Tensor], axis: int, *positions: int) -> Any:
    def hook(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        new = activation.clone()
        index = (slice(None),) * axis + (list(positions) or slice(None),)
        new[index] = change(activation[index])
        return new

    return hook


VECTOR, HEADS, EACH = torch.linspace(-1, 1, 128), torch.linspace(-1, 1, 128).reshape(4, 32), torch.randn(2, 128)


@pytest.mark.parametrize(
    ("name", "spec", "hook"),
    [
        (IN, {"op": "suppress"}, _at(lambda x: x * 0, 1)),
        (IN, {"op": "suppress", "pos": -1}, _at(lambda x: x * 0, 1, 5)),
        (IN, {"op": "scale", "factor": 2, "pos": [1, 3]}, _at(lambda x: x * 2, 1, 1, 3)),
        (IN, {"op": "add", "value": VECTOR.tolist(), "pos": None}, _at(lambda x: x + VECTOR, 1)),
        (IN, {"op": "add", "value": EACH, "pos": (4, 2)}, _at(lambda x: x + EACH, 1, 4, 2)),
        (IN, {"op": "set", "value": 0.5, "pos": 2}, _at(lambda x: x * 0 + 0.5, 1, 2)),
        (IN, {"op": "set", "value": EACH.numpy(), "pos": [0, 5]}, _at(lambda x: x * 0 + EACH, 1, 0, 5)),
        (Z, {"op": "add", "value": HEADS}, _at(lambda x: x + HEADS, 1)),
        (Z, {"op": "add", "value": VECTOR}, _at(lambda x: x + HEADS, 1)),  # flat over the heads
        (Z, {"op": "set", "value": EACH, "pos": [1, 2]}, _at(lambda x: x * 0 + EACH.reshape(2, 4, 32), 1, 1, 2)),
        (PATTERN, {"op": "scale", "factor": 0.5, "pos": [5]}, _at(lambda x: x * 0.5, 2, 5)),
        (Z, lambda activation: activation * 3, _at(lambda x: x * 3, 1)),
    ],
)
def test_an_intervention_is_the_hook_that_does_the_same(
    driver: GraphlensDriver, model: HookedTransformer, name: str, spec: Any, hook: Any
) -> None:
    after = "blocks.2.hook_out"
    expected, cache = None, {}
    with model.hooks([(OURS[name], hook)]):
        expected, cache = model.run_with_cache(TOKENS)
    found = driver.forward(TOKENS, intervene={name: spec}, capture=(name, after))
    close(found.logits, expected)
    close(found.captured[name], cache[name])
    close(found.captured[after], cache[after])
    assert float((expected - model(TOKENS)).abs().max()) > 1e-3
    close(driver.forward(TOKENS).logits, model(TOKENS))  # nothing stays


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"op": "double"}, "suppress, scale, add, set"),
        ({"factor": 2}, "'op'"),
        ({"op": ["add"], "value": 1}, "'op'"),
        ({"op": "scale", "factor": "much"}, "the factor at 'blocks.1.hook_in' must be a finite number"),
        ({"op": "add", "value": "much"}, "is no tensor"),
        (2.0, "'op'"),
        ({"op": "scale"}, "'factor'"),
        ({"op": "add"}, "'value'"),
        ({"op": "set", "value": 1, "positions": 2}, "positions"),
        ({"op": "suppress", "pos": 1.5}, "'pos'"),
        ({"op": "suppress", "pos": []}, "'pos'"),
        ({"op": "suppress", "pos": [True]}, "'pos'"),
        ({"op": "suppress", "pos": 6}, "outside of 6 tokens"),
        ({"op": "add", "value": [1.0, 2.0]}, r"shape \[2\], and the part .* \[2, 6, 128\]"),
        ({"op": "add", "value": EACH, "pos": [1, 2, 3]}, r"\[2, 128\], and the part .* \[2, 3, 128\]"),
    ],
)
def test_an_intervention_that_is_none_is_refused(driver: GraphlensDriver, spec: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        driver.forward(TOKENS, intervene={IN: spec})


def test_what_the_driver_does_not_have_is_refused(driver: GraphlensDriver) -> None:
    with pytest.raises(UnknownHookPoint, match=r"Nearest: 'blocks\.1\.attn\.o\.hook_in'"):
        driver.forward(TOKENS, intervene={"blocks.1.attn.o.hook_inn": {"op": "suppress"}})
    with pytest.raises(UnknownHookPoint, match=r"Nearest: 'blocks\.1\.ln1\.hook_normalized'"):
        driver.forward(TOKENS, capture=("blocks.1.attn.q.hook_in",))
    with pytest.raises(InputError, match="one run"):
        driver.forward(TOKENS, max_new_tokens=3)
    with pytest.raises(InputError, match="prepend_bos"):
        driver.forward(TOKENS, prepend_bos=False)
    with pytest.raises(InputError, match="input_ids"):
        driver.forward()


def test_a_closed_driver_says_so() -> None:
    driver = GraphlensDriver(
        TransformerBridge.from_onnx(graphlens.embedded_model(), "cpu"), SimpleNamespace(), None, Result
    )
    assert driver.architecture == "GPT2LMHeadModel"
    driver.close()
    driver.close()
    with pytest.raises(InputError, match="closed"):
        driver.forward(TOKENS)


def test_boot_needs_transformerlens_4() -> None:
    """Here 3.9 is installed."""
    with pytest.raises(RuntimeUnavailable, match=r"here is 3\.9\.\d: pip install 'transformer-lens>=4\.3"):
        boot(graphlens.embedded_model())


def test_hook_names_are_those_of_the_components() -> None:
    class HookPoint(torch.nn.Module):
        pass

    class Part(torch.nn.Module):
        def __init__(self, **parts: torch.nn.Module) -> None:
            super().__init__()
            self.hook_in = HookPoint()
            self.submodules = parts

    found = hook_names({"embed": Part(), "blocks": Part(attn=Part(q=Part()))}, 2)
    assert found == [
        "embed.hook_in",
        *(f"blocks.{layer}.{tail}" for tail in ("hook_in", "attn.hook_in", "attn.q.hook_in") for layer in (0, 1)),
    ]
