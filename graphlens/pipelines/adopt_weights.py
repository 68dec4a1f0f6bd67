"""Whether the weights that matching found are those that a graph computes with: each is multiplied out on a probe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np

from graphlens.analysis.arrays import Array
from graphlens.analysis.identity_terms import ACTIVATIONS
from graphlens.file.names import POSITION_EMBEDDINGS, TOKEN_EMBEDDINGS, TYPE_EMBEDDINGS, in_block
from graphlens.pipelines.fresh_weights import FreshWeights
from graphlens.surgery.sublayers import Pair, Sublayer, norm_weights, sublayers

if TYPE_CHECKING:
    from graphlens.file.model_config import ModelConfig

(_TYPES,) = TYPE_EMBEDDINGS
_HIDDEN = "hidden states"  # stands for a hook point
ROWS = 1 << 12  # of an unembedding that are multiplied at once


@dataclass
class WeightProof:
    """What is known of a model's weights after a probe.

    Attributes:
        proved: The weights that gave what the graph gave.
        failed: Weight -> why it is not to be named, in a sentence.
    """

    proved: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)


def proved_weights(
    weights: FreshWeights,
    activations: Mapping[str, Array],
    config: ModelConfig,
    tokens: Array,
    types: Array | None,
    mask: Array | None,
    allowed: float,
    hidden: Array | None = None,
) -> WeightProof:
    """Multiplies out every weight on the activations of a run, and compares with those behind it.

    Args:
        weights: The weights; those that another program stored as integers, as numbers.
        activations: Hook name -> activation of the run.
        config: The model's architecture.
        tokens: int64 [b, p].
        types: Types of tokens, int64 [b, p], or None.
        mask: [b, p], 1 at real tokens; None where all are.
        allowed: How far both may be apart, relative to the largest number: more than rounding where activations are
            rounded to integers before they are multiplied.
        hidden: The last hidden states [b, p, d_model], of a file that ends in them.

    Returns:
        Which weights are proved. One that no equation reads is neither proved nor failed.
    """
    if hidden is not None:
        activations = {**activations, _HIDDEN: hidden}
    work = _Work(weights, activations, config, tokens, types, mask, allowed)
    work.embeddings()
    for layer in range(config.n_layers):
        for part in sublayers(config, layer):
            work.reads(part)
            work.writes(part)
        work.of_heads(layer)
    work.end()
    found = WeightProof(work.proved, work.failed)
    for name in work.proved:
        found.failed.pop(name, None)
    for name in weights.names:
        if name not in found.proved:
            found.failed.setdefault(name, "no hook points are there that could prove it.")
    return found


@dataclass
class _Work:
    """The weights of one model, being multiplied out."""

    weights: FreshWeights
    activations: Mapping[str, Array]
    config: ModelConfig
    tokens: Array
    types: Array | None
    mask: Array | None
    allowed: float
    proved: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)

    @cached_property
    def real(self) -> Array:
        """bool [b, p]: tokens that are no padding."""
        return np.ones(self.tokens.shape, np.bool_) if self.mask is None else np.asarray(self.mask) != 0

    def at(self, hook: str) -> Array | None:
        """An activation at the real tokens, [n, ...] in float64; None where it is not there."""
        value = self.activations.get(hook)
        if value is not None and value.ndim == 2 and len(value) == len(self.tokens):  # of a classifier of images
            return np.asarray(value, np.float64)
        if value is None or value.shape[:2] != self.tokens.shape:
            return None
        found: Array = value[self.real].astype(np.float64)
        return found

    def weight(self, name: str) -> Array | None:
        """A weight as it is stored; None where it was not found."""
        return self.weights[name] if name in self.weights else None

    def compare(self, names: Iterable[str], hook: str, made: Callable[[], Array | None]) -> bool:
        """Proves the weights of an equation whose right side is a hook point, or says that it does not hold."""
        there = [name for name in names if name in self.weights]
        right = self.at(hook)
        if not there or right is None:
            return False
        try:
            left = made()
        except ValueError as error:  # shapes that cannot be multiplied
            left, why = None, f"it does not fit: {error!s:.100}."
        else:
            why = "what it is multiplied with is no hook point here."
        if left is not None and left.shape == right.shape:
            apart = float(np.abs(left - right).max(initial=0)) / (float(np.abs(right).max(initial=0)) or 1.0)
            if apart <= self.allowed:
                self.proved.update(there)
                return True
            why = f"multiplied out on a probe it gives another {hook} (by {apart:.1e}, allowed {self.allowed:.0e})."
        elif left is not None:
            why = f"multiplied out on a probe it gives {list(left.shape[1:])} at {hook}, which is {list(right.shape[1:])}."
        for name in there:
            self.failed.setdefault(name, why)
        return False

    def normed(self, norm: str) -> Array | None:
        """What a norm gives: its hook_normalized times its weight plus its bias."""
        value = self.at(f"{norm}.hook_normalized")
        weight, bias = (self.weight(name) for name in norm_weights(norm))
        if value is None:
            return None
        value = value if weight is None else value * weight
        return value if bias is None else value + bias

    def linear(self, x: Array, pair: Pair) -> Array | None:
        """x [n, ..., a] times a matrix [a, b] or one for each head [heads, a, b], plus its bias."""
        matrix, bias = (self.weight(name) for name in pair)
        if matrix is None:
            return None
        matrix, x = _single(matrix), _single(x)  # a matrix in float64 would be a copy
        if matrix.ndim == 3 and x.ndim == 3:  # z by heads, summed
            found = np.einsum("nha,had->nd", x, matrix)
        elif matrix.ndim == 3:
            found = np.einsum("nd,hda->nha", x, matrix)
        else:
            found = x @ matrix
        result: Array = found if bias is None else found + bias
        return result

    def embeddings(self) -> None:
        """The rows of the tables that tokens, positions and types are looked up in."""
        every = np.broadcast_to(np.arange(self.tokens.shape[1]), self.tokens.shape)
        counted = np.maximum(self.real.cumsum(-1) - 1, 0)  # the real ones alone, as others count
        for names, hooks, places in (
            (TOKEN_EMBEDDINGS, ("hook_embed", "embed.hook_embed"), (self.tokens,)),
            (POSITION_EMBEDDINGS, ("hook_pos_embed", "embed.hook_pos_embed"), (every, counted)),
            (
                (_TYPES,),
                ("embed.hook_token_type_embed",),
                (np.zeros_like(self.tokens) if self.types is None else self.types,),
            ),
        ):
            for name in names:
                for hook in hooks:
                    any(self.compare([name], hook, partial(self.rows, name, where)) for where in places)
        for name in TOKEN_EMBEDDINGS:  # where hook_embed lies behind a norm
            if name not in self.proved:
                self.compare([name], "embed.ln.hook_normalized", partial(self.normalised_rows, name))

    def rows(self, name: str, places: Array) -> Array | None:
        """The rows of a table at the real tokens."""
        if name not in self.weights:
            return None
        try:
            return self.weights.part(name, 0, places[self.real]).astype(np.float64)
        except IndexError:  # it has fewer rows
            return None

    def normalised_rows(self, name: str) -> Array | None:
        """The rows of a table of tokens, as the norm behind them normalises them."""
        return self.normalised(self.rows(name, self.tokens), "embed.ln")

    def reads(self, part: Sublayer) -> None:
        """The first matrices of a sublayer, and the norm before them."""
        norm = [] if part.norm is None else norm_weights(part.norm)
        start = self.at(part.residual) if part.norm is None else self.normed(part.norm)
        if start is None and not any(name in self.weights for name in norm):
            start = self.at(part.residual)  # the one block without the norm that the others have (ModernBERT's first)
        for hook, pair in part.readers.items():
            late = self.at(part.late[hook]) if hook in part.late else None
            begun = start if late is None or start is None else start + late
            if begun is not None:
                self.compare([*norm, *pair], hook, partial(self.linear, begun, pair))

    def of_heads(self, layer: int) -> None:
        """The weights of the norms of queries and keys: a rotation leaves each pair of dimensions as long as it is."""
        for letter in "qk":
            name = in_block(layer, f"attn.{letter}_norm.w")
            weight = self.weight(name)
            normal = self.activations.get(in_block(layer, f"attn.{letter}_norm.hook_normalized"))
            rotated = self.at(in_block(layer, f"attn.hook_rot_{letter}"))
            if weight is None or normal is None or rotated is None or normal.size != self.real.size * rotated[0].size:
                continue
            value = normal.reshape(*self.real.shape, -1)[self.real] * np.tile(weight, rotated[0].size // weight.size)
            value = value.reshape(rotated.shape).astype(np.float64)
            if any(_as_long(value, rotated, adjacent, self.allowed) for adjacent in (False, True)):
                self.proved.add(name)
            else:
                self.failed.setdefault(name, "what it gives is of another length than what is rotated.")

    def writes(self, part: Sublayer) -> None:
        """The last matrix of a sublayer, and the norm after it."""
        inner = self.at(part.inner)
        if part.inner_norm is not None or inner is None:
            return
        if part.post is None:
            self.compare(part.out, part.written, lambda: self.linear(inner, part.out))
            if (
                self.config.normalises_residual and part.norm is not None
            ):  # ln2, which normalises what the block ends with
                block = part.residual.rpartition(".")[0]
                norm = f"{block}.ln2"
                self.compare(norm_weights(norm), f"{block}.hook_normalized_resid_post", lambda: self.normed(norm))
            return
        post = part.post
        self.compare(part.out, f"{post}.hook_normalized", lambda: self.normalised(self.linear(inner, part.out), post))
        self.compare(norm_weights(post), part.written, lambda: self.normed(post))

    def normalised(self, x: Array | None, norm: str) -> Array | None:
        """A value as a norm normalises it."""
        if x is None:
            return None
        if self.config.norm_centres(norm.rpartition(".")[2]):
            x = x - x.mean(-1, keepdims=True)
        found: Array = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config.eps)
        return found

    def end(self) -> None:
        """The last norm, the head of an encoder, and the unembedding."""
        for norm in ("embed.ln", "ln_final", "mlm_head.ln"):
            hook = "unembed.hook_in"
            if norm == "embed.ln":
                full = self.config.is_encoder and not self.config.pre_norm_encoder
                hook = "hook_full_embed" if full else in_block(0, "hook_resid_pre")
            self.compare(norm_weights(norm), hook, partial(self.normed, norm))
        self.compare(norm_weights("ln_final"), _HIDDEN, partial(self.normed, "ln_final"))
        last = self.at(in_block(self.config.n_layers - 1, "hook_normalized_resid_post"))
        dense = ("mlm_head.W", "mlm_head.b")
        if last is not None:
            self.compare(dense, "mlm_head.ln.hook_normalized", lambda: self.headed(last, dense))
        else:  # the head reads the last norm
            given = self.normed("ln_final")
            names = (*dense, *norm_weights("ln_final"))
            self.compare(names, "mlm_head.ln.hook_normalized", lambda: self.headed(given, dense))
        read = self.at("head.hook_in")
        if read is not None:
            head = ("head.W_H", "head.b_H")
            self.compare(norm_weights("ln_final"), "head.hook_in", self.class_token)
            self.compare(head, "head.hook_out", lambda: self.linear(read, head))
        given = self.at("unembed.hook_in")
        if given is not None:
            pair = ("unembed.W_U", "unembed.b_U")
            self.compare(pair, "unembed.hook_out", lambda: self.unembedded(given, pair))

    def class_token(self) -> Array | None:
        """What the last norm of a vision model gives at the first token, which the classifier reads."""
        value = self.normed("ln_final")
        return None if value is None else value.reshape(*self.tokens.shape, -1)[:, 0]

    def headed(self, x: Array | None, dense: Pair) -> Array | None:
        """What the last norm of an encoder's head normalises to."""
        found = None if x is None else self.linear(x, dense)
        if found is None:
            return None
        right = self.at("mlm_head.ln.hook_normalized")
        choices = [self.normalised(function(found), "mlm_head.ln") for function in ACTIVATIONS.values()]
        assert right is not None, "it was looked for"
        return min((one for one in choices if one is not None), key=lambda one: float(np.abs(one - right).max()))

    def unembedded(self, x: Array, pair: Pair) -> Array | None:
        """Logits, some of the vocabulary at a time: dequantised or cast, a whole matrix may be large."""
        name, bias = pair[0], self.weight(pair[1])
        if name not in self.weights:
            return None
        right = self.at("unembed.hook_out")
        assert right is not None, "it was looked for"
        x, parts, width = _single(x), list[Array](), right.shape[-1]
        for start in range(
            0, width, ROWS
        ):  # all that is left the last time, should the matrix be wider than the logits
            end = start + ROWS if start + ROWS < width else None
            parts.append(x @ _single(self.weights.part(name, 1, slice(start, end))))
        found: Array = np.concatenate(parts, -1)
        return found if bias is None else found + bias


def _single(array: Array) -> Array:
    """An array as float32; itself, if it is."""
    return array.astype(np.float32, copy=False)


def _as_long(value: Array, rotated: Array, adjacent: bool, allowed: float) -> bool:
    """True if pairs of dimensions, neighbours or half a head apart, are as long before as after a rotation, but for a factor."""
    lengths = []
    for each in (value, rotated):
        pairs = each.reshape(*each.shape[:-1], -1, 2) if adjacent else each.reshape(*each.shape[:-1], 2, -1)
        lengths.append((pairs**2).sum(-1 if adjacent else -2))
    before, after = lengths
    factor = float((before * after).sum() / max(float((before**2).sum()), 1e-30))
    return bool(np.abs(factor * before - after).max(initial=0) <= allowed * (after.max(initial=0) or 1))
