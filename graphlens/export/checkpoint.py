"""Checkpoint folders: which files hold the weights, under which keys, and what the Hugging Face config says."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from graphlens.errors import ExportError, ModelFileError
from graphlens.export.families import Family, families, family_for
from graphlens.file.folder import CONFIG_FILE
from graphlens.file.inside import inside, read_regular
from graphlens.file.manifest import Json
from graphlens.file.safetensors import Array, SafetensorsFile, TensorEntry, as_float
from graphlens.file.settings import read_settings

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WEIGHTS_FILE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
# What quantised checkpoints have beside or in place of a matrix: GPTQ's and AWQ's tensors, those of bitsandbytes.
_QUANTISED_KEYS = (".qweight", ".qzeros", ".g_idx", ".SCB", ".absmax", ".quant_map", ".weight_packed", ".weight_scale")
QUANTISED = (
    "its weights are quantised, and graphlens exports float weights (F64, F32, F16, BF16). Take the original model, or save "
    "it dequantised."
)
# Buffers that older versions of transformers stored, and that every model computes for itself.
_BUFFERS = re.compile(
    r"(^|\.)(attn|attention|self_attention)\.(bias|masked_bias)$|rotary_emb\.|\.embed_positions$|position_ids$"
)
# The safetensors dtypes of weights that can be exported.
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder that transformers wrote.

    Attributes:
        folder: Where it is.
        family: The family that its config names.
        tensors: Key -> (file, where the tensor lies in it).
    """

    folder: Path
    family: Family
    tensors: Mapping[str, tuple[str, TensorEntry]]

    @property
    def files(self) -> list[str]:
        """The names of the weights files, sorted."""
        return sorted({file for file, _ in self.tensors.values()})

    def is_tied(self, asked: bool) -> bool:
        """Whether parameters that the family ties share one tensor, as transformers would load this checkpoint.

        Args:
            asked: What the config says.

        Returns:
            False also where the config ties a parameter and the checkpoint stores another content for it than for the one
            that it would be tied to. The stored content is then the model's.
        """
        return asked and all(self._agree(one, other) for one, other in self.family.tied.items())

    def _agree(self, one: str, other: str) -> bool:
        """True unless two parameters are stored both, with different contents."""
        stored = list[Array]()
        for parameter in (one, other):
            key = next((key for key in self.family.keys(parameter, tied=False) if key in self.tensors), None)
            if key is None:
                return True
            file, entry = self.tensors[key]
            if entry.dtype not in FLOATS:
                return True  # refused where the parameter is located
            stored.append(as_float(SafetensorsFile(self.folder / file), key))
        return np.array_equal(stored[0], stored[1], equal_nan=True)

    def hf_config(self) -> PretrainedConfig:
        """transformers' config of the checkpoint; see ``hf_config_of``."""
        return hf_config_of(self.folder, str(self.folder))

    def locate(self, parameter: str, shape: tuple[int, ...], tied: bool) -> tuple[str, str]:
        """Where a parameter of the transformers model is stored.

        Args:
            parameter: The parameter's name.
            shape: The shape that the config gives it.
            tied: True if the config ties the unembedding to the embedding.

        Returns:
            The (file, key) of its tensor.

        Raises:
            ExportError: No tensor of the checkpoint is this parameter, or it has another shape or no float dtype.
        """
        key = next((key for key in self.family.keys(parameter, tied) if key in self.tensors), None)
        if key is None:
            raise ExportError(
                f"{self.folder}: the weights hold no tensor for {parameter!r}. "
                f"The checkpoint is not a complete {self.family.architecture}."
            )
        file, entry = self.tensors[key]
        if entry.shape != shape:
            raise ExportError(
                f"{self.folder / file}: tensor {key!r} has shape {list(entry.shape)} where config.json asks for "
                f"{list(shape)}. The weights and the config belong to different models."
            )
        if entry.dtype not in FLOATS:
            raise ExportError(
                f"{self.folder / file}: tensor {key!r} is stored as {entry.dtype}. graphlens exports float "
                "weights (F64, F32, F16, BF16); load and save the model dequantised first."
            )
        return file, key

    def ensure_complete(self, shapes: Mapping[str, tuple[int, ...]], blocks: str, tied: bool) -> list[str]:
        """Refuses a checkpoint that lacks a parameter of the model, or holds tensors for which it should have a use.

        A bias that ``config.json`` does not mention, or another block, says that the weights are those of another model.
        transformers leaves them out in silence. What is stored of computed buffers is no matter.

        Args:
            shapes: The shapes of all parameters of the transformers model, by name.
            blocks: The path of its list of blocks.
            tied: True if the config ties the unembedding to the embedding.

        Returns:
            The keys of tensors outside the blocks that are not used: other heads, say.

        Raises:
            ExportError: A parameter is missing or has another shape, or a tensor too many belongs to a block or to a module
                that the model has.
        """
        for parameter, shape in shapes.items():
            self.locate(parameter, shape, tied)
        names = {*shapes, *self.family.tied}
        known = {key for name in names for key in self.family.keys(name, tied) + self.family.keys(name, tied=False)}
        modules = {key.rpartition(".")[0] for key in known}
        paths = {blocks, *(blocks.removeprefix(prefix) for prefix in self.family.prefixes)}
        left = sorted(key for key in self.tensors if key not in known and not _BUFFERS.search(key))
        for key in left:
            if key.startswith(tuple(f"{path}." for path in paths)) or key.rpartition(".")[0] in modules:
                raise ExportError(
                    f"{self.folder / self.tensors[key][0]}: the weights hold {key!r}, for which the {self.family.architecture} "
                    "that config.json describes has no use. The weights and the config belong to different models, or the "
                    "config lacks what says that there is one."
                )
        return left


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads the config and the headers of the weights files, but no weight.

    Args:
        folder: A checkpoint folder.

    Raises:
        ExportError: Something is missing or damaged, or graphlens cannot export this architecture.
    """
    family = family_of(folder, str(folder))
    tensors: dict[str, tuple[str, TensorEntry]] = {}
    for file in _weight_files(folder):
        try:
            entries = SafetensorsFile(folder / file).entries
        except ModelFileError as error:
            raise ExportError(f"{error} Download or save the checkpoint again.") from error
        for key, entry in entries.items():
            tensors[key] = (file, entry)
    for key in tensors:
        if key.endswith(_QUANTISED_KEYS):
            raise ExportError(f"{folder / tensors[key][0]}: holds {key!r} (GPTQ, AWQ or bitsandbytes): {QUANTISED}")
    return Checkpoint(folder, family, tensors)


def hf_config_of(folder: Path, where: str) -> PretrainedConfig:
    """transformers' config of a checkpoint, which fills in the defaults that ``config.json`` leaves out.

    Args:
        folder: The checkpoint folder; of its files only ``config.json`` is read.
        where: How an error calls the checkpoint.

    Raises:
        ExportError: transformers refuses what the file holds.
    """
    import transformers
    from huggingface_hub import errors

    # Its checks of fields raise this one, which is no ValueError; older versions have no checks.
    strict = getattr(errors, "StrictDataclassError", ValueError)
    try:
        found: PretrainedConfig = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, strict) as error:
        raise ExportError(f"{where}: transformers refuses its {CONFIG_FILE} ({error}).") from error
    return found


def family_of(folder: Path, where: str) -> Family:
    """The family that a folder's config names.

    Args:
        folder: The folder.
        where: How an error calls the checkpoint: its folder, or its name on the hub.

    Raises:
        ExportError: It has no config, or one that cannot be read or exported.
    """
    if not os.path.lexists(folder / CONFIG_FILE):
        raise ExportError(f"{where}: no config.json here, so this is not a Hugging Face checkpoint folder.")
    try:
        config = read_settings(folder / CONFIG_FILE, f"{where}: its {CONFIG_FILE}")
    except ModelFileError as error:
        raise ExportError(str(error)) from error
    return supported_family(config, where)


def supported_family(settings: Mapping[str, Json], where: str) -> Family:
    """The family of a config that can be exported.

    Args:
        settings: What its config.json holds.
        where: How an error calls the checkpoint: its folder, or its name on the hub.

    Raises:
        ExportError: graphlens cannot export it; the message says what it can.
    """
    family = family_for(settings)
    if family is None:
        known = ", ".join(family.architecture for family in families())
        found = settings.get("architectures") or settings.get("model_type")
        raise ExportError(f"{where}: config.json names {found}, which graphlens cannot export. It exports: {known}.")
    quantised = settings.get("quantization_config")
    if quantised:
        raise ExportError(f"{where}: config.json has a quantization_config{_method(quantised)}: {QUANTISED}")
    family.check_settings(settings, where)
    return family


def _method(quantised: Json) -> str:
    """How weights are quantised, as a part of a sentence, from a quantization_config."""
    found = quantised.get("quant_method") if isinstance(quantised, dict) else None
    if found is None and isinstance(quantised, dict):
        found = next((kind for kind in ("load_in_4bit", "load_in_8bit") if quantised.get(kind)), None)
    return f" ({found})" if isinstance(found, str) else ""


def _weight_files(folder: Path) -> list[str]:
    """The names of a folder's weights files. Raises ExportError if there are none, or some are missing."""
    if (folder / WEIGHTS_FILE).exists():
        return [WEIGHTS_FILE]
    if (folder / SHARD_INDEX).exists():
        return _shards(folder)
    if list(folder.glob("*.gguf")):
        raise ExportError(f"{folder}: holds GGUF weights, which graphlens does not read. Take the original checkpoint.")
    if list(folder.glob("*.bin")):
        raise ExportError(
            f"{folder}: holds only .bin weights. graphlens reads safetensors. Convert once with: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, safe_serialization=True)"
        )
    raise ExportError(f"{folder}: no model.safetensors here (nor {SHARD_INDEX}).")


def _shards(folder: Path) -> list[str]:
    """The names of the weights files that a shard index lists."""
    try:
        shards = set(json.loads(read_regular(inside(folder, SHARD_INDEX)))["weight_map"].values())
    except ModelFileError:  # it says what the file is, and is a ValueError too
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise ExportError(f"{folder / SHARD_INDEX}: cannot be read as a shard index ({error!r}).") from error
    for shard in shards:
        if Path(shard).name != shard:
            raise ExportError(f"{folder / SHARD_INDEX}: names a shard outside the folder: {shard!r}.")
        if not (folder / shard).exists():
            raise ExportError(f"{folder}: shard {shard!r}, which {SHARD_INDEX} lists, is missing.")
    return sorted(shards)
