"""The manifest: what a hooked file says about itself, as plain data, in its ``metadata_props``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

from graphlens.errors import ModelFileError

FORMAT_VERSION = 1
METADATA_KEY = "graphlens"


@dataclass(frozen=True)
class ModelConfig:
    """The architecture, in TransformerLens's terms. Sizes are counts; ``eps`` is added to a variance."""

    model_name: str
    original_architecture: str
    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    act_fn: str
    eps: float
    normalization_type: str
    positional_embedding_type: str
    dtype: str

    @property
    def n_params(self) -> int:
        """Attention and MLP matrix parameters, as TransformerLens counts them (no embeddings, biases, norms)."""
        attention = 2 * self.d_model * self.d_head * (self.n_heads + self.n_key_value_heads)
        return self.n_layers * (attention + 2 * self.d_model * self.d_mlp)

    @property
    def d_vocab_out(self) -> int:
        """The number of logits, equal to d_vocab for every supported family."""
        return self.d_vocab


@dataclass(frozen=True)
class HookEntry:
    """One hook point: the graph value that carries it, its axes (see hook_points) and its dtype."""

    value: str
    axes: tuple[str, ...]
    dtype: str


@dataclass(frozen=True)
class WeightView:
    """A weight as a strided view of one tensor of one safetensors file.

    Applied in this order: ``take=(axis, part, parts)``, ``shape`` (a reshape that splits axes), ``permute``.
    """

    file: str
    tensor: str
    take: tuple[int, int, int] | None = None
    shape: tuple[int, ...] | None = None
    permute: tuple[int, ...] | None = None


@dataclass(frozen=True)
class WeightFile:
    """A weights file's fingerprint: size in bytes, SHA-256 of its header, of strided samples of every tensor, and of
    the whole file."""

    size: int
    header_sha256: str
    samples_sha256: str
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything a hooked file says about itself. Holds no absolute path and no time of day."""

    config: ModelConfig
    hooks: Mapping[str, HookEntry]
    weights: Mapping[str, WeightView]
    files: Mapping[str, WeightFile]
    source: str
    revision: str | None = None
    processing: tuple[str, ...] = ()
    exporter: Mapping[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def with_hooks(self, hooks: Mapping[str, HookEntry]) -> Self:
        """The same manifest with another hook map."""
        return replace(self, hooks=dict(hooks))

    def with_files(self, files: Mapping[str, WeightFile]) -> Self:
        """The same manifest with other weights files."""
        return replace(self, files=dict(files))

    def to_json(self) -> str:
        """Compact JSON; the same manifest always gives the same bytes."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, where: str = "this file") -> Self:
        """Parses a manifest. Raises ModelFileError for one that is malformed or of a newer format."""
        try:
            data: dict[str, Any] = json.loads(text)
            version = data["format_version"]
            if not isinstance(version, int):
                raise TypeError("format_version is not an integer")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _malformed(where, error) from error
        if version > FORMAT_VERSION:
            raise ModelFileError(
                f"{where}: the manifest has format {version}, and this graphlens reads up to {FORMAT_VERSION}. "
                "Update graphlens, or export the model again with this version."
            )
        try:
            manifest = cls(
                config=ModelConfig(**data["config"]),
                hooks={n: HookEntry(h["value"], tuple(h["axes"]), h["dtype"]) for n, h in data["hooks"].items()},
                weights={n: _view(v) for n, v in data["weights"].items()},
                files={n: WeightFile(**f) for n, f in data["files"].items()},
                source=data["source"],
                revision=data["revision"],
                processing=tuple(data["processing"]),
                exporter=dict(data["exporter"].items()),
                format_version=version,
            )
            manifest._check_types()
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise _malformed(where, error) from error
        return manifest

    def _check_types(self) -> None:
        """Raises TypeError or ValueError for what a stranger's JSON may hold instead of what belongs there."""
        records: list[Any] = [self.config, *self.hooks.values(), *self.weights.values(), *self.files.values()]
        for record in records:
            for item in fields(record):
                value, kind = getattr(record, item.name), str(item.type)
                plain = _PLAIN_TYPES.get(kind.removesuffix(" | None"), (tuple,))
                if not (value is None and kind.endswith("None")) and type(value) not in plain:
                    raise TypeError(f"{item.name} is {value!r}, not {kind}")
        if not isinstance(self.source, str) or not all(isinstance(part, str) for part in self.processing):
            raise TypeError("source and processing must be text")
        for name in (*self.files, *(view.file for view in self.weights.values())):
            if name in ("", ".", "..") or set(name) & set("/\\:"):
                raise ValueError(f"{name!r} is not the name of a file in the folder")
        strange = {view.file for view in self.weights.values()} - set(self.files)
        if strange:
            raise ValueError(f"no fingerprint of {sorted(strange)}")


_PLAIN_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "str": (str,)}


def _malformed(where: str, error: Exception) -> ModelFileError:
    return ModelFileError(f"{where}: the graphlens manifest is malformed ({error}). Export the model again.")


def _view(data: Mapping[str, Any]) -> WeightView:
    def fixed(key: str) -> Any:
        return None if data[key] is None else tuple(data[key])

    return WeightView(data["file"], data["tensor"], fixed("take"), fixed("shape"), fixed("permute"))
