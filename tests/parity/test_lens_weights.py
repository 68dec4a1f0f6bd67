"""ProcessWeights and the names of models beside TransformerLens 3.9's."""

from __future__ import annotations

import json
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import graphlens
from graphlens import GraphlensError
from graphlens.transformer_lens import loading, supported_models
from graphlens.transformer_lens.weight_processing import ProcessWeights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformer_lens import HookedTransformer, HookedTransformerConfig, weight_processing
    from transformer_lens import loading as their_loading

TINY = {
    "d_model": 12,
    "d_head": 4,
    "n_heads": 3,
    "n_layers": 2,
    "n_ctx": 9,
    "d_vocab": 11,
    "d_mlp": 20,
    "act_fn": "gelu",
}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "attn_only": {"attn_only": True},
    "solu_ln": {"act_fn": "solu_ln"},
    "rms": {"normalization_type": "RMS", "gated_mlp": True, "final_rms": True},
    "gated": {"gated_mlp": True},
    "shared_keys": {
        "n_heads": 6,
        "d_head": 2,
        "n_key_value_heads": 2,
        "positional_embedding_type": "rotary",
        "rotary_dim": 2,
    },
    "parallel": {"parallel_attn_mlp": True},
    "no_norm": {"normalization_type": None},
    "experts": {"num_experts": 3, "experts_per_token": 2, "gated_mlp": True, "normalization_type": "RMS"},
}


def made(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A config of TransformerLens's, and random weights for it by its names, norms and biases too."""
    cfg = HookedTransformerConfig(**{**TINY, **MODELS[name]}, seed=1, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = HookedTransformer(cfg).state_dict()
    generator = torch.Generator().manual_seed(2)
    state = {
        key: torch.randn(value.shape, generator=generator)
        for key, value in shapes.items()
        if not key.endswith((".mask", ".IGNORE", "rotary_sin", "rotary_cos"))
    }
    return cfg, state


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=0, atol=atol, msg=lambda said, name=name: f"{name}: {said}"
        )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "steps",
    [
        {},
        {"fold_ln": False},
        {"center_writing_weights": False},
        {"center_unembed": False, "fold_value_biases": False},
    ],
)
def test_a_processed_state_dict_is_transformerlens_own(name: str, steps: dict[str, bool]) -> None:
    cfg, state = made(name)
    before = {key: value.clone() for key, value in state.items()}
    ours = ProcessWeights.process_weights(state, cfg, **steps)
    assert_same(state, before, 0)
    assert_same(ours, weight_processing.ProcessWeights.process_weights(before, cfg, **steps))


@pytest.mark.parametrize("step", ["fold_layer_norm", "center_writing_weights", "center_unembed", "fold_value_biases"])
@pytest.mark.parametrize("name", ["gpt2", "gated", "shared_keys", "attn_only", "solu_ln"])
def test_a_step_is_transformerlens_own(name: str, step: str) -> None:
    cfg, state = made(name)
    ours = getattr(ProcessWeights, step)(state, cfg)
    assert_same(ours, getattr(weight_processing.ProcessWeights, step)({**state}, cfg))


def test_refactored_heads_make_the_same_products() -> None:
    """The sign of each singular vector is free, so the products are compared, and how the two factors share the scale."""
    cfg, state = made("gpt2")
    ours = ProcessWeights.refactor_factored_attn_matrices(state, cfg)
    theirs = weight_processing.ProcessWeights.refactor_factored_attn_matrices({**state}, cfg)
    for layer in range(cfg.n_layers):

        def weight(of: dict[str, torch.Tensor], leaf: str, layer: int = layer) -> torch.Tensor:
            return of[f"blocks.{layer}.attn.{leaf}"]

        for of in (state, theirs):
            products = [weight(each, "W_Q") @ weight(each, "W_K").mT for each in (ours, of)]
            torch.testing.assert_close(*products, rtol=0, atol=1e-4)
            products = [weight(each, "W_V") @ weight(each, "W_O") for each in (ours, of)]
            torch.testing.assert_close(*products, rtol=0, atol=1e-4)
        for leaf in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"):
            one, other = (weight(each, leaf).abs() for each in (ours, theirs))
            if leaf == "b_O":
                one, other = (weight(each, leaf) for each in (ours, theirs))
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_half_precision_comes_back_in_half_precision() -> None:
    cfg, state = made("gpt2")
    half = {name: value.half() for name, value in state.items()}
    found = ProcessWeights.process_weights(half, cfg)
    assert {value.dtype for value in found.values()} == {torch.float16}
    assert_same(found, weight_processing.ProcessWeights.process_weights({**half}, cfg), 2e-2)


def test_what_cannot_be_processed_is_refused() -> None:
    cfg, state = made("shared_keys")
    with pytest.raises(GraphlensError, match="rotated"):
        ProcessWeights.refactor_factored_attn_matrices(state, cfg)
    plain = types.SimpleNamespace(n_layers=cfg.n_layers)
    with pytest.raises(GraphlensError, match="has no"):
        ProcessWeights.refactor_factored_attn_matrices(state, plain)
    with pytest.raises(GraphlensError, match="adapter"):
        ProcessWeights.center_unembed(state, cfg, adapter=object())


def test_single_weights_are_processed_as_in_transformerlens() -> None:
    q, k, v, bias, norm = (torch.randn(*shape) for shape in ((3, 5, 4), (3, 5, 4), (3, 5, 4), (3, 4), (5,)))
    for name, arguments in (
        ("fold_layer_norm_bias_single", (q, bias, norm)),
        ("fold_layer_norm_weight_single", (q, norm)),
        ("center_weight_single", (q,)),
        ("fold_layer_norm_biases", (q, k, v, bias, None, 2 * bias, norm)),
        ("fold_layer_norm_weights", (q, k, v, norm)),
        ("center_attention_weights", (q, k, v)),
    ):
        one, other = (getattr(kind, name)(*arguments) for kind in (ProcessWeights, weight_processing.ProcessWeights))
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


# Names of models


def test_every_name_means_what_it_means_in_transformerlens() -> None:
    ours, theirs = loading.make_model_alias_map(), their_loading.make_model_alias_map()
    shared = ours.keys() & theirs.keys()
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}
    assert len(shared) > 400
    # What is left are the names of architectures that are not exported.
    exported = set(ours.values())
    assert {name for name, official in theirs.items() if official in exported} == shared
    for name in ("gpt2", "GPT2-small", "pythia-70m", "EleutherAI/pythia-70m"):
        assert loading.get_official_model_name(name) == their_loading.get_official_model_name(name)
    assert supported_models.OFFICIAL_MODEL_NAMES is loading.OFFICIAL_MODEL_NAMES


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="pythia-70m"):
        loading.get_official_model_name("pythia-71m")
    with pytest.raises(ValueError, match="no checkpoints"):
        loading.get_checkpoint_labels("gpt2")


@pytest.mark.parametrize("name", ["stanford-gpt2-small-a", "pythia-70m-v0", "pythia-70m"])
def test_checkpoints_are_those_of_transformerlens(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert loading.get_checkpoint_labels(name) == their_loading.get_checkpoint_labels(name)


def test_checkpoints_that_are_listed_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["config.json", "checkpoints/model_000100.pth", "checkpoints/model_2000000000.pth"]
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: files)
    monkeypatch.setattr("transformer_lens.loading_from_pretrained.HfApi.list_repo_files", lambda *_, **__: files)
    monkeypatch.setattr("graphlens.lens.pretrained.get_official_model_name", lambda _: "NeelNanda/SoLU_1L512W_C4_Code")
    assert loading.get_checkpoint_labels("solu-1l") == their_loading.get_checkpoint_labels("solu-1l")


# Configurations by name


@pytest.mark.parametrize(
    "options", [{}, {"fold_ln": True, "default_prepend_bos": False}, {"first_n_layers": 2, "n_ctx": 64}]
)
def test_a_config_by_name_is_that_of_the_model(options: dict[str, Any], tmp_path: Path, lens: Any) -> None:
    found = loading.get_pretrained_model_config("tiny-gpt2", **options)
    lens_says = lens.cfg.to_dict()
    for name in (
        "d_model",
        "d_head",
        "n_heads",
        "d_mlp",
        "d_vocab",
        "act_fn",
        "eps",
        "attn_scale",
        "positional_embedding_type",
    ):
        assert getattr(found, name) == lens_says[name], name
    assert found.normalization_type == ("LNPre" if options.get("fold_ln") else "LN")
    assert found.n_layers == options.get("first_n_layers", lens.cfg.n_layers)
    assert found.n_ctx == options.get("n_ctx", 128)
    assert found.default_prepend_bos is options.get("default_prepend_bos", True)
    assert found.dtype is torch.float32


def test_a_config_of_settings_in_hand_and_of_a_checkpoint() -> None:
    settings = json.loads((graphlens.embedded_model() / "config.json").read_text())
    found = loading.get_pretrained_model_config("pythia-70m-v0", {**settings, "n_layer": 3}, checkpoint_value=4000)
    assert (found.n_layers, found.checkpoint_index, found.checkpoint_value) == (3, 3, 4000)
    assert (found.from_checkpoint, found.checkpoint_label_type) == (True, "step")
    with pytest.raises(GraphlensError, match="none of that step"):
        loading.get_pretrained_model_config("pythia-70m-v0", settings, checkpoint_value=4001)


def test_the_config_of_a_checkpoint_in_transformerlens_own_format() -> None:
    old = {"d_model": 8, "n_layers": 2, "d_head": 4, "n_heads": 2, "n_ctx": 6, "d_vocab": 11, "act_fn": "solu_ln"}
    old |= {"attn_only": False, "d_mlp": 19, "normalization": "LN"}
    found = loading.get_pretrained_model_config("solu-2l", old)
    assert (found.n_layers, found.act_fn, found.d_mlp, found.normalization_type) == (2, "solu_ln", 19, "LN")
    assert loading.get_pretrained_model_config("solu-2l", old, fold_ln=True, n_ctx=4).to_dict()["n_ctx"] == 4


def test_a_config_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fails(*given: object, **options: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    with pytest.raises(graphlens.ExportError, match="gpt2: the hub cannot be reached"):
        loading.get_pretrained_model_config("gpt2-small")


def test_the_sizes_of_a_model(lens: Any) -> None:
    assert loading.get_num_params_of_pretrained("tiny-gpt2") == lens.cfg.n_params
    sizes = loading.get_basic_config("tiny-gpt2")
    assert (sizes.d_model, sizes.n_layers, sizes.n_ctx) == (lens.cfg.d_model, lens.cfg.n_layers, 128)
    assert loading.Config() == loading.Config(**vars(their_loading.Config()))
