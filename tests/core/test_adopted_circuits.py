"""Circuits of adopted models against their definition in NumPy: every receiver reads what its own edges carry."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graphlens import HookedTransformer, adopt
from graphlens.attribution import edge_attribution, faithfulness
from graphlens.metrics import LogitDiff
from tests.foreign_decoder import D_HEAD, EPS, HEADS, LAYERS, VOCAB, decoder, forward, weights

Array = np.ndarray[Any, Any]
METRIC = LogitDiff(5, 7)
RANDOM = np.random.default_rng(3)
CLEAN, CORRUPTED = RANDOM.integers(0, VOCAB, (2, 7)), RANDOM.integers(0, VOCAB, (2, 7))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HookedTransformer:
    folder = tmp_path_factory.mktemp("circuits")
    adopt(decoder(folder / "model.onnx"), folder / "hooked", announce=lambda _: None)
    return HookedTransformer.from_onnx(folder / "hooked", "cpu")


def _norm(x: Array, weight: Array, bias: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS) * weight + bias


def by_definition(edges: list[str]) -> Array:
    """The logits of a run in which an edge of the circuit carries what its sender writes, and all others what it wrote."""
    w = {name: array.astype(np.float64) for name, array in weights().items()}
    base, clean = forward(CORRUPTED)[1], forward(CLEAN)[1]
    into: dict[str, list[str]] = {}
    for edge in edges:
        sender, receiver = edge.split("->")
        into.setdefault(receiver, []).append(sender)
    more = {"embed": clean["blocks.0.hook_resid_pre"] - base["blocks.0.hook_resid_pre"]}

    def read(receiver: str, corrupted: Array) -> Array:
        return corrupted + sum((more[sender] for sender in into.get(receiver, ())), np.zeros(()))

    causal = np.tri(CLEAN.shape[1], dtype=bool)
    for layer in range(LAYERS):
        b, p = f"blocks.{layer}.", f"l{layer}."
        matrices = np.split(w[p + "c"], 3, -1)
        biases = np.split(w[p + "d"], 3)
        for head in range(HEADS):
            own = slice(head * D_HEAD, (head + 1) * D_HEAD)
            q, k, v = (
                _norm(read(f"L{layer}H{head}.{letter}", base[b + "hook_resid_pre"]), w[p + "a"], w[p + "b"])
                @ matrix[:, own]
                + bias[own]
                for letter, matrix, bias in zip("qkv", matrices, biases, strict=True)
            )
            scores = np.where(causal, q @ k.swapaxes(-1, -2) * D_HEAD**-0.5, -np.inf)
            raised = np.exp(scores - scores.max(-1, keepdims=True))
            z = raised / raised.sum(-1, keepdims=True) @ v
            more[f"L{layer}H{head}"] = (z - base[b + "attn.hook_z"][:, :, head]) @ w[p + "e"][own]
        mid = read(f"L{layer}MLP", base[b + "hook_resid_mid"])
        neurons = np.maximum(_norm(mid, w[p + "g"], w[p + "h"]) @ w[p + "i"] + w[p + "j"], 0)
        more[f"L{layer}MLP"] = neurons @ w[p + "k"] + w[p + "l"] - base[b + "hook_mlp_out"]
    last = read("logits", base[f"blocks.{LAYERS - 1}.hook_resid_post"])
    found: Array = _norm(last, w["w2"], w["w3"]) @ w["w4"]
    return found


def test_a_circuit_is_its_definition(model: HookedTransformer) -> None:
    clean = {name: value.astype(np.float32) for name, value in forward(CLEAN)[1].items()}
    heads = [f"L{layer}H{head}" for layer in range(LAYERS) for head in range(HEADS)]
    mlps = [f"L{layer}MLP" for layer in range(LAYERS)]
    order = ["embed", *(name for layer in range(LAYERS) for name in (*heads[layer * HEADS :][:HEADS], mlps[layer]))]
    every = [
        f"{sender}->{receiver}"
        for place, sender in enumerate(order)
        for later in order[place + 1 :]
        if sender == "embed" or later[:2] != sender[:2] or (later.endswith("MLP") and "H" in sender)
        for receiver in ([later] if later.endswith("MLP") else [f"{later}.{letter}" for letter in "qkv"])
    ]
    every += [f"{sender}->logits" for sender in order]
    some = [edge for edge in every if RANDOM.random() < 0.6]
    circuits = {
        "all": every,
        "none": [],
        "some": some,
        "one path": ["embed->L0H1.v", "L0H1->L1H2.k", "L1H2->L1MLP", "L1MLP->logits"],
        "direct": ["embed->logits"],
    }
    found = faithfulness(model, CORRUPTED, clean, METRIC, circuits)
    for index, (name, edges) in enumerate(circuits.items()):
        expected = float(np.asarray(METRIC(by_definition(edges))))
        assert abs(float(found.values[index]) - expected) < 5e-5, name
    assert abs(float(found.values[0]) - float(np.asarray(METRIC(forward(CLEAN)[0])))) < 5e-5
    assert abs(float(found.values[1]) - float(np.asarray(METRIC(forward(CORRUPTED)[0])))) < 5e-5
    assert len({round(float(value), 3) for value in found.values}) == len(circuits)


def test_an_edges_score_is_a_derivative(model: HookedTransformer) -> None:
    """Of edges to the logits: the metric's change along what the sender changes, by finite differences."""
    clean = {name: value.astype(np.float32) for name, value in forward(CLEAN)[1].items()}
    base = forward(CORRUPTED)[1]
    found = edge_attribution(model, CORRUPTED, clean, METRIC)
    scores = dict(zip(found.labels["edge"], found.values, strict=True))
    last = f"blocks.{LAYERS - 1}.hook_resid_post"
    for sender, hook in (
        ("embed", "blocks.0.hook_resid_pre"),
        ("L0MLP", "blocks.0.hook_mlp_out"),
        ("L1MLP", "blocks.1.hook_mlp_out"),
    ):
        direction = clean[hook] - base[hook]
        ends = []
        for step in (1e-4, -1e-4):

            def moved(name: str, value: Array, step: float = step, direction: Array = direction) -> Array:
                return value + step * direction if name == last else value

            ends.append(float(np.asarray(METRIC(forward(CORRUPTED, edit=moved)[0]))))
        expected = (ends[0] - ends[1]) / 2e-4
        assert abs(float(scores[f"{sender}->logits"]) - expected) < 1e-3 * max(1.0, abs(expected))
