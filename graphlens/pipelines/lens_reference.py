"""The logits of a config of TransformerLens's, in NumPy, from its state dict: what exports of such configs are compared with.

Written from the config and not from a Spec, by the definitions of TransformerLens 3.9's HookedTransformer, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from graphlens.analysis.arrays import Array
from graphlens.file.manifest import Json


def lens_logits(settings: Mapping[str, Json], state: Mapping[str, Array], tokens: Array) -> Array:
    """The logits of tokens without padding.

    Args:
        settings: The fields of the config.
        state: The weights, in TransformerLens's names and shapes.
        tokens: int64 [b, p].

    Returns:
        float64 [b, p, d_vocab_out].
    """
    return _Reference(settings, state).logits(tokens)


class _Doubles(Mapping[str, Array]):
    """Weights in float64, each when it is asked for: all at once would take twice the model's memory."""

    def __init__(self, state: Mapping[str, Array]) -> None:
        self._state = state

    def __getitem__(self, name: str) -> Array:
        return self._state[name].astype(np.float64)

    def __contains__(self, name: object) -> bool:
        return name in self._state

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


class _Reference:
    """One model."""

    def __init__(self, settings: Mapping[str, Json], state: Mapping[str, Array]) -> None:
        self._settings, self._state = settings, _Doubles(state)
        kind = settings.get("normalization_type", "LN")
        self._kind = kind if isinstance(kind, str) else None

    def _flag(self, key: str, default: bool = False) -> bool:
        return bool(self._settings.get(key, default))

    def _text(self, key: str, default: str) -> str:
        return str(self._settings.get(key, default))

    def _number(self, key: str, default: float = 0.0) -> float:
        """A number, the default where it is not set."""
        found = self._settings.get(key)
        return float(found) if isinstance(found, int | float) else default

    def _norm(self, x: Array, name: str, centred: bool) -> Array:
        """A norm with the weights that there are."""
        if centred:
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + self._number("eps", 1e-5))
        weight, bias = self._state.get(f"{name}.w"), self._state.get(f"{name}.b")
        x = x if weight is None else x * weight
        return x if bias is None else x + bias

    def _usual(self, x: Array, name: str) -> Array:
        """A norm of the kind of the config."""
        return x if self._kind is None else self._norm(x, name, self._kind.startswith("LN"))

    def logits(self, tokens: Array) -> Array:
        """See ``lens_logits``."""
        x = self._state["embed.W_E"][tokens]
        if self._flag("post_embedding_ln"):
            x = self._norm(x, "embed.ln", True)
        kind, late = self._text("positional_embedding_type", "standard"), None
        if kind in ("standard", "shortformer"):
            learned = self._state["pos_embed.W_pos"][: tokens.shape[1]]
            x, late = (x + learned, None) if kind == "standard" else (x, learned)
        both, after = self._flag("parallel_attn_mlp"), self._flag("use_normalization_before_and_after")
        after = after and self._kind is not None
        for layer in range(int(self._number("n_layers"))):
            at = f"blocks.{layer}"
            attended = self._attention(self._usual(x, f"{at}.ln1"), late, layer)
            attended = self._norm(attended, f"{at}.ln1_post", False) if after else attended
            if self._flag("attn_only"):
                x = x + attended
                continue
            middle = x if both else x + attended
            fed = self._mlp(self._usual(middle, f"{at}.ln2"), f"{at}.mlp")
            fed = self._norm(fed, f"{at}.ln2_post", False) if after else fed
            x = x + attended + fed
        if self._kind is not None:
            rms = self._flag("final_rms") or self._kind.startswith("RMS")
            x = self._norm(x, "ln_final", not rms)
        return self._capped(x @ self._state["unembed.W_U"] + self._state["unembed.b_U"], "output_logits_soft_cap")

    def _capped(self, x: Array, key: str) -> Array:
        cap = self._number(key)
        return cap * np.tanh(x / cap) if cap > 0 else x

    def _attention(self, x: Array, late: Array | None, layer: int) -> Array:
        """Attention's output [b, p, d_model]."""
        at, placed = f"blocks.{layer}.attn", x if late is None else x + late
        made = {}
        for letter, read in (("Q", placed), ("K", placed), ("V", x)):
            once = f"{at}._W_{letter}" in self._state
            weight, bias = (self._state[f"{at}.{'_' if once else ''}{part}_{letter}"] for part in "Wb")
            made[letter] = np.einsum("bpD,hDd->bphd", read, weight) + bias
        heads, d_head = made["Q"].shape[2:]
        if self._flag("use_qk_norm"):
            made |= {letter: self._norm(made[letter], f"{at}.{letter.lower()}_norm", False) for letter in "QK"}
        clip = self._number("clip_qkv")
        if clip > 0:
            made = {letter: np.clip(array, -clip, clip) for letter, array in made.items()}
        local = False
        types = self._settings.get("attn_types")
        if self._flag("use_local_attn") and isinstance(types, list | tuple):
            local = types[layer] == "local"
        if self._text("positional_embedding_type", "standard") == "rotary":
            made |= {letter: self._rotated(made[letter], local, d_head) for letter in "QK"}
        made |= {letter: np.repeat(made[letter], heads // made[letter].shape[2], 2) for letter in "KV"}
        divisor = 1.0
        if self._flag("use_attn_scale", True):
            asked = self._number("attn_scale", -1.0)
            divisor = math.sqrt(d_head) if asked == -1 else asked
        divisor *= layer + 1 if self._flag("scale_attn_by_inverse_layer_idx") else 1
        scores = self._capped(np.einsum("bqhd,bkhd->bhqk", made["Q"], made["K"]) / divisor, "attn_scores_soft_cap")
        places = np.arange(x.shape[1])
        away = places[None, :] - places[:, None]
        if self._text("positional_embedding_type", "standard") == "alibi":
            slopes = 2.0 ** (-8 / heads * np.arange(1, heads + 1))
            scores = scores + slopes[:, None, None] * np.minimum(away, 0)
        if self._text("attention_dir", "causal") == "causal":
            seen = (away <= 0) & (away > -self._number("window_size") if local else True)
            scores = np.where(seen, scores, -np.inf)
        pattern = np.exp(scores - scores.max(-1, keepdims=True))
        pattern /= pattern.sum(-1, keepdims=True)
        z = np.einsum("bhqk,bkhd->bqhd", pattern, made["V"])
        found: Array = np.einsum("bphd,hdD->bpD", z, self._state[f"{at}.W_O"]) + self._state[f"{at}.b_O"]
        return found

    def _rotated(self, x: Array, local: bool, d_head: int) -> Array:
        """Queries or keys [b, p, h, d] rotated by their positions."""
        size = int(self._number("rotary_dim", d_head))
        base = self._number("rotary_base", 10000)
        base = self._number("rotary_base_local", base) if local else base
        wave = base ** (np.arange(size // 2) / (size / 2))
        wave = wave if local else wave * self._number("rotary_scaling_factor", 1.0)
        turns = np.exp(1j * np.arange(x.shape[1])[:, None] / wave)[:, None, :]
        pairs = self._flag("rotary_adjacent_pairs")
        first, second = (
            (x[..., :size:2], x[..., 1:size:2]) if pairs else (x[..., : size // 2], x[..., size // 2 : size])
        )
        turned, found = (first + 1j * second) * turns, x.copy()
        if pairs:
            found[..., :size:2], found[..., 1:size:2] = turned.real, turned.imag
        else:
            found[..., : size // 2], found[..., size // 2 : size] = turned.real, turned.imag
        return found

    def _mlp(self, x: Array, at: str) -> Array:
        """The MLP's output [b, p, d_model]."""
        act, gated = self._text("act_fn", "relu"), self._flag("gated_mlp")
        if gated:
            inner = _ACTIVATIONS[act](x @ self._state[f"{at}.W_gate"]) * (x @ self._state[f"{at}.W_in"])
            inner = inner + self._state[f"{at}.b_in"]
        else:
            inner = _ACTIVATIONS[act](x @ self._state[f"{at}.W_in"] + self._state[f"{at}.b_in"])
        if act == "solu_ln":
            inner = self._norm(inner, f"{at}.ln", True)
        found: Array = inner @ self._state[f"{at}.W_out"] + self._state[f"{at}.b_out"]
        return found


def _exact_gelu(x: Array) -> Array:
    erf = np.vectorize(math.erf, otypes=[np.float64])
    found: Array = x * (1 + erf(x / math.sqrt(2))) / 2
    return found


def _tanh_gelu(x: Array) -> Array:
    found: Array = x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    return found


def _solu(x: Array) -> Array:
    shares = np.exp(x - x.max(-1, keepdims=True))
    found: Array = x * shares / shares.sum(-1, keepdims=True)
    return found


_ACTIVATIONS = {
    "gelu": _exact_gelu,
    "gelu_python": _exact_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "swish": lambda x: x / (1 + np.exp(-x)),
    "solu": _solu,
    "solu_ln": _solu,
}
