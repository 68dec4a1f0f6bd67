"""Links, pipes and folders in place of files: what leaves the folder is refused, and nothing waits for ever."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from graphlens import Ablate, HookedTransformer, bake_model, surgery
from graphlens.errors import GraphlensError, ModelFileError
from graphlens.file.folder import SETTINGS
from graphlens.file.inside import inside
from tests.damage import MODEL, WEIGHTS, refused, rewrite
from tests.hub_cache import in_the_hubs_cache


def test_a_hooked_folder_in_the_hubs_cache_opens(tiny_copy: Path, tmp_path: Path, tokens: np.ndarray) -> None:
    snapshot = in_the_hubs_cache(tiny_copy, tmp_path / "hub")
    model = HookedTransformer.from_onnx(snapshot, "cpu")
    expected = HookedTransformer.from_onnx(tiny_copy, "cpu")
    np.testing.assert_array_equal(model(tokens), expected(tokens))
    edit = Ablate("blocks.1.attn.hook_z", heads=1)
    np.testing.assert_array_equal(
        model.run_with_interventions(tokens, edit), expected.run_with_interventions(tokens, edit)
    )
    np.testing.assert_array_equal(model.W_E, expected.W_E)
    assert model.to_str_tokens("A dog") == expected.to_str_tokens("A dog")
    surgery.check(snapshot / MODEL)
    baked = bake_model(snapshot, edit, tmp_path / "baked")
    assert not any(path.is_symlink() for path in Path(baked).iterdir())


@pytest.mark.parametrize("file", [MODEL, WEIGHTS])
def test_a_snapshots_link_that_leaves_the_repository_is_refused(file: str, tiny_copy: Path, tmp_path: Path) -> None:
    snapshot = in_the_hubs_cache(tiny_copy, tmp_path / "hub")
    other = tmp_path / "hub" / "models--someone--else"
    other.mkdir()
    (snapshot / file).resolve().rename(other / "blob")
    (snapshot / file).unlink()
    (snapshot / file).symlink_to(other / "blob")
    refused(snapshot, "a link that leaves the folder", of=file)


@pytest.mark.parametrize("file", [MODEL, WEIGHTS])
def test_a_link_that_leaves_the_folder_is_refused(file: str, tiny_copy: Path) -> None:
    (tiny_copy / file).rename(tiny_copy.parent / "outside")
    (tiny_copy / file).symlink_to("../outside")
    refused(tiny_copy, "a link that leaves the folder", of=file)


def test_a_weights_file_that_only_the_manifest_names_is_looked_at_too(tiny_copy: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from graphlens.surgery.files import write_graph
    from graphlens.surgery.graph import write_manifest

    model = surgery.load(tiny_copy)
    manifest = surgery.read_manifest(model)
    shutil.copyfile(tiny_copy / WEIGHTS, tmp_path / "secret")
    (tiny_copy / "more.safetensors").symlink_to(tmp_path / "secret")
    more = {**manifest.files, "more.safetensors": manifest.files[WEIGHTS]}
    write_manifest(model, replace(manifest, files=more))
    write_graph(model, tiny_copy / MODEL)
    refused(tiny_copy, "a link that leaves the folder", of="more.safetensors")
    (tiny_copy / "more.safetensors").unlink()
    os.mkfifo(tiny_copy / "more.safetensors")
    refused(tiny_copy, "not a regular file", of="more.safetensors")


@pytest.mark.parametrize("file", [MODEL, WEIGHTS])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_refused_at_once(kind: str, file: str, tiny_copy: Path) -> None:
    (tiny_copy / file).unlink()
    (os.mkfifo if kind == "pipe" else os.mkdir)(tiny_copy / file)
    refused(tiny_copy)


@pytest.mark.parametrize("file", [file for file in SETTINGS if file.endswith(".json")])
def test_settings_that_are_links_are_not_copied_out(file: str, tiny_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text('{"password": "hunter2"}')
    (tiny_copy / file).unlink(missing_ok=True)
    (tiny_copy / file).symlink_to(tmp_path / "secret")
    with pytest.raises(GraphlensError, match="a link that leaves the folder"):
        bake_model(tiny_copy, Ablate("hook_embed"), tmp_path / "baked")
    assert not (tmp_path / "baked").exists()


@pytest.mark.parametrize("location", ["a" * 5000, f"{WEIGHTS}/below"])
def test_a_location_that_is_no_path_of_a_file_is_refused(location: str, tiny_copy: Path) -> None:
    def change(proto: onnx.ModelProto) -> None:
        for initializer in proto.graph.initializer:
            for entry in initializer.external_data:
                if entry.key == "location":
                    entry.value = location

    refused(rewrite(tiny_copy, change), "not the path of a file")


def test_a_link_inside_the_folder_is_followed(tiny_copy: Path, tokens: np.ndarray) -> None:
    expected = HookedTransformer.from_onnx(tiny_copy, "cpu")(tokens)
    (tiny_copy / MODEL).rename(tiny_copy / "graph.onnx")
    (tiny_copy / MODEL).symlink_to("graph.onnx")
    np.testing.assert_array_equal(HookedTransformer.from_onnx(tiny_copy, "cpu")(tokens), expected)


def test_a_link_that_the_user_names_is_followed(tiny_copy: Path, tmp_path: Path, tokens: np.ndarray) -> None:
    (tmp_path / "mine.onnx").symlink_to(tiny_copy / MODEL)
    expected = HookedTransformer.from_onnx(tiny_copy, "cpu")(tokens)
    np.testing.assert_array_equal(HookedTransformer.from_onnx(tmp_path / "mine.onnx", "cpu")(tokens), expected)
    surgery.check(tmp_path / "mine.onnx")


def test_a_link_to_a_folder_is_the_folder(tiny_copy: Path, tmp_path: Path, tokens: np.ndarray) -> None:
    (tmp_path / "link").symlink_to(tiny_copy)
    expected = HookedTransformer.from_onnx(tiny_copy, "cpu")(tokens)
    np.testing.assert_array_equal(HookedTransformer.from_onnx(tmp_path / "link", "cpu")(tokens), expected)


def test_a_broken_link_is_a_missing_file(tiny_copy: Path) -> None:
    (tiny_copy / WEIGHTS).unlink()
    (tiny_copy / WEIGHTS).symlink_to("nowhere")
    with pytest.raises(ModelFileError, match="missing"):
        HookedTransformer.from_onnx(tiny_copy)


@pytest.mark.parametrize(
    "name", ["model.onnx", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"]
)
def test_a_file_that_a_link_out_of_the_folder_leads_to_is_refused_and_never_opened(
    name: str, tiny_copy: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside" / name
    outside.parent.mkdir()
    outside.write_bytes((tiny_copy / name).read_bytes() if (tiny_copy / name).exists() else b"{}")
    (tiny_copy / name).unlink(missing_ok=True)
    (tiny_copy / name).symlink_to(outside)
    code = """
import os, sys
from graphlens import HookedTransformer
from graphlens.errors import ModelFileError
opened = []
sys.addaudithook(lambda event, args: event == "open" and opened.append(os.path.realpath(str(args[0]))))
try:
    HookedTransformer.from_onnx(sys.argv[1], "cpu").to_tokens("Hi")
except ModelFileError as error:
    assert sys.argv[2] in opened or "a link that leaves the folder" in str(error), error
    print("opened" if sys.argv[2] in opened else "refused")
"""
    done = subprocess.run([sys.executable, "-c", code, tiny_copy, outside.resolve()], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "refused"), done.stderr


def test_a_link_to_itself_is_refused(tiny_copy: Path) -> None:
    (tiny_copy / "model.safetensors").unlink()
    (tiny_copy / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(ModelFileError, match="not a regular file"):
        inside(tiny_copy, "model.safetensors")
