"""SAEs that cannot be: each ends in one sentence that says what was found and what to do."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_sae_files import D_IN, D_SAE, GOLDEN, HOOK, activations, arrays, standard

import graphlens
from graphlens import HookedTransformer, Sae
from graphlens.edits.spliced_sae import SplicedSae
from graphlens.errors import InputError
from graphlens.file.sae_config import SaeConfig
from graphlens.file.sae_names import OF_MODULE
from graphlens.surgery.sae_splicing import place_of

CONFIG = {
    "architecture": "standard",
    "d_in": D_IN,
    "d_sae": D_SAE,
    "metadata": {"hook_name": HOOK, "sae_lens_version": "6.54.0"},
}
OLD = {"d_in": D_IN, "d_sae": D_SAE, "hook_name": HOOK}


def folder_with(tmp_path: Path, said: dict[str, object], weights: dict[str, np.ndarray] | None = None) -> Path:
    (tmp_path / "cfg.json").write_text(json.dumps(said))
    save_file(arrays() if weights is None else weights, tmp_path / "sae_weights.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("said", "match"),
    [
        (
            CONFIG | {"architecture": "temporal"},
            "'temporal' cannot be run. Those that can: standard, gated, .*matryoshka_batchtopk",
        ),
        (CONFIG | {"architecture": "matching_pursuit"}, "'matching_pursuit' cannot be run"),
        (CONFIG | {"apply_b_dec_to_input": "no"}, "true or false"),
        (OLD | {"hook_head_index": 3}, "one head alone"),
        (CONFIG | {"architecture": "abstopk", "k": 3}, "'abstopk' cannot be run"),
        (CONFIG | {"architecture": "topk_standard"}, "'topk_standard' cannot be run"),
        (CONFIG | {"architecture": ["standard"]}, "cannot be run"),
        (
            CONFIG | {"normalize_activations": "covariance_whitening"},
            "covariance_whitening.*not known. There are: none",
        ),
        (CONFIG | {"normalize_activations": "constant_scalar_rescale"}, "constant_scalar_rescale"),
        (CONFIG | {"reshape_activations": "hook_q"}, "hook_q"),
        (CONFIG | {"d_in": "13"}, "does not say d_in"),
        (CONFIG | {"d_sae": -1}, "d_sae must be"),
        (CONFIG | {"d_sae": True}, "does not say d_sae"),
        (CONFIG | {"metadata": {"sae_lens_version": "6.54.0"}}, "Pass hook="),
        (CONFIG | {"metadata": None}, "Pass hook="),
        (CONFIG | {"architecture": "topk"}, "topk SAE needs k"),
        (CONFIG | {"architecture": "topk", "k": D_SAE + 1}, "k=30: there are 29 features"),
        (CONFIG | {"architecture": "transcoder", "apply_b_dec_to_input": True}, "no b_dec to take"),
        (CONFIG | {"d_in": D_IN + 1}, r"W_enc: its shape is \[13, 29\].*\[14, 29\]"),
        (OLD | {"activation_fn_str": "tanh-relu"}, "'tanh-relu' is not known. There are: relu, topk"),
        (OLD | {"activation_fn_str": "topk", "activation_fn_kwargs": {}}, "topk SAE needs k"),
        (OLD | {"architecture": "gated"}, "holds no tensor 'b_gate'"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, said: dict[str, object], match: str) -> None:
    with pytest.raises(graphlens.ModelFileError, match=match) as raised:
        Sae.from_folder(folder_with(tmp_path, said))
    assert str(tmp_path) in str(raised.value)


def without(name: str) -> dict[str, np.ndarray]:
    return {key: array for key, array in arrays().items() if key != name}


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
    return {key: change(array) if key == name else array for key, array in arrays().items()}


def spoiled(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def spoil(array: np.ndarray) -> np.ndarray:
        made = array.copy()
        made.flat[-2] = value
        return made

    return spoil


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        (without("b_enc"), "holds no tensor 'b_enc'"),
        (changed("b_dec", spoiled(np.nan)), "b_dec: it holds NaN"),
        (changed("W_enc", spoiled(np.nan)), "W_enc: it holds NaN"),
        (changed("W_dec", spoiled(np.inf)), "W_dec: it holds NaN or infinity"),
        (changed("W_dec", spoiled(-np.inf)), "W_dec: it holds NaN or infinity"),
        (changed("b_enc", lambda array: array[:-1].copy()), r"b_enc: its shape is \[28\]"),
        (changed("W_dec", lambda array: array.T.copy()), r"W_dec: its shape is \[13, 29\]"),
        (changed("W_enc", lambda array: array.reshape(-1)), r"W_enc: its shape is \[377\]"),
    ],
)
def test_weights_that_cannot_be(tmp_path: Path, weights: dict[str, np.ndarray], match: str) -> None:
    with pytest.raises(graphlens.ModelFileError, match=match):
        Sae.from_folder(folder_with(tmp_path, CONFIG, weights))


def test_a_threshold_may_be_infinite_for_a_feature_that_is_off(tmp_path: Path) -> None:
    weights = arrays("jumprelu")
    weights["threshold"][4] = np.inf
    sae = Sae.from_folder(folder_with(tmp_path, CONFIG | {"architecture": "jumprelu"}, weights))
    assert not sae.encode(activations())[..., 4].any()


class _Trap:
    """What a hostile pickle does when it is opened."""

    def __reduce__(self) -> tuple[object, ...]:
        return (open, ("/tmp/a-pickle-was-opened", "w"))  # it would raise no error, and leave a file


@pytest.mark.parametrize("name", ["ae.pt", "model.pth", "sae.bin", "sae.pkl"])
def test_pickles_are_refused_and_how_to_convert_them_is_said(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(_Trap()))
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder"}}))
    with pytest.raises(
        graphlens.ModelFileError, match=rf"{name} is a pickle.*weights_only=True.*{Path(name).stem}\.safetensors"
    ):
        Sae.from_folder(tmp_path)
    assert not Path("/tmp/a-pickle-was-opened").exists()


def test_an_npz_with_a_pickle_in_it_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_3"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **arrays("jumprelu") | {"W_enc": np.array([_Trap()], object)})
    with pytest.raises(graphlens.ModelFileError, match="cannot be read as arrays"):
        Sae.from_folder(folder)
    assert not Path("/tmp/a-pickle-was-opened").exists()
    for data in (b"", b"PK\x03\x04 no archive", (folder / "params.npz").read_bytes()[:-200]):
        (folder / "params.npz").write_bytes(data)
        with pytest.raises(graphlens.ModelFileError, match="cannot be read as arrays"):
            Sae.from_folder(folder)


def test_folders_that_hold_none(tmp_path: Path) -> None:
    with pytest.raises(graphlens.ModelFileError, match="no such folder"):
        Sae.from_folder(tmp_path / "absent")
    with pytest.raises(
        graphlens.ModelFileError, match=r"nothing in it.*cfg\.json and sae_weights\.safetensors \(SAELens\)"
    ):
        Sae.from_folder(tmp_path)
    (tmp_path / "cfg.json").write_text("{")
    (tmp_path / "sae_weights.safetensors").write_bytes(b"")
    with pytest.raises(graphlens.ModelFileError, match=r"cfg\.json cannot be read"):
        Sae.from_folder(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps(CONFIG))
    with pytest.raises(graphlens.ModelFileError, match="not a safetensors file"):
        Sae.from_folder(tmp_path)
    outside = tmp_path.parent / f"{tmp_path.name}-weights"
    save_file(arrays(), outside)
    (tmp_path / "sae_weights.safetensors").unlink()
    (tmp_path / "sae_weights.safetensors").symlink_to(outside)
    with pytest.raises(graphlens.ModelFileError, match="a link that leaves the folder"):
        Sae.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("said", "match"),
    [
        (
            {"activation": "groupmax", "k": 4, "d_in": D_IN, "num_latents": D_SAE},
            "'groupmax' cannot be run. There is: topk",
        ),
        ({"signed": True, "k": 4, "d_in": D_IN, "num_latents": D_SAE}, "signed topk"),
        ({"k": 4, "d_in": D_IN + 1, "num_latents": D_SAE}, "another SAE's"),
        ({"k": 4, "d_in": D_IN}, r"13 x 416, and the encoder in sae\.safetensors is 13 x 29"),
    ],
)
def test_sparsify_settings_that_cannot_be(tmp_path: Path, said: dict[str, object], match: str) -> None:
    folder, w = tmp_path / "layers.1", arrays()
    folder.mkdir()
    tensors = {
        "encoder.weight": w["W_enc"].T.copy(),
        "encoder.bias": w["b_enc"],
        "W_dec": w["W_dec"],
        "b_dec": w["b_dec"],
    }
    save_file(tensors, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(said))
    with pytest.raises(graphlens.ModelFileError, match=match):
        Sae.from_folder(folder)


@pytest.mark.parametrize(
    ("trainer", "match"),
    [
        ({"dict_class": "CrossCoder", "layer": 1}, "'CrossCoder' cannot be run. Those that can: AutoEncoder,"),
        (None, "class None"),
        ({"dict_class": "AutoEncoder"}, "Pass hook="),
        ({"dict_class": "AutoEncoder", "layer": 1, "submodule_name": "somewhere"}, "Pass hook="),
        ({"dict_class": "AutoEncoder", "layer": 1}, "holds no encoder"),
    ],
)
def test_dictionaries_that_cannot_be(tmp_path: Path, trainer: object, match: str) -> None:
    save_file({"b_dec": np.ones(3, np.float32)}, tmp_path / "ae.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    with pytest.raises(graphlens.ModelFileError, match=match):
        Sae.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"architecture": "relu"}, "no SAE of this architecture"),
        ({"threshold": np.ones(D_SAE)}, "threshold: a standard SAE has no such weight"),
        ({"architecture": "jumprelu"}, "threshold: a jumprelu SAE needs it"),
        ({"b_enc": None}, "b_enc: a standard SAE needs it"),
        ({"W_enc": np.ones(5)}, r"W_enc: a matrix is wanted, not an array of shape \[5\]"),
        ({"W_dec": np.ones((D_SAE, D_IN + 2))}, "only a transcoder writes elsewhere"),
        ({"hook_out": "blocks.2.hook_mlp_out"}, "only a transcoder writes elsewhere"),
        ({"hook": ""}, "Pass hook="),
        ({"k": 3}, "a standard SAE has none"),
        ({"rescale_acts_by_decoder_norm": True}, "only topk"),
        ({"b_dec": np.full(D_IN, np.nan)}, "b_dec: it holds NaN"),
        ({"b_dec": "zeros"}, "b_dec: an array of numbers is wanted"),
        ({"b_dec": np.ones(D_IN) * 1j}, "complex"),
        ({"b_dec": np.full(D_IN, 1e300)}, "b_dec: it holds NaN or infinity"),
        ({"architecture": None}, "no SAE of this architecture"),
        ({"apply_b_dec_to_input": "yes"}, "must be True or False"),
    ],
)
def test_arrays_that_cannot_be(change: dict[str, object], match: str) -> None:
    with pytest.raises(graphlens.InputError, match=match):
        Sae.from_arrays(**{**arrays(), "hook": HOOK, **change})  # type: ignore[arg-type]


def test_activations_and_features_of_another_width() -> None:
    sae = standard()
    for call, value in ((sae.encode, np.ones((2, D_IN + 1))), (sae.decode, np.ones(D_SAE - 1)), (sae, np.float32(1))):
        with pytest.raises(graphlens.InputError, match="is wanted"):
            call(value)
    heads = standard(reshape_activations="hook_z")
    with pytest.raises(graphlens.InputError, match="head x d_head = 13"):
        heads.encode(np.ones((2, 3, 5)))


@pytest.mark.parametrize("chosen", [[], [D_SAE], [-D_SAE - 1], [1, 1], [0, -D_SAE], [1.5]])
def test_features_that_there_are_not(chosen: list[int]) -> None:
    with pytest.raises(graphlens.InputError, match="feature"):
        standard().only(chosen)


def test_some_features_of_a_topk_sae_are_refused() -> None:
    weights = arrays()
    sae = Sae.from_arrays(*(weights[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")), HOOK, "topk", k=3)
    with pytest.raises(graphlens.InputError, match="depends on all others"):
        sae.only([1])


def test_a_config_is_checked_where_it_is_made() -> None:
    assert SaeConfig("standard", 3, 5, HOOK).shapes == {"W_enc": (3, 5), "W_dec": (5, 3), "b_dec": (3,), "b_enc": (5,)}
    with pytest.raises(graphlens.InputError, match="d_in must be"):
        SaeConfig("standard", 0, 5, HOOK)


def changed_bytes(data: bytes, random: np.random.Generator, most: int) -> bytes:
    """A file with a few bytes changed among its first ones, or cut, or with a stretch of it twice."""
    kind, at = random.integers(4), int(random.integers(min(most, len(data))))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[max(0, at - 9) :]
    made = bytearray(data)
    for place in random.integers(min(most, len(data)), size=int(random.integers(1, 4))):
        made[place] = int(random.choice(list(b'0179-{}[]",:eE\x00\xff'))) if kind == 2 else int(random.integers(256))
    return bytes(made)


@pytest.mark.parametrize(("case", "file"), [("standard", 0), ("standard", 1), ("old-topk", 0), ("npz", 0)])
def test_damaged_files_end_in_an_error_of_ours_or_in_an_sae(tmp_path: Path, case: str, file: int) -> None:
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_3"
    folder.mkdir(parents=True)
    if case == "npz":
        np.savez_compressed(folder / "params.npz", **arrays("jumprelu"))
    else:
        for path in (GOLDEN / case).iterdir():
            if path.name != "values.npz":
                shutil.copyfile(path, folder / path.name)
    path = sorted(folder.iterdir())[file]
    whole, random, refused = path.read_bytes(), np.random.default_rng(file), list[str]()
    for _ in range(150):
        path.write_bytes(changed_bytes(whole, random, 10_000 if case == "npz" else 700))
        try:
            sae = Sae.from_folder(folder)
        except graphlens.GraphlensError as error:
            refused.append(str(error))
        else:
            assert {name: array.shape for name, array in sae.weights.items()} == sae.cfg.shapes
    assert len(refused) > 30
    assert max(map(len, refused)) < 1000


def test_what_was_trained_before_a_norm_does_not_stand_behind_it(tiny: HookedTransformer) -> None:
    """sparsify's SAEs of a module, on a model such as Gemma 2."""
    manifest = tiny.runner.engine.manifest
    hooks = dict(manifest.hooks)
    sae = Sae.from_arrays(
        np.ones((tiny.cfg.d_model, 5), np.float32),
        np.zeros(5, np.float32),
        np.ones((5, tiny.cfg.d_model), np.float32),
        np.zeros(tiny.cfg.d_model, np.float32),
        "blocks.1.hook_mlp_out",
    )
    one = SplicedSae.of(Sae(replace(sae.cfg, metadata={OF_MODULE: True}), sae.weights))
    assert place_of(one, hooks, manifest).writes == "blocks.1.hook_mlp_out"
    behind = {}
    for name, entry in hooks.items():
        if name == "blocks.1.hook_mlp_out":
            behind["blocks.1.ln2_post.hook_scale"] = hooks["blocks.1.ln2.hook_scale"]
        behind[name] = entry
    with pytest.raises(InputError, match="behind a norm that comes after it"):
        place_of(one, behind, manifest)
