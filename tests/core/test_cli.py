"""The command line: what it prints is the API's, errors are one block on stderr, exit codes say which kind.

Most commands run in this process. ``in_a_process`` is for what only a process of its own can show.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from graphlens import HookedTransformer
from graphlens.cli.app import DEFECT
from graphlens.file.folder import TOKENIZER_FILES
from tests.command_line import graphlens, sentence

PROMPT = "When John and Mary went to the store, John gave a drink to"


def in_a_process(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "graphlens", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != DEFECT, done.stderr
    return done


def test_demo_runs_on_both_embedded_models_and_on_a_folder(tiny_folder: Path) -> None:
    shown = in_a_process("demo")
    assert shown.returncode == 0, shown.stderr
    for heading in ("Logit lens", "Ablate", "Patch", "Attention"):
        assert heading in shown.stdout
    assert shown.stderr == ""
    llama = graphlens("demo", "--model", "tiny-llama")
    assert llama.returncode == 0, llama.stderr
    assert "tiny-llama" in llama.stdout
    assert llama.stderr == ""
    figures = json.loads(graphlens("demo", "--json").stdout)
    again = json.loads(graphlens("demo", "--json", "--model", tiny_folder).stdout)
    for volatile in (figures, again):
        volatile.pop("cache_ms")
    assert figures == again


def test_hooks_lists_every_hook_point(tiny: HookedTransformer, tiny_folder: Path) -> None:
    listed = json.loads(graphlens("hooks", tiny_folder, "--json").stdout)
    assert list(listed) == list(tiny.hook_dict)
    assert listed["blocks.2.attn.hook_z"] == {"shape": "[batch, pos, 4, 32]", "dtype": "float32"}
    table = graphlens("hooks", tiny_folder).stdout
    assert all(name in table for name in tiny.hook_dict)


def test_cache_writes_the_activations_that_the_api_reads(
    tiny: HookedTransformer, tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "acts.safetensors"
    done = graphlens("cache", tiny_folder, PROMPT, "--names", "blocks.[01].attn.hook_pattern", "-o", out)
    assert done.returncode == 0, done.stderr
    saved = load_file(out)
    _, cache = tiny.run_with_cache(PROMPT)
    assert set(saved) == {"tokens", "blocks.0.attn.hook_pattern", "blocks.1.attn.hook_pattern"}
    np.testing.assert_array_equal(saved["tokens"], tiny.to_tokens(PROMPT))
    for name in set(saved) - {"tokens"}:
        np.testing.assert_array_equal(saved[name], cache[name])


def test_run_shows_the_models_probabilities_and_an_ablations(tiny: HookedTransformer, tiny_folder: Path) -> None:
    ran = json.loads(graphlens("run", tiny_folder, PROMPT, "--ablate", "blocks.2.attn.hook_z:1", "--json").stdout)
    rows = ran["next"]
    assert ran["tokens"] == tiny.to_str_tokens(PROMPT)
    assert ran["of"] == len(ran["tokens"])

    def probabilities(logits: np.ndarray) -> np.ndarray:
        exp = np.exp(logits[0, -1].astype(np.float64) - logits[0, -1].max())
        return exp / exp.sum()

    def ablate(z: np.ndarray, hook: object) -> None:
        z[:, :, 1, :] = 0

    plain = probabilities(tiny(PROMPT))
    edited = probabilities(tiny.run_with_hooks(PROMPT, fwd_hooks=[("blocks.2.attn.hook_z", ablate)]))
    assert np.abs(plain - edited).max() > 0
    for row in rows:
        token = tiny.to_single_token(row["token"])
        assert row["probability"] == pytest.approx(plain[token], rel=1e-4, abs=1e-8)
        assert row["ablated"] == pytest.approx(edited[token], rel=1e-4, abs=1e-8)
    assert rows[0]["probability"] == pytest.approx(plain.max(), rel=1e-4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("blocks.9.attn.hook_z:1", "blocks.3.attn.hook_z"),
        ("blocks.0.attn.hook_z:4", "head_index has 4 (0-3)"),
        ("blocks.0.attn.hook_z:x", "comes a head's number"),
        ("blocks.0.hook_resid_pre:1", "has no heads"),
    ],
)
def test_a_wrong_ablation_is_one_block_on_stderr(spec: str, message: str, tiny_folder: Path) -> None:
    done = graphlens("run", tiny_folder, PROMPT, "--ablate", spec)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert message in " ".join(done.stderr.replace("│", " ").split())


def test_a_folder_that_is_not_there_and_a_pattern_that_matches_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    gone = in_a_process("hooks", tmp_path / "gone")
    assert gone.returncode == 1
    assert "no such folder" in " ".join(gone.stderr.replace("│", " ").split())
    nothing = graphlens("cache", tiny_folder, "Hi", "--names", "hook_q_in", "-o", tmp_path / "a.safetensors")
    assert nothing.returncode == 1
    assert not (tmp_path / "a.safetensors").exists()
    unwritable = graphlens("cache", tiny_folder, "Hi", "-o", tmp_path / "no" / "a.safetensors")
    assert unwritable.returncode == 1
    assert "cannot be written" in " ".join(unwritable.stderr.replace("│", " ").split())


def test_check_accepts_the_embedded_model_and_refuses_an_altered_one(tiny_folder: Path, tmp_path: Path) -> None:
    import shutil

    assert graphlens("check", tiny_folder).returncode == 0
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "altered"))
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    refused = graphlens("check", folder)
    assert refused.returncode == 1
    assert "altered" in refused.stderr or "not the weights" in " ".join(refused.stderr.replace("│", " ").split())


def test_every_command_has_help_with_an_example() -> None:
    commands = ("demo", "export", "hooks", "cache", "run", "patch", "attribute", "check", "cache-clear")
    listing = graphlens("--help").stdout
    for command in commands:
        assert command in listing
        shown = graphlens(command, "--help")
        assert shown.returncode == 0
        assert f"graphlens {command}" in shown.stdout
    assert graphlens("run").returncode == 2
    assert graphlens("nonsense").returncode == 2


def test_cache_clear_empties_the_cache_folder_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hooked" / "x").mkdir(parents=True)
    (tmp_path / "hooked" / "x" / "model.onnx").write_bytes(b"1" * 1000)
    (tmp_path / "mine.txt").write_text("mine")
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path))
    done = graphlens("cache-clear")
    assert done.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.fixture
def tokenless(tiny_copy: Path) -> Path:
    for name in TOKENIZER_FILES:
        (tiny_copy / name).unlink(missing_ok=True)
    return tiny_copy


def test_without_a_tokenizer_commands_take_token_ids(tokenless: Path, tiny: HookedTransformer, tmp_path: Path) -> None:
    ids = tiny.to_tokens(PROMPT)
    spelt = ", ".join(map(str, ids[0].tolist()))
    ran = json.loads(graphlens("run", tokenless, spelt, "--json").stdout)
    assert ran["tokens"] == [str(token) for token in ids[0].tolist()]
    assert int(ran["next"][0]["token"]) == int(tiny(ids)[0, -1].argmax())
    assert graphlens("run", tokenless, spelt).returncode == 0
    out = tmp_path / "acts.safetensors"
    assert graphlens("cache", tokenless, spelt, "--names", "hook_embed", "-o", out).returncode == 0
    np.testing.assert_array_equal(load_file(out)["tokens"], ids)
    said = graphlens("generate", tokenless, spelt, "-n", "3").stdout.split()
    wanted = tiny.generate(ids, 3, temperature=0.0, stop_at_eos=False, return_type="tokens", verbose=False)
    assert list(map(int, said)) == wanted[0].tolist()
    other = ids.copy()
    other[0, 1] += 1
    pair = ("--clean", spelt, "--corrupted", " ".join(map(str, other[0].tolist())), "--answer", "7", "--wrong", "9")
    done = graphlens("patch", tokenless, *pair, "--sites", "mlp_out", "-o", tmp_path / "patched")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "When John"), 'give token ids in place of the prompt, with spaces or commas between them: "0 5 6 7"'),
        (("run", "5 99999"), "99999"),
        (("generate", "5; 6"), "give token ids in place of the prompt"),
        (
            ("patch", "--clean", "5 6", "--corrupted", "a b", "--answer", "1", "--wrong", "2", "-o", "x"),
            "in place of --corrupted",
        ),
        (
            ("patch", "--clean", "5 6", "--corrupted", "5 7", "--answer", " Mary", "--wrong", "3", "-o", "x"),
            "--answer takes a token id",
        ),
    ],
)
def test_without_a_tokenizer_text_is_refused_with_what_to_give(
    arguments: tuple[str, ...], said: str, tokenless: Path
) -> None:
    command, *rest = arguments
    done = graphlens(command, tokenless, *rest)
    assert done.returncode == 1
    assert said in sentence(done.stderr)
