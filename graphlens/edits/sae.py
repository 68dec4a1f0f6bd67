"""An SAE as data: its settings, its weights, and how it is kept, named and told from others."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Self, TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from graphlens.edits.numbers import numbers_of
from graphlens.edits.sae_arrays import SaeArrays
from graphlens.errors import InputError, InputShapeError, ModelFileError, checked_number, warn
from graphlens.file.digests import Mark, digest_of
from graphlens.file.folder import new_folder, user_path
from graphlens.file.sae_config import SaeConfig as SaeConfig
from graphlens.file.sae_folders import Asked, read_folder
from graphlens.file.sae_hub import fetched
from graphlens.file.sae_names import HOOKS as HOOKS
from graphlens.file.sae_saelens import write
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


class Sae(SaeArrays):
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
        super().__init__(cfg, weights)
        self.features = features
        self.files = MappingProxyType(dict(files or {}))
        self._opened = {path: _identity(path) for path, _ in self.files.values()}
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
        weights = {name: numbers_of(value, name) for name, value in given.items() if value is not None}
        for name in ("W_enc", "W_dec"):
            if weights[name].ndim != 2:
                raise InputShapeError(f"{name}: a matrix is wanted, not an array of shape {list(weights[name].shape)}.")
        (d_in, d_sae), d_out = weights["W_enc"].shape, weights["W_dec"].shape[1]
        if str(architecture).endswith("transcoder"):
            settings.setdefault("apply_b_dec_to_input", False)
        cfg = SaeConfig(architecture, d_in, d_sae, hook, d_out=None if d_out == d_in else d_out, **settings)
        return cls(cfg, weights)

    @classmethod
    def from_folder(
        cls,
        path: str | os.PathLike[str],
        hook: str | None = None,
        hook_out: str | None = None,
        model_name: str | None = None,
    ) -> Self:
        """Opens the SAE in a folder. No pickle is read; weights in float32 are mapped, not loaded.

        Args:
            path: A folder in SAELens's layout, Gemma Scope's, sparsify's or dictionary_learning's.
            hook: The hook point that it reads, in place of what the files say; needed where they say none.
            hook_out: The hook point that a transcoder stands for, likewise.
            model_name: The model that it was trained on, likewise.

        Returns:
            The SAE.

        Raises:
            ModelFileError: There is no SAE that can be read, or a file is damaged, or holds NaN.
        """
        folder = user_path(path)
        stored = read_folder(folder, Asked(hook, hook_out, model_name))
        try:
            return cls(stored.cfg, stored.weights, stored.files)
        except InputError as error:
            raise ModelFileError(f"{folder}: {error}") from error

    @classmethod
    def from_pretrained(
        cls,
        release: str,
        sae_id: str,
        hook: str | None = None,
        hook_out: str | None = None,
        model_name: str | None = None,
        norm_scaling_factor: float | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Opens an SAE of the Hugging Face hub, downloaded unless it is in the hub's cache; or one that ships with graphlens.

        Args:
            release: The repository: "owner/name". "tiny-gpt2-saes" are those of tiny-gpt2 that ship with graphlens.
            sae_id: The SAE's folder in it, "." for the repository itself.
            hook: The hook point that it reads, in place of what the files say; needed where they say none.
            hook_out: The hook point that a transcoder stands for, likewise.
            model_name: The model that it was trained on, likewise.
            norm_scaling_factor: What activations are multiplied by for an SAE with
                ``normalize_activations="expected_average_only_in"``; see ``with_norm_folded``.
            revision: The hub's branch, tag or commit.
            token: The hub's access token, or True for the one of the last login.
            cache_dir: The hub's cache folder.

        Returns:
            The SAE.

        Raises:
            InputError: ``release`` is no repository: SAELens's names of releases are not known here.
            ModelFileError: There is no SAE there that can be read, or the hub cannot be reached and nothing is cached.
        """
        made = cls.from_folder(fetched(release, sae_id, revision, token, cache_dir), hook, hook_out, model_name)
        if norm_scaling_factor is not None:
            return made.with_norm_folded(norm_scaling_factor)
        if made.cfg.normalize_activations == "expected_average_only_in":
            warn(
                f"{release} {sae_id}: this SAE was trained on activations times a factor that its files do not tell. Pass "
                "norm_scaling_factor=, unless it is in the weights already."
            )
        return made

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the SAE in SAELens's layout, which opens it: ``cfg.json`` and ``sae_weights.safetensors``.

        Args:
            folder: The folder to make: absent, or empty.

        Raises:
            ExportError: It is not empty, or cannot be written.
        """
        with new_folder(folder) as stage:
            write(stage, self.cfg, self.weights)

    def with_norm_folded(self, factor: float) -> Self:
        """The SAE of activations as the model has them, where it was trained on these times a factor.

        Args:
            factor: The factor, by which the average norm of the activations became the square root of their width.

        Returns:
            An SAE with other ``W_enc``, ``W_dec`` and ``b_dec``, and nothing to normalise.

        Raises:
            InputError: It is no positive number, or the SAE normalises in another way.
        """
        by = np.float32(checked_number(factor, "norm_scaling_factor", float, least=1e-12))
        if self.cfg.normalize_activations not in ("none", "expected_average_only_in") or self.cfg.is_transcoder:
            raise InputError(
                f"norm_scaling_factor: the SAE normalises by {self.cfg.normalize_activations!r}, and takes no factor."
            )
        weights = {**self.weights, "W_enc": self.W_enc * by, "W_dec": self.W_dec / by, "b_dec": self.b_dec / by}
        kept = {name: place for name, place in self.files.items() if name not in ("W_enc", "W_dec", "b_dec")}
        return type(self)(replace(self.cfg, normalize_activations="none"), weights, kept)

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self  # nothing of it changes

    def __reduce__(self) -> tuple[object, ...]:
        # The weights travel: what lies at the files' paths elsewhere, or later, may be another SAE.
        return type(self), (self.cfg, dict(self.weights), {}, self.features)

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
        places: dict[str, list[str | int]] = {}
        there = {path for path, opened in self._opened.items() if opened is not None and _identity(path) == opened}
        for name, (path, entry) in sorted(self.files.items()):
            if path in there:
                places[name] = [digest_of(path), entry.offset, entry.length]
        kept = {name: self._digest(name) for name in sorted(self.weights) if name not in places}
        said = [self.cfg.plain(), kept, places]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def _digest(self, name: str) -> str:
        """The digest of a weight that lies in memory, or in a file whose path is gone or another's by now."""
        if name not in self._digests:
            self._digests[name] = hashlib.sha256(np.ascontiguousarray(self.weights[name]).data).hexdigest()
        return self._digests[name]

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {}

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
        if not isinstance(features, Iterable):
            raise InputError(f"features={features!r:.60}: a list of the features' numbers is wanted.")
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


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file a path leads to, whatever is in it; None for none. A file that is mapped keeps its own while it is."""
    mark = Mark.of(path)
    return None if mark is None else (mark.inode, mark.device)
