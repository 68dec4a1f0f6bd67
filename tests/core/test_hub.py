"""Names: what is a folder, what is on the hub, and what the hub's refusals are turned into."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

import graphlens
from graphlens.errors import ExportError
from graphlens.pipelines.cache import cached_export
from graphlens.pipelines.hub import resolve

RESPONSE = SimpleNamespace(headers={}, request=None)


def answers(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


class Hub:
    """A hub with one repository, and a cache folder in the hub's own layout: files are links from a commit to blobs.

    Attributes:
        files: The content of each file of the repository.
        cache: The cache folder.
        asked: What was downloaded, in order.
        online: False makes what is not in the cache unreachable.
    """

    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path, files: Mapping[str, bytes]) -> None:
        self.files, self.cache, self.asked, self.online = dict(files), cache, list[str](), True
        self.folder = cache / "models--someone--model"
        self.snapshot = self.folder / "snapshots" / self.commit
        for name in ("hf_hub_download", "snapshot_download"):
            monkeypatch.setattr(huggingface_hub, name, getattr(self, name))
        monkeypatch.setattr(huggingface_hub.HfApi, "get_paths_info", self.get_paths_info)

    def hf_hub_download(self, repo: str, name: str, **options: object) -> str:
        self._check(repo, options)
        place = self.snapshot / name
        if place.exists():
            return str(place)
        if not self.online:
            raise errors.LocalEntryNotFoundError("offline")
        if name not in self.files:
            (self.folder / ".no_exist" / self.commit).mkdir(parents=True, exist_ok=True)
            (self.folder / ".no_exist" / self.commit / name).touch()
            raise errors.RemoteEntryNotFoundError("404", response=RESPONSE)
        blob = self.folder / "blobs" / hashlib.sha256(self.files[name]).hexdigest()
        for made in (blob.parent, self.snapshot, self.folder / "refs"):
            made.mkdir(parents=True, exist_ok=True)
        (self.folder / "refs" / "main").write_text(self.commit)
        blob.write_bytes(self.files[name])
        place.symlink_to(os.path.relpath(blob, place.parent))
        self.asked.append(name)
        return str(place)

    def snapshot_download(self, repo: str, allow_patterns: Sequence[str], **options: object) -> str:
        self._check(repo, options)
        assert options["revision"] in (self.commit, None) or not self.asked, "after the first, files of one commit"
        if not self.online and not self.snapshot.exists():
            raise errors.LocalEntryNotFoundError("offline")
        if self.online:
            for name in self.files:
                if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                    self.hf_hub_download(repo, name, **options)
        return str(self.snapshot)

    def get_paths_info(self, repo: str, paths: Sequence[str], **_: object) -> list[SimpleNamespace]:
        if not self.online:
            raise errors.OfflineModeIsEnabled("offline")
        return [SimpleNamespace(size=len(self.files[path])) for path in paths if path in self.files]

    def _check(self, repo: str, options: Mapping[str, object]) -> None:
        assert repo == "someone/model"
        assert options["cache_dir"] == str(self.cache)


CHECKPOINT = {
    "config.json": json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}).encode(),
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"weights once more",
    "README.md": b"a model",
    "tokenizer.json": b"{}",
}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.RepositoryNotFoundError("404", response=RESPONSE), "neither a local folder nor a model on the"),
        (errors.GatedRepoError("403", response=RESPONSE), "gated.*log in"),
        (errors.RevisionNotFoundError("404", response=RESPONSE), "no revision 'v9'"),
        (errors.LocalEntryNotFoundError("offline"), "cannot be reached and the model is not in the local hub cache"),
        (errors.OfflineModeIsEnabled("offline"), "cannot be reached"),
        (errors.HfHubHTTPError("500 oops", response=RESPONSE), "answered with an error.*500 oops"),
        (OSError(28, "No space left on device"), "could not be fetched.*No space left"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_hub_refuses_is_said(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, error)
    with pytest.raises(ExportError, match=message):
        graphlens.HookedTransformer.from_pretrained_no_processing("gpt2", revision="v9")


def test_names_that_cannot_be_on_the_hub(tmp_path: Path) -> None:
    for name in ("./gone", "a/b/c", str(tmp_path / "gone")):
        with pytest.raises(ExportError, match="no such folder"):
            resolve(name)
    with pytest.raises(ExportError, match="nor a valid hub name"):
        resolve("not a name!")
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="a file, where"):
        resolve(tmp_path / "file")


def test_only_the_files_that_are_needed_are_fetched_and_the_config_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub = Hub(monkeypatch, tmp_path, CHECKPOINT)
    source = resolve("someone/model", revision="main", token="t", cache_dir=tmp_path)
    assert (source.name, source.folder, source.revision) == ("someone/model", hub.snapshot, hub.commit)
    assert hub.asked == ["config.json", "model.safetensors", "tokenizer.json"]
    hub.online = False
    assert resolve("someone/model", cache_dir=tmp_path) == source


def test_an_alias_is_the_repository_that_it_stands_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def snapshot_download(repo: str, *_: object, **__: object) -> str:
        raise errors.RepositoryNotFoundError(repo, response=RESPONSE)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ExportError, match="'gpt2-small' is neither") as caught:
        resolve("gpt2-small", cache_dir=tmp_path)
    assert str(caught.value.__cause__) == "gpt2"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"model_type": "whisper"},
            r"^someone/model: config\.json names whisper, which .* It exports: .*GPT2LMHeadModel",
        ),
        (
            {"model_type": "gpt2", "add_cross_attention": True},
            r"^someone/model: config\.json sets add_cross_attention",
        ),
        (
            {"model_type": "gpt2", "quantization_config": {"quant_method": "gptq"}},
            r"^someone/model: .*quantization_config \(gptq\): its weights are quantised.* F16",
        ),
        (
            {"model_type": "llama", "quantization_config": {"load_in_4bit": True}},
            r"^someone/model: .*quantization_config \(load_in_4bit\): its weights are quantised",
        ),
        ({"model_type": "llama", "hidden_size": 0}, r"^someone/model: config\.json sets hidden_size=0, and it must be"),
        ({"model_type": "gemma3_text", "rms_norm_eps": "x"}, r"^someone/model: config\.json sets rms_norm_eps='x'"),
        ([1], r"^someone/model: its config\.json holds no JSON object"),
        (None, r"^someone/model: its config\.json cannot be read"),
        ("nested too deep", r"^someone/model: its config\.json cannot be read"),
    ],
)
def test_what_cannot_be_exported_is_said_before_any_weight_is_fetched(
    config: object, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = b"{" if config is None else json.dumps(config).encode()
    text = b"[" * 100_000 if config == "nested too deep" else text
    hub = Hub(monkeypatch, tmp_path, {**CHECKPOINT, "config.json": text})
    with pytest.raises(ExportError, match=said) as caught:
        graphlens.HookedTransformer.from_pretrained("someone/model", cache_dir=tmp_path)
    assert str(tmp_path) not in str(caught.value)
    assert hub.asked == ["config.json"]


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("model.safetensors", r"^someone/model: this repository has no model\.safetensors .*save_pretrained"),
        ("config.json", r"^someone/model: this repository has no config\.json"),
    ],
)
def test_a_repository_without_what_is_needed(
    lost: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub = Hub(monkeypatch, tmp_path, {name: data for name, data in CHECKPOINT.items() if name != lost})
    with pytest.raises(ExportError, match=said) as caught:
        resolve("someone/model", cache_dir=tmp_path)
    assert str(tmp_path) not in str(caught.value)
    assert "model.safetensors" not in hub.asked
    assert "pytorch_model.bin" not in hub.asked


@pytest.mark.parametrize("config", ["kept", "another's", "none"])
def test_a_hooked_repository_is_used_as_it_is(
    config: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_folder: Path
) -> None:
    names = ("model.onnx", "model.safetensors", "config.json", "tokenizer.json")
    files = {name: (tiny_folder / name).read_bytes() for name in names}
    files |= {"another.safetensors": b"", "pytorch_model.bin": b"", "onnx/model.onnx": b""}
    if config == "none":
        del files["config.json"]
    elif config != "kept":
        files["config.json"] = b'{"model_type": "whisper"}'
    hub = Hub(monkeypatch, tmp_path / "hub", files)
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path / "cache"))
    for online in (True, False):
        hub.online = online
        assert cached_export("someone/model", cache_dir=hub.cache) == hub.snapshot
    assert set(hub.asked) == set(names) & set(files)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("size", [100, 101])
def test_another_exporters_graph_is_no_hooked_one_and_is_not_fetched_if_large(
    size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("graphlens.pipelines.hub.LARGEST_GRAPH", 100)
    hub = Hub(monkeypatch, tmp_path, {**CHECKPOINT, "model.onnx": b"x" * size})
    assert resolve("someone/model", cache_dir=tmp_path).folder == hub.snapshot
    assert "model.safetensors" in hub.asked
    assert ("model.onnx" in hub.asked) == (size == 100)


@pytest.mark.parametrize(("name", "near"), [("gpt2-smal", "gpt2-small"), ("someone/distilgtp2", "distilgpt2")])
def test_a_name_that_is_none_is_answered_with_the_nearest(
    name: str, near: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, errors.RepositoryNotFoundError("404", response=RESPONSE))
    with pytest.raises(ExportError, match=rf"nor a model on the .*Nearest names that graphlens knows: .*'{near}'"):
        resolve(name)
    answers(monkeypatch, errors.OfflineModeIsEnabled("offline"))
    with pytest.raises(ExportError, match=rf"cannot be reached.*Nearest names that graphlens knows: .*'{near}'"):
        resolve(name)
    with pytest.raises(ExportError, match="cannot be reached") as caught:
        resolve(near)  # it is a name that graphlens knows: nothing else was meant
    assert "Nearest" not in str(caught.value)


# Adapters

ADAPTER = {"adapter_config.json": b'{"base_model_name_or_path": "gpt2"}', "adapter_model.safetensors": b"lora"}


def test_an_adapter_on_the_hub_is_told_from_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = Hub(monkeypatch, tmp_path, ADAPTER)
    with pytest.raises(ExportError, match=r"^someone/model: this repository holds a PEFT adapter.*merge_and_unload"):
        resolve("someone/model", cache_dir=tmp_path)
    assert hub.asked == ["adapter_config.json"]


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name, data in (*ADAPTER.items(), ("tokenizer.json", b"{}")):
        (folder / name).write_bytes(data)
    return folder


def test_an_adapter_is_refused_with_what_to_do_where_peft_is_not_installed(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ExportError, match=r"a PEFT adapter of 'gpt2'.*pip install peft.*merge_and_unload\(\)"):
        resolve(adapter)


def test_an_adapter_is_merged_once_by_peft(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = list[str]()

    class Model:
        @classmethod
        def from_pretrained(cls, folder: str) -> Model:
            merged.append(folder)
            return cls()

        def merge_and_unload(self) -> Model:
            return self

        def save_pretrained(self, folder: Path) -> None:
            (folder / "config.json").write_bytes(CHECKPOINT["config.json"])
            (folder / "model.safetensors").write_bytes(b"base and lora")

    peft = ModuleType("peft")
    peft.__spec__ = ModuleSpec("peft", None)
    monkeypatch.setattr(peft, "AutoPeftModelForCausalLM", Model, raising=False)
    monkeypatch.setitem(sys.modules, "peft", peft)
    source = resolve(adapter)
    assert (source.name, merged) == ("adapter", [str(adapter)])
    assert (source.folder / "model.safetensors").read_bytes() == b"base and lora"
    assert (source.folder / "tokenizer.json").read_bytes() == b"{}"
    assert resolve(adapter) == source
    assert len(merged) == 1
    (adapter / "adapter_model.safetensors").write_bytes(b"other")
    assert resolve(adapter).folder != source.folder
    # Another tokenizer beside it too: a cached merge would hold the old one.
    before = resolve(adapter).folder
    (adapter / "tokenizer.json").write_text("[]")
    after = resolve(adapter).folder
    assert after != before
    assert (after / "tokenizer.json").read_text() == "[]"
    # What fails leaves nothing behind, and a model of one's own beside an adapter is the model.
    (adapter / "adapter_model.safetensors").write_bytes(b"a third")
    monkeypatch.setattr(Model, "merge_and_unload", lambda self: self.gone)
    with pytest.raises(ExportError, match=r"peft cannot merge this adapter into its base model"):
        resolve(adapter)
    assert len(list((source.folder.parent).iterdir())) == 3
    (adapter / "model.safetensors").write_bytes(b"")
    assert resolve(adapter).folder == adapter


def test_a_local_folder_wins_over_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers(monkeypatch, AssertionError("the hub was asked"))
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("gpt2").folder == Path("gpt2")
    assert resolve("tiny-gpt2").folder == graphlens.embedded_model()
    assert resolve("tiny-llama").folder == graphlens.embedded_model("tiny-llama")
