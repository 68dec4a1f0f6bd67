"""SAEs in five libraries' layouts: opened, compared with published formulas and SAELens's values, saved, and told apart."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import graphlens
from graphlens import CrossLayerTranscoder, Sae
from graphlens.file.sae_config import WEIGHTS
from graphlens.file.sae_folders import SHIPPED
from graphlens.file.sae_layouts import Layout, layouts, register
from graphlens.file.safetensors import SafetensorsFile
from tests.saes.oracle_check import TOLERANCE, compared

D_IN, D_SAE, D_OUT, K = 13, 29, 7, 4
GOLDEN = Path(__file__).with_name("golden")
HOOK = "blocks.2.hook_resid_post"
MLP = ("blocks.2.ln2.hook_normalized", "blocks.2.hook_mlp_out")
READ_BY_MLP = (
    "blocks.2.mlp.hook_in",
    "blocks.2.hook_mlp_out",
)  # sparsify reads the module's input: with the norm's weights
Arrays = dict[str, np.ndarray]


def arrays(architecture: str = "standard", seed: int = 0, d_out: int | None = None) -> Arrays:
    """Random weights, none of them 0, as an architecture has them."""
    random = np.random.default_rng(seed)
    width = d_out or (D_OUT if architecture.endswith("transcoder") else D_IN)
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, width), "b_dec": (width,), "W_skip": (width, D_IN)}
    names = ("W_enc", "W_dec", "b_dec", *WEIGHTS[architecture])
    made = {name: random.standard_normal(shapes.get(name, (D_SAE,))).astype(np.float32) * 0.5 for name in names}
    if "threshold" in made:
        made["threshold"] = np.abs(made["threshold"])
    return made


def activations(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, 5, D_IN)).astype(np.float32)


def relu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, 0)


def largest(x: np.ndarray, k: int) -> np.ndarray:
    """The k largest of each row, rectified: no two are equal here."""
    return np.where(x >= np.sort(x, axis=-1)[..., -k, None], relu(x), 0)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(expected).max() > 0.1
    assert np.abs(found - expected).max() <= TOLERANCE * max(1.0, np.abs(expected).max())


def sixty_four(weights: Arrays) -> Arrays:
    return {name: array.astype(np.float64) for name, array in weights.items()}


# The layouts, by the formulas that their libraries publish


def test_values_are_those_that_saelens_wrote_beside_its_folders() -> None:
    found = list(compared(GOLDEN))
    assert {each.name for each in found} >= {
        "gated",
        "topk-rescaled",
        "trained-batchtopk",
        "skip_transcoder",
        "old-hook_z",
    }
    for each in found:
        assert each.farthest <= TOLERANCE, each
        assert len(each.arrays) >= 7


@pytest.mark.parametrize(
    ("place", "hook", "model", "reshape"),
    [
        ("gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", "blocks.20.hook_resid_post", "gemma-2-2b", "none"),
        ("gemma-scope-9b-it-mlp/layer_3/width_16k/average_l0_7", "blocks.3.hook_mlp_out", "gemma-2-9b-it", "none"),
        ("gemma-scope-2b-pt-att/layer_0/width_16k/average_l0_7", "blocks.0.attn.hook_z", "gemma-2-2b", "hook_z"),
        (
            "models--google--gemma-scope-2b-pt-res/snapshots/0123abc/layer_5/width_65k/average_l0_71",
            "blocks.5.hook_resid_post",
            "gemma-2-2b",
            "none",
        ),
    ],
)
@pytest.mark.parametrize("small", [False, True])
def test_gemma_scope(tmp_path: Path, place: str, hook: str, model: str, reshape: str, small: bool) -> None:
    weights = arrays("jumprelu")
    folder = tmp_path / place
    folder.mkdir(parents=True)
    np.savez_compressed(
        folder / "params.npz", **{name.replace("W_", "w_") if small else name: each for name, each in weights.items()}
    )
    sae = Sae.from_folder(folder)
    assert (sae.cfg.hook, sae.cfg.model_name, sae.cfg.reshape_activations) == (hook, model, reshape)
    w, x = sixty_four(weights), activations()
    pre = x @ w["W_enc"] + w["b_enc"]
    features = relu(pre) * (pre > w["threshold"])
    read = x.reshape(2, 5, 1, D_IN) if reshape == "hook_z" else x
    close(sae.encode(read), features)
    close(sae(read).reshape(x.shape), features @ w["W_dec"] + w["b_dec"])


def test_gemma_scope_embeddings_are_in_the_scale_that_gemma_multiplies_by(tmp_path: Path) -> None:
    weights = arrays("jumprelu")
    folder = tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_21"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **weights)
    sae = Sae.from_folder(folder)
    assert sae.cfg.hook == "hook_embed"
    w, x = sixty_four(weights), activations()
    pre = x @ w["W_enc"] / np.sqrt(D_IN) + w["b_enc"]
    features = relu(pre) * (pre > w["threshold"])
    close(sae(x), features @ w["W_dec"] * np.sqrt(D_IN) + w["b_dec"])


def test_gemma_scope_transcoders_read_the_normed_stream(tmp_path: Path) -> None:
    weights = arrays("jumprelu_transcoder")
    folder = tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_7" / "width_16k" / "average_l0_7"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **weights)
    sae = Sae.from_folder(folder)
    assert (sae.cfg.hook, sae.cfg.writes) == ("blocks.7.ln2.hook_normalized", "blocks.7.hook_mlp_out")
    w, x = sixty_four(weights), activations()
    pre = x @ w["W_enc"] + w["b_enc"]
    close(sae(x), relu(pre) * (pre > w["threshold"]) @ w["W_dec"] + w["b_dec"])


def test_gemma_scope_2(tmp_path: Path) -> None:
    weights = arrays("jumprelu_skip_transcoder")
    theirs = {"W_enc": "w_enc", "W_dec": "w_dec", "W_skip": "affine_skip_connection"}
    folder = tmp_path / "gemma-scope-2-1b-pt" / "transcoder" / "layer_12_width_16k"
    folder.mkdir(parents=True)
    save_file({theirs.get(name, name): each for name, each in weights.items()}, folder / "params.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt"}))
    with pytest.raises(graphlens.ModelFileError, match="Pass hook="):
        Sae.from_folder(folder)
    sae = Sae.from_folder(folder, hook="blocks.12.ln2.hook_normalized", hook_out="blocks.12.hook_mlp_out")
    w, x = sixty_four(weights), activations()
    pre = x @ w["W_enc"] + w["b_enc"]
    close(sae(x), relu(pre) * (pre > w["threshold"]) @ w["W_dec"] + w["b_dec"] + x @ w["W_skip"].T)
    assert set(sae.files) == set(weights)
    plain = tmp_path / "gemma-scope-2-1b-pt" / "resid_post" / "layer_12_width_16k"
    plain.mkdir(parents=True)
    save_file({theirs.get(name, name): each for name, each in arrays("jumprelu").items()}, plain / "params.safetensors")
    (plain / "config.json").write_text(json.dumps({"architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt"}))
    assert Sae.from_folder(plain).cfg.hook == "blocks.12.hook_resid_post"


@pytest.mark.parametrize(
    ("name", "said", "hooks"),
    [
        ("layers.2", {"num_latents": D_SAE}, (HOOK, HOOK)),
        ("layers_2", {"num_latents": 0, "expansion_factor": 2}, (HOOK, HOOK)),
        ("layers.2.mlp", {"num_latents": D_SAE}, ("blocks.2.hook_mlp_out",) * 2),
        ("gpt_neox.layers.2.attention", {"num_latents": D_SAE}, ("blocks.2.hook_attn_out",) * 2),
        ("embed_tokens", {"num_latents": D_SAE}, ("hook_embed", "hook_embed")),
        ("h.2.mlp", {"num_latents": D_SAE, "transcode": True}, READ_BY_MLP),
        ("layers.2.mlp", {"num_latents": D_SAE, "transcode": True, "skip_connection": True}, READ_BY_MLP),
    ],
)  # fmt: skip
def test_sparsify(tmp_path: Path, name: str, said: dict[str, object], hooks: tuple[str, str]) -> None:
    transcoder, skip = "transcode" in said, "skip_connection" in said
    w = arrays("skip_transcoder" if skip else "standard", d_out=D_IN)
    features = D_SAE if said["num_latents"] else 2 * D_IN
    w = {
        key: each[..., :features] if key in ("W_enc", "b_enc") else each[:features] if key == "W_dec" else each
        for key, each in w.items()
    }
    folder = tmp_path / "repository" / name
    folder.mkdir(parents=True)
    tensors = {
        "encoder.weight": w["W_enc"].T.copy(),
        "encoder.bias": w["b_enc"].copy(),
        "W_dec": w["W_dec"].copy(),
        "b_dec": w["b_dec"],
    }
    save_file({**tensors, **({"W_skip": w["W_skip"]} if skip else {})}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"k": K, "d_in": D_IN, "normalize_decoder": True, **said}))
    (folder.parent / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-70m", "ctx_len": 2048}))
    sae = Sae.from_folder(folder)
    assert (sae.cfg.hook, sae.cfg.writes, sae.cfg.model_name, sae.cfg.k) == (*hooks, "EleutherAI/pythia-70m", K)
    assert sae.cfg.activation == "topk"
    w, x = sixty_four(w), activations()
    acts = largest((x if transcoder else x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], K)
    close(sae.encode(x), acts)
    close(sae(x), acts @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if skip else 0))


LINEAR = {"W_enc": "encoder.weight", "W_dec": "decoder.weight"}
DICTIONARIES: dict[str, tuple[str, dict[str, str], Callable[[Arrays, np.ndarray], np.ndarray]]] = {
    "AutoEncoder": (
        "standard",
        LINEAR | {"b_enc": "encoder.bias", "b_dec": "bias"},
        lambda w, x: relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]),
    ),
    "AutoEncoderNew": (
        "standard",
        LINEAR | {"b_enc": "encoder.bias", "b_dec": "decoder.bias"},
        lambda w, x: relu(x @ w["W_enc"] + w["b_enc"]),
    ),
    "GatedAutoEncoder": (
        "gated",
        LINEAR | {"b_dec": "decoder_bias", "b_gate": "gate_bias", "b_mag": "mag_bias"},
        lambda w, x: relu(np.exp(w["r_mag"]) * ((x - w["b_dec"]) @ w["W_enc"]) + w["b_mag"])
        * ((x - w["b_dec"]) @ w["W_enc"] + w["b_gate"] > 0),
    ),
    "JumpReluAutoEncoder": (
        "jumprelu",
        {},
        lambda w, x: relu(x @ w["W_enc"] + w["b_enc"]) * (x @ w["W_enc"] + w["b_enc"] > w["threshold"]),
    ),
    "AutoEncoderTopK": (
        "standard",
        LINEAR | {"b_enc": "encoder.bias"},
        lambda w, x: largest((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], K),
    ),
    "BatchTopKSAE": (
        "standard",
        LINEAR | {"b_enc": "encoder.bias"},
        lambda w, x: relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"] > 0.7),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DICTIONARIES)
def test_dictionary_learning(tmp_path: Path, kind: str) -> None:
    architecture, names, formula = DICTIONARIES[kind]
    weights = arrays(architecture)
    tensors = {
        names.get(name, name): each.T.copy() if names.get(name, "").endswith("weight") else each
        for name, each in weights.items()
    }
    if "TopK" in kind:
        tensors |= {"k": np.asarray(K, np.int32), "threshold": np.asarray(0.7, np.float32)}
    trainer = {
        "dict_class": kind,
        "layer": 2,
        "lm_name": "EleutherAI/pythia-70m",
        "k": K,
        "submodule_name": "resid_post_layer_2",
    }
    folder = tmp_path / "trainer_0"
    folder.mkdir()
    save_file(tensors, folder / "ae.safetensors")
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    sae = Sae.from_folder(folder)
    assert (sae.cfg.hook, sae.cfg.model_name, sae.cfg.context_size) == (HOOK, "pythia-70m", 128)
    w, x = sixty_four(weights), activations()
    close(sae.encode(x), formula(w, x))
    close(sae(x), formula(w, x) @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("jump", [False, True])
def test_cross_layer_transcoders_write_to_their_own_and_all_later_layers(tmp_path: Path, jump: bool) -> None:
    layers, random = 3, np.random.default_rng(5)
    kept: dict[str, np.ndarray] = {}
    for layer in range(layers):
        encoder = {
            f"W_enc_{layer}": random.standard_normal((D_SAE, D_IN)).astype(np.float32),
            f"b_enc_{layer}": random.standard_normal(D_SAE).astype(np.float32),
            f"b_dec_{layer}": random.standard_normal(D_IN).astype(np.float32),
        }
        if jump:
            encoder[f"threshold_{layer}"] = np.abs(random.standard_normal(D_SAE)).astype(np.float32)
        decoder = {f"W_dec_{layer}": random.standard_normal((D_SAE, layers - layer, D_IN)).astype(np.float32)}
        save_file(encoder, tmp_path / f"W_enc_{layer}.safetensors")
        save_file(decoder, tmp_path / f"W_dec_{layer}.safetensors")
        kept |= sixty_four(encoder | decoder)
    (tmp_path / "config.yaml").write_text('model_kind: cross_layer_transcoder\nfeature_input_hook: "mlp.hook_in"\n')
    found = CrossLayerTranscoder.from_folder(tmp_path)
    assert (found.n_layers, found.d_in, found.d_sae) == (layers, D_IN, D_SAE)
    assert found.hooks(-1) == ("blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out")
    x = random.standard_normal((layers, 2, 5, D_IN)).astype(np.float32)
    pre = [x[layer] @ kept[f"W_enc_{layer}"].T + kept[f"b_enc_{layer}"] for layer in range(layers)]
    features = np.stack(
        [each * (each > kept[f"threshold_{at}"]) if jump else relu(each) for at, each in enumerate(pre)]
    )
    close(found.encode(x), features)
    written = [
        kept[f"b_dec_{to}"] + sum(features[at] @ kept[f"W_dec_{at}"][:, to - at] for at in range(to + 1))
        for to in range(layers)
    ]
    close(found.decode(features), np.stack(written))
    with pytest.raises(graphlens.ModelFileError, match="CrossLayerTranscoder"):
        Sae.from_folder(tmp_path)
    (tmp_path / "W_dec_1.safetensors").unlink()
    with pytest.raises(graphlens.ModelFileError, match=r"W_dec_1\.safetensors is missing"):
        CrossLayerTranscoder.from_folder(tmp_path)


def test_old_factors_of_features_go_into_the_decoder(tmp_path: Path) -> None:
    weights, factors = arrays(), np.linspace(0.5, 2, D_SAE, dtype=np.float32)
    said = {"d_in": D_IN, "d_sae": D_SAE, "hook_point": HOOK, "finetuning_scaling_factor": True}
    (tmp_path / "cfg.json").write_text(json.dumps(said))
    save_file({**weights, "scaling_factor": factors}, tmp_path / "sae_weights.safetensors")
    w, x = sixty_four(weights), activations()
    features = relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    sae = Sae.from_folder(tmp_path)
    close(sae.encode(x), features)
    close(sae(x), (features * factors) @ w["W_dec"] + w["b_dec"])
    (tmp_path / "cfg.json").write_text(json.dumps(said | {"finetuning_scaling_factor": False}))
    with pytest.raises(graphlens.ModelFileError, match="scaling_factor"):
        Sae.from_folder(tmp_path)


# Saved and opened again


@pytest.mark.parametrize("architecture", WEIGHTS)
def test_a_saved_sae_opens_as_it_was_and_its_weights_are_mapped(tmp_path: Path, architecture: str) -> None:
    weights = arrays(architecture)
    b_enc = weights.pop("b_enc", None)
    first = [weights.pop(name) for name in ("W_enc", "W_dec", "b_dec")]
    sae = Sae.from_arrays(
        first[0], b_enc, first[1], first[2], HOOK, architecture, **weights,
        k=K if architecture == "topk" else None, rescale_acts_by_decoder_norm=architecture == "topk", model_name="tiny",
        hook_out="blocks.2.hook_mlp_out" if architecture.endswith("transcoder") else None,
        normalize_activations="layer_norm", metadata={"dataset_path": "text", "layers": [1, 2]},
    )  # fmt: skip
    sae.save(tmp_path / "saved")
    again = Sae.from_folder(tmp_path / "saved")
    assert replace(again.cfg, metadata={}) == replace(sae.cfg, metadata={})
    assert dict(again.cfg.metadata) == {**sae.cfg.metadata, "sae_lens_version": "6.0.0"}
    for name, array in sae.weights.items():
        np.testing.assert_array_equal(again.weights[name], array)
        path, entry = again.files[name]
        raw = path.read_bytes()[entry.offset : entry.offset + entry.length]
        assert raw == array.tobytes()
        base = again.weights[name]
        while base.base is not None and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap)
    again.save(tmp_path / "twice")
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()
    with pytest.raises(graphlens.ExportError, match="not empty"):
        sae.save(tmp_path / "saved")


def test_a_transcoder_with_k_is_saved_so_that_saelens_refuses_it(tmp_path: Path) -> None:
    weights = arrays("transcoder")
    sae = Sae.from_arrays(*(weights[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")), HOOK, "transcoder", k=K)
    sae.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "cfg.json").read_text())["architecture"] == "topk_transcoder"
    again = Sae.from_folder(tmp_path / "saved")
    assert again.cfg.k == K
    assert again.cfg.architecture == "transcoder"
    np.testing.assert_array_equal(again(activations()), sae(activations()))


# What one is told from another by


def standard(**settings: object) -> Sae:
    weights = arrays()
    return Sae.from_arrays(*(weights[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")), HOOK, **settings)  # type: ignore[arg-type]


def test_keys_differ_where_anything_does(tmp_path: Path) -> None:
    sae = standard()
    assert sae.key() == standard().key()
    others = [
        standard(apply_b_dec_to_input=False),
        standard(normalize_activations="layer_norm"),
        sae.only([1, 2]),
        sae.only([2, 1]),
    ]
    changed = {name: array.copy() for name, array in sae.weights.items()}
    changed["b_dec"][3] = np.nextafter(changed["b_dec"][3], np.float32(9))
    others.append(Sae(sae.cfg, changed))
    sae.save(tmp_path / "saved")
    opened = Sae.from_folder(tmp_path / "saved")
    keys = {each.key() for each in (sae, opened, *others)}
    assert len(keys) == 2 + len(others)
    assert opened.key() == Sae.from_folder(tmp_path / "saved").key()
    before = opened.key()
    path, entry = opened.files["b_enc"]
    with path.open("r+b") as file:
        file.seek(entry.offset)
        file.write(np.float32(3).tobytes())
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 10**9))
    assert opened.key() != before


def test_a_key_is_of_the_weights_that_are_held(tmp_path: Path) -> None:
    """Not of what lies at their path by then: SAEs of equal keys share a session."""
    kept, place = {}, tmp_path / "saved"
    for at in (1, 2):
        standard().with_norm_folded(at).save(place)
        kept[at] = Sae.from_folder(place)
        kept[at].key()
        place.rename(tmp_path / str(at))
        kept[at + 2] = Sae.from_folder(tmp_path / str(at))
        kept[at + 4] = pickle.loads(pickle.dumps(kept[at + 2]))
        shutil.move(tmp_path / str(at), place)
        assert kept[at].key() == kept[at].key()
        shutil.rmtree(place)
    standard().with_norm_folded(3).save(place)
    third = Sae.from_folder(place)
    for at in (1, 2):
        assert len({each.key() for each in (third, kept[at], kept[3 - at])}) == 3
        assert kept[at + 4].key() == pickle.loads(pickle.dumps(kept[at])).key() == kept[at].key()
        np.testing.assert_array_equal(kept[at + 4].W_enc, standard().W_enc * np.float32(at))


def test_arrays_are_copied_and_cannot_be_written() -> None:
    weights = arrays()
    sae = Sae.from_arrays(*(weights[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")), HOOK)
    key, before = sae.key(), sae.W_enc.copy()
    weights["W_enc"][:] = 0
    np.testing.assert_array_equal(sae.W_enc, before)
    assert sae.key() == key
    with pytest.raises(ValueError, match="read-only"):
        sae.W_enc[0, 0] = 1


# Some features alone


@pytest.mark.parametrize("architecture", [name for name in WEIGHTS if name != "topk"])
def test_some_features_alone_have_the_activations_that_they_had(architecture: str) -> None:
    weights = arrays(architecture)
    first = [weights.pop(name, None) for name in ("W_enc", "b_enc", "W_dec", "b_dec")]
    sae = Sae.from_arrays(*first, HOOK, architecture, **weights)  # type: ignore[arg-type]
    chosen, x = [5, 0, -1, 11], activations()
    part = sae.only(chosen)
    assert part.cfg.d_sae == 4
    assert part.features == (5, 0, D_SAE - 1, 11)
    assert part.only([2]).features == (D_SAE - 1,)
    np.testing.assert_allclose(part.encode(x), sae.encode(x)[..., chosen], rtol=1e-5, atol=1e-6)
    features = np.zeros((2, 5, D_SAE), np.float32)
    features[..., chosen] = sae.encode(x)[..., chosen]
    np.testing.assert_allclose(part.decode(part.encode(x)), sae.decode(features), rtol=1e-5, atol=1e-5)
    assert not part.files


def test_a_folded_factor_gives_what_the_sae_gives_of_activations_times_it() -> None:
    sae = standard(normalize_activations="expected_average_only_in")
    folded, x = sae.with_norm_folded(3.5), activations()
    assert folded.cfg.normalize_activations == "none"
    close(folded.encode(x), sae.encode(x * np.float32(3.5)))
    close(folded(x), sae(x * np.float32(3.5)) / 3.5)
    with pytest.raises(graphlens.InputError, match="layer_norm"):
        standard(normalize_activations="layer_norm").with_norm_folded(2)


def test_tensors_in_tensors_out() -> None:
    torch = pytest.importorskip("torch")
    weights = {name: torch.from_numpy(each) for name, each in arrays().items()}
    sae = Sae.from_arrays(*(weights[name].requires_grad_() for name in ("W_enc", "b_enc", "W_dec", "b_dec")), HOOK)
    x = activations()
    found = sae.encode(torch.from_numpy(x).double())
    assert isinstance(found, torch.Tensor)
    assert found.dtype == torch.float64
    np.testing.assert_array_equal(found.float().numpy(), standard().encode(x))
    assert isinstance(sae(torch.from_numpy(x)), torch.Tensor)
    assert isinstance(sae(x), np.ndarray)


# The register


def test_two_layouts_of_one_name_or_of_the_same_files_are_an_error() -> None:
    assert layouts()[: len(SHIPPED)] == SHIPPED
    (first, *_) = SHIPPED
    for layout in (Layout(first.name, ("other",), (), first.read), Layout("other", first.files, (), first.read)):
        with pytest.raises(graphlens.InputError, match="SAELens"):
            register(layout)
    assert layouts() == SHIPPED


def test_weights_are_not_read_into_memory_by_the_header_alone(tmp_path: Path) -> None:
    standard().save(tmp_path / "saved")
    entries = SafetensorsFile(tmp_path / "saved" / "sae_weights.safetensors").entries
    assert set(entries) == {"W_enc", "b_enc", "W_dec", "b_dec"}
    assert all(entry.dtype == "F32" for entry in entries.values())
