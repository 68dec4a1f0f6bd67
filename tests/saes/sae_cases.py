"""SAEs of every architecture at every kind of place in a tiny random model of odd sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from graphlens import Sae

HEADS, D_HEAD, D_MLP, VOCABULARY, D_SAE = 5, 7, 41, 101, 53
D_MODEL = HEADS * D_HEAD
RESID, MLP_OUT, MID, Z = (
    f"blocks.1.{name}" for name in ("hook_resid_post", "hook_mlp_out", "hook_resid_mid", "attn.hook_z")
)
NORMED = "blocks.1.ln2.hook_normalized"
# Name of what is computed -> its architecture and settings.
KINDS: dict[str, dict[str, Any]] = {
    "standard": {},
    "standard-b_dec-unused": {"apply_b_dec_to_input": False},
    "standard-constant_norm_rescale": {"normalize_activations": "constant_norm_rescale"},
    "standard-layer_norm": {"normalize_activations": "layer_norm"},
    "standard-average": {"normalize_activations": "expected_average_only_in"},
    "gated": {"architecture": "gated"},
    "jumprelu": {"architecture": "jumprelu"},
    "topk": {"architecture": "topk", "k": 6},
    "topk-rescaled": {"architecture": "topk", "k": 6, "rescale_acts_by_decoder_norm": True},
}
TRANSCODERS: dict[str, dict[str, Any]] = {
    name: {"architecture": name}
    for name in ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
}
PLACES: dict[str, dict[str, Any]] = {
    "resid": {"hook": RESID},
    "mlp_out": {"hook": MLP_OUT},
    "hook_z": {"hook": Z, "reshape_activations": "hook_z"},
}
TRANSCODED = {"normed": {"hook": NORMED, "hook_out": MLP_OUT}, "mid": {"hook": MID, "hook_out": MLP_OUT}}


@dataclass(frozen=True)
class Case:
    """An SAE at a place, with or without its error term."""

    name: str
    sae: Sae
    error_term: bool


def made(seed: int = 0, width: int = D_MODEL, width_out: int | None = None, d_sae: int = D_SAE, **settings: Any) -> Sae:
    """A random SAE, none of whose numbers are those of an untrained one."""
    random = np.random.default_rng(seed)

    def numbers(*shape: int) -> Any:
        return (random.normal(size=shape) * 0.3).astype(np.float32)

    architecture = settings.get("architecture", "standard")
    out = width if width_out is None else width_out
    arrays: dict[str, Any] = {}
    if architecture == "gated":
        arrays = {name: numbers(d_sae) for name in ("b_gate", "b_mag", "r_mag")}
    if "jumprelu" in architecture:
        arrays["threshold"] = np.abs(numbers(d_sae))
    if "skip" in architecture:
        arrays["W_skip"] = numbers(out, width)
    b_enc = None if architecture == "gated" else numbers(d_sae)
    return Sae.from_arrays(numbers(width, d_sae), b_enc, numbers(d_sae, out), numbers(out), **arrays, **settings)


def cases() -> list[Case]:
    """Every architecture at every place, with and without an error term."""
    found = []
    for kinds, places in ((KINDS, PLACES), (TRANSCODERS, TRANSCODED)):
        for kind, settings in kinds.items():
            for place, where in places.items():
                for error_term in (False, True):
                    name = f"{kind}-{place}{'-error' if error_term else ''}"
                    found.append(Case(name, made(len(found), **settings, **where), error_term))
    return found
