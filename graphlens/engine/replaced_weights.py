"""The weights that an open model computes with in place of its files': checked, and what the graph's tensors become by them."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from graphlens.errors import InputError
from graphlens.file.manifest import Manifest, WeightView
from graphlens.file.names import POSITION_EMBEDDINGS, TOKEN_EMBEDDINGS
from graphlens.file.safetensors import Array, apply_view, put_view
from graphlens.file.stored import DATA_TYPES, StoredWeights
from graphlens.surgery.replaced import initializers_of_weights, untied

_UNEMBEDDINGS = ("unembed.W_U", "unembed.W_tokens")


@dataclass(frozen=True)
class ReplacedWeights:
    """The weights that an open model computes with in place of its files'.

    Attributes:
        model: The hooked graph. Where a file has one tensor as embedding and unembedding and these now differ, each has an
            initializer of its own.
        places: TransformerLens name -> the initializer that the weight is a view of.
        contents: Initializer -> what it holds instead, shaped and typed as it is stored; bfloat16 as uint16 words.
            Read-only. Without those that hold what the file holds.
        values: TransformerLens name -> the weight, as a read-only view of the contents; bfloat16 as a float32 copy.
    """

    model: ir.Model
    places: Mapping[str, str] = field(default_factory=dict)
    contents: Mapping[str, Array] = field(default_factory=dict)
    values: Mapping[str, Array] = field(default_factory=dict)

    def digest(self, of_files: str) -> str:
        """What tells the model with these weights from any other.

        Args:
            of_files: The digest of its files: that of the model itself where no weight is another.
        """
        if not self.contents:
            return of_files
        # Which initializer each weight is: an embedding that was set apart, and one that was not, may hold the same.
        digest = hashlib.sha256(f"{of_files} {sorted(self.places.items())}".encode())
        for name, content in sorted(self.contents.items()):
            digest.update(f"{name} {content.dtype} {content.shape}".encode())
            digest.update(np.ascontiguousarray(content).data)
        return digest.hexdigest()


class OverlaidWeights(Mapping[str, Array]):
    """A model's weights by TransformerLens name: those that were replaced, else those of its files.

    Args:
        stored: The weights of the files.
        values: Those that were replaced.
    """

    def __init__(self, stored: Mapping[str, Array], values: Mapping[str, Array]) -> None:
        self._stored, self._values = stored, values

    def __getitem__(self, name: str) -> Array:
        return self._values[name] if name in self._values else self._stored[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def replace_weights(model: ir.Model, manifest: Manifest, given: Mapping[str, Array]) -> ReplacedWeights:
    """What a file's weights become. Everything is checked before anything is made, and nothing of the file is changed.

    Args:
        model: The hooked graph of the file.
        manifest: Its manifest. With a lower ``n_ctx`` the position embeddings are the first so many.
        given: TransformerLens name -> the weight, of any floating dtype.

    Raises:
        InputError: For a name that the file has no weight of, a shape that is not the weight's, numbers that are no floats or not
            finite in the dtype that the file stores, and two weights that are one tensor and contradict each other.
    """
    tensors = _Tensors(model, manifest)
    new = {name: tensors.checked(name, array) for name, array in given.items()}
    places = initializers_of_weights(model, manifest)
    contents: dict[str, Array] = {}
    for name, array in new.items():
        tensors.write(contents.setdefault(places[name], tensors.copy(name)), name, array)
    for place, content in list(contents.items()):
        names = [name for name in places if places[name] == place]
        if len(names) == 1 or all(tensors.holds(content, name, new.get(name)) for name in names):
            continue
        if sorted(names) not in [[one, other] for one in TOKEN_EMBEDDINGS for other in _UNEMBEDDINGS]:
            raise InputError(
                f"{' and '.join(names)} are one tensor in this file: set all of them, to the same numbers."
            )
        model, places[max(names)] = untied(model, place)
        for name in names:
            contents[places[name]] = tensors.copy(name)
            if name in new:
                tensors.write(contents[places[name]], name, new[name])
    for name, place in places.items():
        if place in contents and _same(contents[place], tensors.stored(name)):
            del contents[place]
    for content in contents.values():
        content.flags.writeable = False
    values = {name: tensors.view(contents[place], name) for name, place in places.items() if place in contents}
    for value in values.values():
        value.flags.writeable = False  # those that are no views of the contents
    return ReplacedWeights(model, places, contents, values)


class _Tensors:
    """The stored tensors that a file's weights are views of."""

    def __init__(self, model: ir.Model, manifest: Manifest) -> None:
        self._manifest, self._stored = manifest, StoredWeights(model, manifest)

    def copy(self, name: str) -> Array:
        """The whole tensor that a weight is a view of, to write into."""
        return np.array(self._stored.array(name))

    def stored(self, name: str) -> Array:
        """The whole tensor that a weight is a view of, as the file holds it."""
        return self._stored.array(name)

    def now(self, name: str) -> Array:
        """A weight as the file holds it."""
        return self.view(self._stored.array(name), name)

    def view(self, tensor: Array, name: str) -> Array:
        """A weight in a tensor that is laid out as the file's, read-only where it is a view; bfloat16 as float32."""
        return apply_view(_widened(tensor), self._of_positions(name, self._manifest.weights[name]))

    def _of_positions(self, name: str, view: WeightView) -> WeightView:
        """A view of as many positions as the model is opened with."""
        if name not in POSITION_EMBEDDINGS:
            return view
        start = 0 if view.cut is None else view.cut[1]
        return replace(view, cut=(0, start, start + self._manifest.config.n_ctx))

    def write(self, tensor: Array, name: str, array: Array) -> None:
        """Writes a weight into a tensor. What is there already stays as it is stored, to the bit."""
        view = self._of_positions(name, self._manifest.weights[name])
        stored = replace(view, times=None, plus=None)
        if stored != view:
            kept = apply_view(_widened(tensor), view) == array
            array = array - np.asarray(view.plus or 0, array.dtype)
            array = array / np.asarray(1 if view.times is None else view.times, array.dtype)
            array = np.where(kept, apply_view(_widened(tensor), stored), array)
        put_view(tensor, stored, self._as_stored(name, array))

    def holds(self, tensor: Array, name: str, array: Array | None) -> bool:
        """True if a tensor holds what a weight was to be set to, or what the file holds where it was not."""
        if array is None:
            return _same(self.view(tensor, name), self.now(name))
        again = tensor.copy()
        self.write(again, name, array)
        return _same(again, tensor)

    def _as_stored(self, name: str, array: Array) -> Array:
        """Numbers in the dtype that the file stores; bfloat16 as uint16 words."""
        entry = self._stored.entry(name)
        assert entry is not None, "it was looked for"
        with np.errstate(over="ignore"):
            found: Array = array.astype(DATA_TYPES[entry.dtype].numpy(), copy=False)
        return found.view(np.uint16) if entry.dtype == "BF16" else found

    def checked(self, name: str, array: Array) -> Array:
        """A weight that can be set; in the dtype that the file stores, unless the graph computes it from what is stored.

        Raises:
            InputError: It does not fit.
        """
        entry = self._stored.entry(name)
        if entry is None and name in self._manifest.weights:
            raise InputError(
                f"{name!r} is stored as integers in the file that this model was adopted from, with scales of their own: it can "
                "be read, and cannot be set. Adopt the float file to compute with other weights."
            )
        if entry is None:
            known = self._manifest.weights
            near = [full for full in known if full.endswith(f".{name}")][:3] or difflib.get_close_matches(name, known)
            hint = f" Nearest: {', '.join(map(repr, near))}." if near else ""
            raise InputError(f"this model has no weight {name!r}.{hint} List what it has with list(model.weights).")
        view = self._of_positions(name, self._manifest.weights[name])
        shape = apply_view(self._stored.array(name), replace(view, times=None, plus=None)).shape
        if array.shape != shape:
            raise InputError(f"{name!r} is {list(shape)}, and what it was to be set to is {list(array.shape)}.")
        if not np.issubdtype(array.dtype, np.floating):
            raise InputError(f"{name!r} was to be set to numbers of dtype {array.dtype}: give floating-point ones.")
        dtype = DATA_TYPES[entry.dtype].numpy()
        computed = dtype if view.times is None and view.plus is None else np.promote_types(dtype, np.float32)
        with np.errstate(over="ignore"):
            found: Array = array.astype(computed, copy=False)
            finite = np.isfinite(found.astype(dtype, copy=False)).all()
        if not finite:
            raise InputError(
                f"{name!r} was to be set to numbers that are not finite, or too large for the {dtype} that the file holds."
            )
        return found


def _widened(content: Array) -> Array:
    """A tensor as numbers, read-only: bfloat16 words as float32, which holds them exactly."""
    if content.dtype != np.uint16:
        return content
    words = content.astype(np.uint32) << 16
    words.flags.writeable = False
    return words.view(np.float32)


def _same(one: Array, other: Array) -> bool:
    floats = one.dtype.kind == "f"
    if not np.array_equal(one.flat[:64], other.flat[:64], equal_nan=floats):  # most that differ do so at once
        return False
    return np.array_equal(one, other, equal_nan=floats)
