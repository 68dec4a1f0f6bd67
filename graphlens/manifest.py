"""The manifest: what a hooked file says about itself, as plain data, in its ``metadata_props``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
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
        except (ValueError, KeyError, TypeError) as error:
            raise ModelFileError(
                f"{where}: the graphlens manifest is malformed ({error}). Export the model again."
            ) from error
        if version > FORMAT_VERSION:
            raise ModelFileError(
                f"{where}: the manifest has format {version}, and this graphlens reads up to {FORMAT_VERSION}. "
                "Update graphlens, or export the model again with this version."
            )
        try:
            return cls(
                config=ModelConfig(**data["config"]),
                hooks={n: HookEntry(h["value"], tuple(h["axes"]), h["dtype"]) for n, h in data["hooks"].items()},
                weights={n: _view(v) for n, v in data["weights"].items()},
                files={n: WeightFile(**f) for n, f in data["files"].items()},
                source=data["source"],
                revision=data["revision"],
                processing=tuple(data["processing"]),
                exporter=dict(data["exporter"]),
                format_version=version,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ModelFileError(
                f"{where}: the graphlens manifest is malformed ({error}). Export the model again."
            ) from error


def _view(data: Mapping[str, Any]) -> WeightView:
    def fixed(key: str) -> Any:
        return None if data[key] is None else tuple(data[key])

    return WeightView(data["file"], data["tensor"], fixed("take"), fixed("shape"), fixed("permute"))
