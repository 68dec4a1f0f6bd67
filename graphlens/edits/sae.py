"""An SAE as data: its settings, its weights, and how it is kept, named and told from others."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Self, TypedDict, Unpack, cast

import numpy as np
import numpy.typing as npt

from graphlens.edits.sae_forward import Forward
from graphlens.edits.selection import Tensor, of_tensor
from graphlens.errors import InputError, InputShapeError, checked_number
from graphlens.file.digests import digest_of
from graphlens.file.sae_config import HOOKS as HOOKS
from graphlens.file.sae_config import SaeConfig as SaeConfig
from graphlens.file.safetensors import Array, TensorEntry

if TYPE_CHECKING:
    from graphlens.file.manifest import Json


class Settings(TypedDict, total=False):
    """Settings that ``Sae.from_arrays`` takes beside the arrays: those of ``SaeConfig``."""

    hook_out: str | None
    k: int | None
    apply_b_dec_to_input: bool
    normalize_activations: str
    reshape_activations: str
    rescale_acts_by_decoder_norm: bool
    model_name: str | None
    context_size: int | None
    prepend_bos: bool | None
    metadata: Mapping[str, Json]


class Sae:
    """A sparse autoencoder or a transcoder: a dictionary of features of one hook point's activations.

    Args:
        cfg: Its settings.
        weights: Its weights by SAELens's names, float32, of the shapes that ``cfg.shapes`` tells.
        files: Where they lie in safetensors files, for those that do.

    Attributes:
        cfg: Its settings.
        weights: Its weights, read-only: ``W_enc`` [d_in, d_sae], ``W_dec`` [d_sae, d_out], ``b_dec`` [d_out], and those of its
            architecture: ``b_enc``, ``threshold``, ``b_gate``, ``b_mag`` and ``r_mag`` [d_sae], ``W_skip`` [d_out, d_in].
        files: Weight -> the safetensors file that it lies in, and where in it.
        features: Which features of a wider SAE these are, after ``only``; None for all.

    Raises:
        InputError: Weights are absent or too many, have other shapes, or hold NaN.
    """

    def __init__(
        self,
        cfg: SaeConfig,
        weights: Mapping[str, Array],
        files: Mapping[str, tuple[Path, TensorEntry]] | None = None,
        features: tuple[int, ...] | None = None,
    ) -> None:
        _ensure_fit(cfg, weights)
        self.cfg, self.features = cfg, features
        self.weights: Mapping[str, Array] = MappingProxyType({name: _read_only(weights[name]) for name in cfg.shapes})
        self.files = MappingProxyType(dict(files or {}))
        self._forward = Forward(cfg, self.weights)
        self._wider: tuple[Sae, str] | None = None

    @classmethod
    def from_arrays(
        cls,
        W_enc: npt.ArrayLike,  # noqa: N803
        b_enc: npt.ArrayLike | None,
        W_dec: npt.ArrayLike,  # noqa: N803
        b_dec: npt.ArrayLike,
        hook: str,
        architecture: str = "standard",
        *,
        threshold: npt.ArrayLike | None = None,
        b_gate: npt.ArrayLike | None = None,
        b_mag: npt.ArrayLike | None = None,
        r_mag: npt.ArrayLike | None = None,
        W_skip: npt.ArrayLike | None = None,  # noqa: N803
        **settings: Unpack[Settings],
    ) -> Self:
        """Makes an SAE of arrays, or of tensors of torch. They are copied.

        Args:
            W_enc: The encoder, [d_in, d_sae].
            b_enc: Its bias, [d_sae]; None for a gated SAE.
            W_dec: The decoder, [d_sae, d_out]; d_out is d_in, except for transcoders.
            b_dec: Its bias, [d_out].
            hook: The hook point that it reads, by TransformerLens's name: "blocks.2.hook_resid_post".
            architecture: What is computed; see ``SaeConfig``.
            threshold: What a jumprelu's features must exceed, [d_sae].
            b_gate: A gated SAE's bias of the gate, [d_sae].
            b_mag: Its bias of the magnitude, [d_sae].
            r_mag: Its log scale of the magnitude, [d_sae].
            W_skip: A skip transcoder's direct way, [d_out, d_in].
            **settings: The other settings; see ``SaeConfig``.

        Returns:
            The SAE.

        Raises:
            InputError: An array has another shape than the others ask for or holds NaN, the architecture lacks one or has no
                use for it, or a setting is none that it takes.
        """
        given = {
            "W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "threshold": threshold, "b_gate": b_gate,
            "b_mag": b_mag, "r_mag": r_mag, "W_skip": W_skip,
        }  # fmt: skip
        weights = {name: _numbers(value, name) for name, value in given.items() if value is not None}
        for name in ("W_enc", "W_dec"):
            if weights[name].ndim != 2:
                raise InputShapeError(f"{name}: a matrix is wanted, not an array of shape {list(weights[name].shape)}.")
        (d_in, d_sae), d_out = weights["W_enc"].shape, weights["W_dec"].shape[1]
        if architecture.endswith("transcoder"):
            settings.setdefault("apply_b_dec_to_input", False)
        cfg = SaeConfig(architecture, d_in, d_sae, hook, d_out=None if d_out == d_in else d_out, **settings)
        return cls(cfg, weights)

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> Self:
        """Not there yet."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, release: str, sae_id: str) -> Self:
        """Not there yet."""
        raise NotImplementedError

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Not there yet."""
        raise NotImplementedError

    def key(self) -> str:
        """A digest of the settings and of every byte of the weights: equal for equal SAEs that lie in the same way.

        It is cheap the second time: a file is read again only if it was touched.

        Returns:
            Hexadecimal digits.

        Raises:
            ModelFileError: A file of weights is being written to.
        """
        if self._wider is not None:
            wider, chosen = self._wider
            return hashlib.sha256(f"{wider.key()} {chosen}".encode()).hexdigest()
        places = {
            name: [digest_of(path), entry.offset, entry.length] for name, (path, entry) in sorted(self.files.items())
        }
        said = [self.cfg.plain(), self._digests, places]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _digests(self) -> dict[str, str]:
        """The digests of the weights that lie in memory."""
        return {
            name: hashlib.sha256(np.ascontiguousarray(array)).hexdigest()
            for name, array in sorted(self.weights.items())
            if name not in self.files
        }

    def only(self, features: Sequence[int]) -> Self:
        """The SAE of some features alone, which keeps a wide one's others out of memory.

        Each feature's activation is what it was; the reconstruction is of these alone.

        Args:
            features: Their numbers, in the order wanted; negative ones count from the end.

        Returns:
            An SAE of as many features.

        Raises:
            InputError: There is no such feature, one is named twice, or the SAE is a topk, whose features depend on all others.
        """
        chosen = [
            checked_number(each, "a feature", least=-self.cfg.d_sae, most=self.cfg.d_sae - 1) % self.cfg.d_sae
            for each in features
        ]
        if not chosen or len(set(chosen)) < len(chosen):
            raise InputError(f"features={list(features)!r:.60}: each feature is named once, and there is at least one.")
        if self.cfg.activation == "topk":
            raise InputError("features=: whether a topk SAE keeps a feature depends on all others. Use the whole SAE.")
        weights = {}
        for name, array in self.weights.items():
            axes = [axis for axis, size in enumerate(self._axes(name)) if size]
            weights[name] = np.ascontiguousarray(np.take(array, chosen, axis=axes[0])) if axes else array
        numbers = chosen if self.features is None else [self.features[each] for each in chosen]
        made = type(self)(replace(self.cfg, d_sae=len(chosen)), weights, features=tuple(numbers))
        made._wider = (self, str(chosen))
        return made

    @staticmethod
    def _axes(name: str) -> tuple[bool, ...]:
        """For each axis of a weight, whether it is that of the features."""
        return {"W_enc": (False, True), "W_dec": (True, False), "b_dec": (False,), "W_skip": (False, False)}.get(
            name, (True,)
        )

    @property
    def W_enc(self) -> Array:  # noqa: N802
        """The encoder, [d_in, d_sae]."""
        return self.weights["W_enc"]

    @property
    def W_dec(self) -> Array:  # noqa: N802
        """The decoder, [d_sae, d_out]."""
        return self.weights["W_dec"]

    @property
    def b_enc(self) -> Array | None:
        """The encoder's bias, [d_sae]; None for a gated SAE."""
        return self.weights.get("b_enc")

    @property
    def b_dec(self) -> Array:
        """The decoder's bias, [d_out]."""
        return self.weights["b_dec"]

    @property
    def threshold(self) -> Array | None:
        """What a jumprelu's features must exceed, [d_sae]; None for others."""
        return self.weights.get("threshold")

    def values(self, x: npt.ArrayLike, error_term: bool = False) -> dict[str, Array]:
        """The value at each of its hook points.

        Args:
            x: The activations that it reads, [..., d_in]; [..., head, d_head] with ``reshape_activations="hook_z"``.
            error_term: True adds what it does not reconstruct to its output.

        Returns:
            A name of ``HOOKS`` -> its value, float32; "hook_sae_error" with an error term only.

        Raises:
            InputError: The activations have another width.
        """
        return self._forward.values(self._activations(x), error_term)

    def encode(self, x: npt.ArrayLike) -> Array:
        """The features of activations."""
        read = self._activations(x)
        return self._forward.post(*self._forward.pre(self._forward.joined(read)))

    def decode(self, features: npt.ArrayLike) -> Array:
        """What features stand for."""
        return self._forward.decoded(_numbers(features, "features"))

    def __call__(self, x: npt.ArrayLike) -> Array:
        """The reconstruction of activations."""
        return self.values(x)["hook_sae_output"]

    def _activations(self, x: npt.ArrayLike) -> Array:
        """What a user gave to be read, checked."""
        read = _numbers(x, "x")
        axes = 2 if self.cfg.reshape_activations == "hook_z" else 1
        if read.ndim < axes or int(np.prod(read.shape[-axes:])) != self.cfg.d_in:
            wanted = "[..., head, d_head] with head x d_head" if axes == 2 else "[..., d_in] with d_in"
            raise InputShapeError(
                f"x: activations of shape {list(read.shape)}, where {wanted} = {self.cfg.d_in} is wanted."
            )
        return read


def _numbers(value: npt.ArrayLike, what: str) -> Array:
    """An array or a tensor of torch as a float32 array of its own."""
    if hasattr(value, "detach"):
        value = of_tensor(cast(Tensor, value), what)
    try:
        return np.array(value, np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what}: an array of numbers is wanted ({error}).") from error


def _read_only(array: Array) -> Array:
    """A view that cannot be written into."""
    view = array.view()
    view.flags.writeable = False
    return view


def _ensure_fit(cfg: SaeConfig, weights: Mapping[str, Array]) -> None:
    """Raises InputError unless the weights are those that the settings ask for."""
    shapes = cfg.shapes
    if absent := [name for name in shapes if name not in weights]:
        raise InputError(f"{', '.join(absent)}: a {cfg.architecture} SAE needs it, and it is not there.")
    if extra := [name for name in weights if name not in shapes]:
        raise InputError(f"{', '.join(extra)}: a {cfg.architecture} SAE has no such weight.")
    for name, shape in shapes.items():
        array = weights[name]
        if array.shape != shape:
            raise InputShapeError(
                f"{name}: its shape is {list(array.shape)}, and that of a {cfg.architecture} SAE of {cfg.d_sae} features of "
                f"activations of width {cfg.d_in} is {list(shape)}."
            )
        if np.isnan(array.min()) or (name != "threshold" and not np.isfinite(max(array.max(), -array.min()))):
            raise InputError(f"{name}: it holds NaN or infinity. The file is damaged, or the training failed.")
