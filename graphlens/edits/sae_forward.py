"""What an SAE computes, in NumPy: features of activations, activations of features, and the value at each of its hook points."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from graphlens.file.sae_config import SaeConfig
from graphlens.file.safetensors import Array

_EPSILON = 1e-5  # of the normalisation "layer_norm"


class Forward:
    """An SAE's arithmetic, in float32.

    Args:
        cfg: Its settings.
        weights: Its weights, as ``cfg.shapes`` has them.
    """

    def __init__(self, cfg: SaeConfig, weights: Mapping[str, Array]) -> None:
        self.cfg, self._weights = cfg, weights

    def joined(self, x: Array) -> Array:
        """``hook_sae_input``: the activations as they are, or with their heads joined.

        Args:
            x: [..., d_in], or [..., head, d_head] with ``reshape_activations="hook_z"``.

        Returns:
            float32[..., d_in].
        """
        x = np.asarray(x, np.float32)
        return x.reshape(*x.shape[:-2], -1) if self.cfg.reshape_activations == "hook_z" else x

    def pre(self, joined: Array) -> tuple[Array, Array]:
        """``hook_sae_acts_pre``, and what a gated SAE opens its features by.

        Args:
            joined: float32[..., d_in].

        Returns:
            The pre-activations, and the gate's: float32[..., d_sae] each. Where there is no gate it is the same array.
        """
        w = self._weights
        x, _ = self._normalised(joined)
        if self.cfg.apply_b_dec_to_input:
            x = x - w["b_dec"]
        if self.cfg.activation != "gated":
            pre = x @ w["W_enc"] + w["b_enc"]
            return pre, pre
        product = x @ w["W_enc"]
        return product * np.exp(w["r_mag"]) + w["b_mag"], product + w["b_gate"]

    def post(self, pre: Array, gate: Array) -> Array:
        """``hook_sae_acts_post``: the features.

        Args:
            pre: The pre-activations, float32[..., d_sae].
            gate: What a gated SAE opens its features by, float32[..., d_sae].

        Returns:
            float32[..., d_sae].
        """
        rectified = np.maximum(pre, np.float32(0))
        match self.cfg.activation:
            case "gated":
                return rectified * (gate > 0)
            case "jumprelu":
                return rectified * (pre > self._weights["threshold"])
            case "topk":
                return self._largest(pre)
        return rectified

    def encoded(self, x: Array) -> Array:
        """The features of what the SAE reads.

        Args:
            x: The activations, as ``joined`` takes them.

        Returns:
            float32[..., d_sae].
        """
        return self.post(*self.pre(self.joined(x)))

    def decoded(self, features: Array) -> Array:
        """``hook_sae_recons``: what features stand for, before any normalisation is undone.

        Args:
            features: [..., d_sae].

        Returns:
            float32[..., d_out].
        """
        features = np.asarray(features, np.float32)
        if self.cfg.rescale_acts_by_decoder_norm:
            features = features * (1 / self._norms())
        made: Array = features @ self._weights["W_dec"] + self._weights["b_dec"]
        return made

    def back(self, recons: Array, x: Array) -> Array:
        """The reconstruction in the scale and the shape of what was read.

        Args:
            recons: float32[..., d_out].
            x: What the SAE read, by which its normalisation is undone and its heads are parted, and that a skip adds to.

        Returns:
            float32, of x's shape; [..., d_out] for a transcoder.
        """
        x = np.asarray(x, np.float32)
        if self.cfg.is_transcoder:
            return recons + x @ self._weights["W_skip"].T if self.cfg.has_skip else recons
        _, (scale, shift) = self._normalised(self.joined(x))
        if scale is not None:
            recons = recons * scale
        if shift is not None:
            recons = recons + shift
        return recons.reshape(x.shape)

    def values(self, x: Array, error_term: bool = False) -> dict[str, Array]:
        """The value at each hook point of the SAE.

        Args:
            x: The activations that it reads.
            error_term: True adds what it does not reconstruct to its output.

        Returns:
            Hook name, without what comes before it -> its value; "hook_sae_error" with an error term only.
        """
        joined = self.joined(x)
        pre, gate = self.pre(joined)
        post = self.post(pre, gate)
        recons = self.decoded(post)
        output = self.back(recons, x)
        found = {
            "hook_sae_input": joined,
            "hook_sae_acts_pre": pre,
            "hook_sae_acts_post": post,
            "hook_sae_recons": recons,
        }
        if error_term:
            found["hook_sae_error"] = np.asarray(x, np.float32) - output
            output = output + found["hook_sae_error"]
        return {**found, "hook_sae_output": output}

    def _normalised(self, x: Array) -> tuple[Array, tuple[Array | None, Array | None]]:
        """The input in the scale that the SAE was trained in, and by what factor and shift it goes back."""
        if self.cfg.normalize_activations == "constant_norm_rescale":
            factor = np.float32(self.cfg.d_in**0.5) / np.linalg.norm(x, axis=-1, keepdims=True)
            return x * factor, (1 / factor, None)
        if self.cfg.normalize_activations == "layer_norm":
            mean = x.mean(axis=-1, keepdims=True)
            deviation = (x - mean).std(axis=-1, keepdims=True, ddof=1)  # over d_in - 1, as torch's
            return (x - mean) / (deviation + np.float32(_EPSILON)), (deviation, mean)
        return x, (None, None)

    def _norms(self) -> Array:
        """The norm of each feature's row in ``W_dec``, [d_sae]."""
        norms: Array = np.linalg.norm(self._weights["W_dec"], axis=-1)
        return norms

    def _largest(self, pre: Array) -> Array:
        """The ``k`` largest of each token's pre-activations, rectified, the others 0. Of equals the first are kept."""
        if self.cfg.rescale_acts_by_decoder_norm:
            pre = pre * self._norms()
        assert self.cfg.k is not None  # the settings were checked
        kept = np.argsort(-pre, axis=-1, kind="stable")[..., : self.cfg.k]
        made = np.zeros_like(pre)
        np.put_along_axis(made, kept, np.maximum(np.take_along_axis(pre, kept, axis=-1), 0), axis=-1)
        return made
