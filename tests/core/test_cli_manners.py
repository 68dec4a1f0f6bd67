"""Manners of the commands: help, names of models, token ids, what is checked first, and errors in the commands' own words."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.main import get_command

import graphlens as package
from graphlens import Ablate, HookedTransformer, embedded_model, interventions
from graphlens.cli.app import app
from graphlens.cli.words import SAID, in_words_of_commands
from graphlens.deploy import bake_model, write_drivable, write_stripped
from graphlens.file.end_tokens import end_tokens
from graphlens.file.folder import TOKENIZER_FILES
from tests.command_line import graphlens, sentence

PROMPT = "When John and Mary went to the store, John gave a drink to"
CORRUPTED = "When John and Mary went to the store, Mary gave a drink to"
COMMANDS = sorted(get_command(app).commands)  # type: ignore[attr-defined]
# What nobody types in a terminal.
PYTHON = re.compile(
    r"\w=(True|False|None)\b|\b\w+\(\.\.\.\)|model\.\w+\(|\.(hook_points|set_\w+)\(|from_onnx|from_pretrained|Hooked[A-Z]\w+|"
    r"graphlens\.[a-z]\w+\.|run_with_|fwd_hooks|prepend_bos|eos_token_id|names_filter"
)


def refused(*arguments: str | Path) -> str:
    """What a command says that ends with an error of the user's, which must be no Python."""
    done = graphlens(*arguments)
    assert done.returncode == 1, done.stdout
    said = sentence(done.stderr)
    assert not PYTHON.search(said), said
    return said


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs in an empty folder: nothing in the repository is found by its name alone."""
    monkeypatch.chdir(tmp_path)


# Help


def test_the_version_is_the_packages() -> None:
    done = graphlens("--version")
    assert (done.returncode, done.stdout) == (0, f"graphlens {package.__version__}\n")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_help_reads_well(command: str) -> None:
    long, short = (graphlens(*([command] if command else []), option).stdout for option in ("--help", "-h"))
    assert long == short
    text = sentence(long)
    assert f"Usage: graphlens {command or '[OPTIONS] COMMAND'}" in text
    assert "<list" not in text.partition(" Options ")[2]
    assert not re.search(r"--(?!help|install-completion|show-completion)[\w-]+ (-\w )?<\w+>", text), (
        "an option that says no more of its value than its type"
    )
    assert not PYTHON.search(text.replace("from_pretrained made", ""))
    assert not command or f"Example: graphlens {command}" in text


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("graphlens attr", ["attribute"]),
        ("graphlens run --abl", ["--ablate"]),
        ("graphlens patch --norm", ["--normalise"]),
    ],
)
def test_shells_complete_commands_and_options(words: str, offered: list[str]) -> None:
    environment = {
        **os.environ,
        "_GRAPHLENS_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    code = "import graphlens.cli; graphlens.cli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == offered, done.stderr


# Models by name


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("hooks", "{}", "--json"),
        ("cache", "{}", "Hi", "--names", "hook_embed", "-o", "a.safetensors"),
        ("run", "{}", "John", "--json"),
        ("generate", "{}", "John", "-n", "1"),
        ("drift", "{}", "{}", PROMPT),
        ("process", "{}", "-o", "made"),
        ("bake", "{}", "edits.json", "-o", "made"),
        ("drivable", "{}", "--gates", "hook_embed", "-o", "made"),
        ("strip", "{}", "-o", "made"),
        ("check", "{}"),
        ("inspect", "{}", "--json"),
        ("expose", "{}", "--list"),
        (
            "patch",
            "{}",
            "--clean",
            PROMPT,
            "--corrupted",
            CORRUPTED,
            "--answer",
            " Mary",
            "--wrong",
            " John",
            "-o",
            "made",
        ),
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_command_takes_an_embedded_model_by_its_name(name: str, arguments: tuple[str, ...]) -> None:
    interventions.save(Ablate("blocks.0.attn.hook_z", heads=0), "edits.json")
    done = graphlens(*(argument.format(name) if argument == "{}" else argument for argument in arguments))
    assert done.returncode == 0, done.stderr


def test_what_belongs_to_graphlens_is_not_written_into() -> None:
    file = embedded_model() / "model.onnx"
    before = file.read_bytes()
    assert "ships with graphlens, sealed, and stays as it is" in refused("seal", "tiny-gpt2")
    assert "hooked file already" in refused("adopt", "tiny-gpt2", "--dry-run")
    assert file.read_bytes() == before


def test_a_folder_wins_over_an_embedded_model_of_its_name(tmp_path: Path) -> None:
    shutil.copytree(embedded_model("tiny-llama"), tmp_path / "tiny-gpt2")
    listed = json.loads(graphlens("hooks", "tiny-gpt2", "--json").stdout)
    assert set(listed) == set(HookedTransformer.from_onnx(embedded_model("tiny-llama"), "cpu").hook_dict)


# Token ids, tokenizers, end tokens


@pytest.fixture
def tokenless(tiny_copy: Path) -> Path:
    for name in TOKENIZER_FILES:
        (tiny_copy / name).unlink(missing_ok=True)
    return tiny_copy


def test_prompts_are_ids_where_they_are_said_to_be(tiny: HookedTransformer) -> None:
    ids = tiny.to_tokens(PROMPT)
    spelt = " ".join(map(str, ids[0].tolist()))
    by_ids, by_text = (
        json.loads(graphlens("run", "tiny-gpt2", *given, "--json").stdout) for given in ((spelt, "--ids"), (PROMPT,))
    )
    assert by_ids == by_text
    graphlens("cache", "tiny-gpt2", "5 6 7", "--ids", "--names", "hook_embed", "-o", "a.safetensors")
    np.testing.assert_array_equal(load_file("a.safetensors")["tokens"], [[5, 6, 7]])
    other = " ".join(map(str, tiny.to_tokens(CORRUPTED)[0].tolist()))
    answers = [str(tiny.to_single_token(name)) for name in (" Mary", " John")]
    given = (
        "--clean",
        spelt,
        "--corrupted",
        other,
        "--answer",
        answers[0],
        "--wrong",
        answers[1],
        "--ids",
        "-o",
        "ids",
    )
    done = graphlens("patch", "tiny-gpt2", *given)
    assert done.returncode == 0, done.stderr
    text = ("--clean", PROMPT, "--corrupted", CORRUPTED, "--answer", " Mary", "--wrong", " John", "-o", "text")
    graphlens("patch", "tiny-gpt2", *text)
    np.testing.assert_array_equal(*(load_file(f"{name}/resid_pre.safetensors")["values"] for name in ("ids", "text")))
    assert "not token ids" in refused("run", "tiny-gpt2", PROMPT, "--ids")
    assert "--ids: --answer takes a token id, not ' Mary'" in refused(
        *(
            "patch",
            "tiny-gpt2",
            "--clean",
            "5 6",
            "--corrupted",
            "5 7",
            "--answer",
            " Mary",
            "--wrong",
            "3",
            "--ids",
            "-o",
            "x",
        )
    )
    assert "Put the id of the BOS token first" in refused("run", "tiny-gpt2", "5 6", "--ids", "--bos")


def test_a_tokenizer_from_elsewhere(tokenless: Path, tiny: HookedTransformer) -> None:
    for name in ("tiny-gpt2", str(embedded_model())):
        ran = json.loads(graphlens("run", tokenless, PROMPT, "--tokenizer", name, "--json").stdout)
        assert ran == json.loads(graphlens("run", "tiny-gpt2", PROMPT, "--json").stdout)
    wanted = tiny.generate(PROMPT, 3, temperature=0.0, verbose=False)
    assert graphlens("generate", tokenless, PROMPT, "-n", "3", "--tokenizer", "tiny-gpt2").stdout == f"{wanted}\n"
    assert "--tokenizer FOLDER" in refused("run", tokenless, PROMPT)
    said = refused("run", "tiny-gpt2", "Hi", "--tokenizer", tokenless)  # whose lines may end anywhere in a long path
    assert f"--tokenizer{tokenless}:thereisnotokenizer.jsonthere" in "".join(said.split())


def test_a_tokenizer_of_more_tokens_than_the_model_has_is_refused(tokenless: Path, tmp_path: Path) -> None:
    larger = Path(shutil.copytree(embedded_model(), tmp_path / "larger"))
    data = json.loads((larger / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    vocab |= {f"new {i}": len(vocab) + i for i in range(9)}
    (larger / "tokenizer.json").write_text(json.dumps(data))
    assert "it is another model's" in refused("run", tokenless, "Hi", "--tokenizer", larger)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"config.json": {"eos_token_id": 3}}, [3]),
        ({"config.json": {"eos_token_id": 3}, "generation_config.json": {"eos_token_id": [5, 3, 5]}}, [5, 3]),
        ({"config.json": {"eos_token_id": 3}, "generation_config.json": {}}, [3]),
        ({"config.json": {"eos_token_id": None}}, []),
        ({"config.json": {"eos_token_id": [True, "x", -1, 1.5]}}, []),
        ({}, []),
    ],
)
def test_end_tokens_are_those_of_the_settings(files: dict[str, object], found: list[int], tmp_path: Path) -> None:
    for name, data in files.items():
        (tmp_path / name).write_text(json.dumps(data))
    assert end_tokens(tmp_path) == found


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_generation_ends_where_the_settings_say(file: str, tokenless: Path, tiny: HookedTransformer) -> None:
    ids = tiny.to_tokens(PROMPT)
    free = tiny.generate(ids, 12, temperature=0.0, stop_at_eos=False, return_type="tokens", verbose=False)[0].tolist()
    length = ids.shape[1]
    end = next(token for token in free[length + 1 :] if token not in free[: length + 1])
    settings = json.loads((tokenless / file).read_text()) if (tokenless / file).exists() else {}
    (tokenless / file).write_text(json.dumps({**settings, "eos_token_id": [end, 10**9]}))
    if file == "config.json":
        (tokenless / "generation_config.json").unlink(missing_ok=True)
    spelt = " ".join(map(str, ids[0].tolist()))
    printed = graphlens("generate", tokenless, spelt, "-n", "12").stdout.split()
    assert list(map(int, printed)) == free[: free.index(end, length) + 1]
    with_text = graphlens("generate", tokenless, PROMPT, "-n", "12", "--tokenizer", "tiny-gpt2").stdout
    assert len(tiny.to_tokens(with_text.rstrip("\n"))[0]) == free.index(end, length) + 1


# What is checked before work starts


@pytest.fixture
def nothing_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("a model was opened before the options were checked")

    monkeypatch.setattr("graphlens.engine.engine.Engine.__init__", opened)
    monkeypatch.setattr("graphlens.surgery.load", opened)


PAIR = ("tiny-gpt2", "--clean", PROMPT, "--corrupted", CORRUPTED, "--answer", " Mary", "--wrong", " John", "-o", "out")


@pytest.mark.usefixtures("nothing_opens")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("patch", *PAIR, "--picture", "jpg"), "--picture 'jpg': there is txt, png, svg, pdf, html"),
        (("attribute", *PAIR, "--picture", "map.png"), "--picture 'map.png': there is"),
        (("patch", *PAIR, "--metric", "accuracy"), "--metric 'accuracy': there is logit-diff, probability, kl"),
        (("patch", *PAIR, "--sites", "resid_pre", "--sites", "heads"), "no sites are called 'heads'"),
        (("patch", *PAIR[:-1], "file"), "this is a file, and a folder is wanted"),
        (
            ("patch", *PAIR[:-1], "done", "--sites", "mlp_out", "--sites", "resid_pre"),
            "done/resid_pre.json exists. Go on",
        ),
        (
            ("attribute", *PAIR[:-1], "done", "--sites", "resid_pre"),
            "done/resid_pre-estimate.json exists, and cannot be read",
        ),
        (
            ("cache", "tiny-gpt2", "Hi", "-o", "no/a.safetensors"),
            "no/a.safetensors: cannot be written (there is no folder no)",
        ),
        (("cache", "tiny-gpt2", "Hi", "-o", "done"), "this is a folder, and the activations go into a file"),
        (("run", "tiny-gpt2", "Hi", "--ablate", "blocks.0.attn.hook_z:x"), "after the colon comes a head's number"),
        (("bake", "tiny-gpt2", "edits.json", "-o", "done"), "done: exists and is not empty"),
        (("bake", "tiny-gpt2", "file", "-o", "new"), "it is no JSON"),
        (("drivable", "tiny-gpt2", "--gates", "*", "-o", "done"), "done: exists and is not empty"),
        (("strip", "tiny-gpt2", "-o", "done"), "done: exists and is not empty"),
        (("process", "tiny-gpt2", "-o", "done"), "done: exists and is not empty"),
        (("drift", "tiny-gpt2", "tiny-gpt2", "Hi", "--picture", "a.jpg"), "no plot ends in '.jpg'"),
        (("drift", "tiny-gpt2", "tiny-gpt2", "Hi", "-o", "no/a.json"), "there is no folder no"),
        (("run", "tiny-gpt2", "Hi", "--tokenizer", "done"), "--tokenizer done: there is no tokenizer.json there"),
    ],
    ids=lambda part: part if isinstance(part, str) else f"{part[0]} {part[-1]}",
)
def test_options_and_outputs_are_checked_first(arguments: tuple[str, ...], said: str) -> None:
    interventions.save(Ablate("blocks.0.attn.hook_z", heads=0), "edits.json")
    Path("file").write_text("x")
    Path("done").mkdir()
    for name in ("resid_pre.json", "resid_pre-estimate.json"):
        Path("done", name).write_text("{}")
    before = sorted(Path().rglob("*"))
    assert said in refused(*arguments)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.usefixtures("nothing_opens")
@pytest.mark.parametrize(("ending", "missing"), [("png", "matplotlib"), ("svg", "matplotlib")])
def test_a_missing_package_is_told_first(ending: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    for command in (
        ("patch", *PAIR, "--picture", ending),
        ("drift", "tiny-gpt2", "tiny-gpt2", "Hi", "--picture", f"a.{ending}"),
    ):
        assert f"needs {missing}: pip install 'graphlens-onnx[view]'" in refused(*command)
    assert list(Path().iterdir()) == []


# Files that graphlens wrote for other runtimes


def _bake(out: Path) -> None:
    bake_model(embedded_model(), [Ablate("blocks.0.attn.hook_z", heads=head) for head in range(4)], out)


MADE: dict[str, tuple[Callable[[Path], object], str]] = {
    "baked": (_bake, "edits inside (ablate at blocks.0.attn.hook_z, ablate at blocks.0.attn.hook_z"),
    "drivable": (lambda out: write_drivable(embedded_model(), "hook_embed", out), "its inputs change hook_embed"),
    "stripped": (lambda out: write_stripped(embedded_model(), out), "a file that graphlens wrote for other runtimes"),
    "exported": (lambda out: bake_model(embedded_model(), [], out, with_past=True), "bake without edits"),
}


@pytest.mark.parametrize("kind", MADE)
def test_files_without_hook_points_say_what_they_are(kind: str, tmp_path: Path) -> None:
    make, said = MADE[kind]
    make(tmp_path / kind)
    interventions.save(Ablate("hook_embed"), "edits.json")
    for arguments in (
        ("hooks", kind),
        ("run", kind, "Hi"),
        ("cache", f"{kind}/model.onnx", "Hi", "-o", "a.safetensors"),
        ("process", kind, "-o", "p"),
        ("bake", kind, "edits.json", "-o", "b"),
        ("drift", "tiny-gpt2", kind, "Hi"),
        ("check", kind),
    ):
        found = refused(*arguments)
        assert said in found
        assert "Use the hooked folder that it was made of" in found
    shown = graphlens("inspect", kind)
    assert shown.returncode == 0
    assert said in " ".join(shown.stdout.split())
    data = json.loads(graphlens("inspect", kind, "--json").stdout)
    assert said in data["written"]
    assert json.loads(graphlens("inspect", "tiny-gpt2", "--json").stdout)["written"] is None


# Errors in the words of the commands


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "tiny-gpt2", "Hi", "--ablate", "blocks.9.attn.hook_z"), "graphlens hooks MODEL lists them"),
        (("run", "tiny-gpt2", "Hi", "--ablate", "blocks.0.attn.hook_result:1"), "graphlens bake alone sets it"),
        (("generate", "tiny-gpt2", "", "--no-bos"), "Give some text, or --bos"),
        (("run", "tiny-gpt2", "Hi", "--provider", "tpu"), "it is 'cpu' or 'cuda'"),
        (("bake", "tiny-gpt2", "nan.json", "-o", "x"), 'Write "allow_nonfinite": true beside it'),
        (("bake", "tiny-gpt2", "generated.json", "-o", "x"), "(--with-past)"),
        (("bake", "tiny-gpt2", "edits.json", "-o", "x", "--layout", "flat"), "--layout 'flat': there is"),
        (
            ("bake", "tiny-gpt2", "edits.json", "-o", "x", "--link", "--self-contained"),
            "--self-contained copies the weights",
        ),
        (("adopt", "tiny-gpt2", "--dry-run"), "It is used as it is"),
        (("export", "tiny-gpt2", "-o", "held"), "--force replaces it"),
    ],
    ids=lambda part: part if isinstance(part, str) else f"{part[0]} {part[-1]}",
)
def test_errors_advise_what_can_be_typed(arguments: tuple[str, ...], said: str) -> None:
    shutil.copytree(embedded_model(), "held")
    record = {"kind": "ablate", "hook": "hook_embed"}
    edits = {"edits": {}, "nan": {"value": {"number": "nan"}}, "generated": {"positions": "generated"}}
    for name, more in edits.items():
        whole = {"format": interventions.FORMAT, "version": 1, "interventions": [{**record, **more}]}
        Path(f"{name}.json").write_text(json.dumps(whole))
    assert said in refused(*arguments)


def _texts() -> Iterator[str]:
    """Every text in the package, the parts of one that are filled in left out."""
    for path in Path(str(package.__file__)).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if path.name != "words.py" else ():
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) for part in node.values if isinstance(part, ast.Constant))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_rule_is_of_an_error_that_there_is() -> None:
    every = "\n".join(_texts())
    for pattern in SAID:
        kept = pattern
        for index, escaped in enumerate((r"\(", r"\)", r"\.")):
            kept = kept.replace(escaped, chr(index))
        literal = max(re.split(r"\(.*?\)|\\w\+|\\b|\^", kept), key=len)
        text = "".join("()."[ord(c)] if ord(c) < 3 else c for c in literal)
        assert text.strip(" '") in every, f"no error says {text!r} any more"


def test_what_no_rule_is_about_stays_as_it_is() -> None:
    text = "blocks.0.attn.hook_z: the clean prompt has 3 tokens and the corrupted one 4."
    assert in_words_of_commands(text) == text
