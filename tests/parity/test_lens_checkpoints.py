"""Checkpoints in TransformerLens's own format (config.json and model_final.pth): from a folder, and by their official names."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lens_configs import CONFIGS, Lens, lens_model
from test_export import hub_cache
from test_lens_configs import close
from transformer_lens.pretrained.weight_conversions.mingpt import convert_mingpt_weights
from transformer_lens.pretrained.weight_conversions.neel_solu_old import convert_neel_solu_old_weights

import graphlens
from graphlens.errors import ExportError, GraphlensError

TOKENS = np.random.default_rng(3).integers(0, 23, (2, 7))
_TRAINING = {"lr": 0.002, "batch_size_per_device": 32, "train_loss_ewma_beta": 0.99, "use_bfloat16_matmul": True}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def neel_config(config: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """A config as the author's training code wrote it."""
    names = ("d_model", "n_layers", "d_mlp", "d_head", "n_heads", "n_ctx", "d_vocab", "act_fn")
    return {
        **{name: config[name] for name in names},
        "attn_only": config.get("attn_only", False),
        "normalization": config.get("normalization_type", "LN"),
        "shortformer_pos": config.get("positional_embedding_type") == "shortformer",
        "final_rms": config.get("final_rms", False),
        **_TRAINING,
        **more,
    }


def saved(folder: Path, model: Lens, config: Mapping[str, Any], **more: Any) -> Path:
    """A checkpoint folder, with the buffers that the author's have."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(neel_config(config, **more)))
    torch.save(model.state_dict(), folder / "model_final.pth")
    return folder


@pytest.mark.parametrize("name", ["attn_only", "solu_ln", "shortformer", "final_rms"])
def test_a_folder_opens_as_in_transformerlens(name: str, tmp_path: Path) -> None:
    config = {**CONFIGS[name], "n_heads": 3}
    theirs = lens_model(config)
    folder = saved(tmp_path / "checkpoint", theirs, config)
    ours = graphlens.HookedTransformer.from_pretrained_no_processing(folder)
    logits, found = ours.run_with_cache(TOKENS)
    expected, others = theirs.run_with_cache(torch.from_numpy(TOKENS))
    close(logits, expected)
    assert list(found.keys()) == list(others.keys())
    assert ours.cfg.model_name == "checkpoint"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        processed = graphlens.HookedTransformer.from_pretrained(folder)
    close(torch.from_numpy(processed(TOKENS)).log_softmax(-1), expected.log_softmax(-1))


def test_biases_that_a_checkpoint_lacks_are_zeros(tmp_path: Path) -> None:
    config = CONFIGS["attn_only"]
    theirs = lens_model(config)
    folder = saved(tmp_path / "checkpoint", theirs, config)
    state = {name: value for name, value in theirs.state_dict().items() if ".b_" not in name}
    torch.save(state, folder / "model_final.pth")
    for name, parameter in theirs.named_parameters():
        if ".b_" in name:
            parameter.zero_()
    ours = graphlens.HookedTransformer.from_pretrained_no_processing(folder)
    close(ours(TOKENS), theirs(torch.from_numpy(TOKENS)))


@pytest.mark.parametrize("name", ["solu-2l", "SoLU_2L512W_C4_Code", "NeelNanda/SoLU_2L512W_C4_Code"])
def test_an_official_name_opens_from_the_hub_cache(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = CONFIGS["solu_ln"]
    theirs = lens_model(config)
    asked = "NeelNanda/gpt-neox-tokenizer-digits"
    folder = saved(tmp_path / "checkpoint", theirs, config, tokenizer_name=asked)
    commit = hub_cache(tmp_path / "hub", "NeelNanda/SoLU_2L512W_C4_Code", folder)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if (graphlens.embedded_model() / file).is_file():
            shutil.copyfile(graphlens.embedded_model() / file, tokenizer / file)
    hub_cache(tmp_path / "hub", asked, tokenizer)
    ours = graphlens.HookedTransformer.from_pretrained_no_processing(name, cache_dir=tmp_path / "hub")
    close(ours(TOKENS), theirs(torch.from_numpy(TOKENS)))
    assert ours.cfg.model_name == "SoLU_2L512W_C4_Code"
    assert ours.runner.engine.manifest.revision == commit
    assert ours.tokenizer is not None


def test_without_its_tokenizer_a_model_takes_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    theirs = lens_model(CONFIGS["attn_only"])
    folder = saved(tmp_path / "checkpoint", theirs, CONFIGS["attn_only"], tokenizer_name="nobody/nothing")
    with pytest.warns(UserWarning, match="'nobody/nothing' cannot be had"):
        ours = graphlens.HookedTransformer.from_pretrained_no_processing(folder, cache_dir=tmp_path / "hub")
    close(ours(TOKENS), theirs(torch.from_numpy(TOKENS)))


class _Runs:
    def __reduce__(self) -> Any:
        return (open, ("ran", "w"))


@pytest.mark.parametrize("content", [{"embed.W_E": _Runs()}, [1, 2], {"embed.W_E": 3}, b"nothing", b"junk", b"",
                                     {"embed.W_E": torch.eye(3).to_sparse()}])  # fmt: skip
def test_what_is_no_state_dict_of_tensors_is_refused(
    content: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = saved(tmp_path / "checkpoint", lens_model(CONFIGS["attn_only"]), CONFIGS["attn_only"])
    if isinstance(content, bytes):
        (folder / "model_final.pth").write_bytes(content)
    else:
        torch.save(content, folder / "model_final.pth")
    with pytest.raises(
        ExportError, match=r"model_final\.pth: (torch\.load\(weights_only=True\) refuses|holds no dict)"
    ):
        graphlens.HookedTransformer.from_pretrained_no_processing(folder)
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "checkpoint", lens_model(CONFIGS["plain"]), CONFIGS["attn_only"])
    with pytest.raises(GraphlensError, match=r"blocks\.0\.ln2\.w.*different models"):
        graphlens.HookedTransformer.from_pretrained_no_processing(folder)


@pytest.mark.parametrize("layers", [2, 8, 9])
def test_the_first_solu_models_are_read_as_in_transformerlens(layers: int, tmp_path: Path) -> None:
    config = {**CONFIGS["final_rms"], "act_fn": "solu_ln", "n_layers": layers}
    theirs = lens_model(config)
    state = {}
    for name, value in theirs.state_dict().items():
        turned = layers <= 8 if name == "pos_embed.W_pos" else layers <= 6 and "W_" in name
        old = name.replace("ln_final", "norm").replace("ln", "norm")
        state[old] = value.transpose(-2, -1).contiguous() if turned else value
    again = convert_neel_solu_old_weights(dict(state), theirs.cfg)
    assert all(torch.equal(again[name], value) for name, value in theirs.state_dict().items())
    folder = saved(tmp_path / "SoLU_2L_v10_old", theirs, config)
    torch.save(state, folder / "model_final.pth")
    ours = graphlens.HookedTransformer.from_pretrained_no_processing(folder)
    close(ours(TOKENS), theirs(torch.from_numpy(TOKENS)))


def test_othello_gpt_is_read_as_in_transformerlens(tmp_path: Path) -> None:
    config = {**CONFIGS["plain"], "d_model": 15, "act_fn": "gelu"}
    theirs, heads = lens_model(config), 3
    own = theirs.state_dict()
    state = {"tok_emb.weight": own["embed.W_E"], "pos_emb": own["pos_embed.W_pos"][None]}
    state |= {"ln_f.weight": own["ln_final.w"], "ln_f.bias": own["ln_final.b"], "head.weight": own["unembed.W_U"].T}
    for layer in range(2):
        at = f"blocks.{layer}"
        for norm in ("ln1", "ln2"):
            state |= {f"{at}.{norm}.weight": own[f"{at}.{norm}.w"], f"{at}.{norm}.bias": own[f"{at}.{norm}.b"]}
        for letter, part in (("Q", "query"), ("K", "key"), ("V", "value")):
            state[f"{at}.attn.{part}.weight"] = own[f"{at}.attn.W_{letter}"].permute(0, 2, 1).reshape(heads * 5, 15)
            state[f"{at}.attn.{part}.bias"] = own[f"{at}.attn.b_{letter}"].reshape(-1)
        state[f"{at}.attn.proj.weight"] = own[f"{at}.attn.W_O"].reshape(heads * 5, 15).T
        state[f"{at}.attn.proj.bias"] = own[f"{at}.attn.b_O"]
        for old, new in (("mlp.0", "in"), ("mlp.2", "out")):
            state |= {f"{at}.{old}.weight": own[f"{at}.mlp.W_{new}"].T, f"{at}.{old}.bias": own[f"{at}.mlp.b_{new}"]}
    state = {name: value.contiguous() for name, value in state.items()}
    again = convert_mingpt_weights(state, theirs.cfg)
    assert all(torch.equal(own[name], value) for name, value in again.items())
    folder = saved(tmp_path / "othello", theirs, config, architecture="mingpt")
    torch.save(state, folder / "model_final.pth")
    ours = graphlens.HookedTransformer.from_pretrained_no_processing(folder)
    theirs.unembed.b_U.zero_()
    close(ours(TOKENS), theirs(torch.from_numpy(TOKENS)))


def test_a_folder_with_safetensors_exports_where_it_is_asked_to(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    config = CONFIGS["attn_only"]
    theirs, folder = lens_model(config), tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "transformer_lens"}))
    save_file({name: value.contiguous() for name, value in theirs.state_dict().items()}, folder / "model.safetensors")
    report = graphlens.export_model(folder, tmp_path / "hooked")
    assert report.verification is not None
    close(graphlens.HookedTransformer.from_onnx(tmp_path / "hooked")(TOKENS), theirs(torch.from_numpy(TOKENS)))
    graphlens.export_model(folder, folder)
    close(graphlens.HookedTransformer.from_onnx(folder)(TOKENS), theirs(torch.from_numpy(TOKENS)))
