"""What a model family is, the register of all families, and how one is found for a checkpoint."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from graphlens.errors import ExportError
from graphlens.file.manifest import REQUIRED, Json, ModelConfig, WeightView
from graphlens.file.names import in_block

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Fields of ModelConfig that say which model it is, not which architecture: no family gives them.
_OF_THE_MODEL = {"model_name", "original_architecture", "dtype"}


@dataclass(frozen=True)
class Tap:
    """Hook points at the boundary of a module.

    Attributes:
        before: The hook point that is the module's first input, or None.
        after: The hook point that is the module's output (the first, where it returns several), or None.
    """

    before: str | None = None
    after: str | None = None


@dataclass(frozen=True)
class Weight:
    """Where a TransformerLens weight lies in a checkpoint, as a strided view of one tensor (never a copy).

    Applied in this order: ``take``, ``shape``, ``permute``.

    Attributes:
        tensor: The name of the module's parameter; ``{i}`` stands for the layer.
        take: (axis, part, parts): keep one of so many equal parts of an axis.
        shape: Names of ModelConfig fields, the sizes of the axes after a reshape that splits axes.
        permute: The order of the axes, last.
    """

    tensor: str
    take: tuple[int, int, int] | None = None
    shape: tuple[str, ...] | None = None
    permute: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Family:
    """All that graphlens knows about one Hugging Face architecture.

    Module paths are those of the transformers model. In ``block`` and ``norms`` they are relative to a block.

    Attributes:
        architecture: The class name in a config's ``architectures``.
        model_types: The config's ``model_type`` values that mean this family where no architecture is named.
        blocks: The path of the list of blocks.
        top: Module path -> hook points, outside the blocks.
        block: Module path -> hook points (named without ``blocks.N.``); "" is the block itself.
        norms: Module path -> ``ln1`` or ``ln2``, for the block's normalisation modules.
        final_norm: The path of the norm before the unembedding.
        config: ModelConfig field -> the attribute of transformers' config that holds it, or a function of that config.
        constants: ModelConfig field -> its value, for what the architecture fixes. Fields in neither mapping keep
            ModelConfig's defaults.
        weights: TransformerLens weight name -> where it lies, outside the blocks.
        block_weights: The same for the weights of a block, named without ``blocks.N.``.
        pos_embed: The path of a module whose output is made 0 at masked positions, as TransformerLens does with learned
            position embeddings; None where there is none.
        tied: Parameter -> the parameter whose tensor it shares when ``tie_word_embeddings`` is set.
        prefixes: Prefixes of parameter names that a checkpoint's keys may lack.
        refused: Config key -> the only value that can be exported (also meant where the key is absent).
        tanh_gelu: Class names of activation modules that compute GELU by the tanh formula. Each becomes one node.
        aliases: TransformerLens's model names -> names on the Hugging Face hub.
    """

    architecture: str
    model_types: tuple[str, ...]
    blocks: str
    top: Mapping[str, Tap]
    block: Mapping[str, Tap]
    norms: Mapping[str, str]
    final_norm: str
    config: Mapping[str, str | Callable[[PretrainedConfig], Json]]
    constants: Mapping[str, str | bool | int | float]
    weights: Mapping[str, Weight]
    block_weights: Mapping[str, Weight]
    pos_embed: str | None = None
    tied: Mapping[str, str] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ()
    refused: Mapping[str, Json] = field(default_factory=dict)
    tanh_gelu: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses a family whose ``config`` and ``constants`` do not give each architecture field at most once."""
        known = {item.name for item in fields(ModelConfig)} - _OF_THE_MODEL
        missing = REQUIRED - _OF_THE_MODEL - set(self.config) - set(self.constants)
        wrong = ((set(self.config) | set(self.constants)) - known) | (set(self.config) & set(self.constants)) | missing
        if wrong:
            raise ValueError(
                f"the family {self.architecture} gives these ModelConfig fields twice or not at all, or there is no such "
                f"field: {', '.join(sorted(wrong))}."
            )

    @property
    def centred_norms(self) -> bool:
        """True for LayerNorm, which subtracts the mean; False for RMSNorm."""
        return self.constants["normalization_type"] == "LN"

    @property
    def sizes(self) -> dict[str, type[int] | type[float]]:
        """The keys of a checkpoint's ``config.json`` that hold numbers above 0, and whether they are whole."""
        kinds: dict[str, type[int] | type[float]] = {"int": int, "float": float}
        kind_of = {item.name: kinds.get(str(item.type)) for item in fields(ModelConfig)}
        found = {source: kind_of[item] for item, source in self.config.items() if isinstance(source, str)}
        return {source: kind for source, kind in found.items() if kind is not None}

    def keys(self, parameter: str, tied: bool) -> list[str]:
        """The keys that a checkpoint may store a parameter under, in the order in which to look for them.

        Args:
            parameter: The name of a parameter of the transformers model.
            tied: True if the config sets ``tie_word_embeddings``.
        """
        names = [self.tied[parameter], parameter] if tied and parameter in self.tied else [parameter]
        return [
            key
            for name in names
            for key in (name, *(name.removeprefix(prefix) for prefix in self.prefixes if name.startswith(prefix)))
        ]

    def model_config(self, hf_config: PretrainedConfig, name: str, dtype: str) -> ModelConfig:
        """The architecture of a checkpoint in TransformerLens's terms.

        Args:
            hf_config: transformers' config object, which fills in the defaults that ``config.json`` leaves out.
            name: The model's name.
            dtype: The NumPy name of the dtype that the weights are exported in.

        Raises:
            ExportError: The heads have no width.
        """
        values = {**self.constants, **{item: _value(hf_config, source) for item, source in self.config.items()}}
        config = ModelConfig(model_name=name, original_architecture=self.architecture, dtype=dtype, **values)
        if config.d_head < 1:
            raise ExportError(
                f"{name}: config.json gives {config.n_heads} heads a width of {config.d_model}, less than 1 each."
            )
        return config


def _value(hf_config: PretrainedConfig, source: str | Callable[[PretrainedConfig], Json]) -> Any:
    """One value of transformers' config, by attribute or by function."""
    return getattr(hf_config, source) if isinstance(source, str) else source(hf_config)


_registered: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Makes a family known, and returns it.

    Raises:
        ValueError: A family of that architecture, model type or alias is registered already.
    """
    for other in _registered.values():
        shared = {other.architecture, *other.model_types, *other.aliases} & {
            family.architecture, *family.model_types, *family.aliases
        }  # fmt: skip
        if shared:
            raise ValueError(f"{', '.join(sorted(shared))}: registered already, by the family {other.architecture}.")
    _registered[family.architecture] = family
    return family


@functools.cache
def _import_all() -> None:
    """Imports every file of this folder, which registers its family."""
    folder = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules(importlib.import_module(folder).__path__):
        importlib.import_module(f"{folder}.{module.name}")


def families() -> tuple[Family, ...]:
    """Every family, in the order of their files' names."""
    _import_all()
    return tuple(_registered.values())


def aliases() -> dict[str, str]:
    """TransformerLens's model names -> names on the Hugging Face hub, of all families."""
    return {alias: name for family in families() for alias, name in family.aliases.items()}


def family_for(config: Mapping[str, Json]) -> Family | None:
    """The family of a checkpoint, or None if graphlens does not know it.

    A config that names another architecture (a classifier, say) has no family, whatever its model type.

    Args:
        config: The content of the checkpoint's ``config.json``.
    """
    named = config.get("architectures")
    named = [named] if isinstance(named, str) else named
    for family in families():
        if isinstance(named, list) and named:
            if family.architecture in named:
                return family
        elif not named and config.get("model_type") in family.model_types:
            return family
    return None


def weight_views(family: Family, config: ModelConfig, key_of: Mapping[str, tuple[str, str]]) -> dict[str, WeightView]:
    """TransformerLens weight names -> views of checkpoint tensors.

    Args:
        family: The model's family.
        config: Its architecture, for the number of layers and the sizes of axes.
        key_of: The name of a module's parameter -> the (file, key) that stores it. Weights of other parameters are
            left out.
    """
    placed = {name: (weight, weight.tensor) for name, weight in family.weights.items()}
    for layer in range(config.n_layers):
        for name, weight in family.block_weights.items():
            placed[in_block(layer, name)] = (weight, weight.tensor.format(i=layer))
    views = {}
    for name, (weight, parameter) in placed.items():
        if parameter not in key_of:
            continue
        file, key = key_of[parameter]
        shape = tuple(int(getattr(config, size)) for size in weight.shape) if weight.shape else None
        views[name] = WeightView(file=file, tensor=key, take=weight.take, shape=shape, permute=weight.permute)
    return views
