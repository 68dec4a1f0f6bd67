"""Models given to others: a hooked folder with a card, and the same on the hub, whose library is a stand-in here."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import onnx
import pytest
from huggingface_hub import errors

from graphlens import Ablate, ExportError, HookedTransformer, InputError, embedded_model, surgery
from graphlens.deploy import bake_model, write_drivable, write_stripped
from graphlens.file.version import __version__
from graphlens.pipelines.share import card_of
from graphlens.surgery.graph import write_manifest

PROMPT = "When John and Mary went to the store, John gave a drink to"


@dataclass
class Hub:
    """What stands in for huggingface_hub.HfApi: it keeps what it was asked and what was uploaded."""

    kept: Path
    error: Exception | None = None
    asked: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __call__(self, **options: Any) -> Hub:
        self.asked["api"] = options
        return self

    def create_repo(self, repo_id: str, **options: Any) -> SimpleNamespace:
        self.asked["create_repo"] = {"repo_id": repo_id, **options}
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, folder_path: Path, **options: Any) -> SimpleNamespace:
        if self.error is not None:
            raise self.error
        self.asked["upload_folder"] = options
        shutil.copytree(folder_path, self.kept)
        return SimpleNamespace(commit_url="https://hub.example/user/name/commit/1")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "uploaded")
    monkeypatch.setattr(huggingface_hub, "HfApi", made)
    return made


def fresh() -> HookedTransformer:
    return HookedTransformer.from_onnx(embedded_model(), "cpu")


def test_what_is_saved_opens_as_the_same_model(tiny: HookedTransformer, tmp_path: Path) -> None:
    folder = tiny.save_pretrained(tmp_path / "saved")
    for opened in (HookedTransformer.from_onnx(folder, "cpu"), HookedTransformer.from_pretrained_no_processing(folder)):
        logits, cache = opened.run_with_cache(PROMPT)
        wanted, wanted_cache = tiny.run_with_cache(PROMPT)
        np.testing.assert_array_equal(logits, wanted)
        assert set(cache) == set(wanted_cache)
    surgery.check(folder)
    assert {path.name for path in folder.iterdir()} >= {"README.md", "config.json", "tokenizer.json", "model.onnx"}


def test_weights_that_were_set_are_saved(tmp_path: Path) -> None:
    model = fresh()
    model.set_weights({"blocks.0.mlp.W_in": np.asarray(model.blocks[0].mlp.W_in) * 0.5})
    saved = HookedTransformer.from_onnx(model.save_pretrained(tmp_path / "saved"), "cpu")
    np.testing.assert_allclose(saved(PROMPT), model(PROMPT), atol=1e-5)
    assert np.abs(saved(PROMPT) - fresh()(PROMPT)).max() > 0.1


def test_what_the_folder_would_not_hold_is_refused(tmp_path: Path) -> None:
    model = fresh()
    with model.intervene(Ablate("hook_embed")), pytest.raises(InputError, match=r"Ablate\('hook_embed'.* is active"):
        model.save_pretrained(tmp_path / "saved")
    model.add_hook("hook_embed", lambda value, hook: None)
    with pytest.raises(InputError, match=r"the hook .* at 'hook_embed' is active"):
        model.save_pretrained(tmp_path / "saved")
    model.reset_hooks()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="exists and is not empty"):
        model.save_pretrained(tmp_path / "full")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "mine.txt"]


def test_it_is_pushed_to_the_hub_as_it_is_saved(tiny: HookedTransformer, hub: Hub, tmp_path: Path) -> None:
    link = tiny.push_to_hub("user/name", private=True, token="secret", revision="test", create_pr=True)
    assert link == "https://hub.example/user/name/commit/1"
    assert hub.asked == {
        "api": {"token": "secret"},
        "create_repo": {"repo_id": "user/name", "private": True, "exist_ok": True},
        "upload_folder": {
            "repo_id": "user/name",
            "commit_message": f"Hooked model, written by graphlens {__version__}",
            "revision": "test",
            "create_pr": True,
        },
    }
    saved = tiny.save_pretrained(tmp_path / "saved")
    assert {path.name for path in hub.kept.iterdir()} == {path.name for path in saved.iterdir()}
    for path in saved.iterdir():
        if path.name != "README.md":
            assert (hub.kept / path.name).read_bytes() == path.read_bytes()
    assert 'from_pretrained_no_processing("user/name")' in (hub.kept / "README.md").read_text()
    assert "secret" not in "".join(path.read_text("utf-8", "replace") for path in hub.kept.iterdir())


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (errors.HFValidationError("two slashes"), InputError, r"'a/b/c' is no name of a repository .*two slashes"),
        (ConnectionError("no route"), ExportError, r"the hub did not take the model \(no route\). Log in"),
        (errors.OfflineModeIsEnabled("offline"), ExportError, "did not take the model"),
    ],
)
def test_a_hub_that_refuses(
    error: Exception, kind: type[Exception], said: str, tiny: HookedTransformer, hub: Hub
) -> None:
    hub.error = error
    with pytest.raises(kind, match=said):
        tiny.push_to_hub("a/b/c")
    assert not hub.kept.exists()


@pytest.mark.parametrize(
    "secret",
    ["/home/secret/runs/small", "~/secret/small", "C:\\\\secret\\\\small", "../secret/small", "a/secret/small"],
)
@pytest.mark.parametrize("adopt", [False, True])
def test_nothing_that_is_saved_tells_a_path_of_this_machine(
    secret: str, adopt: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "in"
    if adopt:
        write_stripped(embedded_model(), folder)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(embedded_model() / name, folder / name)
    else:
        shutil.copytree(embedded_model(), folder)
    config = json.loads((folder / "config.json").read_text())
    said = {"_name_or_path": secret, "part": {"_name_or_path": secret, "kept": 1}, "repo_path": "user/name"}
    (folder / "config.json").write_text(json.dumps(config | said))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_file": f"{secret}/tokenizer.json", "extra_special_tokens": {"sign": "/home/"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))

    model = HookedTransformer.from_onnx(folder / "model.onnx", "cpu", adopt=adopt)
    out = model.save_pretrained(tmp_path / "out")
    assert [file.name for file in out.iterdir() if b"secret" in file.read_bytes()] == []
    told = json.loads((out / "config.json").read_text())
    assert told == config | {"part": {"kept": 1}, "repo_path": "user/name"}
    del tokenizer["tokenizer_file"]
    assert json.loads((out / "tokenizer_config.json").read_text()) == tokenizer  # a token that looks like a path stays
    again = HookedTransformer.from_onnx(out, "cpu")
    np.testing.assert_array_equal(again(PROMPT), model(PROMPT))
    if adopt:
        assert again.cfg.model_name == "small"


def test_settings_without_paths_are_saved_to_the_byte(tiny: HookedTransformer, tmp_path: Path) -> None:
    out = tiny.save_pretrained(tmp_path / "out")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (embedded_model() / name).read_bytes()


def test_a_name_that_is_a_path_in_a_file_adopted_before_is_not_passed_on(tmp_path: Path) -> None:
    hooked = surgery.load(embedded_model())
    manifest = surgery.read_manifest(hooked)
    write_manifest(hooked, replace(manifest, config=replace(manifest.config, model_name="/home/secret/small")))
    surgery.save(hooked, tmp_path / "in")
    out = HookedTransformer.from_onnx(tmp_path / "in", "cpu").save_pretrained(tmp_path / "out")
    assert [file.name for file in out.iterdir() if b"secret" in file.read_bytes()] == []
    assert HookedTransformer.from_onnx(out, "cpu").cfg.model_name == "small"


def test_a_card_says_what_the_model_is(tiny: HookedTransformer, tmp_path: Path) -> None:
    text = (tiny.save_pretrained(tmp_path / "saved") / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    told = {key: json.loads(value) for key, value in (line.split(": ", 1) for line in front.splitlines())}
    assert told["library_name"] == "graphlens"
    assert told["pipeline_tag"] == "text-generation"
    assert "interpretability" in told["tags"]
    assert "base_model" not in told, "it came from no hub"
    assert f"| hook points | {len(tiny.hook_dict)} |" in body
    assert "| layers, heads, d_model | 4, 4, 128 |" in body
    (code,) = re.findall(r"```python\n(.*?)```", body, re.S)
    names: dict[str, Any] = {}
    exec(code.replace("PATH/TO/THIS/FOLDER", str(tmp_path / "saved")), names)
    np.testing.assert_array_equal(names["model"](PROMPT), tiny(PROMPT))
    assert (tiny.save_pretrained(tmp_path / "own", card="# mine\n") / "README.md").read_text() == "# mine\n"


def test_a_card_of_a_stranger_holds_no_markup(tiny: HookedTransformer) -> None:
    manifest = tiny.runner.engine.manifest
    evil = '"]\n<script>alert(1)</script> [x](javascript:1) | `a` **b**'
    text = card_of(replace(manifest, source=evil, revision="abc", exporter={evil: evil}))
    _, front, body = text.split("---\n", 2)
    assert "<script" not in body
    assert json.loads(dict(line.split(": ", 1) for line in front.splitlines())["base_model"]) == evil
    assert not re.search(r"(?<!\\)\]\(javascript", body)
    assert all(row.count("|") - row.count(r"\|") == 3 for row in body.splitlines() if row.startswith("| "))


# What a viewer shows


def labels(folder: Path) -> tuple[onnx.ModelProto, dict[str, dict[str, str]]]:
    """The graph file, and the metadata of its nodes by the values that they compute."""
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    found = {}
    for node in proto.graph.node:
        if node.metadata_props:
            found |= {value: {entry.key: entry.value for entry in node.metadata_props} for value in node.output}
    return proto, found


def test_nodes_say_which_hook_point_they_compute(tiny: HookedTransformer, tmp_path: Path) -> None:
    proto, found = labels(tiny.save_pretrained(tmp_path / "saved"))
    onnx.checker.check_model(tmp_path / "saved" / "model.onnx")
    hooks: dict[str, list[str]] = {}
    for name, entry in tiny.runner.engine.manifest.hooks.items():
        hooks.setdefault(entry.value, []).append(name)
    computed = {value for node in proto.graph.node for value in node.output}
    assert {value: told["hook"].split(", ") for value, told in found.items()} == {
        value: names for value, names in hooks.items() if value in computed
    }
    assert found["blocks.2.attn.hook_z"] == {"hook": "blocks.2.attn.hook_z", "layer": "2"}
    assert found["blocks.0.hook_resid_post"] == {
        "hook": "blocks.0.hook_resid_post, blocks.1.hook_resid_pre",
        "layer": "0, 1",
    }
    assert "layer" not in found["hook_embed"]
    assert proto.doc_string.startswith("graphlens: tiny-gpt2 (GPT2LMHeadModel), 4 layers")
    assert (proto.producer_name, proto.producer_version) == ("graphlens", __version__)


def test_labels_follow_the_graph_and_no_graph_in_memory_has_them(tmp_path: Path) -> None:
    source = fresh().save_pretrained(tmp_path / "saved")
    model = surgery.load(source)
    assert not any(node.metadata_props for node in model.graph)
    assert model.doc_string is None
    again = surgery.save(model, tmp_path / "again")
    assert again.read_bytes() == (source / "model.onnx").read_bytes()
    bake_model(source, Ablate("blocks.1.hook_resid_pre", 0.5, positions=0), tmp_path / "baked")
    _, found = labels(tmp_path / "baked")
    assert found["blocks.1.attn.hook_pattern"]["layer"] == "1"
    write_drivable(source, "hook_embed", tmp_path / "drivable")
    assert labels(tmp_path / "drivable")[1]["blocks.3.attn.hook_z"]["hook"] == "blocks.3.attn.hook_z"
    proto, found = labels(write_stripped(source, tmp_path / "stripped"))
    assert found == {}
    assert proto.doc_string == ""
