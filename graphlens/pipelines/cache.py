"""The cache folder: where exports that nobody gave a place to live, and which export a key stands for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from graphlens.errors import ExportError
from graphlens.file.folder import TOKENIZER_FILES, cache_root
from graphlens.file.manifest import FORMAT_VERSION
from graphlens.surgery.fingerprint import quick_fingerprint

# Raised whenever the exporter would write other bytes for the same checkpoint. The versions of torch and transformers
# are left out on purpose: an export is opened later where neither is installed.
EXPORTER_REVISION = 2


def export_folder(name: str, checkpoint: Path, dtype: str, processing: Sequence[str]) -> Path:
    """Where the export of a checkpoint folder lives: keyed by everything that changes its bytes.

    Reads the small files and samples of the weights, a few milliseconds. Raises ExportError for a folder without them.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps([EXPORTER_REVISION, FORMAT_VERSION, dtype, list(processing)]).encode())
    for file in ("config.json", "model.safetensors.index.json", *TOKENIZER_FILES):
        path = checkpoint / file
        if path.is_file():
            digest.update(f"\0{file}\0".encode() + path.read_bytes())
    weights = sorted(checkpoint.glob("*.safetensors"))
    if not (checkpoint / "config.json").is_file():
        raise ExportError(f"{checkpoint}: no config.json here, so this is not a Hugging Face checkpoint folder.")
    for path in weights:
        found = quick_fingerprint(path)
        digest.update(f"\0{path.name}\0{found.size}{found.header_sha256}{found.samples_sha256}".encode())
    label = "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip(".-") or "model"
    return cache_root() / "hooked" / f"{label}-{digest.hexdigest()[:24]}"


def derived_folder(folder: Path, label: str) -> Path:
    """Where what is made of a hooked folder lives: keyed by its graph, which holds its weights' fingerprints."""
    digest = hashlib.sha256(json.dumps([EXPORTER_REVISION, FORMAT_VERSION, label]).encode())
    digest.update((folder / "model.onnx").read_bytes())
    return cache_root() / "hooked" / f"{folder.name.rsplit('-', 1)[0]}-{label[:24]}-{digest.hexdigest()[:24]}"
