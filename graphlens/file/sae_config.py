"""An SAE's settings: what each is called and may be, and which weights of which shapes they ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from graphlens.errors import InputError, InputShapeError, checked_number, is_one_of
from graphlens.file.safetensors import Array

if TYPE_CHECKING:
    from graphlens.file.manifest import Json

NORMALISATIONS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")
SHAPES = ("none", "hook_z")
# Architecture -> the weights that it has beside W_enc, W_dec and b_dec.
WEIGHTS: Mapping[str, tuple[str, ...]] = {
    "standard": ("b_enc",),
    "gated": ("b_gate", "b_mag", "r_mag"),
    "jumprelu": ("b_enc", "threshold"),
    "topk": ("b_enc",),
    "transcoder": ("b_enc",),
    "skip_transcoder": ("b_enc", "W_skip"),
    "jumprelu_transcoder": ("b_enc", "threshold"),
    "jumprelu_skip_transcoder": ("b_enc", "threshold", "W_skip"),
}
_KNOWN = ", ".join(WEIGHTS)


@dataclass(frozen=True)
class SaeConfig:
    """An SAE's settings.

    Attributes:
        architecture: What is computed: "standard", "gated", "jumprelu", "topk", "transcoder", "skip_transcoder",
            "jumprelu_transcoder" or "jumprelu_skip_transcoder".
        d_in: Width of the activations that it reads. With ``reshape_activations="hook_z"`` it is heads times their width.
        d_sae: Number of features.
        hook: The hook point that it reads, by TransformerLens's name.
        hook_out: The hook point that a transcoder stands for; None for the same one.
        d_out: Width of what a transcoder writes; None for ``d_in``.
        k: How many features a token keeps. "topk" needs it; a transcoder that has it keeps its ``k`` largest too.
        apply_b_dec_to_input: True if ``b_dec`` is taken from the input first. A transcoder never does.
        normalize_activations: "none"; "expected_average_only_in", which computes nothing (the factor is folded into weights);
            "constant_norm_rescale"; or "layer_norm".
        reshape_activations: "hook_z" if heads are joined before it, and parted after it; else "none".
        rescale_acts_by_decoder_norm: True if features are chosen by their activation times their row's norm in ``W_dec``.
        model_name: The model that it was trained on.
        context_size: Tokens of the texts that it was trained on.
        prepend_bos: True if these began with a BOS token.
        metadata: All else that its file says, which ``save`` writes again.
    """

    architecture: str
    d_in: int
    d_sae: int
    hook: str
    hook_out: str | None = None
    d_out: int | None = None
    k: int | None = None
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    reshape_activations: str = "none"
    rescale_acts_by_decoder_norm: bool = False
    model_name: str | None = None
    context_size: int | None = None
    prepend_bos: bool | None = None
    metadata: Mapping[str, Json] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if not is_one_of(self.architecture, WEIGHTS):
            raise InputError(
                f"architecture={self.architecture!r:.60}: no SAE of this architecture can be run. There are: {_KNOWN}."
            )
        for name in ("d_in", "d_sae", "d_out", "k"):
            size = getattr(self, name)
            if size is not None or name in ("d_in", "d_sae"):
                object.__setattr__(self, name, checked_number(size, name, least=1))
        for name in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm"):
            object.__setattr__(self, name, checked_number(getattr(self, name), name, bool))
        if not isinstance(self.hook, str) or not self.hook:
            raise InputError(
                f"hook={self.hook!r:.60}: it is not known which hook point the SAE reads. Pass hook=, like "
                "'blocks.2.hook_resid_post'."
            )
        for name, allowed in (("normalize_activations", NORMALISATIONS), ("reshape_activations", SHAPES)):
            if not is_one_of(getattr(self, name), allowed):
                raise InputError(f"{name}={getattr(self, name)!r:.60}: not known. There are: {', '.join(allowed)}.")
        if self.is_transcoder and self.apply_b_dec_to_input:
            raise InputError(
                f"apply_b_dec_to_input=True: a {self.architecture} has no b_dec to take from its input. Pass False."
            )
        if self.is_transcoder and self.reshape_activations != "none":
            raise InputError(
                f"reshape_activations={self.reshape_activations!r}: a {self.architecture} joins no heads. Pass 'none'."
            )
        if not self.is_transcoder and (self.hook_out is not None or self.width_out != self.d_in):
            raise InputError(
                f"hook_out={self.hook_out!r}, d_out={self.d_out!r}: only a transcoder writes elsewhere than it reads, and this "
                f"is a {self.architecture} SAE."
            )
        if self.architecture == "topk" and self.k is None:
            raise InputError("k=None: a topk SAE needs k, the number of features that a token keeps.")
        if self.k is not None and (self.k > self.d_sae or self.activation != "topk"):
            raise InputError(
                f"k={self.k}: "
                + (
                    f"there are {self.d_sae} features."
                    if self.k > self.d_sae
                    else f"a {self.architecture} SAE has none."
                )
            )
        if self.rescale_acts_by_decoder_norm and self.activation != "topk":
            raise InputError("rescale_acts_by_decoder_norm=True: only topk chooses by what it rescales.")

    @property
    def is_transcoder(self) -> bool:
        """True if it stands for what one hook point becomes at another: no error term is to be had from its input."""
        return self.architecture.endswith("transcoder")

    @property
    def has_skip(self) -> bool:
        """True if ``W_skip`` times its input is added to what it writes."""
        return "W_skip" in WEIGHTS[self.architecture]

    @property
    def activation(self) -> str:
        """How features come of pre-activations: "relu", "gated", "jumprelu" or "topk"."""
        if self.architecture.startswith("jumprelu"):
            return "jumprelu"
        if self.architecture == "gated":
            return "gated"
        return "topk" if self.architecture == "topk" or (self.is_transcoder and self.k is not None) else "relu"

    @property
    def writes(self) -> str:
        """The hook point whose value it stands for."""
        return self.hook if self.hook_out is None else self.hook_out

    @property
    def width_out(self) -> int:
        """Width of what it writes."""
        return self.d_in if self.d_out is None else self.d_out

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight that it has, by name, and its shape."""
        of = {
            "W_enc": (self.d_in, self.d_sae),
            "W_dec": (self.d_sae, self.width_out),
            "b_dec": (self.width_out,),
            "W_skip": (self.width_out, self.d_in),
        }
        return {name: of.get(name, (self.d_sae,)) for name in ("W_enc", "W_dec", "b_dec", *WEIGHTS[self.architecture])}

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (*self.plain().values(), dict(self.metadata))

    def plain(self) -> dict[str, Json]:
        """The settings alone, without ``metadata``, as JSON has them."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "metadata"}


def ensure_fit(cfg: SaeConfig, weights: Mapping[str, Array]) -> None:
    """Makes sure that weights are those that settings ask for.

    Args:
        cfg: The settings.
        weights: The weights.

    Raises:
        InputError: Weights are absent or too many, have other shapes, or hold NaN.
    """
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
