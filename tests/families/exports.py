"""A variant's checkpoint and its export, made where they are not there yet; safe for several processes at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from filelock import FileLock

import graphlens
from tests.families.variants import make


def checkpoint_of(name: str, root: Path) -> Path:
    """The checkpoint folder of a variant under ``root``."""
    folder = root / f"{name}-checkpoint"
    with FileLock(root / f".{name}-checkpoint.lock"):
        if not (folder / "model.safetensors").exists():
            make(name).save_pretrained(folder)
    return folder


def hooked_of(name: str, root: Path) -> Path:
    """Its hooked folder, verified as every export is."""
    folder = root / name
    checkpoint = checkpoint_of(name, root)
    with FileLock(root / f".{name}.lock"):
        if not (folder / "model.onnx").exists():
            graphlens.export_model(checkpoint, folder, announce=lambda _: None)
    return folder


def reference_of(checkpoint: Path) -> Any:
    """transformers' model of a checkpoint, in float32 with eager attention."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return model.eval().requires_grad_(False)
