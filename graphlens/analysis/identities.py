"""The arithmetic that holds between a transformer's activations: what tells, without a reference, that hook points are right."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

import numpy as np

from graphlens.analysis.arrays import Array
from graphlens.analysis.identity_attention import attention
from graphlens.analysis.identity_norms import norms
from graphlens.analysis.identity_records import Identity as Identity
from graphlens.analysis.identity_records import failing as failing
from graphlens.analysis.identity_records import unchecked as unchecked
from graphlens.analysis.identity_records import worst as worst
from graphlens.analysis.identity_shapes import by_shape
from graphlens.analysis.identity_stream import stream
from graphlens.analysis.identity_terms import Bools, Floats, largest
from graphlens.errors import InputError

ALLOWED = 1e-5  # of float32, and of what dynamic quantisation leaves in float32
HALF_ROUNDINGS = 8  # of float16: so many times its eps, since each side is rounded a few times


@dataclass(frozen=True)
class Facts:
    """What is known of a model's structure. The fields are those of the model's configuration where it has them.

    Attributes:
        n_layers: The number of blocks.
        kind: "decoder", "encoder" (BERT) or "vision" (ViT).
        parallel_attn_mlp: True if attention and MLP read the same residual stream.
        residual_norms: True where norms normalise the residual stream itself, after each sublayer (encoders; OPT-350m).
        post_norm_only: True where norms normalise what the sublayers give, and none comes before them (OLMo-2).
        centred: True where norms subtract the mean; None where it is not known: what fits the file better.
        final_centred: The same for the last norm; None where it is as ``centred``, or not known.
        eps: What norms add to a variance; None where it is not known: one number is fitted to the file.
        act_fn: The name of the activation function; None where it is not known: the one that fits is found.
        scale: What queries times keys are multiplied by; None where it is not known: one number is fitted to the file.
        by_layer: True if the scores of layer i are also divided by i + 1.
        softcap: The bound that tanh squeezes the scores into; None for none.
        alibi: True if scores have a bias that grows with the distance from the query.
        biased: True if a bias is added to the scores that is the same in all prompts (relative position bias). It is then taken
            away as the mean over the batch, so that a run of one prompt tells nothing.
        rotary_dim: How many of a head's dimensions are rotated; None for all, or where it is not known.
        clip: The bound that queries, keys and values are cut to; None for none.
        sink: True if a row of the pattern sums to less than 1, since one more score takes part in the softmax.
        late_positions: True if position embeddings are not added to the residual stream.
        late_mlp_bias: True if a bias is added to the gated activations.
        logit_scale: What the logits are multiplied by after ``unembed.hook_out``.
        logit_softcap: The bound that tanh squeezes the logits into after that; None for none.
    """

    n_layers: int
    kind: Literal["decoder", "encoder", "vision"] = "decoder"
    parallel_attn_mlp: bool = False
    residual_norms: bool = False
    post_norm_only: bool = False
    centred: bool | None = None
    final_centred: bool | None = None
    eps: float | None = None
    act_fn: str | None = None
    scale: float | None = None
    by_layer: bool = False
    softcap: float | None = None
    alibi: bool = False
    biased: bool = False
    rotary_dim: int | None = None
    clip: float | None = None
    sink: bool = False
    late_positions: bool = False
    late_mlp_bias: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @classmethod
    def of(cls, config: Mapping[str, object], kind: Literal["decoder", "encoder", "vision"] = "decoder") -> Facts:
        """The facts that a configuration states.

        Args:
            config: Fields of ``file.model_config.ModelConfig`` by name; those that are absent are not known.
            kind: See above.

        Raises:
            InputError: Without n_layers.
        """
        if not isinstance(config.get("n_layers"), int):
            raise InputError("the configuration does not say n_layers, how many blocks there are.")
        norm = config.get("normalization_type")
        capped, logits_capped = config.get("attn_scores_soft_cap"), config.get("output_logits_soft_cap")
        found: dict[str, object] = {
            "kind": kind,
            "residual_norms": kind == "encoder",
            "centred": norm.startswith("LN") if isinstance(norm, str) else None,
            "final_centred": False if config.get("final_rms") else None,
            "by_layer": bool(config.get("scale_attn_by_inverse_layer_idx")),
            "softcap": capped if isinstance(capped, float) and capped > 0 else None,
            "alibi": config.get("positional_embedding_type") == "alibi",
            "late_positions": config.get("positional_embedding_type") == "shortformer",
            "logit_softcap": logits_capped if isinstance(logits_capped, float) and logits_capped > 0 else None,
            "logit_scale": config.get("output_logits_scale") or 1.0,
        }
        names = {item.name for item in fields(cls)}
        found |= {name: value for name, value in config.items() if name in names and value is not None}
        if kind == "encoder":
            found["residual_norms"] = True
        return cls(**found)  # type: ignore[arg-type]  # a configuration's values are of these types


@dataclass
class Checker:
    """The activations of one run, and the identities found so far.

    Attributes:
        values: Hook name -> activation, with TransformerLens's axes.
        facts: See ``identities``.
        mask: bool [b, keys], True at real tokens; None where all are.
        past: Layer -> the keys and values of earlier tokens, [b, past, heads, d_head] each, rotated where keys are.
        logits: [b, p, d_vocab], or None.
        found: The identities.
    """

    values: Mapping[str, Array]
    facts: Facts
    mask: Bools | None = None
    past: Mapping[int, tuple[Array, Array]] = field(default_factory=dict)
    logits: Array | None = None
    found: list[Identity] = field(default_factory=list)

    def get(self, name: str) -> Floats | None:
        """An activation in float64; None where it is not there."""
        value = self.values.get(name)
        return None if value is None else value.astype(np.float64)

    def real(self, count: int) -> Bools:
        """Which tokens of a run of so many count, [b or 1, count]: the last ones of the mask."""
        return np.ones((1, count), np.bool_) if self.mask is None else self.mask[:, self.mask.shape[1] - count :]

    def allowed(self, hooks: Iterable[str]) -> float:
        """How far both sides of an equation may be apart by the rounding of the dtypes of its hook points."""
        half = [hook for hook in hooks if hook in self.values and self.values[hook].dtype == np.float16]
        return HALF_ROUNDINGS * float(np.finfo(np.float16).eps) if half else ALLOWED

    def add(
        self,
        name: str,
        layer: int | None,
        hooks: tuple[str, ...],
        expected: Floats,
        size: Floats | float,
        where: Bools | None = None,
        clears: tuple[str, ...] | None = None,
        found: Floats | None = None,
    ) -> Identity | None:
        """Records an identity whose right side is the activation of the last hook point.

        Args:
            name: It in words.
            layer: The block, or None.
            hooks: The hook points; the last one is the right side.
            expected: The left side, of the shape of the right side.
            size: How large what was added up is.
            where: Which entries count; None for all.
            clears: See ``Identity``; None for all of them.
            found: The right side, where it is not the activation itself.

        Returns:
            The identity; None where nothing counts.
        """
        clears = hooks if clears is None else clears
        right = self.get(hooks[-1]) if found is None else found
        assert right is not None
        if expected.shape != right.shape:
            identity = Identity(name, layer, hooks, math.inf, self.allowed(hooks), clears)
            self.found.append(identity)
            return identity
        residual = largest(expected - right, size, where)
        if residual is None:
            return None
        identity = Identity(name, layer, hooks, residual, self.allowed(hooks), clears)
        self.found.append(identity)
        return identity


def identities(
    activations: Mapping[str, Array],
    facts: Facts,
    *,
    mask: Array | None = None,
    past: Mapping[int, tuple[Array, Array]] | None = None,
    logits: Array | None = None,
) -> list[Identity]:
    """What should hold between the activations of one run, and how well it does.

    Nothing is compared with another model. Each activation is computed from those before it by the arithmetic that a
    transformer has whatever its weights are: the pattern is the softmax of the scores, z is pattern times values, the
    residual stream is a sum, a norm divides by the scale. What needs a number that is not given (the factor of the scores,
    eps) is fitted, one number for the whole file. ``failing`` says which hook points fail.

    The residual allowed is 1e-5 relative to the sizes of what is added up, entry by entry. In float16 it is 8 times the
    dtype's eps (0.0078). Padding is left out. No more is allowed where a graph rounds its activations to integers: its
    identities are those of the same graph without its quantisers (``surgery.unfusing.unrounded``).

    Args:
        activations: Hook name -> activation, with TransformerLens's axes. Identities of hook points that are not there are
            left out.
        facts: The structure of the model.
        mask: [b, past + p], 0 at padding; None where there is none.
        past: Layer -> the keys and values of earlier tokens, where the run had them: [b, past, heads, d_head] each, the
            keys rotated. Without it, identities between a longer pattern and the values of this run are left out.
        logits: The model's output [b, p, d_vocab], where ``unembed.hook_out`` is a hook point.

    Returns:
        The identities, in the order of the model.
    """
    real = None if mask is None else np.asarray(mask) != 0
    fitting, misshapen = by_shape(activations, past is not None)
    checker = Checker(fitting, facts, real, past or {}, logits, misshapen)
    with np.errstate(all="ignore"):  # padding may hold anything, and what is no number fails its identity
        stream(checker)
        norms(checker)
        attention(checker)
    return sorted(checker.found, key=lambda each: facts.n_layers if each.layer is None else each.layer)
