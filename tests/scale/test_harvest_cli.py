"""The commands for harvests: what they print, write and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import graphlens
from tests.command_line import graphlens as run
from tests.command_line import sentence
from tests.scale.harvests import LAST


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("Hello world\n\nWhen John and Mary met, John smiled\nThe cat\n" * 3)
    return path


def test_it_writes_what_the_function_writes(corpus: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "h", ["--dtype", "float16", "--context", "40", "--shard-tokens", "30", "--drop-bos"]
    done = run(
        "harvest", "tiny-gpt2", corpus, "--names", "*.hook_resid_post", "--names", "hook_embed", *options, "-o", out
    )
    assert done.returncode == 0, done.stderr
    found = graphlens.Harvest(out)
    assert f"{len(found):,} tokens, 5 hook points -> {out}" in done.stdout
    model = graphlens.HookedTransformer.from_pretrained_no_processing("tiny-gpt2")
    names = ["*.hook_resid_post", "hook_embed"]
    made = graphlens.harvest(
        model,
        corpus,
        names,
        tmp_path / "f",
        dtype="float16",
        context=40,
        shard_tokens=30,
        keep_bos=False,
        verbose=False,
    )
    for path in made.path.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes()
    again = run("harvest", "tiny-gpt2", corpus, "--names", "*.hook_resid_post", *options, "-o", out)
    assert again.returncode == 1
    assert "--resume" in sentence(again.stderr)
    other = run("harvest", "tiny-gpt2", corpus, "--names", "*.hook_resid_post", *options, "-o", out, "--resume")
    assert "the hook points was" in sentence(other.stderr)


def test_check_names_a_damaged_shard(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "h"
    line = ["harvest", "tiny-gpt2", corpus, "--names", LAST, "--shard-tokens", "30", "-o", out]
    assert run(*line).returncode == 0
    sound = run("harvest-check", out)
    assert (sound.returncode, "sound" in sound.stdout) == (0, True)
    place = out / "shard-000001.safetensors"
    data = bytearray(place.read_bytes())
    data[-1] ^= 1
    place.write_bytes(data)
    found = run("harvest-check", out, "--json")
    assert found.returncode == 1
    assert json.loads(found.stdout)["damaged"] == ["shard-000001.safetensors: other bytes than were written"]
    assert run(*line, "--resume").returncode == 0
    assert run("harvest-check", out).returncode == 0


def test_statistics_of_several_files_as_json(corpus: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.asarray([[5, 6, 7]]))
    asked = ["--reduce", "top:3", "--reduce", "quantiles:0.5,0.9", "--reduce", "mean", "--last", "--json"]
    done = run("harvest", "tiny-gpt2", corpus, corpus, "--names", LAST, *asked, "-o", tmp_path / "h")
    told = json.loads(done.stdout)
    assert told["statistics"] == ["top", "quantiles", "mean"]
    assert (told["tokens"], told["documents"], told["dtype"]) == (18, 24, None)
    reduced = graphlens.Harvest(tmp_path / "h").reduced[LAST]
    assert reduced["top_values"].shape == (3, 128)
    assert reduced["quantiles"].shape == (2, 128)
    mixed = run("harvest", "tiny-gpt2", corpus, tmp_path / "ids.npy", "--names", LAST, "-o", tmp_path / "m")
    assert "is ids, and those before it are text" in sentence(mixed.stderr)
    for word in ("top:x", "mean:3", "median"):
        assert (
            run("harvest", "tiny-gpt2", corpus, "--names", LAST, "--reduce", word, "-o", tmp_path / "n").returncode == 1
        )
