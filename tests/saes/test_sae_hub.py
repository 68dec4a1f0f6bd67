"""SAEs of the hub: from its cache's real layout without a connection, and which files are asked for with one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_sae_files import HOOK, activations, arrays, standard

import graphlens
from graphlens import Sae

REPO, COMMIT = "someone/saes-of-tiny", "607a30d783dfa663caf39e06633721c8d4cfcd7e"


def hub_cache(root: Path, repo: str, source: Path) -> None:
    """Puts a folder into a hub cache in its real layout: blobs, a snapshot of links to them, a ref."""
    base = root / f"models--{repo.replace('/', '--')}"
    (base / "blobs").mkdir(parents=True)
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text(COMMIT)
    for index, path in enumerate(sorted(each for each in source.rglob("*") if each.is_file())):
        blob, link = base / "blobs" / f"{index:040x}", base / "snapshots" / COMMIT / path.relative_to(source)
        shutil.copyfile(path, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (len(path.relative_to(source).parts) + 1), "blobs", blob.name))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("sae_id", ["blocks.2.hook_resid_post/width_29", "."])
def test_an_sae_opens_from_the_hubs_cache(tmp_path: Path, sae_id: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    standard().save(source / sae_id if sae_id != "." else source / "at")
    if sae_id == ".":
        source = source / "at"
    hub_cache(tmp_path / "hub", REPO, source)
    sae = Sae.from_pretrained(REPO, sae_id, cache_dir=tmp_path / "hub")
    assert sae.cfg.hook == HOOK
    np.testing.assert_array_equal(sae.encode(activations()), standard().encode(activations()))
    path, _ = sae.files["W_enc"]
    assert COMMIT in path.parts
    assert sae.key() == Sae.from_pretrained(REPO, sae_id, cache_dir=tmp_path / "hub").key()


@pytest.mark.usefixtures("offline")
def test_gemma_scope_is_known_by_the_cached_repositorys_name(tmp_path: Path) -> None:
    place = "layer_12/width_16k/average_l0_82"
    (tmp_path / "source" / place).mkdir(parents=True)
    np.savez(tmp_path / "source" / place / "params.npz", **arrays("jumprelu"))
    hub_cache(tmp_path / "hub", "google/gemma-scope-2b-pt-mlp", tmp_path / "source")
    cfg = Sae.from_pretrained("google/gemma-scope-2b-pt-mlp", place, cache_dir=tmp_path / "hub").cfg
    assert (cfg.hook, cfg.model_name, cfg.architecture) == ("blocks.12.hook_mlp_out", "gemma-2-2b", "jumprelu")


@pytest.mark.usefixtures("offline")
def test_what_is_not_cached_says_so(tmp_path: Path) -> None:
    with pytest.raises(graphlens.ModelFileError, match="cannot be reached and the SAE is not in the local hub cache"):
        Sae.from_pretrained(REPO, "layers.1", cache_dir=tmp_path)
    standard().save(tmp_path / "source" / "one")
    hub_cache(tmp_path / "hub", REPO, tmp_path / "source")
    with pytest.raises(graphlens.ModelFileError, match="nothing of an SAE in 'two' is in the local hub cache"):
        Sae.from_pretrained(REPO, "two", cache_dir=tmp_path / "hub")


def test_a_factor_that_the_files_lack_is_warned_of_and_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standard(normalize_activations="expected_average_only_in").save(tmp_path / "one")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.warns(UserWarning, match="norm_scaling_factor"):
        sae = Sae.from_pretrained(REPO, "one")
    folded = Sae.from_pretrained(REPO, "one", norm_scaling_factor=2.5)
    np.testing.assert_allclose(
        folded.encode(activations()), sae.encode(activations() * np.float32(2.5)), rtol=1e-5, atol=1e-6
    )


def test_no_file_is_fetched_that_no_layout_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def download(name: str, **rest: object) -> str:
        asked.update(rest, name=name)
        folder = tmp_path / "layers.3"
        folder.mkdir()
        w = arrays()
        tensors = {
            "encoder.weight": w["W_enc"].T.copy(),
            "encoder.bias": w["b_enc"],
            "W_dec": w["W_dec"],
            "b_dec": w["b_dec"],
        }
        save_file(tensors, folder / "sae.safetensors")
        (folder / "cfg.json").write_text(
            json.dumps({"k": 3, "d_in": w["W_enc"].shape[0], "num_latents": w["W_enc"].shape[1]})
        )
        (tmp_path / "config.json").write_text(json.dumps({"model": "gpt2"}))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    sae = Sae.from_pretrained(REPO, "layers.3", revision="v1", token="hf_x")
    assert (sae.cfg.hook, sae.cfg.model_name) == ("blocks.3.hook_resid_post", "gpt2")
    assert (asked["name"], asked["revision"], asked["token"]) == (REPO, "v1", "hf_x")
    patterns = asked["allow_patterns"]
    assert isinstance(patterns, list)
    assert {"layers.3/cfg.json", "layers.3/sae.safetensors", "layers.3/sae_weights.safetensors", "config.json"} <= set(
        patterns
    )
    assert not any("*" in pattern or pattern.endswith((".pt", ".bin", ".pth")) for pattern in patterns)


@pytest.mark.parametrize(
    ("there", "sae_id", "match"),
    [
        (["layer_1/ae.pt", "README.md"], "layer_1", r"ae\.pt is a pickle"),
        (["layer_1/notes.txt"], "layer_1", r"no SAE that can be read \(notes\.txt\)"),
        (
            ["a/cfg.json", "a/sae_weights.safetensors", "b/params.npz"],
            "c",
            "no folder 'c'. Folders with an SAE: 'a', 'b'",
        ),
        (
            ["W_enc_0.safetensors", "W_dec_0.safetensors"],
            ".",
            "these are cross-layer transcoders.*CrossLayerTranscoder",
        ),
        (["README.md"], "c", "No folder in it holds an SAE"),
    ],
)
def test_what_the_repository_holds_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: list[str], sae_id: str, match: str
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: there)
    with pytest.raises(graphlens.ModelFileError, match=match):
        Sae.from_pretrained(REPO, sae_id)


@pytest.mark.parametrize(
    ("release", "sae_id", "match"),
    [
        ("gpt2-small-res-jb", "blocks.8.hook_resid_pre", "get_repo_id_and_folder_name"),
        (REPO, "../other", "folder in the repository"),
        (REPO, "/etc", "folder in the repository"),
        (REPO, "layers.*", "not a pattern"),
        (None, "x", "a repository on the hub is wanted"),
    ],
)
def test_names_that_are_none(release: str, sae_id: str, match: str) -> None:
    with pytest.raises(graphlens.InputError, match=match):
        Sae.from_pretrained(release, sae_id)
