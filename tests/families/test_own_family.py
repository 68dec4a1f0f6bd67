"""docs/families.md: a family of one's own, word for word, and what is refused of one."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graphlens import HookedTransformer
from graphlens.errors import ExportError, VerificationError
from graphlens.export import llama_like
from graphlens.export.families import family
from tests.families.comparing import reference_logits

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The register of families, put back at the end."""
    family.families()
    monkeypatch.setattr(family, "registered", dict(family.registered))
    return family.registered


def test_the_page_runs_and_what_it_makes_is_the_model(
    registered: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path / "cache"))
    blocks = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 3
    names: dict[str, Any] = {"folder": tmp_path / "loud"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    model: HookedTransformer = names["model"]
    reference = names["LoudForCausalLM"].from_pretrained(tmp_path / "loud", attn_implementation="eager").eval()
    tokens = np.asarray([[1, 2, 3]])
    with torch.no_grad():
        assert np.abs(names["logits"] - reference_logits(reference, tokens)).max() < 1e-5
    embedding = reference.model.embed_tokens.weight.detach().numpy()
    np.testing.assert_allclose(names["cache"]["hook_embed"][0], 3 * embedding[[1, 2, 3]], rtol=1e-6)
    np.testing.assert_allclose(model.W_E, 3 * embedding, rtol=1e-6)

    # A key that the family does not read is refused, and a Spec that is wrong is not exported.
    names["config"].loudness = 2.0
    names["LoudForCausalLM"](names["config"]).save_pretrained(tmp_path / "other")
    loud = registered["LoudForCausalLM"]
    registered["LoudForCausalLM"] = replace(loud, spec=llama_like)
    with pytest.raises(ExportError, match=r"config\.json sets loudness=2\.0"):
        HookedTransformer.from_pretrained(tmp_path / "other")
    registered["LoudForCausalLM"] = replace(loud, spec=llama_like, without_effect=frozenset({"loudness"}))
    with pytest.raises(VerificationError, match="the exported logits differ from transformers'"):
        HookedTransformer.from_pretrained(tmp_path / "other")
