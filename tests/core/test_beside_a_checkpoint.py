"""A model.onnx that lies beside a checkpoint: ours is used or refused, a stranger's is left alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from graphlens import Ablate, HookedTransformer, bake_model
from graphlens.errors import ModelFileError
from graphlens.file.manifest import METADATA_KEY
from graphlens.pipelines import cache
from tests.damage import rewrite


class Exported(Exception):
    """The checkpoint would be exported."""


@pytest.fixture(autouse=True)
def no_export(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def export(*_: object, **__: object) -> None:
        raise Exported

    monkeypatch.setattr(cache, "export_to_new_folder", export)
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path / "cache"))


def cut_short(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def of_a_newer_format(file: Path) -> None:
    def change(proto: onnx.ModelProto) -> None:
        for entry in proto.metadata_props:
            if entry.key == METADATA_KEY:
                entry.value = json.dumps({**json.loads(entry.value), "format_version": 99})

    rewrite(file.parent, change)


def without_a_readable_manifest(file: Path) -> None:
    def change(proto: onnx.ModelProto) -> None:
        for entry in proto.metadata_props:
            if entry.key == METADATA_KEY:
                entry.value = entry.value[:-5]

    rewrite(file.parent, change)


@pytest.mark.parametrize("damage", [cut_short, of_a_newer_format, without_a_readable_manifest])
def test_one_of_ours_that_cannot_be_used_is_refused_and_not_replaced_by_the_checkpoint(
    damage: Callable[[Path], None], tiny_copy: Path
) -> None:
    damage(tiny_copy / "model.onnx")
    with pytest.raises(ModelFileError, match=r"remove model\.onnx") as caught:
        HookedTransformer.from_pretrained_no_processing(tiny_copy)
    assert str(tiny_copy) in str(caught.value)


def strange(file: Path) -> None:
    graph = onnx.helper.make_graph([], "g", [], [])
    onnx.save(onnx.helper.make_model(graph, producer_name="another"), file)


def large_file_storage(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")


@pytest.mark.parametrize("other", [strange, large_file_storage])
def test_anothers_is_left_alone(other: Callable[[Path], None], tiny_copy: Path) -> None:
    other(tiny_copy / "model.onnx")
    with pytest.raises(Exported):
        HookedTransformer.from_pretrained_no_processing(tiny_copy)


def test_a_baked_file_is_not_taken_for_its_checkpoint_without_a_word(tiny_folder: Path, tmp_path: Path) -> None:
    folder = bake_model(tiny_folder, [Ablate("blocks.1.attn.hook_z", heads=0)], tmp_path / "baked")
    with pytest.warns(UserWarning, match="without the edits"), pytest.raises(Exported):
        HookedTransformer.from_pretrained_no_processing(folder)
