"""Adapters of PEFT (LoRA and its like): merged into their base model by peft, where it is installed."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from graphlens.errors import ExportError, ModelFileError
from graphlens.export.checkpoint import ADAPTER_CONFIG, SHARD_INDEX, WEIGHTS_FILE
from graphlens.file.digests import digest_of
from graphlens.file.folder import CONFIG_FILE, MODEL_FILE, TOKENIZER_FILES, cache_root, staged_folder, writing
from graphlens.file.inside import inside
from graphlens.file.settings import read_settings


def installed(name: str) -> bool:
    """True if a package is installed; it is not imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def is_adapter(folder: Path) -> bool:
    """True if a folder holds an adapter and no model."""
    own = (WEIGHTS_FILE, SHARD_INDEX, MODEL_FILE)
    return (folder / ADAPTER_CONFIG).is_file() and not any((folder / file).exists() for file in own)


def merged(folder: Path) -> Path:
    """The checkpoint that an adapter makes of its base model, in the cache folder; made if it is not there yet.

    Args:
        folder: A folder with ``adapter_config.json``.

    Raises:
        ExportError: peft is not installed, or cannot merge this adapter.
    """
    try:
        settings = read_settings(folder / ADAPTER_CONFIG, f"{folder}: its {ADAPTER_CONFIG}")
    except ModelFileError as error:
        raise ExportError(str(error)) from error
    base = settings.get("base_model_name_or_path")
    if not installed("peft"):
        raise ExportError(
            f"{folder}: holds a PEFT adapter of {base!r}, which is no model by itself. With peft installed (pip install peft) it "
            "is merged into that model here. Or merge it once with: AutoPeftModelForCausalLM.from_pretrained(folder)"
            ".merge_and_unload().save_pretrained(other), and pass the other folder."
        )
    digest = hashlib.sha256(json.dumps(["merged", str(base)]).encode())
    for file in _parts(folder, base):
        digest.update(f"\0{file.name}\0{digest_of(file)}".encode())
    label = "".join(c if c.isalnum() or c in "-_." else "-" for c in folder.resolve().name).strip(".-") or "adapter"
    target = cache_root() / "merged" / f"{label}-{digest.hexdigest()[:24]}"
    if not (target / CONFIG_FILE).is_file():
        with staged_folder(target, finished=CONFIG_FILE) as stage, writing(target):
            _merge(folder, stage)
    return target


def _parts(folder: Path, base: object) -> Iterator[Path]:
    """The files that decide what is merged: the adapter's, its tokenizer's, and its base model's where that is a folder too."""
    yield from sorted(path for path in folder.glob("adapter*") if path.is_file())
    yield from (folder / file for file in TOKENIZER_FILES if (folder / file).is_file())
    if isinstance(base, str) and Path(base).is_dir():
        yield from sorted(path for path in Path(base).glob("*.*") if path.suffix in (".safetensors", ".json"))


def _merge(folder: Path, stage: Path) -> None:
    """Writes the merged model into ``stage``, with the adapter's tokenizer where it has one."""
    peft = importlib.import_module("peft")
    try:
        model = peft.AutoPeftModelForCausalLM.from_pretrained(str(folder))
        model.merge_and_unload().save_pretrained(stage)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise ExportError(f"{folder}: peft cannot merge this adapter into its base model ({error}).") from error
    for file in TOKENIZER_FILES:
        if (folder / file).is_file():
            shutil.copyfile(inside(folder, file), stage / file)
