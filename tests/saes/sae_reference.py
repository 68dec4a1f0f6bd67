"""SAEs in torch, from the published formulas: what graphs with SAEs are compared with. Edits are functions by hook point."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from graphlens import Sae

Tensor = torch.Tensor
Edit = Callable[[Tensor], Tensor]


@dataclass
class Passed:
    """One pass of an SAE: its values by hook point, and what goes on."""

    values: dict[str, Tensor] = field(default_factory=dict)

    @property
    def output(self) -> Tensor:
        return self.values["hook_sae_output"]

    def arrays(self) -> dict[str, Any]:
        return {name: value.detach().numpy() for name, value in self.values.items()}


def passed(
    sae: Sae,
    x: Tensor,
    error_term: bool = False,
    edits: Mapping[str, Edit] | None = None,
    original: Tensor | None = None,
    left_out: Tensor | None = None,
) -> Passed:
    """An SAE of activations. ``original`` is what a transcoder stands for; ``left_out`` is True at tokens without the SAE."""
    original = x if original is None else original
    found = Passed()
    made = _made(sae, x, edits or {}, found.values)
    mask = None if left_out is None else left_out.reshape(*left_out.shape, *[1] * (original.ndim - 2))
    if error_term:
        with torch.no_grad():
            error = original - _made(sae, x, {}, {})
            error = error if mask is None else torch.where(mask, torch.zeros(()), error)
        error = _at("hook_sae_error", error, edits or {}, found.values)
        made = made + error
    made = made if mask is None else torch.where(mask, original, made)
    _at("hook_sae_output", made, edits or {}, found.values)
    return found


def _at(name: str, value: Tensor, edits: Mapping[str, Edit], values: dict[str, Tensor]) -> Tensor:
    value = edits[name](value) if name in edits else value * 1
    if value.requires_grad:
        value.retain_grad()
    values[name] = value
    return value


def _made(sae: Sae, x: Tensor, edits: Mapping[str, Edit], values: dict[str, Tensor]) -> Tensor:
    """What an SAE makes of activations, without an error term."""
    cfg = sae.cfg
    w = {name: torch.from_numpy(np.array(weight)) for name, weight in sae.weights.items()}
    read = x.flatten(-2) if cfg.reshape_activations == "hook_z" else x
    read = _at("hook_sae_input", read, edits, values)
    back: Edit = lambda made: made  # noqa: E731
    if cfg.normalize_activations == "constant_norm_rescale":
        coefficient = cfg.d_in**0.5 / read.norm(dim=-1, keepdim=True)
        read, back = read * coefficient, lambda made: made / coefficient
    elif cfg.normalize_activations == "layer_norm":
        mean = read.mean(-1, keepdim=True)
        deviation = (read - mean).std(-1, keepdim=True)
        read, back = (read - mean) / (deviation + 1e-5), lambda made: made * deviation + mean
    if cfg.apply_b_dec_to_input:
        read = read - w["b_dec"]
    if cfg.architecture == "gated":
        is_open = (read @ w["W_enc"] + w["b_gate"] > 0).float()
        pre = _at("hook_sae_acts_pre", read @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"], edits, values)
        post = is_open * pre.relu()
    else:
        pre = _at("hook_sae_acts_pre", read @ w["W_enc"] + w["b_enc"], edits, values)
        post = pre.relu()
        if "threshold" in w:
            post = post * (pre > w["threshold"])
        elif cfg.k is not None:
            scaled = pre * w["W_dec"].norm(dim=-1) if cfg.rescale_acts_by_decoder_norm else pre
            largest, places = scaled.topk(cfg.k, dim=-1)
            post = torch.zeros_like(scaled).scatter(-1, places, largest.relu())
    post = _at("hook_sae_acts_post", post, edits, values)
    scaled = post / w["W_dec"].norm(dim=-1) if cfg.rescale_acts_by_decoder_norm else post
    made = _at("hook_sae_recons", scaled @ w["W_dec"] + w["b_dec"], edits, values)
    if cfg.is_transcoder:
        return made + x @ w["W_skip"].T if "W_skip" in w else made
    return back(made).reshape(x.shape)
