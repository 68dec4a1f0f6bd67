"""Folders that users name: what onnx and its tools open, how the weights came there, and that there is room for them."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from graphlens import Ablate, surgery
from graphlens.deploy import bake_model, write_drivable, write_stripped
from graphlens.errors import ExportError
from graphlens.file.copies import place
from tests.command_line import graphlens

Z = "blocks.1.attn.hook_z"
WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "bake": lambda source, out: bake_model(source, Ablate(Z, heads=1), out),
    "drivable": lambda source, out: write_drivable(source, Z, out),
    "strip": lambda source, out: write_stripped(source, out),
    "process": lambda source, out: surgery.process_weights(source, out),
    "save": lambda source, out: surgery.save(surgery.load(source), out),
}


@pytest.mark.parametrize("name", WRITERS)
def test_onnx_and_its_tools_open_what_is_written(
    name: str, tiny_folder: Path, tmp_path: Path, tokens: np.ndarray
) -> None:
    WRITERS[name](tiny_folder, tmp_path / "out")
    path = tmp_path / "out" / "model.onnx"
    onnx.checker.check_model(str(path))
    whole = onnx.load(path)
    assert all(item.raw_data for item in whole.graph.initializer if len(item.dims) > 1)
    (expected,) = onnxruntime.InferenceSession(path).run(["logits"], {"input_ids": tokens})
    onnx.save(whole, tmp_path / "one.onnx")  # the weights inside
    (found,) = onnxruntime.InferenceSession(tmp_path / "one.onnx").run(["logits"], {"input_ids": tokens})
    np.testing.assert_array_equal(found, expected)


def test_a_written_folder_can_be_quantised(tiny_folder: Path, tmp_path: Path, tokens: np.ndarray) -> None:
    from onnxruntime.quantization import quantize_dynamic

    out = write_stripped(tiny_folder, tmp_path / "out")
    quantize_dynamic(out / "model.onnx", tmp_path / "small.onnx")
    assert (tmp_path / "small.onnx").stat().st_size < (out / "model.safetensors").stat().st_size / 2
    (logits,) = onnxruntime.InferenceSession(tmp_path / "small.onnx").run(["logits"], {"input_ids": tokens})
    (exact,) = onnxruntime.InferenceSession(out / "model.onnx").run(["logits"], {"input_ids": tokens})
    assert np.corrcoef(logits.ravel(), exact.ravel())[0, 1] > 0.95


def test_a_linked_folder_is_refused_by_onnx_and_not_by_graphlens(tiny_copy: Path, tmp_path: Path) -> None:
    """Why copies are the default."""
    out = write_stripped(tiny_copy, tmp_path / "out", link=True)
    with pytest.raises(onnx.checker.ValidationError, match="hard links"):
        onnx.load(out / "model.onnx")
    onnxruntime.InferenceSession(out / "model.onnx")


def test_commands_say_what_they_wrote(tiny_copy: Path, tmp_path: Path) -> None:
    size = (tiny_copy / "model.safetensors").stat().st_size
    done = graphlens("strip", tiny_copy, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert written > size
    assert f"{written / 1e6:,.1f} MB written\n" in done.stdout
    linked = graphlens("strip", tiny_copy, "-o", tmp_path / "linked", "--link")
    assert (
        f"{(written - size) / 1e6:,.1f} MB written; model.safetensors hardlinked ({size / 1e6:,.1f} MB)"
        in linked.stdout
    )
    assert (tmp_path / "linked" / "model.safetensors").samefile(tiny_copy / "model.safetensors")
    both = graphlens("strip", tiny_copy, "-o", tmp_path / "both", "--link", "--self-contained")
    assert both.returncode == 1
    assert "choose one" in both.stderr
    processed = graphlens("process", tiny_copy, "-o", tmp_path / "processed")
    written = sum(path.stat().st_size for path in (tmp_path / "processed").iterdir())
    assert f"{written / 1e6:,.1f} MB written" in processed.stdout.replace("\n", "")


@pytest.mark.parametrize("answer", [None, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY])
def test_a_copy_shares_blocks_where_the_system_call_succeeds(
    answer: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "original").write_bytes(b"weights")
    (tmp_path / "out").mkdir()
    asked = []

    def ioctl(target: int, request: int, source: int) -> int:
        asked.append(request)
        if answer is not None:
            raise OSError(answer, os.strerror(answer))
        os.write(target, os.pread(source, 100, 0))
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    placed = place({"a": tmp_path / "original"}, tmp_path / "out")
    assert asked == [0x40049409]  # FICLONE of linux/fs.h
    assert (placed.copied, placed.shared) == ((0, {"a": "cloned"}) if answer is None else (7, {}))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
    assert (tmp_path / "out" / "a").read_bytes() == b"weights"
    assert (tmp_path / "out" / "a").stat().st_nlink == 1


def test_a_large_copy_is_announced_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphlens.file.copies.LARGE", 7)
    monkeypatch.setattr("graphlens.file.copies.clone", lambda *_: False)
    (tmp_path / "large").write_bytes(b"weights")
    (tmp_path / "small").write_bytes(b"little")
    (tmp_path / "out").mkdir()
    said: list[tuple[str, bool]] = []
    place(
        {"a": tmp_path / "small", "b": tmp_path / "large"},
        tmp_path / "out",
        announce=lambda line: said.append((line, (tmp_path / "out" / "b").exists())),
    )
    assert said == [("Copying b (0 MB)", False)]


ROOM: dict[str, Callable[[Path, Path], object]] = {
    **WRITERS,
    "transformersjs": lambda source, out: bake_model(source, [], out, layout="transformersjs"),
}


@pytest.mark.parametrize("name", ROOM)
def test_too_little_room_is_told_before_anything_is_written(
    name: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def usage(_: Any) -> SimpleNamespace:
        return SimpleNamespace(free=1000)

    monkeypatch.setattr("graphlens.file.copies.clone", lambda *_: False)
    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(ExportError, match=r"MB would be written there, and 0\.0 MB are free") as caught:
        ROOM[name](tiny_folder, tmp_path / "out")
    assert str(tmp_path) in str(caught.value)
    assert ".partial" not in str(caught.value)
    assert ("--link" in str(caught.value)) is (name in ("drivable", "strip", "save"))
    assert not [path.name for path in tmp_path.rglob("*") if path.is_file()]
