"""What matching finds in torch's exports of transformers' models: every value beside torch hooks, every weight in use."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from graphlens.file.names import split_name
from graphlens.surgery.match import Match, match
from tests.families.comparing import relative
from tests.families.layout import spec_of
from tests.families.torch_hooks import hooked, places
from tests.families.variants import CHOSEN, make
from tests.matched import activations, opened, values_of, weight_of
from tests.scramble import scrambled, with_old_names

Array = np.ndarray
# Those that torch's older exporter refuses, and OPT's that project their embeddings, which are refused.
UNEXPORTED = ("mixtral", "mixtral-window", "phi3-longrope", "opt-350m", "opt-projected")
VARIANTS = [name for name in dict.fromkeys([*CHOSEN, "phi", "olmo2"]) if name not in UNEXPORTED]
TOKENS = np.random.default_rng(0).integers(1, 101, (2, 9))
FEEDS = {"input_ids": TOKENS, "attention_mask": np.ones_like(TOKENS)}


class _Called(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits


@pytest.fixture(scope="module", params=VARIANTS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, ir.Model, Match]:
    """(variant, transformers' model, its export with standard operators, what was found in that)."""
    model = make(request.param)
    file: Path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    names = list(FEEDS)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Called(model).eval(),
            tuple(map(torch.from_numpy, FEEDS.values())),
            file,
            input_names=names,
            output_names=["logits"],
            dynamic_axes={name: {0: "batch", 1: "tokens"} for name in [*names, "logits"]},
            opset_version=17,
            dynamo=False,
        )
    return request.param, model, *opened(file)


def _by_torch(model: Any) -> dict[str, Array]:
    """The activations that torch hooks read off transformers' modules, and its patterns."""
    values: dict[str, Array] = {}

    def keep(name: str, place: Any) -> Any:
        return lambda module, x, y: values.update({name: place.get(module, x, y).numpy().copy()})

    handles = [hooked(model, place, keep(name, place)) for name, place in places(spec_of(model)).items()]
    ids, mask = map(torch.from_numpy, FEEDS.values())
    out = model(input_ids=ids, attention_mask=mask, use_cache=False, output_attentions=True)
    for handle in handles:
        handle.remove()
    for layer, pattern in enumerate(out.attentions or ()):
        values[f"blocks.{layer}.attn.hook_pattern"] = pattern.numpy()
    return values


def test_every_value_is_the_one_that_transformers_has(case: tuple[str, Any, ir.Model, Match]) -> None:
    _, model, graph, found = case
    expected = _by_torch(model)
    values = activations(graph, found, FEEDS)
    # Keys of Falcon's newer models are repeated before they are rotated: nothing else may be missing.
    assert all(split_name(hook)[1] == "attn.hook_rot_k" for hook in found.missing), found.missing
    assert not expected.keys() - values.keys()
    worst = {hook: relative(values[hook], array.reshape(values[hook].shape), hook) for hook, array in expected.items()}
    assert max(worst.values()) < 1e-5, max(worst.items(), key=lambda one: one[1])


def test_scores_are_the_scaled_products_of_queries_and_keys(case: tuple[str, Any, ir.Model, Match]) -> None:
    name, _, graph, found = case
    values = activations(graph, found, FEEDS)
    cap, sloped = found.config.get("attn_scores_soft_cap"), found.config.get("positional_embedding_type") == "alibi"
    for layer in range(int(str(found.config["n_layers"]))):
        at = f"blocks.{layer}.attn.hook_"
        if sloped or "clipped" in " ".join(found.notes) or f"{at}rot_k" in found.missing:
            continue
        q, k = (values.get(f"{at}rot_{letter}", values[f"{at}{letter}"]) for letter in "qk")
        k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
        scale = float(str(found.config["attn_scale"]))
        scale *= layer + 1 if found.config.get("scale_attn_by_inverse_layer_idx") else 1
        products = np.einsum("bqhd,bkhd->bhqk", q, k) / scale
        products = products if cap is None else np.tanh(products / float(str(cap))) * float(str(cap))
        scores = values[f"{at}attn_scores"]
        seen = scores > -1e30
        assert relative(scores[seen], products[seen], f"{name}: scores of block {layer}") < 1e-5
        assert seen[:, :, -1, -1].all()
        assert (~seen[:, :, 0, 1:]).all()


def test_every_weight_gives_what_comes_after_it(case: tuple[str, Any, ir.Model, Match]) -> None:
    name, _, graph, found = case
    values, weights = (
        activations(graph, found, FEEDS),
        {key: weight_of(graph, view) for key, view in found.weights.items()},
    )
    assert relative(weights["embed.W_E"][TOKENS], values["hook_embed"], "embed.W_E") < 1e-5 or "embed.ln.w" in weights
    logits = values["unembed.hook_in"] @ weights["unembed.W_U"] + weights.get("unembed.b_U", 0)
    assert relative(logits, values["unembed.hook_out"], "unembed.W_U") < 1e-5
    layer = 1
    for what, found_, made in _products(f"blocks.{layer}.", values, weights):
        assert relative(found_, made, f"{name}: {what}") < 1e-5
    ends = {key.split(".", 2)[2] for key in weights if key.startswith(f"blocks.{layer}.")}
    assert {"attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "mlp.W_in", "mlp.W_out"} <= ends


def _products(at: str, values: Mapping[str, Array], weights: Mapping[str, Array]) -> list[tuple[str, Array, Array]]:
    """(what, the activation, what the weights make of the one before it) of a block."""

    def out_of(norm: str) -> Array:
        if f"{at}ln1_post.hook_scale" not in values and f"{at}{norm}.w" in weights and _post_norm(at, values):
            return values[at + ("hook_resid_pre" if norm == "ln1" else "hook_resid_mid")]
        return values[f"{at}{norm}.hook_normalized"] * weights.get(f"{at}{norm}.w", 1) + weights.get(f"{at}{norm}.b", 0)

    made = []
    for letter in "QKV":
        product = np.einsum("bpm,hmd->bphd", out_of("ln1"), weights[f"{at}attn.W_{letter}"])
        made.append(
            (
                f"attn.W_{letter}",
                values[f"{at}attn.hook_{letter.lower()}"],
                product + weights.get(f"{at}attn.b_{letter}", 0),
            )
        )
    gated = f"{at}mlp.W_gate" in weights
    first = weights[f"{at}mlp.W_gate" if gated else f"{at}mlp.W_in"]
    bias = weights.get(f"{at}mlp.b_gate" if gated else f"{at}mlp.b_in", 0)
    made.append(("mlp: the first matrix", values[f"{at}mlp.hook_pre"], out_of("ln2") @ first + bias))
    if gated:
        linear = out_of("ln2") @ weights[f"{at}mlp.W_in"] + weights.get(f"{at}mlp.b_in", 0)
        made.append(("mlp.W_in", values[f"{at}mlp.hook_pre_linear"], linear))
    if not _post_norm(at, values) and f"{at}ln1_post.hook_scale" not in values:
        attn = np.einsum("bphd,hdm->bpm", values[f"{at}attn.hook_z"], weights[f"{at}attn.W_O"])
        made.append(("attn.W_O", values[f"{at}hook_attn_out"], attn + weights.get(f"{at}attn.b_O", 0)))
        mlp = values[f"{at}mlp.hook_post"] @ weights[f"{at}mlp.W_out"] + weights.get(f"{at}mlp.b_out", 0)
        made.append(("mlp.W_out", values[f"{at}hook_mlp_out"], mlp))
    return made


def _post_norm(at: str, values: Mapping[str, Array]) -> bool:
    """True for a block whose norms come after its sublayers alone (OLMo-2): ln1 gives what attention writes."""
    x, normal = values[f"{at}hook_resid_pre"], values[f"{at}ln1.hook_normalized"]
    scale = values[f"{at}ln1.hook_scale"]
    centred = x - x.mean(-1, keepdims=True)
    return min(np.abs(normal * scale - one).max() for one in (x, centred)) > 1e-3


def test_names_and_order_say_nothing(case: tuple[str, Any, ir.Model, Match]) -> None:
    _, _, graph, found = case
    for seed in (1, 2):
        other, old = scrambled(graph, seed)
        assert with_old_names(match(other), old) == _without_nodes(found, graph)


def _without_nodes(found: Match, graph: ir.Model) -> Match:
    """The match again, without the names of the original file's nodes."""
    again = match(graph)
    assert list(again.hooks) == list(found.hooks)
    return again


def test_the_graph_with_norms_apart_computes_what_transformers_does(
    case: tuple[str, Any, ir.Model, Match],
) -> None:
    _, model, graph, found = case
    assert found.ports.logits is not None
    logits = values_of(graph, [found.ports.logits], FEEDS)[found.ports.logits]
    ids, mask = map(torch.from_numpy, FEEDS.values())
    assert relative(logits, model(input_ids=ids, attention_mask=mask).logits.numpy(), "logits") < 1e-5


def test_the_config_is_the_one_that_the_family_reads(case: tuple[str, Any, ir.Model, Match]) -> None:
    _, model, _, found = case
    config, asked, spec = found.config, model.config, spec_of(model)
    attention = spec.attention
    assert (config["n_layers"], config["d_model"]) == (asked.num_hidden_layers, asked.hidden_size)
    assert (config["n_heads"], config["n_key_value_heads"]) == (attention.n_heads, attention.n_key_value_heads)
    assert (config["d_head"], config["d_vocab"]) == (attention.d_head, asked.vocab_size)
    assert config["attention_dir"] == "causal"
    eps = [
        getattr(asked, key) for key in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon") if hasattr(asked, key)
    ]
    assert config["eps"] in eps or not eps
    assert float(str(config["attn_scale"])) == pytest.approx(1 / attention.scale, rel=1e-5)
    assert config.get("scale_attn_by_inverse_layer_idx", False) == attention.by_layer
    assert config.get("attn_scores_soft_cap") == attention.softcap
    assert config.get("use_qk_norm", False) == (attention.q_norm is not None)
    assert config.get("window_size") == (attention.window if attention.local else None)
    local = tuple("local" if layer in attention.local else "global" for layer in range(asked.num_hidden_layers))
    assert config.get("attn_types") == (local if attention.local else None)
    assert config.get("parallel_attn_mlp", False) == spec.parallel
    assert (config.get("rotary_dim") is None) == (attention.rotary is None)
    if attention.rotary is not None:
        assert config["rotary_dim"] == attention.rotary.size
        assert config.get("rotary_adjacent_pairs", False) == attention.rotary.pairs
    assert (config["positional_embedding_type"] == "alibi") == (attention.alibi is not None)
    assert config["tied"] == bool(asked.tie_word_embeddings)
