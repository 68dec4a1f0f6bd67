"""What matching finds in a transformer's graph that graphlens did not export: plain records, of names and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["decoder", "encoder", "vision"]
Number = bool | int | float | str | tuple[str, ...] | None


@dataclass(frozen=True)
class View:
    """Where a hook point is in a graph, and how its value gets TransformerLens's axes.

    Applied in this order: ``first``, ``shape``, ``permute``, ``like``. The way back is the inverse of ``permute``, the reshape
    ``back``, the inverse of ``first``.

    Attributes:
        value: The name of the graph's value.
        shape: The sizes of a reshape: 0 keeps the size at its place, -1 is what is left; None for no reshape.
        permute: The order of the axes after it; None where they are in order.
        back: The sizes of the reshape that undoes ``shape``, by the same rule; None beside a ``shape`` where only a run tells
            them: those of the value itself (after ``first``).
        nodes: The names of the matrix products whose result it is, as the original file calls them: what a quantiser's
            ``nodes_to_exclude`` takes. Empty for what no matrix product makes.
        first: The order of the axes before the reshape; None where they are in order.
        tokens: A value [b, p, ...] by whose first two sizes the first axis is split, before all else, where prompts and
            tokens are in one axis ([b * p, D]; OPT); None where they are not.
        like: A value [b, ...] whose batch it is expanded to, where it is computed once for all prompts ([1, p, D] positions);
            None where it has a batch. There is no way back: its readers broadcast.
    """

    value: str
    shape: tuple[int, ...] | None = None
    permute: tuple[int, ...] | None = None
    back: tuple[int, ...] | None = None
    nodes: tuple[str, ...] = ()
    first: tuple[int, ...] | None = None
    like: str | None = None
    tokens: str | None = None


@dataclass(frozen=True)
class Quantised:
    """How the integers of a tensor become numbers: ``(integer - zero point) * scale``.

    Attributes:
        scale: The initializer of the scales, [] or [n] or, in blocks, [n, blocks].
        zero_point: That of the zero points; None for 0 (for unsigned packed integers: half their range).
        axis: The axis that scales belong to; None for one scale.
        bits: 8, or 4 and 2 where a byte holds several.
        block: How many numbers along a row share a scale (``MatMulNBits``), or None.
    """

    scale: str
    zero_point: str | None = None
    axis: int | None = None
    bits: int = 8
    block: int | None = None


@dataclass(frozen=True)
class MatchedWeight:
    """A weight under TransformerLens's name, as a view of an initializer. The steps are those of ``file.manifest.WeightView``.

    Attributes:
        tensor: The initializer's name.
        quantised: How its integers become numbers, done first; None for a tensor of numbers.
        take: (axis, part, parts): keep one of so many equal parts of an axis.
        cut: (axis, start, stop): keep a stretch of an axis.
        shape: The sizes after a reshape that splits axes.
        within: (axis, start, stop): keep a stretch of an axis that ``shape`` made.
        permute: The order of the axes.
        joined: True if the first two axes are joined into one.
        times: What the numbers are multiplied by.
        plus: What is added to them.
    """

    tensor: str
    quantised: Quantised | None = None
    take: tuple[int, int, int] | None = None
    cut: tuple[int, int, int] | None = None
    shape: tuple[int, ...] | None = None
    within: tuple[int, int, int] | None = None
    permute: tuple[int, ...] | None = None
    joined: bool = False
    times: float | None = None
    plus: float | None = None


@dataclass(frozen=True)
class Ports:
    """What the inputs and outputs of a graph are, by their names in it; None for those that it lacks.

    Attributes:
        input: The tokens, int64 or int32 [b, p]; for a vision model the pixels, float [b, channels, height, width].
        attention_mask: Which tokens are no padding, [b, p] (with past: [b, past + p]).
        position_ids: Positions, [b, p].
        token_type_ids: Types of tokens, [b, p].
        past: (layer, "key" or "value") -> the input of what is kept of earlier tokens, [b, heads, past, d_head].
        present: The same for the outputs.
        logits: The output of logits; None for a file that ends in hidden states.
        hidden: The output of the last hidden states, where there is one.
    """

    input: str
    attention_mask: str | None = None
    position_ids: str | None = None
    token_type_ids: str | None = None
    past: Mapping[tuple[int, str], str] = field(default_factory=dict)
    present: Mapping[tuple[int, str], str] = field(default_factory=dict)
    logits: str | None = None
    hidden: str | None = None


@dataclass(frozen=True)
class Match:
    """The hook points, weights and architecture that were found in a graph.

    Attributes:
        kind: "decoder", "encoder" (BERT) or "vision" (ViT).
        config: Fields of ``file.model_config.ModelConfig`` that structure says: n_layers, n_heads, n_key_value_heads, d_model,
            d_head, d_mlp, d_vocab, act_fn, eps, normalization_type, positional_embedding_type, parallel_attn_mlp, gated_mlp, ...
            What structure does not say is absent.
        hooks: TransformerLens's name -> where it is, in firing order.
        weights: TransformerLens's name -> the view of an initializer.
        ports: The graph's inputs and outputs.
        missing: Hook points that a model of this kind has and the graph does not show -> why, in a sentence.
        notes: What else a reader should know, a sentence each ("keys and values are repeated for 4 queries each").
    """

    kind: Kind
    config: Mapping[str, Number]
    hooks: Mapping[str, View]
    weights: Mapping[str, MatchedWeight]
    ports: Ports
    missing: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
