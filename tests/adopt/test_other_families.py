"""Families beyond the matrix: adopted and equal to transformers, or refused by a sentence; none opens as what it is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import graphlens
from graphlens.errors import InputError
from tests.adopt.other_families import ADOPTED, OTHERS, REFUSED, adopted, beside, refusal


@pytest.mark.parametrize("name", ADOPTED)
def test_activations_and_edits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    found = beside(name, tmp_path)
    assert found.plain <= 2e-6
    assert found.edited <= 2e-6
    assert set(found.missing) == set(OTHERS[name].lacks)
    assert found.hooks > 48


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_told_why(name: str, tmp_path: Path) -> None:
    said = refusal(name, tmp_path)
    assert OTHERS[name].refused in said
    assert "graphlens expose" in said


@pytest.mark.parametrize("name", ["megatron", "eurobert"])
def test_an_encoder_with_a_decoders_blocks_is_no_decoder(name: str, tmp_path: Path) -> None:
    """It would be asked for a next token that its earlier ones have seen."""
    model, _, ours = adopted(name, tmp_path)
    assert (ours.cfg.attention_dir, ours.cfg.pre_norm_encoder) == ("bidirectional", True)
    with pytest.raises(InputError, match="HookedEncoder"):
        graphlens.HookedTransformer.from_onnx(tmp_path / name, "cpu")
    with pytest.raises(InputError, match="does not generate"):
        ours.generate("a")
    ids = np.random.default_rng(2).integers(5, 211, (2, 7))
    logits, cache = ours.run_with_cache(ids)
    state = dict(model.named_parameters())
    table = next(
        value for key, value in state.items() if key.endswith(("word_embeddings.weight", "embed_tokens.weight"))
    )
    np.testing.assert_array_equal(ours.W_E, table.numpy())
    np.testing.assert_array_equal(ours.embed.embed.W_E, ours.W_E)
    last = cache["blocks.2.hook_resid_post"]
    np.testing.assert_array_equal(ours.encoder_output(ids), last)
    total = sum(cache[f"blocks.{layer}.hook_{part}_out"] for layer in range(3) for part in ("attn", "mlp"))
    np.testing.assert_allclose(cache["blocks.0.hook_resid_pre"] + total, last, rtol=0, atol=1e-5)
    np.testing.assert_allclose(cache.accumulated_resid(layer=-1)[-1], last, rtol=0, atol=1e-5)
    if name == "megatron":
        with pytest.raises(InputError, match="mlm_head"):
            cache.logit_lens()
    else:
        read = ours.ln_final(last) @ ours.W_U + ours.b_U
        np.testing.assert_allclose(read, logits, rtol=0, atol=1e-4 * np.abs(logits).max())


def test_types_of_tokens_are_fed_to_an_encoder_with_a_decoders_blocks(tmp_path: Path) -> None:
    import torch

    from tests.adopt.other_families import Called, make
    from tests.adopt.torch_routes import quiet

    model = make("megatron")

    class Typed(Called):
        def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return self.model(input_ids=ids, attention_mask=mask, token_type_ids=types).logits  # type: ignore[no-any-return]

    names = ["input_ids", "attention_mask", "token_type_ids"]
    ids = torch.from_numpy(np.random.default_rng(1).integers(5, 211, (2, 9)))
    types = torch.arange(18).reshape(2, 9) % 2
    with quiet():
        torch.onnx.export(
            Typed(model, False).eval(), (ids, torch.ones_like(ids), types), tmp_path / "model.onnx", input_names=names,
            output_names=["logits"], dynamic_axes={each: {0: "b", 1: "p"} for each in names}, opset_version=17, dynamo=False,
        )  # fmt: skip
    graphlens.adopt(tmp_path / "model.onnx", tmp_path / "hooked", announce=lambda _: None)
    ours = graphlens.HookedEncoder.from_onnx(tmp_path / "hooked", "cpu")
    expected = model(input_ids=ids, token_type_ids=types).logits.numpy()
    plain = model(input_ids=ids).logits.numpy()
    found = ours(ids.numpy(), token_type_ids=types.numpy())
    assert np.abs(expected - plain).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    np.testing.assert_allclose(ours(ids.numpy()), plain, rtol=0, atol=2e-6 * np.abs(plain).max())
