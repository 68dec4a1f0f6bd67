"""What the cache of exports serves is what was asked for, to the last bit: transformers is the judge."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers

from graphlens import ExportError, HookedTransformer, ModelFileError
from graphlens.pipelines import cache
from graphlens.pipelines.export import export_model

TOKENS = np.random.default_rng(0).integers(0, 101, (2, 9))
Change = Callable[[transformers.GPT2LMHeadModel], object]
# One row, one entry, one neuron: what a digest of samples does not see.
CHANGES: dict[str, Change] = {
    "a row of an embedding": lambda model: model.transformer.wte.weight[TOKENS[0, 3]].mul_(-3),
    "a bias entry": lambda model: model.transformer.h[1].attn.c_proj.bias[17].add_(5),
    "a neuron": lambda model: model.transformer.h[2].mlp.c_fc.weight[:, 33].mul_(9),
    "the last entry of the last matrix": lambda model: model.transformer.h[2].mlp.c_proj.weight[-1, -1].add_(20),
}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path / "cache"))


def loaded(checkpoint: Path) -> transformers.GPT2LMHeadModel:
    return transformers.GPT2LMHeadModel.from_pretrained(checkpoint, attn_implementation="eager").eval()


def logits(model: transformers.GPT2LMHeadModel) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def near(found: np.ndarray, expected: np.ndarray) -> bool:
    """Up to a constant at each position, which centring the unembedding takes away."""
    found, expected = (each - each.mean(-1, keepdims=True) for each in (found, expected))
    return bool(np.abs(found - expected).max() <= 5e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize(("processed", "changes"), [(False, ["a bias entry", "a neuron"]), (True, ["a bias entry"])])
def test_a_model_in_memory_is_the_one_that_runs_however_little_it_changed(
    processed: bool, changes: list[str], odd_checkpoint: Path
) -> None:
    make = HookedTransformer.from_pretrained if processed else HookedTransformer.from_pretrained_no_processing
    model = loaded(odd_checkpoint)
    before = logits(model)
    assert near(make(odd_checkpoint, hf_model=model)(TOKENS), before)
    for change in map(CHANGES.__getitem__, changes):
        with torch.no_grad():
            change(model)
        expected = logits(model)
        assert not near(before, expected)
        assert near(make(odd_checkpoint, hf_model=model)(TOKENS), expected)
        before = expected


@pytest.mark.parametrize("processed", [False, True])
def test_a_checkpoint_saved_again_under_its_name_is_exported_again(
    processed: bool, odd_checkpoint: Path, tmp_path: Path
) -> None:
    make = HookedTransformer.from_pretrained if processed else HookedTransformer.from_pretrained_no_processing
    folder = Path(shutil.copytree(odd_checkpoint, tmp_path / "odd"))
    model = loaded(folder)
    assert near(make(folder)(TOKENS), logits(model))
    for change in list(CHANGES.values())[:1]:
        with torch.no_grad():
            change(model)
        model.save_pretrained(folder)
        assert near(make(folder)(TOKENS), logits(model))


def test_settings_are_the_checkpoints_too(odd_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(odd_checkpoint, tmp_path / "odd"))
    for text in ('{"eos_token_id": 7}', '{"eos_token_id": 8}'):
        (folder / "generation_config.json").write_text(text)
        model = HookedTransformer.from_pretrained_no_processing(folder)
        assert (model.runner.engine.folder / "generation_config.json").read_text() == text


def test_what_was_derived_of_a_damaged_folder_is_not_served(odd_hooked: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(odd_hooked, tmp_path / "odd"))
    HookedTransformer.from_pretrained_no_processing(folder, dtype="float16")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelFileError, match="SHA-256"):
        HookedTransformer.from_pretrained_no_processing(folder, dtype="float16")


@pytest.mark.parametrize(("dtype", "verify"), [(torch.float32, True), (torch.bfloat16, False)])
def test_a_tied_flag_is_not_believed_over_a_head_of_its_own(
    dtype: torch.dtype, verify: bool, odd_checkpoint: Path, tmp_path: Path
) -> None:
    model = loaded(odd_checkpoint)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape))
    model.to(dtype).save_pretrained(tmp_path / "untied")
    config = tmp_path / "untied" / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    assert config.read_text() != text
    expected = logits(loaded(tmp_path / "untied").float())
    assert near(expected, logits(model.float()))
    export_model(tmp_path / "untied", tmp_path / "hooked", verify=verify)
    hooked = HookedTransformer.from_onnx(tmp_path / "hooked")
    assert near(hooked(TOKENS), expected)
    np.testing.assert_array_equal(hooked.W_U, model.lm_head.weight.detach().float().numpy().T)
    np.testing.assert_array_equal(hooked.W_E, model.transformer.wte.weight.detach().float().numpy())


def write_over(path: Path, data: bytes) -> None:
    """Writes into a file as some programs save: the same file, under all its names."""
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()


def test_a_checkpoint_written_over_in_place_does_not_spoil_what_the_cache_has_of_it(
    odd_checkpoint: Path, tmp_path: Path
) -> None:
    """The cache's weights are another name of the checkpoint's own file, where the file system has hardlinks."""
    first, second = (Path(shutil.copytree(odd_checkpoint, tmp_path / name / "odd")) for name in ("first", "second"))
    model = loaded(first)
    expected = logits(model)
    assert near(HookedTransformer.from_pretrained_no_processing(first)(TOKENS), expected)
    with torch.no_grad():
        CHANGES["a neuron"](model)
    model.save_pretrained(tmp_path / "changed")
    write_over(first / "model.safetensors", (tmp_path / "changed" / "model.safetensors").read_bytes())
    assert near(HookedTransformer.from_pretrained_no_processing(first)(TOKENS), logits(model))
    assert near(HookedTransformer.from_pretrained_no_processing(second)(TOKENS), expected)
    assert near(HookedTransformer.from_pretrained(second)(TOKENS), expected)


@pytest.mark.parametrize("file", ["model.onnx", "model.safetensors"])
@pytest.mark.parametrize("processed", [False, True])
def test_a_damaged_export_in_the_cache_is_made_again(
    processed: bool, file: str, odd_checkpoint: Path, tmp_path: Path
) -> None:
    make = HookedTransformer.from_pretrained if processed else HookedTransformer.from_pretrained_no_processing
    checkpoint = Path(shutil.copytree(odd_checkpoint, tmp_path / "odd"))
    path = make(checkpoint).runner.engine.path.parent
    name = "processed.safetensors" if processed and file != "model.onnx" else file
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).unlink()
    (path / name).write_bytes(data)
    assert near(make(checkpoint)(TOKENS), logits(loaded(checkpoint)))


@pytest.mark.parametrize("processed", [False, True])
def test_an_export_in_the_cache_that_lost_its_graph_is_made_again(
    processed: bool, odd_checkpoint: Path, tmp_path: Path
) -> None:
    make = HookedTransformer.from_pretrained if processed else HookedTransformer.from_pretrained_no_processing
    checkpoint = Path(shutil.copytree(odd_checkpoint, tmp_path / "odd"))
    make(checkpoint).runner.engine.path.unlink()
    assert near(make(checkpoint)(TOKENS), logits(loaded(checkpoint)))


def test_a_checkpoint_that_changes_while_it_is_exported_is_not_kept(
    odd_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Path(shutil.copytree(odd_checkpoint, tmp_path / "odd"))
    model = loaded(checkpoint)
    before = logits(model)
    with torch.no_grad():
        CHANGES["a neuron"](model)
    export = cache.export_to_new_folder

    def late(*given: Any, **options: Any) -> object:
        model.save_pretrained(checkpoint)
        return export(*given, **options)

    monkeypatch.setattr(cache, "export_to_new_folder", late)
    with pytest.raises(ExportError, match="wrote into this checkpoint"):
        HookedTransformer.from_pretrained_no_processing(checkpoint)
    monkeypatch.undo()
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path / "cache"))
    original = Path(shutil.copytree(odd_checkpoint, tmp_path / "other" / "odd"))
    assert near(HookedTransformer.from_pretrained_no_processing(original)(TOKENS), before)


Damage = Callable[[bytes], bytes]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[:-200], "cut short"),
        (lambda data: data.replace(b"\n\x09graphlens\x12", b"\n\x09graphlenr\x12"), "not as it was written"),
        (lambda data: data.replace(b'"format_version":2', b'"format_version":9'), "format 9"),
        (lambda data: data.replace(b'{"config"', b'["config"'), "malformed"),
        (lambda data: b"", "no graphlens manifest"),
        (lambda data: bytes(len(data)), "not an ONNX model"),
    ],
)
def test_the_checkpoint_beside_a_damaged_model_is_not_served_in_its_place(
    damage: Damage, says: str, odd_hooked: Path, tmp_path: Path
) -> None:
    """It may have other weights or edits than the checkpoint."""
    folder = Path(shutil.copytree(odd_hooked, tmp_path / "odd"))
    assert (folder / "config.json").is_file()
    good = (folder / "model.onnx").read_bytes()
    assert damage(good) != good
    (folder / "model.onnx").write_bytes(damage(good))
    with pytest.raises(ModelFileError, match=says):
        HookedTransformer.from_pretrained_no_processing(folder)


def test_another_exporters_graph_beside_a_checkpoint_does_not_matter(odd_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(odd_checkpoint, tmp_path / "odd"))
    graph = onnx.helper.make_graph([], "theirs", [], [])
    for data in (onnx.helper.make_model(graph).SerializeToString(), b"version https://git-lfs.github.com/spec/v1\n"):
        (folder / "model.onnx").write_bytes(data)
        assert near(HookedTransformer.from_pretrained_no_processing(folder)(TOKENS), logits(loaded(folder)))
