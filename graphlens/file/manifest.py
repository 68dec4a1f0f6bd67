"""The manifest: what a hooked file says about itself, as plain data, in its ``metadata_props``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Self, TypeAlias, TypeVar

from graphlens.errors import InputError, checked_number
from graphlens.file.adopted import Adopted, adopted_from
from graphlens.file.manifest_format import FORMAT_VERSION, known_format, malformed
from graphlens.file.model_config import ModelConfig as ModelConfig
from graphlens.file.quantised import Quantisation

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Record = TypeVar("Record", bound="DataclassInstance")

SEALED_SINCE = 2  # the first format whose graph files have a seal
METADATA_KEY = "graphlens"
_LARGEST = 2**31  # of a size, which is multiplied by others
_MOST = 10_000  # layers or experts: names of all are listed; a graph has a node for each at least
DTYPES = ("float32", "float64", "float16", "int64", "int32")  # of activations


# The fields of ModelConfig that have no default: every manifest holds them. Format 2 had some more.
REQUIRED = frozenset(item.name for item in fields(ModelConfig) if item.default is MISSING)
_CONFIG_OF_2 = REQUIRED | {"attn_only", "gated_mlp", "parallel_attn_mlp", "attention_dir", "default_prepend_bos"}


def _stored(config: ModelConfig) -> dict[str, Json]:
    """The fields of a config as a manifest holds them: without those that equal their defaults."""
    data = asdict(config)
    default = asdict(ModelConfig(**{name: data[name] for name in REQUIRED}))
    return {name: value for name, value in data.items() if name in REQUIRED or value != default[name]}


@dataclass(frozen=True)
class HookEntry:
    """Where a hook point is in the graph.

    Attributes:
        value: The name of the graph value that carries the activation.
        axes: The activation's axes by name; see ``names.axes_of``.
        dtype: The activation's NumPy dtype.
        width: The size of its last axis, where the model's own sizes do not tell it: the features of an SAE.
    """

    value: str
    axes: tuple[str, ...]
    dtype: str
    width: int | None = None

    def sizes(self, of_model: Mapping[str, int]) -> Mapping[str, int]:
        """The sizes of those axes that are the same in every run.

        Args:
            of_model: Those that the model has: see ``names.axis_sizes``.
        """
        return of_model if self.width is None else {**of_model, self.axes[-1]: self.width}


@dataclass(frozen=True)
class WeightView:
    """A weight as a view of one tensor of one safetensors file.

    Applied in this order: ``quantised``, ``take`` or ``cut``, ``shape``, ``within``, ``permute``, ``joined``, ``times``,
    ``plus``.

    Attributes:
        file: The name of the weights file, in the folder of the graph.
        tensor: The key of the tensor in it.
        take: (axis, part, parts): keep one of so many equal parts of an axis.
        shape: The sizes after a reshape that splits axes.
        permute: The order of the axes.
        cut: (axis, start, stop): keep a stretch of an axis.
        within: (axis, start, stop): keep a stretch of an axis that ``shape`` made.
        joined: True if the first two axes are joined into one.
        times: What the numbers are multiplied by, in float32.
        plus: What is added to them.
        quantised: What the tensor's integers mean; None for a tensor of numbers.
    """

    file: str
    tensor: str
    take: tuple[int, int, int] | None = None
    shape: tuple[int, ...] | None = None
    permute: tuple[int, ...] | None = None
    cut: tuple[int, int, int] | None = None
    within: tuple[int, int, int] | None = None
    joined: bool = False
    times: float | None = None
    plus: float | None = None
    quantised: Quantisation | None = None


def _without_none(entry: dict[str, Json]) -> dict[str, Json]:
    """A hook point as a manifest holds it: with its width, which format 5 brought, only where it has one."""
    return {key: value for key, value in entry.items() if value is not None}


# What format 3 brought. A file that needs none of it is written in format 2, which older versions open too.
_VIEW_SINCE_3 = ("cut", "within", "joined", "times", "plus")
_VIEW_SINCE_4 = ("quantised",)


def _told(view: WeightView) -> dict[str, Json]:
    """The fields of a view as a manifest holds them: those of later formats only where they say something."""
    later = (*_VIEW_SINCE_3, *_VIEW_SINCE_4)
    told = {key: value for key, value in vars(view).items() if key not in later or value not in (None, False)}
    return told if view.quantised is None else {**told, "quantised": vars(view.quantised)}


@dataclass(frozen=True)
class WeightFile:
    """The fingerprint of a weights file.

    Attributes:
        size: Bytes.
        sha256: SHA-256 of the whole file.
    """

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything a hooked file says about itself. Holds no absolute path and no time of day.

    Attributes:
        config: The model's architecture.
        hooks: Hook name -> where it is in the graph.
        weights: TransformerLens weight name -> the view of a stored tensor that it is.
        files: The name of each weights file -> its fingerprint.
        source: The name that the model was exported by.
        revision: The hub's commit, if the model came from there.
        processing: The steps of weight processing that were done, in order.
        exporter: Package -> version, of those that wrote the graph.
        format_version: The format of this manifest.
        adopted: What the file was made of, where another program exported it; None for graphlens's own exports.
    """

    config: ModelConfig
    hooks: Mapping[str, HookEntry]
    weights: Mapping[str, WeightView]
    files: Mapping[str, WeightFile]
    source: str
    revision: str | None = None
    processing: tuple[str, ...] = ()
    exporter: Mapping[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    adopted: Adopted | None = None

    def with_hooks(self, hooks: Mapping[str, HookEntry]) -> Self:
        """The same manifest with another hook map."""
        return replace(self, hooks=dict(hooks))

    def with_files(self, files: Mapping[str, WeightFile]) -> Self:
        """The same manifest with other weights files."""
        return replace(self, files=dict(files))

    def with_length(self, n_ctx: int) -> Self:
        """The same manifest for runs of another length.

        Args:
            n_ctx: How many tokens a run may have.

        Raises:
            InputError: It is not between 1 and what the model was trained for.
        """
        config = self.config
        if not 1 <= (n_ctx := checked_number(n_ctx, "n_ctx")) <= (config.n_ctx_trained or config.n_ctx):
            raise InputError(f"n_ctx={n_ctx}: this model {config.lengths}.")
        return replace(self, config=replace(config, n_ctx=n_ctx))

    @property
    def keeps_past(self) -> bool:
        """True if runs can go on from the keys and values of earlier ones: False for a file adopted without a KV cache."""
        return self.adopted is None or "past" in self.adopted.inputs

    @property
    def masks_left_padding(self) -> bool:
        """False for a file adopted from one that computes a prompt padded on the left as another than the prompt alone."""
        return self.adopted is None or self.adopted.left_padding == "masked"

    @property
    def headless(self) -> bool:
        """True for a file adopted from one that ends in hidden states: it gives no logits."""
        return self.adopted is not None and self.adopted.headless

    @property
    def needed_format(self) -> int:
        """The oldest format that can say what this manifest says, of those that are still written: 2 to 5."""
        if any(entry.width is not None for entry in self.hooks.values()):
            return 5
        if self.adopted is not None or any(view.quantised is not None for view in self.weights.values()):
            return 4
        weights = any(_told(view).keys() & set(_VIEW_SINCE_3) for view in self.weights.values())
        return 3 if weights or _stored(self.config).keys() - _CONFIG_OF_2 else 2

    def to_json(self) -> str:
        """The manifest as compact JSON, in the oldest format that holds it; the same manifest always gives the same bytes."""
        weights = {name: _told(view) for name, view in self.weights.items()}
        # Each graph that is made gets one: asdict, which copies deeply, would take as long as the rest of making it.
        hooks = {name: _without_none(vars(entry)) for name, entry in self.hooks.items()}
        files = {name: vars(entry) for name, entry in self.files.items()}
        changed = {"config": _stored(self.config), "hooks": hooks, "weights": weights, "files": files}
        whole = {**vars(self), **changed, "format_version": self.needed_format}
        adopted = whole.pop("adopted")
        return json.dumps(whole if adopted is None else {**whole, "adopted": vars(adopted)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, where: str = "this file") -> Self:
        """Reads a manifest.

        Args:
            text: What ``to_json`` wrote, or what a stranger put in its place.
            where: The file's name, for error messages.

        Raises:
            ModelFileError: The manifest is malformed, or of a newer format.
        """
        data, version = known_format(text, where)
        try:
            manifest = cls(
                config=_record(ModelConfig, data["config"]),
                hooks={name: _record(HookEntry, _known(HookEntry, entry)) for name, entry in data["hooks"].items()},
                weights={name: _view(_known(WeightView, view)) for name, view in data["weights"].items()},
                files={name: _record(WeightFile, _known(WeightFile, file)) for name, file in data["files"].items()},
                source=data["source"],
                revision=data["revision"],
                processing=tuple(data["processing"]),
                exporter=dict(data["exporter"].items()),
                format_version=version,
                adopted=None if data.get("adopted") is None else adopted_from(data["adopted"]),
            )
            manifest._check_texts()
            manifest._check_entries()
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
            raise malformed(where, error) from error
        return manifest

    def _check_texts(self) -> None:
        """Raises TypeError or ValueError for names that are no text or leave the folder."""
        if not isinstance(self.source, str) or not all(isinstance(part, str) for part in self.processing):
            raise TypeError("source and processing must be text")
        for name in (*self.files, *(view.file for view in self.weights.values())):
            if name in ("", ".", "..") or set(name) & set("/\\:"):
                raise ValueError(f"{name!r} is not the name of a file in the folder")
        if strange := {view.file for view in self.weights.values()} - set(self.files):
            raise ValueError(f"no fingerprint of {sorted(strange)}")

    def _check_entries(self) -> None:
        """Raises ValueError for hook points and weights that are described by what is no axis, dtype or view."""
        for name, entry in self.hooks.items():
            if not all(isinstance(axis, str) for axis in entry.axes):
                raise ValueError(f"the axes of {name!r} are {entry.axes!r}, not names")
            if entry.width is not None and not 1 <= entry.width <= _LARGEST:
                raise ValueError(f"the width of {name!r} is {entry.width}")
            if entry.dtype not in DTYPES:
                raise ValueError(f"{name!r} has the dtype {entry.dtype!r}")
        if (config := self.config).dtype not in DTYPES:
            raise ValueError(f"the model computes in {config.dtype!r}")
        for item in fields(config):
            number, kind = getattr(config, item.name), str(item.type)
            most = _MOST if item.name in ("n_layers", "num_experts") else _LARGEST
            size = not kind.startswith("int") or number is None or (item.name != "d_mlp") <= number <= most
            if not size or (kind.startswith("float") and number is not None and not abs(number) < math.inf):
                raise ValueError(f"the model's {item.name} is {number}")
        if config.eps < 0 or config.attn_scale <= 0 or config.n_heads % config.n_key_value_heads:
            raise ValueError(f"no model has eps {config.eps}, attn_scale {config.attn_scale} and these heads: {config}")
        for name, view in self.weights.items():
            for part in ("take", "shape", "permute", "cut", "within"):
                numbers = getattr(view, part)
                if not all(type(number) is int and number >= 0 for number in numbers or ()):
                    raise ValueError(f"{part} of the weight {name!r} is {numbers!r}")
            for part, told in (("take", "(axis, part, parts)"), ("cut", _STRETCH), ("within", _STRETCH)):
                numbers = getattr(view, part)
                if numbers is not None and not (len(numbers) == 3 and numbers[1] < numbers[2]):
                    raise ValueError(f"{part} of the weight {name!r} is {numbers!r}, not {told}")
            for part in ("times", "plus"):
                if not math.isfinite(getattr(view, part) or 0) or view.times == 0:
                    raise ValueError(f"{part} of the weight {name!r} is {getattr(view, part)!r}")
            if sorted(view.permute or ()) != list(range(len(view.permute or ()))):
                raise ValueError(f"permute of the weight {name!r} is {view.permute!r}, no order of axes")


_STRETCH = "(axis, start, stop)"
# What a field of each type takes from JSON. bool is no int here.
_PLAIN_TYPES: dict[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (float, int), "str": (str,)}


def _known(kind: type[HookEntry | WeightView | WeightFile], data: Mapping[str, Json]) -> dict[str, Json]:
    """What another version may have written of a hook point, a weight or a file besides is left out."""
    return {name: value for name, value in data.items() if name in kind.__dataclass_fields__}


def _view(data: Mapping[str, Json]) -> WeightView:
    """The view of a weight from its JSON object. Raises TypeError or ValueError for what is none."""
    inner = data.get("quantised")
    if not isinstance(inner, dict):
        return _record(WeightView, data)
    how = _record(Quantisation, inner)
    how.check()
    return replace(_record(WeightView, {**data, "quantised": None}), quantised=how)


def _record(kind: Callable[..., Record], data: Mapping[str, Json]) -> Record:
    """A record from its JSON object. Raises TypeError for a value that is not of its field's type."""
    record = kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})
    for item in fields(record):
        value, expected = getattr(record, item.name), str(item.type)
        plain = _PLAIN_TYPES.get(expected.removesuffix(" | None"), (tuple,))
        if not (value is None and expected.endswith("None")) and type(value) not in plain:
            raise TypeError(f"{item.name} is {value!r}, not {expected}")
    return record
