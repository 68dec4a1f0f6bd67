"""The command line given what it cannot take: each time a sentence, and never a traceback.

What a defect of graphlens looks like is shown by one that is put in.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, load_file

from graphlens import HookedTransformer
from graphlens.cli.app import main
from graphlens.errors import InputError
from graphlens.file.folder import cache_root
from graphlens.patching import SweepResult
from tests.command_line import graphlens, sentence

PROMPT = "When John and Mary went to the store, John gave a drink to"
CORRUPTED = "When John and Mary went to the store, Mary gave a drink to"
ANSWERS = ("--answer", " Mary", "--wrong", " John")
LONG = "a drink to Mary " * 60


def pair(
    command: str, model: Path, out: Path, clean: str = PROMPT, corrupted: str = CORRUPTED
) -> tuple[str | Path, ...]:
    return (command, model, "--clean", clean, "--corrupted", corrupted, *ANSWERS, "-o", out)


def refused(*arguments: str | Path) -> str:
    """What a command says on stderr that ends with an error of the user's."""
    done = graphlens(*arguments)
    assert done.returncode == 1, done.stdout
    assert done.stdout == ""
    return sentence(done.stderr)


# A text that is too long


@pytest.fixture(scope="module")
def cut(tiny: HookedTransformer) -> tuple[np.ndarray, str]:
    """The first n_ctx tokens of LONG [1, p], and what is said of the others."""
    ids, n_ctx = tiny.to_tokens(LONG, truncate=False), tiny.cfg.n_ctx
    assert ids.shape[1] > n_ctx + 1
    said = f"has {ids.shape[1]} tokens, and {tiny.cfg.model_name} takes at most {n_ctx} (n_ctx)"
    return ids[:, :n_ctx], said


def test_run_says_which_tokens_of_a_long_text_it_ran(
    tiny: HookedTransformer, tiny_folder: Path, cut: tuple[np.ndarray, str]
) -> None:
    tokens, said = cut
    done = graphlens("run", tiny_folder, LONG, "--json")
    assert f"Warning: the prompt {said}" in sentence(done.stderr)
    found = json.loads(done.stdout)
    assert found["tokens"] == tiny.to_str_tokens(tokens[0])
    assert found["of"] == tiny.to_tokens(LONG, truncate=False).shape[1]
    assert found["next"][0]["token"] == tiny.to_string(tiny(tokens)[0, -1].argmax())
    shown = graphlens("run", tiny_folder, LONG).stdout
    assert f"the first {tokens.shape[1]} of {found['of']} tokens" in sentence(shown)
    assert graphlens("run", tiny_folder, PROMPT, "--strict").stderr == ""
    assert "--strict" in refused("run", tiny_folder, LONG, "--strict")


def test_cache_says_which_tokens_of_a_long_text_it_ran(
    tiny: HookedTransformer, tiny_folder: Path, tmp_path: Path, cut: tuple[np.ndarray, str]
) -> None:
    tokens, said = cut
    out = tmp_path / "acts.safetensors"
    done = graphlens("cache", tiny_folder, LONG, "--names", "hook_embed", "-o", out)
    assert f"Warning: the prompt {said}" in sentence(done.stderr)
    assert f"of the first {tokens.shape[1]} of" in sentence(done.stdout)
    saved = load_file(out)
    np.testing.assert_array_equal(saved["tokens"], tokens)
    _, cache = tiny.run_with_cache(tokens, names_filter="hook_embed")
    np.testing.assert_array_equal(saved["hook_embed"], cache["hook_embed"])
    out.unlink()
    assert said in refused("cache", tiny_folder, LONG, "--names", "hook_embed", "-o", out, "--strict")
    assert not out.exists()


@pytest.mark.parametrize("command", ["patch", "attribute"])
def test_a_pair_of_long_texts_is_cut_with_a_warning_for_each(
    command: str, tiny: HookedTransformer, tiny_folder: Path, tmp_path: Path, cut: tuple[np.ndarray, str]
) -> None:
    tokens, said = cut
    given = pair(command, tiny_folder, tmp_path / "out", LONG, LONG.replace("Mary", "John"))
    strict = refused(*given, "--strict")
    assert f"--clean {said}" in strict
    assert not (tmp_path / "out").exists()
    done = graphlens(*given, "--sites", "mlp_out", "--raw")
    assert done.returncode == 0, done.stderr
    for option in ("--clean", "--corrupted"):
        assert f"Warning: {option} {said}" in sentence(done.stderr)
    assert f"the first {tokens.shape[1]} of" in sentence(done.stdout)
    kept = next((tmp_path / "out").glob("*.json"))
    assert len(SweepResult.load(kept).labels["pos"]) == tokens.shape[1]


def test_a_pair_of_long_texts_of_different_lengths_is_refused_though_both_would_be_cut_alike(
    tiny_folder: Path, tmp_path: Path
) -> None:
    assert "position by position" in refused(*pair("patch", tiny_folder, tmp_path / "out", LONG, LONG + " and"))


def test_generate_refuses_a_long_text(tiny_folder: Path) -> None:
    assert "(n_ctx)" in refused("generate", tiny_folder, LONG)


# Texts that are none


@pytest.mark.parametrize("command", ["run", "generate", "cache", "patch"])
def test_a_text_that_is_not_utf8_is_refused(command: str, tiny_folder: Path, tmp_path: Path) -> None:
    text = os.fsdecode(b"a caf\xe9")  # as the system hands it in
    given: dict[str, tuple[str | Path, ...]] = {
        "run": ("run", tiny_folder, text),
        "generate": ("generate", tiny_folder, text),
        "cache": ("cache", tiny_folder, text, "-o", tmp_path / "a.safetensors"),
        "patch": pair("patch", tiny_folder, tmp_path / "out", text),
    }
    assert r"holds '\udce9' at index 5" in refused(*given[command])
    assert not list(tmp_path.iterdir())


# Places that are none


def test_results_are_not_written_over_a_file(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for command in ("patch", "attribute"):
        assert "this is a file, and a folder is wanted" in refused(*pair(command, tiny_folder, tmp_path / "thesis.txt"))
        assert "cannot be made" in refused(*pair(command, tiny_folder, tmp_path / "thesis.txt" / "out"))
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("path", ["x" * 300, "~no-such-user/x", ""], ids=["long", "user", "empty"])
def test_a_path_that_can_be_none_is_refused(
    path: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = {"x": "can be looked for there (File name too long)", "~": "no such user's folder", "": "the path is empty"}[
        path[:1]
    ]
    edits = tmp_path / "edits.json"
    edits.write_text('{"format": "graphlens.interventions", "version": 1, "interventions": []}')
    for given in (
        ("hooks", path),
        ("check", path),
        ("run", path, "Hi"),
        ("demo", "--model", path),
        ("strip", tiny_folder, "-o", path),
        ("bake", tiny_folder, edits, "-o", path),
        ("bake", tiny_folder, path, "-o", "baked"),
        ("drivable", tiny_folder, "--gates", "*", "-o", path),
        ("page", tiny_folder, "-o", path),
        ("page", tiny_folder, "--single-file", path),
        ("page", tiny_folder, "-o", "site", "--edits", path),
        ("export", path, "-o", "exported"),
        ("cache", tiny_folder, "Hi", "-o", path),
        (*pair("patch", tiny_folder, Path("out"))[:-1], path),
    ):
        assert said in refused(*given), given[0]
    assert [file.name for file in tmp_path.iterdir()] == ["edits.json"]


def test_a_tilde_is_the_users_folder_in_every_path(
    tiny: HookedTransformer, tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tiny_copy == tmp_path / "tiny"
    np.testing.assert_array_equal(HookedTransformer.from_onnx("~/tiny")([1, 2]), tiny([1, 2]))
    for given, made in (
        (("cache", "~/tiny", "Hi", "--names", "hook_embed", "-o", "~/a.safetensors"), "a.safetensors"),
        (("strip", "~/tiny/model.onnx", "-o", "~/stripped"), "stripped/model.onnx"),
        (("drivable", "~/tiny", "--gates", "hook_embed", "-o", "~/driven"), "driven/model.onnx"),
        (pair("patch", Path("~/tiny"), Path("~/out")), "out/resid_pre.json"),
    ):
        done = graphlens(*given)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / made).is_file()
    assert graphlens("check", "~/tiny").returncode == 0
    assert SweepResult.load("~/out/resid_pre").shape == (4, 15)


def test_a_user_without_a_folder_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAPHLENS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(InputError, match=r"^~/.*: there is no such user's folder .*Write the path in full"):
        cache_root()


def test_a_folder_whose_name_is_not_utf8_is_refused_by_name(tiny_copy: Path) -> None:
    odd = os.fsencode(tiny_copy.parent) + b"/caf\xe9"
    try:
        os.rename(tiny_copy, odd)
    except OSError:
        pytest.skip("this file system has no such names")
    said = refused("run", os.fsdecode(odd), "Hi")
    assert "is not UTF-8" in said
    assert r"caf\udce9" in "".join(said.split())  # it may be broken where a line ends


def test_a_working_folder_that_was_removed(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert graphlens("run", tiny_folder, "Hi").returncode == 0
    for given in (
        ("check", "model"),
        ("strip", tiny_folder, "-o", "out"),
        ("cache", tiny_folder, "Hi", "-o", "a.safetensors"),
        pair("patch", tiny_folder, Path("out")),
    ):
        refused(*given)


def test_a_pipe_stays_a_pipe(tiny: HookedTransformer, tiny_folder: Path, tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", list[bytes]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    done = graphlens("cache", tiny_folder, "Hi", "--names", "hook_embed", "-o", pipe)
    if not pipe.is_fifo():  # nobody will write to it
        os.replace(pipe, tmp_path / "file")
        pytest.fail("the pipe was replaced by a file")
    reader.join(10)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(load(read[0])["tokens"], tiny.to_tokens("Hi"))


# Terminals


def test_the_demonstration_works_on_an_ascii_terminal() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LANG": "C", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-m", "graphlens", "demo"], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""
    shown = done.stdout.decode("ascii")
    assert "Logit lens" in shown
    assert "\\u" not in shown
    maps = [line.split() for line in shown.splitlines() if line.startswith("L2 ")]
    assert len(maps) == 3
    assert all(re.fullmatch(r"-?\d+\.\d+", cell) for row in maps for cell in row[1:])


def test_what_a_stream_cannot_encode_becomes_an_escape(
    tiny: HookedTransformer, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = {name: io.TextIOWrapper(io.BytesIO(), "ascii") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(sys, "argv", ["graphlens", "run", str(tiny_folder), "caf\xe9", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    streams["stdout"].flush()
    found = json.loads(streams["stdout"].buffer.getvalue())  # type: ignore[attr-defined]
    assert found["tokens"] == tiny.to_str_tokens("caf\xe9")
    assert not "".join(found["tokens"]).isascii()


# Defects


@pytest.mark.parametrize(
    "kind", [ValueError, KeyError, AssertionError, OSError, type("PanicException", (BaseException,), {})]
)
def test_a_defect_is_called_one_and_exits_with_70(
    kind: type[BaseException], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(*_: object, **__: object) -> None:
        raise kind("oh no [/]")

    monkeypatch.setattr("graphlens.cli.run.open_any", faulty)
    done = graphlens("run", tiny_folder, "Hi", defect=True)
    said = sentence(done.stderr)
    assert done.returncode == 70
    assert done.stdout == ""
    for part in (
        "a defect of graphlens",
        f"{kind.__name__}:",
        "oh no [/]",
        "Please report it",
        "graphlens 0.",
        "run ",
        "in faulty",
    ):
        assert part in said


def test_too_little_memory_is_no_defect(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(*_: object, **__: object) -> None:
        raise MemoryError("10 GB")

    monkeypatch.setattr("graphlens.cli.run.open_any", faulty)
    assert "not enough memory" in refused("run", tiny_folder, "Hi")


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of the size of files")
@pytest.mark.parametrize("arguments", [("hooks",), ("hooks", "--json")])
def test_no_room_for_what_is_printed_is_no_defect(
    arguments: tuple[str, ...], tiny_folder: Path, tmp_path: Path
) -> None:
    import resource

    with (tmp_path / "out").open("w") as out:
        done = subprocess.run(
            [sys.executable, "-m", "graphlens", arguments[0], tiny_folder, *arguments[1:]],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
        )
    assert done.returncode == 1
    assert "what this prints could not be written: File too large" in sentence(done.stderr)


def test_a_closed_stdout_is_no_defect(tiny_folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "graphlens", "hooks", tiny_folder, "--json"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.close(1),
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_warning_is_one_line(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphlens.errors import warn

    monkeypatch.setattr("graphlens.cli.run.print_json", lambda data: warn("two of them"))
    done = graphlens("hooks", tiny_folder, "--json")
    assert done.stderr == "Warning: two of them\n"
