"""Metrics of a padded batch, against the loss of transformers and the Kullback-Leibler divergence of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import graphlens
from graphlens.metrics import CrossEntropy, KLDivergence
from graphlens.patching import Site, sweep
from graphlens.torch import HookedTransformer as TorchModel

LENGTHS, WIDTH = (7, 3, 5), 7


@pytest.fixture(scope="module")
def theirs(odd_checkpoint: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(odd_checkpoint, attn_implementation="eager").eval()


def prompts(side: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    tokens, mask = rng.integers(0, 101, (3, WIDTH)), np.zeros((3, WIDTH), int)
    for row, length in enumerate(LENGTHS):
        mask[row, WIDTH - length :] = side == "left"
        mask[row, :length] |= side == "right"
    return tokens, mask


@pytest.mark.parametrize("face", [graphlens.HookedTransformer, TorchModel])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_transformers(side: str, face: Any, odd_hooked: Path, theirs: Any) -> None:
    """With -100 at padding, one text at a time for the loss of each."""
    model, (tokens, mask) = face.from_onnx(odd_hooked, "cpu"), prompts(side)
    ids, real = torch.from_numpy(tokens), torch.from_numpy(mask)
    labels = torch.where(real == 1, ids, -100)
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = theirs(input_ids=ids, attention_mask=real, position_ids=positions).logits
        each = [
            float(theirs(input_ids=ids[row : row + 1, mask[row] == 1], labels=ids[row : row + 1, mask[row] == 1]).loss)
            for row in range(3)
        ]
    counts = np.asarray(LENGTHS) - 1
    # Labels after padding on the left are predicted from it: transformers counts these, a next-token loss does not.
    both = (real[:, :-1] & real[:, 1:]) == 1
    whole = torch.nn.functional.cross_entropy(logits[:, :-1][both], labels[:, 1:][both])
    assert float(whole) == pytest.approx(np.average(each, weights=counts), rel=1e-5)
    given = tokens if face is graphlens.HookedTransformer else ids
    found = sweep(
        model,
        given,
        [Site("z", 1, head=0)],
        "zero",
        {"all": CrossEntropy(tokens, position=None), "again": CrossEntropy(given, position=None)},
        attention_mask=mask,
        verbose=False,
    )
    np.testing.assert_allclose(found.baselines["corrupted"], [float(whole)] * 2, rtol=1e-5)
    rows = CrossEntropy(tokens, position=None, reduction="none", mask=mask)(model(given, attention_mask=mask))
    np.testing.assert_allclose(np.asarray(rows), each, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_divergence_of_torch(side: str) -> None:
    _, mask = prompts(side)
    reference, logits = np.random.default_rng(5).standard_normal((2, 3, WIDTH, 101))
    real = mask == 1
    expected = torch.nn.functional.kl_div(
        torch.from_numpy(logits[real]).log_softmax(-1),
        torch.from_numpy(reference[real]).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    assert float(KLDivergence(reference, position=None, mask=mask)(logits)) == pytest.approx(float(expected), rel=1e-9)
