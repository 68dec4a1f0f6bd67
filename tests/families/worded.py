"""Variants that read words: with the vocabulary and the tokenizer of the embedded model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from filelock import FileLock

import graphlens
from tests.families.variants import make

N_CTX = 4096  # more than the cap of 2,048
ENDS = [0, 7]  # ids that end a text, where a config lists several


def worded_checkpoint(name: str, root: Path) -> Path:
    """The checkpoint folder of a variant with the embedded model's tokenizer, made where it is not there yet.

    Args:
        name: The variant.
        root: Where the folder lies.
    """
    source, folder = graphlens.embedded_model(), root / f"{name}-worded"
    with FileLock(root / f".{name}-worded.lock"):
        if not (folder / "tokenizer.json").exists():
            size = json.loads((source / "config.json").read_text())["vocab_size"]
            longer = {"n_positions": 128} if name.startswith("gpt2") else {"max_position_embeddings": N_CTX}
            model = make(name, vocab_size=size, **longer)
            model.generation_config.eos_token_id = ENDS
            model.save_pretrained(folder)
            for file in ("tokenizer_config.json", "tokenizer.json"):
                shutil.copy(source / file, folder)
    return folder


def worded_folder(name: str, root: Path) -> Path:
    """Its hooked folder."""
    checkpoint, folder = worded_checkpoint(name, root), root / f"{name}-worded-hooked"
    with FileLock(root / f".{name}-worded-hooked.lock"):
        if not (folder / "model.onnx").exists():
            graphlens.export_model(checkpoint, folder, announce=lambda _: None)
    return folder
