"""``python -m tests.transformerlens4 --all``: graphlens beside TransformerLens 4.3, a line for each model.

Models are made and exported here; TransformerLens 4.3 runs in an environment of its own, which is made unless ``--python``
names the interpreter of one that has it, and what graphlens needs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.families.exports import checkpoint_of, hooked_of
from tests.families.variants import VARIANTS
from tests.transformerlens4.page import ALLOWED, HEAD, page, row
from tools.bench.environments import TORCH, Environment

ROOT = Path(__file__).resolve().parents[2]
# One model of each architecture, and those of its variants whose hook points lie otherwise. TransformerLens 4.3 does not open
# a Falcon with grouped keys.
MODELS = (
    *("gpt2", "gpt-neo", "gptj", "neox", "neox-sequential", "opt", "bloom", "falcon-7b", "phi", "phi3"),
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "olmo", "olmo2", "stablelm"),
    *("stablelm-parallel", "smollm3", "granite"),
)
USUAL = ("gpt2", "llama", "neox", "gemma3")
FOUR = Environment(
    "transformer-lens-4.3",
    (
        *("transformer-lens==4.3.0", "transformers==5.23.*", TORCH),
        *("onnxruntime>=1.30", "onnxruntime-extensions>=0.14", "ml_dtypes>=0.4", "onnx>=1.21", "onnx-ir>=1.0"),
        *("tokenizers>=0.20", "safetensors>=0.4.5", "huggingface_hub>=0.30", "rich>=13.7", "typer>=0.12"),
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.transformerlens4", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="model", help=f"default: {', '.join(USUAL)}")
    parser.add_argument("--all", action="store_true", help="one model of every architecture")
    parser.add_argument("--python", type=Path, help="an interpreter that has TransformerLens 4.3")
    parser.add_argument("--exports", type=Path, help="a folder to keep models and the environment in")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table into this page; needs --all")
    asked = parser.parse_args()
    unknown = set(asked.names) - set(VARIANTS)
    if unknown:
        parser.error(f"no such model: {', '.join(sorted(unknown))}. There are: {', '.join(VARIANTS)}.")
    if asked.table and not asked.all:
        parser.error("--table needs --all: the page is about every architecture.")
    names = list(MODELS) if asked.all else asked.names or list(USUAL)
    with tempfile.TemporaryDirectory() as made:
        root = asked.exports or Path(made)
        root.mkdir(parents=True, exist_ok=True)
        python = asked.python or FOUR.python(root)
        models = [[name, str(checkpoint_of(name, root)), str(hooked_of(name, root))] for name in names]
        found, versions = _measured(python, models, root)
    if asked.table and all(one.get("failed") is None for one in found):
        asked.table.write_text(page(asked.table.read_text(encoding="utf-8"), found, versions), encoding="utf-8")
    failures = [f"{one['name']}: {what}" for one in found for what in _failures(one)]
    print("\n".join(failures) or f"No failure, with {versions}.")
    sys.exit(bool(failures))


def _measured(python: Path, models: list[list[str]], root: Path) -> tuple[list[dict[str, Any]], str]:
    """What TransformerLens's interpreter measures, each line printed as it comes; and the versions there."""
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "GRAPHLENS_CACHE": str(root / "cache")}
    found, versions = [], ""
    print(HEAD)
    command = [str(python), "-m", "tests.transformerlens4.worker"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdin=-1, stdout=-1) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(models))
        process.stdin.close()
        for line in process.stdout:
            if not line.startswith("{"):
                continue
            told = json.loads(line)
            if "versions" in told:
                versions = told["versions"]
                continue
            found.append(told)
            print(row(told), flush=True)
    if process.returncode or len(found) < len(models):
        found.append({"name": "the worker", "failed": f"ended with {process.returncode} after {len(found)} models"})
    return found, versions


def _failures(one: dict[str, Any]) -> list[str]:
    """What is wrong with one model."""
    if one.get("failed") is not None:
        return [one["failed"]]
    return [
        f"{what}: {worst[0]:.1e} at {worst[1]}" for what, worst in one["worst"].items() if not worst[0] <= ALLOWED
    ] + [f"names that TransformerLens 4 does not have: {', '.join(one['strange'])}"] * bool(one["strange"])


if __name__ == "__main__":
    main()
