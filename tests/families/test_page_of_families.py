"""The graph of a live page, of every family: its logits and edits are the model's own, and its lens ends in the prediction."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from graphlens import Ablate, HookedTransformer, Scale, Steer, surgery
from graphlens.surgery.page_graph import LENS_COUNT, page_graph
from tests.closeness import close
from tests.families.variants import CHOSEN
from tests.live.page_models import run

IDS = [1, 57, 3, 99, 20, 4]


@pytest.mark.parametrize("name", CHOSEN)
def test_a_page_of_a_family(name: str, family_folder: Callable[[str], Path]) -> None:
    folder = family_folder(name)
    model, hooked = HookedTransformer.from_onnx(folder, "cpu"), surgery.load(folder)
    graph, manifest = page_graph(hooked), surgery.read_manifest(hooked)
    vector = np.random.default_rng(2).standard_normal(model.cfg.d_model).astype(np.float32)
    steered = next(hook for hook in graph.gates if hook.startswith("blocks.1.hook_"))
    edits = {
        "blocks.0.attn.hook_z": [Ablate("blocks.0.attn.hook_z", heads=2, positions=[0, 3])],
        steered: [Steer(steered, vector, positions=slice(2, None)), Scale(steered, -0.5, positions=1)],
    }
    tokens = np.array([IDS])
    every = [item for items in edits.values() for item in items]
    expected = model.run_with_interventions(tokens, every)
    close(run(graph, folder, IDS)["logits"], model(tokens))
    found = run(graph, folder, IDS, edits, manifest)
    close(found["logits"], expected)
    if graph.lens is not None:
        odds = np.exp(expected[0] - expected[0].max(-1, keepdims=True))
        largest = np.sort(odds / odds.sum(-1, keepdims=True), -1)[:, : -LENS_COUNT - 1 : -1]
        close(found["lens/probabilities"][-1], largest)
    else:
        assert "has no logit lens" in graph.no_lens
