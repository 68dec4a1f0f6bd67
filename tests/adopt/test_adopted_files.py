"""Foreign files adopted: every hook point found, read and edited as transformers with torch hooks has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.adopt.adopt_files import FLOAT, QUANTISED, ROUTES, Files
from tests.adopt.cells import measured
from tests.adopt.checkpoints import FAMILIES
from tests.adopt.fixtures import FIXTURES

pytest_plugins = ["tests.adopt.session_files"]

# Every family by the exporter that most files are of, and every other kind of file of a family that has what is odd in it.
MADE = (
    *((f"small-{family}", "legacy-eager") for family in FAMILIES),
    ("small-llama", "legacy-sdpa"),
    ("small-llama", "legacy-past"),
    ("small-llama", "dynamo20-past"),
    ("small-bert", "dynamo23-sdpa"),
    ("small-gpt2", "legacy-eager.ort99"),
    ("small-bert", "legacy-eager.ort2"),
    ("small-vit", "legacy-eager.ort1"),
    ("small-llama", "legacy-eager.session-all"),
    ("small-bert", "legacy-eager.fusions"),
    ("small-gpt2", "legacy-eager.fp16"),
    ("small-gpt2", "legacy-eager.int8"),
    ("small-neox", "legacy-eager.int8-channel"),
    ("small-llama", "legacy-eager.int8-all"),
    ("small-bert", "legacy-eager.int8-all"),
    ("small-llama", "legacy-eager.int4"),
    ("small-llama", "optimum-past.int8"),
    ("small-llama", "optimum-past.qdq"),
    ("small-gemma2", "legacy-eager.qdq"),
    ("small-bert", "dynamo20-sdpa.qdq"),
    ("small-gpt2", "legacy-eager.qoperator"),
    ("small-neox", "legacy-eager.qoperator"),
    ("small-vit", "legacy-eager.fp16"),
    ("small-vit", "legacy-eager.session-all"),
    ("small-vit", "optimum.int8"),
)


def right(files: Files, name: str, route: str, path: Path) -> None:
    cell = measured(path, name, route, files)
    assert cell.failures == []
    assert cell.hooks == cell.wanted > 30
    assert cell.identities > 20
    if ROUTES[route].numbers != QUANTISED:
        assert cell.edits > 15
    if ROUTES[route].numbers == FLOAT:
        assert cell.worst <= 1e-4
        assert cell.edit <= 1e-4


@pytest.mark.parametrize(("name", "route"), MADE, ids=[".".join(each) for each in MADE])
def test_every_hook_point_is_transformers(name: str, route: str, files: Files) -> None:
    right(files, name, route, files.path(name, route))


@pytest.mark.parametrize(("name", "route"), FIXTURES, ids=[".".join(each) for each in FIXTURES])
def test_files_of_tools_that_are_not_here(name: str, route: str, files: Files) -> None:
    right(files, name, route, files.root / "files" / f"{name}.{route}.onnx")


def test_a_file_that_keeps_a_window_of_its_past_generates_from_whole_prompts(files: Files, tmp_path: Path) -> None:
    """Its step takes keys and values of other lengths in each layer once a prompt is longer than the window."""
    import torch
    from transformers import AutoModelForCausalLM

    from graphlens import HookedTransformer, adopt

    adopt(files.root / "files" / "small-gemma2.genai-fp32.onnx", tmp_path / "hooked", announce=lambda _: None)
    model = HookedTransformer.from_onnx(tmp_path / "hooked", "cpu")
    tokens = torch.randint(0, model.cfg.d_vocab, (1, 7), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(files.checkpoint("small-gemma2"), dtype=torch.float32).eval()
    expected = theirs.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    found = model.generate(
        tokens.numpy(), max_new_tokens=6, do_sample=False, stop_at_eos=False, verbose=False, return_type="tokens"
    )
    assert found.tolist() == expected.tolist()
