"""What torch can hand over and graphlens cannot take: quantised models, tensors that NumPy lacks a dtype for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import graphlens.torch
from graphlens import Ablate, HookedTransformer, Steer
from graphlens.errors import ExportError, InputError


@pytest.fixture
def hf_model(odd_checkpoint: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(odd_checkpoint).eval()


def packed(model: Any) -> Any:
    """torch's own dynamic quantisation, which packs the linear modules' weights."""
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "qnnpack" if "qnnpack" in torch.backends.quantized.supported_engines else engine
    try:
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    finally:
        torch.backends.quantized.engine = engine


def as_integers(model: Any) -> Any:
    """As bitsandbytes keeps weights: bytes where floats were."""
    module = model.transformer.h[0].mlp.c_fc
    module.weight = torch.nn.Parameter(module.weight.detach().to(torch.int8), requires_grad=False)
    return model


def by_transformers(model: Any) -> Any:
    """As transformers marks a model that was loaded quantised."""
    model.config.quantization_config = SimpleNamespace(quant_method="gptq")
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("quantise", "said"),
    [
        (packed, r"quantised \(lm_head\..* is a "),
        (as_integers, r"quantised \(transformer\.h\.0\.mlp\.c_fc\.weight is torch\.int8\)"),
        (by_transformers, r"quantised \(by gptq\)"),
    ],
)
def test_a_quantised_model_is_refused_with_a_sentence(
    quantise: Any, said: str, hf_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=rf"hf_model is {said}.*dequantize"):
        HookedTransformer.from_pretrained("mine", hf_model=quantise(hf_model))
    assert not list(tmp_path.iterdir())


def test_a_bfloat16_vector_steers_as_its_float32(model: Any) -> None:
    vector = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    hook, tokens = "blocks.1.hook_resid_pre", [[1, 2, 3]]
    edit = Steer(hook, vector, 2.0)
    assert edit == Steer(hook, vector.float().numpy(), 2.0)
    steered = model.run_with_hooks(tokens, fwd_hooks=[(hook, lambda value, hook: value + 2 * vector.float())])
    found = model.run_with_interventions(tokens, edit)
    torch.testing.assert_close(found, steered, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(3).to_sparse(),
        torch.ones(3, device="meta"),
        torch.ones(3).to(torch.float8_e4m3fn),
    ],
    ids=["sparse", "meta", "float8"],
)
def test_a_tensor_that_is_no_array_is_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"Steer\.vector is a tensor that cannot be read as an array"):
        Steer("blocks.0.hook_resid_pre", tensor)
    with pytest.raises(InputError, match=r"positions is a tensor that cannot be read as an array"):
        Ablate("blocks.0.hook_resid_pre", positions=tensor)


def test_an_attention_mask_may_be_a_tensor(model: Any) -> None:
    tokens, mask = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    expected = model(tokens, attention_mask=mask.numpy())
    for given in (mask, mask.bool(), mask.to(torch.bfloat16)):
        torch.testing.assert_close(model(tokens, attention_mask=given), expected, rtol=0, atol=0)


@pytest.mark.parametrize("face", [graphlens.torch.HookedTransformer, HookedTransformer])
def test_the_function_that_was_called_is_named_on_both_faces(face: Any, tiny_folder: Path) -> None:
    opened = face.from_onnx(tiny_folder, "cpu")
    with pytest.raises(
        TypeError, match=r"^run_with_cache\(\) has no argument 'name_filter': did you mean names_filter\?"
    ):
        opened.run_with_cache("x", name_filter="hook_embed")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"n_head": 7}, "transformers cannot build the model that config.json describes"),
        ({"n_head": 10**6}, "1000000 heads"),
        ({"tie_word_embeddings": "x"}, "transformers refuses it"),
        ({"n_inner": "x"}, "n_inner='x', and it must be a whole number above 0"),
    ],
)
def test_a_config_that_transformers_cannot_build(
    changed: dict[str, Any], said: str, odd_checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(odd_checkpoint, tmp_path / "checkpoint"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(ExportError, match=said):
        graphlens.export_model(folder, tmp_path / "hooked")
    assert not (tmp_path / "hooked").exists()
