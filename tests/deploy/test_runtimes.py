"""Baked folders in onnxruntime-genai. Node, transformers.js and the browser have their tests in tests/js."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime_genai as og
import pytest

MAKE_FILES = Path(__file__).resolve().parents[1] / "js" / "make_files.py"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that tests/js opens, and what Python computes with the same edits."""
    out = tmp_path_factory.mktemp("js") / "made"
    subprocess.run([sys.executable, MAKE_FILES, out], check=True)
    return out


def test_genai_generates_what_generate_does_under_the_interventions(work: Path) -> None:
    expected: dict[str, Any] = json.loads((work / "expected.json").read_text(encoding="utf-8"))
    model = og.Model(str(work / "baked-past"))
    assert og.Tokenizer(model).encode(f"<|endoftext|>{expected['prompt']}").tolist() == expected["prompt_tokens"]
    options = og.GeneratorParams(model)
    options.set_search_options(do_sample=False, max_length=len(expected["generated"]))
    generator = og.Generator(model, options)
    generator.append_tokens(expected["prompt_tokens"])
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0).tolist() == expected["generated"]
