"""The commands of README, word for word, on folders of several families that read words."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from graphlens import Ablate, HookedTransformer
from graphlens.interventions import save
from tests.command_line import graphlens
from tests.families.worded import worded_checkpoint
from tests.live.page_models import PROGRAMS

FAMILIES = ("llama", "neox", "qwen3", "gemma3")
README = Path(__file__).parents[2] / "README.md"
CLEAN = "When John and Mary went to the store, John gave a drink to"
CORRUPTED = CLEAN.replace("John gave", "Mary gave")


def commands() -> list[list[str]]:
    """The commands of README's block of them, split as a shell does, without "graphlens" and without comments."""
    (block,) = re.findall(
        r"^```\n(graphlens demo .*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    return [shlex.split(line, comments=True)[1:] for line in block.splitlines()]


def test_readme_names_every_command() -> None:
    from graphlens.cli.app import app

    names = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert {command[0] for command in commands()} == names - {"cache-clear"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_goes_through_readme(
    family: str, families_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = worded_checkpoint(family, families_root)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path / "cache"))
    save([Ablate("blocks.1.attn.hook_z", heads=1)], tmp_path / "edits.json")
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in (CLEAN, CORRUPTED)))
    monkeypatch.setattr("graphlens.pipelines.page.runtime_files", lambda *_: PROGRAMS)  # not from npm, over a network
    printed: dict[str, str] = {}
    outs = {"patch": "patched", "attribute": "attributed"}  # README's two write into folders of one name
    for command in commands():
        name, words = command[0], list(command)
        if name == "demo":
            continue
        if name == "export":
            words[1] = str(checkpoint)
        for option, text in (("--clean", CLEAN), ("--corrupted", CORRUPTED)):
            if option in words:
                words[words.index(option) + 1] = text
        if name in outs:
            words[-1] = outs[name]
        # README's model is larger: its block 5 and head 7 are no block and head here.
        words = [word.replace("blocks.5.attn.hook_z:7", "blocks.2.attn.hook_z:3") for word in words]
        done = graphlens(*words)
        assert done.returncode == 0, (words, done.stderr)
        printed[name] = done.stdout
    model = HookedTransformer.from_onnx("gpt2-hooked", "cpu")
    assert "blocks.2.attn.hook_z" in printed["hooks"]
    check(model, tmp_path, printed)
    shown = graphlens("demo", "--json", "--model", "gpt2-hooked")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["tokens"] == model.to_str_tokens(CLEAN)


def check(model: HookedTransformer, folder: Path, printed: dict[str, str]) -> None:
    """What the commands wrote and said is what the API gives."""
    _, cache = model.run_with_cache("Hello")
    kept = load_file(folder / "acts.safetensors")
    np.testing.assert_array_equal(kept["tokens"], model.to_tokens("Hello"))
    assert (kept["tokens"][0, 0] == 0) == model.cfg.default_prepend_bos
    for name in (name for name in cache if name.endswith("hook_pattern")):
        np.testing.assert_array_equal(kept[name], cache[name])
    story = "Once upon a time"
    assert printed["generate"].startswith(story)
    tokens = model.to_tokens("The capital of France is")
    likeliest = model.to_string([int(model(tokens)[0, -1].argmax())])
    rows = json.loads(graphlens("run", "gpt2-hooked", "The capital of France is", "--json").stdout)["next"]
    assert rows[0]["token"] == likeliest
    processed = HookedTransformer.from_onnx("gpt2-processed", "cpu")
    assert processed.cfg.processing
    gap = _log_softmax(processed(tokens)) - _log_softmax(model(tokens))
    assert np.abs(gap).max() <= 5e-5 * max(1.0, np.abs(model(tokens)).max())
    import onnxruntime

    edited = onnxruntime.InferenceSession("gpt2-edited/model.onnx").run(None, {"input_ids": tokens})[0]
    expected = model.run_with_interventions(tokens, [Ablate("blocks.1.attn.hook_z", heads=1)])
    np.testing.assert_allclose(edited, expected, atol=5e-5 * max(1.0, np.abs(expected).max()))
    plain = onnxruntime.InferenceSession("gpt2-plain/model.onnx").run(None, {"input_ids": tokens})[0]
    np.testing.assert_allclose(plain, model(tokens), atol=5e-5)
    assert "only operators that graphlens itself writes" in printed["check"]
    assert "trial run" in printed["check"]
    assert "python -m http.server" in printed["page"]
    page = (folder / "site" / "index.html").read_text(encoding="utf-8")
    told = json.loads(re.findall(r'id="settings">(.*)</script>', page)[0])["check"]
    reads = model(np.array([told["ids"]]))[0, -1]
    assert told["top"][0][0] == int(reads.argmax())


def _log_softmax(logits: Any) -> Any:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
