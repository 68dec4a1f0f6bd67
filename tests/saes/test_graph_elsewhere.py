"""Attribution graphs of the embedded models, hooked and adopted: MLPs' own neurons are the features of their transcoders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import graphlens
from graphlens import HookedTransformer, Sae, attribution_graph
from graphlens.deploy import write_stripped
from tests.models import MODEL

PROMPT = "John and Mary went to the"


def neurons(model: HookedTransformer) -> list[Sae]:
    """What is active above 1; the errors have the rest. Of a gated MLP the gate alone is read."""
    found = []
    for layer in range(model.cfg.n_layers):
        mlp, norm = model.blocks[layer].mlp, model.blocks[layer].ln2
        gated = model.cfg.gated_mlp
        w_in = np.asarray(norm.w)[:, None] * np.asarray(mlp.W_gate if gated else mlp.W_in)
        b_in = np.zeros(w_in.shape[1]) if gated else mlp.b_in + norm.b @ mlp.W_in
        hooks = {"hook": f"blocks.{layer}.ln2.hook_normalized", "hook_out": f"blocks.{layer}.hook_mlp_out"}
        threshold = np.ones(len(b_in), np.float32)
        found.append(
            Sae.from_arrays(
                w_in, b_in, mlp.W_out, mlp.b_out, architecture="jumprelu_transcoder", threshold=threshold, **hooks
            )
        )
    return found


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_an_embedded_model_adds_up(name: str) -> None:
    model = MODEL if name == "tiny-gpt2" else HookedTransformer.from_onnx(graphlens.embedded_model(name), "cpu")
    graph = attribution_graph(model, neurons(model), PROMPT, verbose=False, without_features_at=[0])
    readings = graph.readings[np.isfinite(graph.readings)]
    assert len(readings) > 100
    assert np.nanmax(np.abs(graph.gaps)) <= 1e-4 * max(1.0, float(np.abs(readings).max()))
    assert list(graph.tokens) == model.to_str_tokens(PROMPT)
    small = graph.prune()
    assert 0 < len(small.weights) < len(graph.weights)
    assert all(source != target for source, target, _ in small.top(20))


def test_an_adopted_file_has_the_graph_of_the_model(tmp_path: Path) -> None:
    source = graphlens.embedded_model("tiny-gpt2")
    write_stripped(source, tmp_path / "plain")
    graphlens.adopt(tmp_path / "plain/model.onnx", tmp_path / "hooked", tokenizer=source)
    adopted = HookedTransformer.from_onnx(tmp_path / "hooked", "cpu")
    saes = neurons(MODEL)
    found = attribution_graph(adopted, saes, PROMPT, verbose=False)
    expected = attribution_graph(MODEL, saes, PROMPT, verbose=False)
    assert [node[:4] for node in found.nodes] == [node[:4] for node in expected.nodes]
    matrices = []
    for graph in (found, expected):
        matrix = np.zeros((len(graph.nodes), len(graph.nodes)))
        matrix[graph.targets, graph.sources] = graph.weights
        matrices.append(matrix)
    assert np.abs(matrices[0] - matrices[1]).max() <= 1e-5 * np.abs(matrices[1]).max()
