"""Saving a hooked folder: what is written, what is linked, and what an error leaves behind."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from graphlens import HookedTransformer, surgery
from graphlens.errors import ExportError, ModelFileError
from graphlens.file.leftovers import partial_of, provisional
from graphlens.file.safetensors import SafetensorsFile
from graphlens.surgery.fingerprint import fingerprint
from graphlens.surgery.graph import write_manifest
from graphlens.surgery.splice import Scope

POST = "blocks.0.hook_resid_post"
WEIGHTS = "model.safetensors"


def identity(value: ir.Value, scope: Scope) -> ir.Value:
    return scope.op("Identity", [value])


def plus_one(value: ir.Value, scope: Scope) -> ir.Value:
    return scope.op("Add", [value, scope.constant(np.float32(1), "amount")])


def times_three(value: ir.Value, scope: Scope) -> ir.Value:
    return scope.op("Mul", [value, scope.constant(np.float32(3), "amount")])


def assert_near(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("link", [False, True])
def test_a_saved_model_opens_anywhere_with_weights_of_its_own(
    link: bool, tiny_copy: Path, tmp_path: Path, tokens: np.ndarray
) -> None:
    edited = surgery.splice(surgery.load(tiny_copy), {POST: times_three})
    expected = HookedTransformer.from_onnx(tiny_copy, "cpu").run_with_hooks(
        tokens, fwd_hooks=[(POST, lambda x, hook: x * np.float32(3))]
    )
    path = surgery.save(edited, tmp_path / "deep" / "new", link=link)
    assert path == tmp_path / "deep" / "new" / "model.onnx"
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["model.onnx", WEIGHTS]
    weights = path.parent / WEIGHTS
    assert not weights.is_symlink()
    assert weights.samefile(tiny_copy / WEIGHTS) is link
    surgery.check(path)
    shutil.rmtree(tiny_copy)
    plain = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = plain.run(["logits"], {"input_ids": tokens})
    assert_near(logits, expected)
    np.testing.assert_array_equal(HookedTransformer.from_onnx(path.parent, "cpu")(tokens), logits)


def test_loading_what_was_saved_gives_the_same_graph(tiny_copy: Path, tmp_path: Path) -> None:
    model = surgery.splice(surgery.load(tiny_copy), {POST: plus_one, "blocks.2.attn.hook_z": identity})
    path = surgery.save(model, tmp_path / "new")
    loaded = surgery.load(path)
    assert surgery.read_manifest(loaded) == surgery.read_manifest(model)
    again = surgery.save(loaded, tmp_path / "again")
    assert again.read_bytes() == path.read_bytes()


def test_weights_behind_a_link_are_linked_themselves(tiny_copy: Path, tmp_path: Path) -> None:
    # As in the hub's cache, whose entries are symlinks to blobs.
    (tiny_copy / "blob").hardlink_to(tiny_copy / WEIGHTS)
    (tiny_copy / WEIGHTS).unlink()
    (tiny_copy / WEIGHTS).symlink_to("blob")
    path = surgery.save(surgery.load(tiny_copy), tmp_path / "new", link=True)
    assert not (path.parent / WEIGHTS).is_symlink()
    assert (path.parent / WEIGHTS).stat().st_ino == (tiny_copy / "blob").stat().st_ino


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP])
def test_where_nothing_can_be_linked_the_weights_are_copied(
    code: int, tiny_copy: Path, tmp_path: Path, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    path = surgery.save(surgery.load(tiny_copy), tmp_path / "new", link=True)
    assert (path.parent / WEIGHTS).stat().st_ino != (tiny_copy / WEIGHTS).stat().st_ino
    surgery.check(path)


def test_a_model_can_be_saved_over_itself(tiny_copy: Path, tokens: np.ndarray) -> None:
    expected = HookedTransformer.from_onnx(tiny_copy, "cpu").run_with_hooks(
        tokens, fwd_hooks=[(POST, lambda x, hook: x * np.float32(3))]
    )
    model = surgery.load(tiny_copy)
    for _ in range(2):  # the second time the model in memory reads weights that were saved over
        surgery.save(surgery.splice(model, {POST: times_three}), tiny_copy)
        surgery.check(tiny_copy)
        assert_near(HookedTransformer.from_onnx(tiny_copy, "cpu")(tokens), expected)


def other_model(folder: Path, target: Path) -> ir.Model:
    """The model with other weights in a file of the same name, in another folder."""
    target.mkdir()
    header = SafetensorsFile(folder / WEIGHTS).header
    values = np.frombuffer((folder / WEIGHTS).read_bytes()[len(header) :], np.float32)
    (target / WEIGHTS).write_bytes(header + (values * np.float32(0.5)).tobytes())
    shutil.copyfile(folder / "model.onnx", target / "model.onnx")
    model = surgery.load(target, verify=False)
    write_manifest(model, surgery.read_manifest(model).with_files({WEIGHTS: fingerprint(target / WEIGHTS)}))
    return model


@pytest.mark.parametrize("link", [False, True])
def test_another_model_can_be_saved_over_one(link: bool, tiny_copy: Path, tmp_path: Path, tokens: np.ndarray) -> None:
    before = HookedTransformer.from_onnx(tiny_copy, "cpu")(tokens)
    names = {path.name for path in tiny_copy.iterdir()}
    surgery.save(other_model(tiny_copy, tmp_path / "other"), tiny_copy, link=link)
    assert {path.name for path in tiny_copy.iterdir()} == names
    assert (tiny_copy / WEIGHTS).samefile(tmp_path / "other" / WEIGHTS) is link
    surgery.check(tiny_copy)
    assert not np.allclose(HookedTransformer.from_onnx(tiny_copy, "cpu")(tokens), before, atol=1e-3)


def test_weights_keep_a_longer_name_where_the_last_step_fails(
    tiny_copy: Path, tmp_path: Path, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is saved by then, under names that a later save tidies up."""
    other = other_model(tiny_copy, tmp_path / "other")
    expected = HookedTransformer.from_onnx(surgery.save(other, tmp_path / "apart"), "cpu")(tokens)
    names = {path.name for path in tiny_copy.iterdir()}

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken:
        broken.setattr(os, "link", refuse)
        surgery.save(other, tiny_copy)
    (longer,) = {path.name for path in tiny_copy.iterdir()} - names
    assert surgery.check(tiny_copy).external_files == (longer,)
    np.testing.assert_array_equal(HookedTransformer.from_onnx(tiny_copy, "cpu")(tokens), expected)
    surgery.save(other, tiny_copy)
    assert surgery.check(tiny_copy).external_files == (WEIGHTS,)
    # Its writer, this process, still runs: as if it were dead.
    monkeypatch.setattr("graphlens.file.leftovers.is_running", lambda process: False)
    surgery.save(other, tiny_copy)
    assert {path.name for path in tiny_copy.iterdir()} == names


def failing(monkeypatch: pytest.MonkeyPatch, step: str, code: int) -> None:
    """Makes a step of writing the graph fail; the weights can still be linked."""
    error = OSError(code, os.strerror(code))
    really_replace, really_open = os.replace, Path.open

    def replace(source: Any, target: Any) -> None:
        if Path(target).suffix == ".onnx":
            raise error
        really_replace(source, target)

    def open_(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if "onnx" in path.name and set(mode) & set("wxa+"):
            raise error
        return really_open(path, mode, *rest, **options)

    def sync(_: int) -> None:
        raise error

    if step == "rename":
        monkeypatch.setattr(os, "replace", replace)
    elif step == "open":
        monkeypatch.setattr(Path, "open", open_)
    else:
        monkeypatch.setattr(os, "fsync", sync)


@pytest.mark.parametrize(
    ("step", "code", "advice"),
    [
        ("open", errno.EACCES, "may not write"),
        ("open", errno.EROFS, "read-only"),
        ("write", errno.ENOSPC, "disk is full"),
        ("write", errno.EDQUOT, "quota"),
        ("write", errno.EIO, "another folder"),
        ("rename", errno.EPERM, "may not write"),
    ],
)
def test_a_save_that_fails_leaves_the_old_model_and_says_what_to_do(
    step: str, code: int, advice: str, tiny_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {path.name: path.read_bytes() for path in tiny_copy.iterdir()}
    edited = surgery.splice(surgery.load(tiny_copy), {POST: plus_one})
    with monkeypatch.context() as broken:
        failing(broken, step, code)
        with pytest.raises(ExportError, match=advice) as caught:
            surgery.save(edited, tiny_copy)
    assert str(tiny_copy / "model.onnx") in str(caught.value)
    assert {path.name: path.read_bytes() for path in tiny_copy.iterdir()} == contents
    surgery.check(tiny_copy)


@pytest.mark.parametrize("step", ["open", "write", "rename"])
def test_a_save_of_another_model_that_fails_leaves_the_old_one(
    step: str, tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = other_model(tiny_copy, tmp_path / "other")
    contents = {path.name: path.read_bytes() for path in tiny_copy.iterdir()}
    with monkeypatch.context() as broken:
        failing(broken, step, errno.ENOSPC)
        with pytest.raises(ExportError, match="disk is full"):
            surgery.save(other, tiny_copy)
    assert [path.name for path in tiny_copy.iterdir() if path.name.endswith(".partial")] == []
    surgery.check(tiny_copy)
    assert {path.name: path.read_bytes() for path in tiny_copy.iterdir()} == contents


@pytest.mark.parametrize("step", ["open", "write", "rename"])
def test_a_save_into_a_new_folder_that_fails_leaves_nothing_that_opens(
    step: str, tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = surgery.load(tiny_copy)
    with monkeypatch.context() as broken:
        failing(broken, step, errno.ENOSPC)
        with pytest.raises(ExportError, match="disk is full"):
            surgery.save(model, tmp_path / "new")
    assert not [path.name for path in (tmp_path / "new").glob("*") if "onnx" in path.name]
    with pytest.raises(ModelFileError):
        surgery.load(tmp_path / "new")


def test_a_save_removes_what_killed_writers_left_and_nothing_of_running_ones(tiny_copy: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from graphlens.file.leftovers import partial_of\n"
        "path = partial_of(Path(sys.argv[1])); path.write_bytes(b'half'); print(path.name, flush=True); time.sleep(600)\n"
    )
    target = tiny_copy / "model.onnx"
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, text=True) for _ in "ab"
    ]
    try:
        running, killed = (str(writer.stdout and writer.stdout.readline()).strip() for writer in writers)
        writers[1].kill()
        writers[1].wait()
        ours = partial_of(target)  # of another thread of this process, say
        elsewhere = tiny_copy / f".model.onnx.deadbeef-{writers[1].pid}-00.partial"
        strangers = [ours, elsewhere, tiny_copy / ".download.partial", tiny_copy / ".a.b.partial"]
        for path in strangers:
            path.write_bytes(b"half")
        staged = partial_of(tiny_copy / "export")  # an export into a folder beside the file
        staged.mkdir()
        pid = writers[1].pid
        dead = [tiny_copy / name.replace(f"-{os.getpid()}-", f"-{pid}-") for name in (staged.name, ours.name)]
        dead += [provisional(tiny_copy / name) for name in ("w.safetensors", "edits.json", "unnamed")]
        dead[2:] = [path.with_name(path.name.replace(f"-{os.getpid()}-", f"-{pid}-")) for path in dead[2:]]
        dead[0].mkdir()
        for path in (dead[0] / "model.onnx", *dead[1:]):
            path.write_bytes(b"half")
        named = provisional(tiny_copy / "edits.safetensors")
        named = named.with_name(named.name.replace(f"-{os.getpid()}-", f"-{pid}-"))
        named.write_bytes(b"arrays")
        (tiny_copy / "edits.txt").write_text(f'{{"safetensors_file": "{named.name}"}}')
        day = 24 * 3600
        abandoned = tiny_copy / f".export.deadbeef-7-{'0' * 16}.partial"
        slow = tiny_copy / f".export.deadbeef-8-{'0' * 16}.partial"
        for path in (abandoned, slow):
            path.mkdir()
            (path / "model.onnx").write_bytes(b"half")
            os.utime(path / "model.onnx", (0, time.time() - (day + 60 if path is abandoned else day - 60)))
            os.utime(path, (0, time.time() - day - 60))
        surgery.save(other_model(tiny_copy, tmp_path / "other"), tiny_copy)
        left = {path.name for path in tiny_copy.iterdir() if path.name.endswith(".partial")}
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    assert killed not in left
    assert left == {running, staged.name, slow.name, *(path.name for path in strangers)}
    assert not any(path.exists() for path in dead)
    assert named.exists()
    surgery.check(tiny_copy)


def test_a_folder_that_cannot_be_made_is_an_export_error(tiny_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ExportError, match=r"taken.*could not be written"):
        surgery.save(surgery.load(tiny_copy), tmp_path / "taken" / "new")
    assert (tmp_path / "taken").read_text() == "a file"
