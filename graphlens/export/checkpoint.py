"""Checkpoint folders: which files hold the weights, under which keys, and what the Hugging Face config says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphlens.errors import ExportError, ModelFileError
from graphlens.export.families import FAMILIES, Family, family_for
from graphlens.file.manifest import ModelConfig
from graphlens.file.safetensors import SafetensorsFile, TensorEntry

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class Checkpoint:
    """A folder that transformers wrote: its config, its family, where each tensor lies (file, entry)."""

    folder: Path
    config: Mapping[str, Any]
    family: Family
    tensors: Mapping[str, tuple[str, TensorEntry]]

    @property
    def files(self) -> list[str]:
        """The weights files, by name, sorted."""
        return sorted({file for file, _ in self.tensors.values()})

    def locate(self, parameter: str, shape: tuple[int, ...], tied: bool) -> tuple[str, str]:
        """The (file, key) that stores a module parameter. Raises ExportError when none does, or its shape differs.

        Keys may lack the family's prefix, and a tied parameter is stored under the name it is tied to.
        """
        names = [parameter]
        if tied and parameter in self.family.tied:
            names.insert(0, self.family.tied[parameter])
        for name in names:
            for key in (name, *(name.removeprefix(p) for p in self.family.prefixes if name.startswith(p))):
                if key not in self.tensors:
                    continue
                file, entry = self.tensors[key]
                if entry.shape != shape:
                    raise ExportError(
                        f"{self.folder / file}: tensor {key!r} has shape {list(entry.shape)} where config.json asks for "
                        f"{list(shape)}. The weights and the config belong to different models."
                    )
                if entry.dtype not in _FLOATS:
                    raise ExportError(
                        f"{self.folder / file}: tensor {key!r} is stored as {entry.dtype}. graphlens exports float "
                        "weights (F64, F32, F16, BF16); load and save the model dequantised first."
                    )
                return file, key
        raise ExportError(
            f"{self.folder}: the weights hold no tensor for {parameter!r}. "
            f"The checkpoint is not a complete {self.family.architecture}."
        )


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads a checkpoint folder's config and weight headers (no weight). Raises ExportError when it cannot be used."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ExportError(f"{folder}: no config.json here, so this is not a Hugging Face checkpoint folder.") from error
    except (ValueError, OSError) as error:
        raise ExportError(f"{folder / 'config.json'}: cannot be read ({error}).") from error
    family = family_for(config) if isinstance(config, dict) else None
    if family is None:
        known = ", ".join(f.architecture for f in FAMILIES)
        found = config.get("architectures") or config.get("model_type") if isinstance(config, dict) else None
        raise ExportError(f"{folder}: config.json names {found}, which graphlens cannot export. It exports: {known}.")
    for key, value in family.refused.items():
        if config.get(key, value) != value:
            raise ExportError(f"{folder}: config.json sets {key}={config[key]}; graphlens exports only {key}={value}.")
    tensors: dict[str, tuple[str, TensorEntry]] = {}
    for file in _weight_files(folder):
        try:
            entries = SafetensorsFile(folder / file).entries
        except ModelFileError as error:
            raise ExportError(f"{error} Download or save the checkpoint again.") from error
        for key, entry in entries.items():
            tensors[key] = (file, entry)
    return Checkpoint(folder, config, family, tensors)


def _weight_files(folder: Path) -> list[str]:
    if (folder / _SINGLE).exists():
        return [_SINGLE]
    if (folder / _INDEX).exists():
        try:
            shards = set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, OSError) as error:
            raise ExportError(f"{folder / _INDEX}: cannot be read as a shard index ({error!r}).") from error
        for shard in shards:
            if Path(shard).name != shard:
                raise ExportError(f"{folder / _INDEX}: names a shard outside the folder: {shard!r}.")
            if not (folder / shard).exists():
                raise ExportError(f"{folder}: shard {shard!r}, which {_INDEX} lists, is missing.")
        return sorted(shards)
    if list(folder.glob("*.bin")):
        raise ExportError(
            f"{folder}: holds only .bin weights. graphlens reads safetensors. Convert once with: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, safe_serialization=True)"
        )
    raise ExportError(f"{folder}: no model.safetensors here (nor {_INDEX}).")


def model_config(checkpoint: Checkpoint, hf_config: Any, name: str, dtype: str) -> ModelConfig:
    """The architecture in TransformerLens's terms, from transformers' config object (its defaults filled in)."""
    value = {field: getattr(hf_config, attribute) for field, attribute in checkpoint.family.config.items()}
    if value["d_mlp"] is None:
        value["d_mlp"] = 4 * value["d_model"]
    d_head = getattr(hf_config, "head_dim", None) or value["d_model"] // value["n_heads"]
    return ModelConfig(
        model_name=name,
        original_architecture=checkpoint.family.architecture,
        normalization_type=checkpoint.family.normalization,
        positional_embedding_type="standard" if checkpoint.family.pos_embed else "rotary",
        d_head=d_head,
        dtype=dtype,
        **value,
    )
