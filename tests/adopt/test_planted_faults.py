"""Quantised files with a known fault: drift names the step that has it first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import graphlens
from graphlens.experiments.drift import drift
from tests.adopt.adopt_files import Files
from tests.adopt.cells import opened

pytest_plugins = ["tests.adopt.session_files"]


def _adopted(files: Files, name: str, route: str) -> Any:
    folder = files.root / "drift" / f"{name}.{route}"
    if not folder.exists():
        graphlens.adopt(files.path(name, route), folder, announce=lambda _: None)
    return opened(folder, name)


@pytest.fixture(scope="module")
def prompts() -> np.ndarray:
    return np.random.default_rng(5).integers(1, 61, (3, 13))


def test_only_the_unembedding_is_quantised(files: Files, prompts: np.ndarray) -> None:
    """The quantiser of 4 bits skips Gemm, which is what the older exporter writes for GPT-2's matrices."""
    reference, other = (_adopted(files, "small-gpt2", route) for route in ("legacy-eager", "legacy-eager.int4"))
    result = drift(reference, other, prompts, patch=True, verbose=False)
    worst = result.worst(1)[0]
    assert worst.hook == "unembed.hook_out"
    assert worst.fresh == pytest.approx(result.logits, rel=1e-3)
    assert worst.recovered == pytest.approx(1.0, abs=1e-3)
    assert all(site.fresh < 1e-5 for site in result.sites if site.hook != "unembed.hook_out")


def test_a_mask_whose_scale_rounds_every_score_away(files: Files, prompts: np.ndarray) -> None:
    """-3.4e38 in the mask, quantised by one scale of 1.3e36: every score that is seen becomes 0."""
    reference, other = (_adopted(files, "small-llama", route) for route in ("legacy-eager", "legacy-eager.qdq"))
    result = drift(reference, other, prompts, verbose=False)
    worst = result.worst(1)[0]
    assert worst.role == "attn.hook_attn_scores"
    assert worst.fresh > 0.9  # nothing is left of them
    others = [site for site in result.sites if site.role not in ("attn.hook_attn_scores", "attn.hook_pattern")]
    assert max(site.fresh for site in others) < 0.5
