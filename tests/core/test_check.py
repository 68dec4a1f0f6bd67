"""``graphlens check``: what it says that it checked, and the trial run in a process with limits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnx
import pytest
from onnx import helper

from graphlens import HookedTransformer, surgery
from graphlens.errors import ModelFileError
from graphlens.pipelines.check import check_folder
from graphlens.pipelines.trial import try_out
from tests.command_line import graphlens, sentence
from tests.damage import rewrite


def test_check_says_what_it_checked_and_what_not(tiny_folder: Path) -> None:
    done = graphlens("check", tiny_folder)
    assert done.returncode == 0, done.stderr
    said = sentence(done.stdout)
    assert "safe " not in said
    assert "nothing was found wrong in what was checked" in said
    report = surgery.check(tiny_folder)
    for part in (
        f"{report.nodes:,} nodes",
        "only operators that graphlens itself writes",
        "model.safetensors",
        "every byte",
        "tokenizer.json",
        "Not checked",
        "--run",
    ):
        assert part in said


def test_check_names_what_an_edit_added(tiny_copy: Path) -> None:
    def add(proto: onnx.ModelProto) -> None:
        proto.graph.node.append(helper.make_node("Selu", ["logits"], ["selu"]))

    said = sentence(graphlens("check", rewrite(tiny_copy, add)).stdout)
    assert "Selu" in said
    assert "only operators that graphlens itself writes" not in said


def test_check_looks_at_the_tokenizer_and_says_when_there_is_none(tiny_copy: Path) -> None:
    file = tiny_copy / "tokenizer.json"
    data = json.loads(file.read_text())
    data["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "/////w=="}
    file.write_text(json.dumps(data))
    done = graphlens("check", tiny_copy)
    assert done.returncode == 1
    assert "precompiled_charsmap" in sentence(done.stderr)
    file.unlink()
    assert "tokenizer: there is none" in sentence(graphlens("check", tiny_copy / "model.onnx").stdout)


def test_a_trial_run_opens_and_runs_the_file(tiny: HookedTransformer, tiny_folder: Path) -> None:
    found = check_folder(tiny_folder, run=True)
    assert found.trial is not None
    assert found.trial.outputs == len(onnx.load(tiny_folder / "model.onnx", load_external_data=False).graph.output)
    text = "When John and Mary went to the store, John gave 3 drinks to Mary. " * 8
    assert found.trial.tokens == len(tiny.to_tokens(text, prepend_bos=False, truncate=False)[0])
    said = "\n".join(found.lines())
    assert "trial run" in said
    assert "--run" not in said


def test_the_command_tries_a_file_with_required_inputs(tiny_folder: Path, tmp_path: Path) -> None:
    surgery.save(surgery.with_past(surgery.load(tiny_folder)), tmp_path / "past")
    done = graphlens("check", tmp_path / "past", "--run", "--memory", "2.5", "--seconds", "60")
    assert done.returncode == 0, done.stderr
    said = sentence(done.stdout)
    assert "tokenizer: there is none" in said
    assert "ran once" in said
    assert ("at most 2.5 GB" if sys.platform == "linux" else "no limit of memory") in said


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no limit of memory that holds")
def test_a_trial_run_that_needs_more_memory_than_allowed_is_refused(tiny_copy: Path) -> None:
    """Half a gigabyte at run time, by a number that depends on the tokens: no shape says so."""

    def add(proto: onnx.ModelProto) -> None:
        nodes = [
            helper.make_node("ReduceMax", ["input_ids"], ["largest"], keepdims=0),
            helper.make_node("Add", ["largest", "many"], ["count"]),
            helper.make_node("Mul", ["count", "many"], ["more"]),
            helper.make_node("Range", ["none", "more", "single"], ["long"]),
            helper.make_node("ReduceMax", ["long"], ["end"], keepdims=0),
        ]
        proto.graph.node.extend(nodes)
        for name, number in (("none", 0), ("single", 1), ("many", 2**13)):
            proto.graph.initializer.append(helper.make_tensor(name, onnx.TensorProto.INT64, [], [number]))
        proto.graph.output.append(helper.make_tensor_value_info("end", onnx.TensorProto.INT64, []))

    folder = rewrite(tiny_copy, add)
    assert try_out(folder, 0, 3_000_000_000).outputs > 0
    with pytest.raises(ModelFileError, match="trial run") as caught:
        try_out(folder, 0, 500_000_000)
    assert str(folder) in str(caught.value)
    assert "500,000,000 bytes" in str(caught.value)


def test_a_trial_run_that_does_not_end_is_stopped(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphlens.pipelines.trial.STARTING", 0.0)
    with pytest.raises(ModelFileError, match="did not end in time"):
        try_out(tiny_folder, 0, seconds=0.01)


def test_a_trial_run_imports_nothing_from_the_working_folder_and_leaves_nothing(
    tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    for name in ("resource.py", "onnxruntime.py", "numpy.py", "graphlens.py"):
        (tiny_copy / name).write_text(f"open({str(ran)!r}, 'w').close()")
    monkeypatch.chdir(tiny_copy)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert try_out(Path("."), 0, 3_000_000_000).outputs > 0
    assert not ran.exists()
    assert not any((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize(
    "limit", [("--memory", "inf"), ("--seconds", "inf"), ("--memory", "nan"), ("--seconds", "nan")]
)
def test_a_trial_run_without_a_limit_is_refused(limit: tuple[str, str], tiny_folder: Path) -> None:
    done = graphlens("check", tiny_folder, "--run", *limit)
    assert done.returncode == 2
    assert limit[0] in sentence(done.stderr)
