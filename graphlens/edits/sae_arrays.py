"""An SAE's arrays: its weights by name, and what they make of activations that a user gives."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from graphlens.edits.numbers import as_given, numbers_of
from graphlens.edits.sae_forward import Forward
from graphlens.errors import InputShapeError
from graphlens.file.sae_config import SaeConfig, ensure_fit
from graphlens.file.safetensors import Array


class SaeArrays:
    """An SAE's settings and weights, and its arithmetic in NumPy: the base of ``Sae``.

    Args:
        cfg: Its settings.
        weights: Its weights by SAELens's names, float32, of the shapes that ``cfg.shapes`` tells.

    Attributes:
        cfg: Its settings.
        weights: Its weights, read-only.

    Raises:
        InputError: Weights are absent or too many, have other shapes, or hold NaN.
    """

    def __init__(self, cfg: SaeConfig, weights: Mapping[str, Array]) -> None:
        ensure_fit(cfg, weights)
        self.cfg = cfg
        self.weights: Mapping[str, Array] = MappingProxyType({name: _read_only(weights[name]) for name in cfg.shapes})
        self._forward = Forward(cfg, self.weights)

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
        """The features of activations.

        Args:
            x: The activations, as ``values`` takes them; an array, or a tensor of torch.

        Returns:
            [..., d_sae], float32; a tensor for a tensor, without gradients.

        Raises:
            InputError: The activations have another width.
        """
        return as_given(self._forward.encoded(self._activations(x)), x)

    def decode(self, features: npt.ArrayLike) -> Array:
        """What features stand for, before any normalisation is undone.

        Args:
            features: [..., d_sae]; an array, or a tensor of torch.

        Returns:
            [..., d_out], float32; a tensor for a tensor.

        Raises:
            InputError: There are more or fewer features.
        """
        given = numbers_of(features, "features")
        if given.shape[-1:] != (self.cfg.d_sae,):
            raise InputShapeError(f"features: shape {list(given.shape)}, where [..., {self.cfg.d_sae}] is wanted.")
        return as_given(self._forward.decoded(given), features)

    @cached_property
    def directions(self) -> Array:
        """What an activation of 1 of each feature adds to ``hook_sae_recons``: float32 [d_sae, d_out].

        It is ``W_dec``, with rows of norm 1 where ``rescale_acts_by_decoder_norm`` is set.
        """
        return self._forward.directions()

    def output_scale(self, sae_input: Array) -> Array | None:
        """What ``hook_sae_recons`` is multiplied by on its way out of the SAE, where it normalises what it reads.

        Args:
            sae_input: The values at ``hook_sae_input``, float32 [..., d_in].

        Returns:
            float32 [..., 1]; None for an SAE that multiplies by nothing.
        """
        return self._forward.scale(sae_input)

    def __call__(self, x: npt.ArrayLike) -> Array:
        """The reconstruction of activations, or what a transcoder writes.

        Args:
            x: The activations, as ``values`` takes them; an array, or a tensor of torch.

        Returns:
            float32, of x's shape; [..., d_out] for a transcoder. A tensor for a tensor, without gradients.

        Raises:
            InputError: The activations have another width.
        """
        return as_given(self.values(x)["hook_sae_output"], x)

    def __repr__(self) -> str:
        of = f" of {self.cfg.model_name}" if self.cfg.model_name else ""
        to = f" -> {self.cfg.writes}" if self.cfg.writes != self.cfg.hook else ""
        return f"Sae({self.cfg.architecture}, {self.cfg.d_sae} features at {self.cfg.hook}{to}{of})"

    def _activations(self, x: npt.ArrayLike) -> Array:
        """What a user gave to be read, checked."""
        read = numbers_of(x, "x")
        axes = 2 if self.cfg.reshape_activations == "hook_z" else 1
        if read.ndim < axes or int(np.prod(read.shape[-axes:])) != self.cfg.d_in:
            wanted = "[..., head, d_head] with head x d_head" if axes == 2 else "[..., d_in] with d_in"
            raise InputShapeError(
                f"x: activations of shape {list(read.shape)}, where {wanted} = {self.cfg.d_in} is wanted."
            )
        return read


def _read_only(array: Array) -> Array:
    """A view that cannot be written into."""
    view = array.view()
    view.flags.writeable = False
    return view
