"""Exporting: every checkpoint layout gives the same file, failures leave nothing behind, and the cache opens alone."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from conftest import save_model
from safetensors.numpy import load_file, save_file
from torch_reference import ODD_CONFIG

import graphlens
from graphlens import surgery
from graphlens.errors import ExportError, GraphlensError, ModelFileError, RuntimeUnavailable, VerificationError
from graphlens.file.folder import staged_folder
from graphlens.pipelines.cache import cached_export
from graphlens.pipelines.verify import verify_export
from graphlens.surgery.files import write_graph
from graphlens.surgery.graph import values_by_name
from tests.hub_cache import in_the_hubs_cache


def copy_with(checkpoint: Path, target: Path, change) -> Path:
    """A copy of a checkpoint whose tensors went through ``change``."""
    target.mkdir()
    shutil.copyfile(checkpoint / "config.json", target / "config.json")
    save_file(change(load_file(checkpoint / "model.safetensors")), target / "model.safetensors", {"format": "pt"})
    return target


def logits_of(folder: Path) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(0, 101, (2, 9))
    return graphlens.HookedTransformer.from_onnx(folder)(tokens)


def test_keys_without_the_prefix_and_with_extra_buffers(odd_checkpoint: Path, odd_hooked: Path, tmp_path: Path) -> None:
    def as_on_the_hub(tensors: dict) -> dict:
        tensors = {key.removeprefix("transformer."): value for key, value in tensors.items()}
        for layer in range(3):
            tensors[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 33, 33), np.float32))
            tensors[f"h.{layer}.attn.masked_bias"] = np.asarray(-1e4, np.float32)
        return tensors

    checkpoint = copy_with(odd_checkpoint, tmp_path / "checkpoint", as_on_the_hub)
    report = graphlens.export_model(checkpoint, tmp_path / "out")
    assert report.verification is not None
    np.testing.assert_array_equal(logits_of(report.folder), logits_of(odd_hooked))


def test_a_tied_head_may_be_stored_or_absent(odd_checkpoint: Path, odd_hooked: Path, tmp_path: Path) -> None:
    assert "lm_head.weight" not in load_file(odd_checkpoint / "model.safetensors")
    stored = copy_with(
        odd_checkpoint, tmp_path / "stored", lambda t: {**t, "lm_head.weight": t["transformer.wte.weight"].copy()}
    )
    folder = graphlens.export_model(stored, tmp_path / "out").folder
    np.testing.assert_array_equal(logits_of(folder), logits_of(odd_hooked))


def test_an_untied_head_is_used(tmp_path: Path) -> None:
    save_model(tmp_path / "checkpoint", transformers.GPT2Config(**ODD_CONFIG, tie_word_embeddings=False))
    folder = graphlens.export_model(tmp_path / "checkpoint", tmp_path / "out").folder
    model = graphlens.HookedTransformer.from_onnx(folder)
    tensors = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert not np.array_equal(tensors["lm_head.weight"], tensors["transformer.wte.weight"])
    np.testing.assert_array_equal(model.weights["unembed.W_U"], tensors["lm_head.weight"].T)
    np.testing.assert_array_equal(model.weights["embed.W_E"], tensors["transformer.wte.weight"])


def test_an_untied_head_that_is_missing_is_an_error(odd_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = copy_with(odd_checkpoint, tmp_path / "checkpoint", lambda t: t)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(ExportError, match=r"no tensor for 'lm_head.weight'"):
        graphlens.export_model(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sharded_checkpoint(odd_checkpoint: Path, odd_hooked: Path, tmp_path: Path) -> None:
    model = transformers.GPT2LMHeadModel.from_pretrained(odd_checkpoint)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    folder = graphlens.export_model(tmp_path / "sharded", tmp_path / "out").folder
    assert len(list(folder.glob("*.safetensors"))) > 1
    np.testing.assert_array_equal(logits_of(folder), logits_of(odd_hooked))
    next(iter((tmp_path / "sharded").glob("*.safetensors"))).unlink()
    with pytest.raises(ExportError, match=r"shard .* is missing"):
        graphlens.export_model(tmp_path / "sharded", tmp_path / "again")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_become_one_new_float32_file(odd_checkpoint: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model = transformers.GPT2LMHeadModel.from_pretrained(odd_checkpoint, dtype=dtype).eval()
    model.save_pretrained(tmp_path / "checkpoint")
    folder = graphlens.export_model(tmp_path / "checkpoint", tmp_path / "out").folder
    assert [path.name for path in folder.glob("*.safetensors")] == ["weights.safetensors"]
    tokens = np.random.default_rng(0).integers(0, 101, (2, 9))
    with torch.no_grad():
        expected = model.float()(torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(logits_of(folder) - expected).max() <= 1e-4 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("link", [False, True])
def test_weights_are_copied_or_hardlinked_and_links_are_resolved(
    link: bool, odd_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphlens.file.copies.clone", lambda *_: False)
    linked = in_the_hubs_cache(odd_checkpoint, tmp_path / "hub")
    report = graphlens.export_model(linked, tmp_path / "out", verify=False, link=link)
    weights = (linked / "model.safetensors").resolve()
    assert report.copied_bytes == (0 if link else weights.stat().st_size)
    entry = report.folder / "model.safetensors"
    assert not entry.is_symlink()
    assert entry.samefile(weights) is link
    written = sum(path.stat().st_size for path in report.folder.iterdir() if not (link and path == entry))
    assert report.written.startswith(f"{written / 1e6:,.1f} MB written")
    assert ("model.safetensors hardlinked" in report.written) is link
    if not link:
        loaded = onnx.load(report.folder / "model.onnx")
        assert all(item.raw_data for item in loaded.graph.initializer if item.dims)


def test_where_linking_is_refused_the_weights_are_copied_and_that_is_announced(
    odd_checkpoint: Path, odd_hooked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, "cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    said: list[str] = []
    report = graphlens.export_model(odd_checkpoint, tmp_path / "out", verify=False, announce=said.append, link=True)
    assert report.copied_bytes == (odd_checkpoint / "model.safetensors").stat().st_size
    assert any("Copying model.safetensors" in line and "cannot be hardlinked" in line for line in said)
    np.testing.assert_array_equal(logits_of(report.folder), logits_of(odd_hooked))


def test_the_same_checkpoint_gives_the_same_bytes(odd_checkpoint: Path, odd_hooked: Path, tmp_path: Path) -> None:
    # In a process of its own: nothing remembered from the other export.
    code = "import sys, graphlens; graphlens.export_model(sys.argv[1], sys.argv[2], verify=False)"
    subprocess.run([sys.executable, "-c", code, str(odd_checkpoint), str(tmp_path / "out")], check=True)
    assert (tmp_path / "out" / "model.onnx").read_bytes() == (odd_hooked / "model.onnx").read_bytes()


def test_exporting_into_the_checkpoints_own_folder_adds_the_graph(odd_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = copy_with(odd_checkpoint, tmp_path / "checkpoint", lambda t: t)
    before = sorted(path.name for path in checkpoint.iterdir())
    graphlens.export_model(checkpoint, checkpoint)
    assert sorted(path.name for path in checkpoint.iterdir()) == sorted([*before, "model.onnx"])
    assert logits_of(checkpoint).shape == (2, 9, 101)


def test_the_graph_is_standard(odd_hooked: Path) -> None:
    model = surgery.load(odd_hooked)
    assert dict(model.opset_imports) == {"": 20}
    assert model.ir_version <= 10
    assert {node.domain for node in model.graph.all_nodes()} == {""}
    assert "logits" in {value.name for value in model.graph.outputs}
    text = (odd_hooked / "model.onnx").read_bytes()
    assert str(odd_hooked.parent).encode() not in text
    assert b"site-packages" not in text


# Checkpoints that cannot be exported


def test_a_folder_with_only_bin_weights(odd_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    shutil.copyfile(odd_checkpoint / "config.json", tmp_path / "bin" / "config.json")
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(ExportError, match=r"only \.bin weights.*safe_serialization"):
        graphlens.export_model(tmp_path / "bin", tmp_path / "out")
    with pytest.raises(ExportError, match=r"only \.bin weights"):
        graphlens.HookedTransformer.from_pretrained_no_processing(tmp_path / "bin")


@pytest.mark.parametrize("architectures", [["BertModel"], ["GPT2ForSequenceClassification"]])
def test_a_folder_that_is_not_a_gpt2(architectures: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": architectures, "model_type": "gpt2"}))
    with pytest.raises(ExportError, match=rf"{architectures[0]}.*It exports: .*GPT2LMHeadModel"):
        graphlens.export_model(tmp_path, tmp_path / "out")


def test_a_folder_without_config_or_weights(odd_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no config\.json"):
        graphlens.export_model(tmp_path, tmp_path / "out")
    shutil.copyfile(odd_checkpoint / "config.json", tmp_path / "config.json")
    with pytest.raises(ExportError, match=r"no model\.safetensors"):
        graphlens.export_model(tmp_path, tmp_path / "out")


def test_weights_of_another_shape_than_the_config(odd_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = copy_with(odd_checkpoint, tmp_path / "checkpoint", lambda t: t)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "n_inner": 78}))
    with pytest.raises(ExportError, match=r"has shape \[40, 77\] where config\.json asks for \[40, 78\]"):
        graphlens.export_model(checkpoint, tmp_path / "out")


def test_nan_weights_fail_verification_and_leave_nothing(odd_checkpoint: Path, tmp_path: Path) -> None:
    def poison(tensors: dict) -> dict:
        tensors["transformer.h.1.mlp.c_fc.weight"][3, 5] = np.nan
        return tensors

    checkpoint = copy_with(odd_checkpoint, tmp_path / "checkpoint", poison)
    with pytest.raises(VerificationError, match=r"'blocks\.1\.mlp\.hook_pre' holds .* NaN"):
        graphlens.export_model(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    with pytest.raises(VerificationError):
        graphlens.export_model(checkpoint, checkpoint)
    assert sorted(path.name for path in checkpoint.iterdir()) == ["config.json", "model.safetensors"]


# Verification finds what it is for


@pytest.mark.parametrize(
    ("damage", "message"),
    [("mask", "attends to later positions"), ("scale", "differ from transformers'"), ("dead hook", "does not change")],
)
def test_verification_refuses_a_wrong_graph(
    damage: str, message: str, odd_checkpoint: Path, odd_hooked: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(odd_hooked, tmp_path / "wrong"))
    model = surgery.load(folder)
    nodes = list(model.graph)
    if damage == "mask":
        causal = next(node for node in nodes if node.op_type == "LessOrEqual")
        other = ir.Node("", "GreaterOrEqual", causal.inputs)
        model.graph.insert_before(causal, other)
        causal.outputs[0].replace_all_uses_with(other.outputs[0])
    elif damage == "scale":
        after_matmul = {node.outputs[0] for node in nodes if node.op_type == "MatMul"}
        scale = next(node for node in nodes if node.op_type == "Mul" and node.inputs[0] in after_matmul)
        value = scale.inputs[1]
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.01), name=value.name)
    else:
        # hook_z read by nobody: its consumers take the value before it.
        z = values_by_name(model)["blocks.1.attn.hook_z"]
        twin = z.producer()
        copy = ir.Node("", twin.op_type, twin.inputs, list(twin.attributes.values()))
        model.graph.insert_before(twin, copy)
        for node, index in tuple(z.uses()):
            node.replace_input_with(index, copy.outputs[0])
    write_graph(model, folder / "model.onnx")
    with pytest.raises(VerificationError, match=message):
        verify_export(folder / "model.onnx", odd_checkpoint)


def test_verification_reports_its_own_figures(odd_checkpoint: Path, tmp_path: Path) -> None:
    report = graphlens.export_model(odd_checkpoint, tmp_path / "out")
    assert report.verification is not None
    assert 0 < report.verification.logits_difference <= report.verification.allowed
    assert report.verification.hook_points == 57
    assert report.verification.peak_bytes > 50e6
    assert any("peak memory" in line for line in report.verification.lines())


# Writing


def test_an_existing_folder_is_not_overwritten_unless_forced(odd_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    graphlens.export_model(odd_checkpoint, out, verify=False)
    with pytest.raises(ExportError, match="--force"):
        graphlens.export_model(odd_checkpoint, out, verify=False)
    graphlens.export_model(odd_checkpoint, out, verify=False, force=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(ExportError, match="not empty"):
        graphlens.export_model(odd_checkpoint, other, verify=False, force=True)
    assert (other / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("code", "advice"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "may not write"), (errno.EROFS, "read-only")]
)
def test_a_disk_that_cannot_be_written_is_said_and_nothing_is_left(
    code: int, advice: str, odd_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ExportError, match=advice):
        graphlens.export_model(odd_checkpoint, tmp_path / "out", verify=False)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "mkdir", fail)
    with pytest.raises(ExportError, match=advice):
        graphlens.export_model(odd_checkpoint, tmp_path / "deep" / "out", verify=False)


def test_a_file_size_limit_of_the_system_is_an_export_error(odd_checkpoint: Path, tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "import graphlens\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "try: graphlens.export_model(sys.argv[1], sys.argv[2], verify=False)\n"
        "except graphlens.ExportError as error: print('refused', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(odd_checkpoint), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert "refused" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_nothing_that_opens(odd_checkpoint: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, graphlens\n"
        "from graphlens.pipelines import verify\n"
        "verify.verify_export = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "graphlens.export_model(sys.argv[1], sys.argv[2])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(odd_checkpoint), str(tmp_path / "out")])
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    left = list(tmp_path.iterdir())
    assert len(left) == 1
    assert left[0].name.endswith(".partial")
    with pytest.raises(ModelFileError):
        graphlens.HookedTransformer.from_onnx(left[0])
    graphlens.export_model(odd_checkpoint, tmp_path / "out", verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_replaced_export_stays_until_the_new_one_is_complete(
    odd_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = graphlens.export_model(odd_checkpoint, tmp_path / "out", verify=False).folder
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*_: object) -> None:
        raise VerificationError("no")

    with monkeypatch.context() as broken:
        broken.setattr("graphlens.pipelines.verify.verify_export", fail)
        with pytest.raises(VerificationError):
            graphlens.export_model(odd_checkpoint, out, force=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    # Also where the system cannot exchange two folders in one step.
    monkeypatch.setattr(sys, "platform", "darwin")
    graphlens.export_model(odd_checkpoint, out, verify=False, force=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_beside_weights_that_it_would_replace_or_may_not_follow_is_refused(
    odd_checkpoint: Path, tmp_path: Path
) -> None:
    half = transformers.GPT2LMHeadModel.from_pretrained(odd_checkpoint, dtype=torch.float16)
    half.save_pretrained(tmp_path / "half", max_shard_size="60KB")
    index = json.loads((tmp_path / "half" / "model.safetensors.index.json").read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    (tmp_path / "half" / first).rename(tmp_path / "half" / "weights.safetensors")
    renamed = {key: "weights.safetensors" if file == first else file for key, file in index["weight_map"].items()}
    (tmp_path / "half" / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": renamed}))
    before = {path.name: path.read_bytes() for path in (tmp_path / "half").iterdir()}
    with pytest.raises(ExportError, match="would replace"):
        graphlens.export_model(tmp_path / "half", tmp_path / "half", verify=False)
    assert {path.name: path.read_bytes() for path in (tmp_path / "half").iterdir()} == before
    linked = in_the_hubs_cache(odd_checkpoint, tmp_path / "hub")
    names = sorted(path.name for path in linked.iterdir())
    with pytest.raises(ExportError, match="leaves the folder"):
        graphlens.export_model(linked, linked, verify=False)
    assert sorted(path.name for path in linked.iterdir()) == names


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_checkpoints_link_that_leaves_its_folder_is_refused(file: str, odd_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(odd_checkpoint, tmp_path / "checkpoint"))
    (folder / file).unlink()
    (folder / file).symlink_to(odd_checkpoint / file)
    with pytest.raises(GraphlensError, match=f"{file}: a link that leaves the folder"):
        graphlens.export_model(folder, tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()


# The cache of from_pretrained


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_from_pretrained_exports_once_and_opens_without_torch(odd_checkpoint: Path, cache: Path) -> None:
    first = graphlens.HookedTransformer.from_pretrained_no_processing(odd_checkpoint)
    (folder,) = (cache / "hooked").iterdir()
    written = (folder / "model.onnx").stat().st_mtime_ns
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.split('.')[0] in ('torch', 'transformers'): raise ImportError('refused: ' + name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import graphlens, numpy as np\n"
        "model = graphlens.HookedTransformer.from_pretrained_no_processing(sys.argv[1])\n"
        "print(float(model(np.arange(5))[0, -1, 3]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(odd_checkpoint)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == float(first(np.arange(5))[0, -1, 3])
    assert (folder / "model.onnx").stat().st_mtime_ns == written
    np.testing.assert_array_equal(
        graphlens.HookedTransformer.from_pretrained_no_processing(odd_checkpoint)(np.arange(5)), first(np.arange(5))
    )


def test_another_checkpoint_of_the_same_name_gets_its_own_export(
    odd_checkpoint: Path, tmp_path: Path, cache: Path
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()

    def nudge(tensors: dict) -> dict:
        tensors["transformer.wte.weight"][0, 0] += 1
        return tensors

    one = copy_with(odd_checkpoint, tmp_path / "a" / "model", lambda t: t)
    other = copy_with(odd_checkpoint, tmp_path / "b" / "model", nudge)
    folders = {cached_export(one), cached_export(other)}
    assert len(folders) == 2
    assert {folder.parent for folder in folders} == {cache / "hooked"}


def test_without_the_export_packages_the_error_names_the_extra(
    odd_checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else find(name, *rest))
    with pytest.raises(RuntimeUnavailable, match=r"needs torch.*graphlens-onnx\[export\]"):
        graphlens.HookedTransformer.from_pretrained_no_processing(odd_checkpoint)


def test_two_processes_exporting_the_same_model_both_succeed(odd_checkpoint: Path, cache: Path) -> None:
    code = (
        "import sys, graphlens; graphlens.HookedTransformer.from_pretrained_no_processing(sys.argv[1]); print('opened')"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(odd_checkpoint)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for run in runs:
        out, err = run.communicate(timeout=300)
        assert out.strip() == "opened", err
    assert len(list((cache / "hooked").iterdir())) == 1


def test_a_stranger_at_the_target_is_not_taken_for_the_export(odd_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stage = staged_folder(out)
    stage.__enter__()
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(ExportError, match="could not be written"):
        stage.__exit__(None, None, None)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


# The hub


def hub_cache(root: Path, repo: str, checkpoint: Path) -> str:
    """A hub cache in its real layout: blobs, a snapshot of symlinks, a ref. Returns the commit."""
    commit = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
    base = root / f"models--{repo.replace('/', '--')}"
    for folder in ("blobs", "refs", f"snapshots/{commit}"):
        (base / folder).mkdir(parents=True)
    (base / "refs" / "main").write_text(commit)
    for index, path in enumerate(sorted(checkpoint.iterdir())):
        blob = base / "blobs" / f"{index:040x}"
        shutil.copyfile(path, blob)
        (base / "snapshots" / commit / path.name).symlink_to(Path("../../blobs") / blob.name)
    return commit


@pytest.mark.parametrize(("name", "repo"), [("gpt2", "gpt2"), ("gpt2-small", "gpt2"), ("distillgpt2", "distilgpt2")])
def test_a_hub_name_opens_from_the_hub_cache_offline(
    name: str,
    repo: str,
    odd_checkpoint: Path,
    odd_hooked: Path,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit = hub_cache(tmp_path / "hub", repo, odd_checkpoint)
    model = graphlens.HookedTransformer.from_pretrained_no_processing(name, cache_dir=tmp_path / "hub")
    assert model.cfg.model_name == repo
    (folder,) = (cache / "hooked").iterdir()
    assert model.runner.engine.folder == folder
    assert model.runner.engine.manifest.revision == commit
    entry = folder / "model.safetensors"
    assert not entry.is_symlink()
    blobs = {path.stat().st_ino for path in (tmp_path / "hub").rglob("blobs/*")}
    assert entry.stat().st_ino in blobs
    tokens = np.arange(7)
    np.testing.assert_array_equal(model(tokens), graphlens.HookedTransformer.from_onnx(odd_hooked)(tokens))
