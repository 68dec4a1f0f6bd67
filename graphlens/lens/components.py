"""What the parts of a model are, by the names of TransformerLens's classes: for ``isinstance`` and for annotations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from graphlens.errors import InputError
from graphlens.model import parts
from graphlens.model.methods import encoder_weights


class Kind(type):
    """A kind of part. Parts of a model are instances of it where they fit; none is made by calling it."""

    part: type
    fits: Callable[[parts.Component], bool]

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, parts.Component) and isinstance(instance, cls.part) and cls.fits(instance)

    def __call__(cls, *args: object, **options: object) -> NoReturn:
        """Refuses to make a part by itself.

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"{cls.__name__}: the parts of a graphlens model are pieces of its graph, made with it. Use those of a model "
            "(model.blocks[0].mlp, model.ln_final), or build a whole model: HookedTransformer(HookedTransformerConfig(...))."
        )


def _kind(name: str, what: str, part: type, fits: Callable[[parts.Component], bool] = lambda _: True) -> Kind:
    """A kind of part.

    Args:
        name: TransformerLens's name of the class.
        what: What its docstring says.
        part: graphlens's class.
        fits: True for the parts of that class that are of this kind.
    """
    return Kind(name, (), {"__doc__": what, "part": part, "fits": staticmethod(fits)})


def _norm(kind: str, folded: bool) -> Callable[[parts.Component], bool]:
    return lambda part: str(part.cfg.normalization_type).startswith(kind) and hasattr(part, "w") is not folded


def _shares_keys(part: parts.Component) -> bool:
    return part.cfg.n_key_value_heads != part.cfg.n_heads


def _is_gated(part: parts.Component) -> bool:
    return bool(part.cfg.gated_mlp) and not part.cfg.num_experts


Embed = _kind("Embed", "The token embedding.", parts.Embed)
PosEmbed = _kind("PosEmbed", "The position embedding.", parts.PosEmbed)
Unembed = _kind("Unembed", "The unembedding.", parts.Unembed)
TransformerBlock = _kind("TransformerBlock", "A block.", parts.Block)
AbstractAttention = _kind("AbstractAttention", "Attention of any kind.", parts.Attention)
Attention = _kind(
    "Attention", "Attention whose heads have keys of their own.", parts.Attention, lambda part: not _shares_keys(part)
)
GroupedQueryAttention = _kind(
    "GroupedQueryAttention", "Attention whose heads share keys.", parts.Attention, _shares_keys
)
MLP = _kind("MLP", "An MLP without a gate.", parts.Mlp, lambda p: not p.cfg.gated_mlp and not p.cfg.num_experts)
GatedMLP = _kind("GatedMLP", "An MLP with a gate.", parts.Mlp, _is_gated)
MoE = _kind("MoE", "An MLP of several experts.", parts.Mlp, lambda part: bool(part.cfg.num_experts))
LayerNorm = _kind("LayerNorm", "A LayerNorm with weights.", parts.Norm, _norm("LN", False))
LayerNormPre = _kind("LayerNormPre", "A LayerNorm whose weights are folded.", parts.Norm, _norm("LN", True))
RMSNorm = _kind("RMSNorm", "An RMSNorm with weights.", parts.Norm, _norm("RMS", False))
RMSNormPre = _kind("RMSNormPre", "An RMSNorm whose weights are folded.", parts.Norm, _norm("RMS", True))
BertBlock = _kind("BertBlock", "A block of an encoder.", encoder_weights.EncoderBlock)
BertEmbed = _kind("BertEmbed", "The embeddings of an encoder.", encoder_weights.EncoderEmbed)
BertMLMHead = _kind("BertMLMHead", "What reads the words of an encoder.", encoder_weights.MlmHead)
