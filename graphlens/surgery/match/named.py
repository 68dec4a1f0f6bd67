"""TransformerLens's names for what was found in a graph: each hook point's view, and why some are missing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from graphlens.file.firing import graph_order
from graphlens.file.names import in_block
from graphlens.surgery.match.config import config_of, kind_of
from graphlens.surgery.match.layout import MOVES, Layout, view_of
from graphlens.surgery.match.parts import Attention, Block, Branch, Found, Linear, Normed, Spot
from graphlens.surgery.match.ports import ports_of
from graphlens.surgery.match.records import Kind, Match, View
from graphlens.surgery.match.weights import weights_of
from graphlens.surgery.match.wires import Wires

_NO_SCALE = "the graph computes only the inverse of the scale"
_INSIDE = "it is inside of an operator that was kept"
_LAYOUT = "its value lies in a layout from which no reshape and permutation gives TransformerLens's axes"
_REPEATED = "keys are repeated for the queries that share them before they are rotated"
_INTEGERS = "the graph has only integers that stand for its numbers, and several nodes read them"
_SHARED = "attention and MLP read the same norm, which is ln1: changing it would change both"


def named(found: Found, origin: Mapping[str, str]) -> Match:
    """What was found, under TransformerLens's names.

    Args:
        found: The parts of a transformer.
        origin: Name of a node that unfusing made -> that of the original's node.
    """
    names = _Names(found, origin)
    names.embeddings()
    for layer, block in enumerate(found.blocks):
        names.block(layer, block)
    names.ending()
    kind = kind_of(found)
    weights = weights_of(found, kind, names.hooks)
    config, notes = config_of(found, kind, weights)
    return Match(
        kind=kind,
        config=config,
        hooks=_in_firing_order(found.wires, names.hooks, len(found.blocks)),
        weights=weights,
        ports=ports_of(found),
        missing=names.missing,
        notes=tuple(dict.fromkeys([*names.notes, *notes])),
    )


def _in_firing_order(wires: Wires, hooks: Mapping[str, View], n_layers: int) -> dict[str, View]:
    values: dict[str, ir.Value] = {str(value.name): value for node in wires.nodes() for value in node.outputs}
    values |= {str(value.name): value for value in [*wires.graph.inputs, *wires.graph.initializers.values()]}
    order = graph_order(wires.graph, {name: values[view.value] for name, view in hooks.items()}, n_layers)
    return {name: hooks[name] for name in order}


class _Names:
    """Collects hook points.

    Args:
        found: The parts of a transformer.
        origin: See ``named``.
    """

    def __init__(self, found: Found, origin: Mapping[str, str]) -> None:
        self._found, self._wires, self._origin = found, found.wires, origin
        self._kind: Kind = kind_of(found)
        self.hooks: dict[str, View] = {}
        self.missing: dict[str, str] = {}
        self.notes: list[str] = []

    # -- one hook point

    def _add(self, name: str, view: View | None, product: Linear | ir.Node | None = None, why: str = _LAYOUT) -> None:
        if view is None:
            self.missing[name] = why
            return
        node = product.node if isinstance(product, Linear) else product
        label = () if node is None else (self._origin.get(str(node.name), str(node.name)),)
        self.hooks[name] = replace(view, nodes=label)

    def _stream(self, name: str, value: ir.Value, product: Linear | None = None) -> None:
        """A hook point of axes [b, p, any]."""
        self._add(
            name,
            self._tokens(value) or self._flat(value),
            product,
            _LAYOUT if self._wires.hooked(value) is not None else _INTEGERS,
        )

    def _tokens(self, value: ir.Value) -> View | None:
        """A value [b, p, any] as it is; one of all tokens in an axis after it is reshaped."""
        wires, found = self._wires, self._found
        for _ in range(4):
            shape = wires.shape(value)
            if shape is None:
                return None
            if len(shape) == 3 and shape[:2] == (found.batch, found.tokens):
                return self._plain(value)
            node = wires.only_use(value)
            if node is None or node.op_type not in MOVES:
                return None
            value = wires.first(node.outputs[0])
        return None

    def _flat(self, value: ir.Value) -> View | None:
        """A value [b * p, any]; None for any other."""
        shape, found = self._wires.shape(value), self._found
        hooked, like = self._wires.hooked(value), self._wires.hooked(found.beginning.tokens.value)
        if hooked is None or like is None or shape is None or len(shape) != 2 or shape[0] != found.batch * found.tokens:
            return None
        return View(str(hooked.name), tokens=str(like.name))

    def _plain(self, value: ir.Value) -> View | None:
        """A value as it is; None where it is hidden in integers."""
        hooked = self._wires.hooked(value)
        return None if hooked is None else View(str(hooked.name))

    def _norm(self, name: str, normed: Normed | None) -> None:
        """The two hook points of a norm."""
        if normed is None:
            return
        norm = normed.norm
        if norm.scale is None:
            self.missing[f"{name}.hook_scale"] = _NO_SCALE if norm.normalized is not None else _INSIDE
        else:
            self._stream(f"{name}.hook_scale", norm.scale)
        if norm.normalized is None:
            self.missing[f"{name}.hook_normalized"] = _INSIDE
        else:
            self._stream(f"{name}.hook_normalized", norm.normalized)

    # -- before the blocks

    def embeddings(self) -> None:
        """The hook points before the blocks."""
        begin = self._found.beginning
        encoder = self._kind == "encoder"
        inner = "embed." if encoder else ""
        if begin.projected is not None:
            self._projected(inner)
            return
        whole = begin.norm is not None and not encoder and begin.positions is None
        self._embedding(f"{inner}hook_embed", begin.whole if whole else begin.tokens.value)
        if begin.positions is not None:
            self._embedding(f"{inner}hook_pos_embed", begin.positions.value)
        if begin.types is not None:
            self._embedding("embed.hook_token_type_embed", begin.types.value)
        self._norm("embed.ln", begin.norm)
        if encoder:
            self._stream("hook_full_embed", begin.whole)

    def _projected(self, inner: str) -> None:
        """Embeddings that are narrower than the residual stream: what a matrix makes of their sum is as wide."""
        begin, wires = self._found.beginning, self._wires
        assert begin.projected is not None
        sizes = [(wires.shape(value) or (0,))[-1] for value in (begin.projected.source, begin.projected.out)]
        why = f"embeddings have {sizes[0]} numbers, and a matrix makes the residual stream's {sizes[1]} of them"
        there = {"hook_embed": begin.tokens, "hook_pos_embed": begin.positions}
        self.missing |= {f"{inner}{name}": why for name, table in there.items() if table is not None}
        if begin.types is not None:
            self.missing["embed.hook_token_type_embed"] = why
        if begin.norm is not None:
            self.missing |= dict.fromkeys(("embed.ln.hook_scale", "embed.ln.hook_normalized"), why)
        if self._kind == "encoder":
            self._stream("hook_full_embed", begin.whole, begin.projected)

    def _embedding(self, name: str, value: ir.Value) -> None:
        view = self._tokens(value)
        shape = self._wires.shape(value)
        hooked, tokens = self._wires.hooked(value), self._wires.hooked(self._found.beginning.tokens.value)
        like = None if tokens is None else str(tokens.name)
        count = self._found.tokens
        if hooked is None or shape is None:
            view = None
        elif len(shape) == 3 and shape[:2] == (1, count) and self._found.batch != 1:
            view = View(str(hooked.name), like=like)
        elif len(shape) == 2 and shape[0] == count:
            view = View(str(hooked.name), (1, -1, shape[1]), back=(-1, shape[1]), like=like)
        self._add(name, view, why=_LAYOUT if hooked is not None else _INTEGERS)

    # -- a block

    def block(self, layer: int, block: Block) -> None:
        """The hook points of a block.

        Args:
            layer: Its number.
            block: It.
        """

        def at(name: str) -> str:
            return in_block(layer, name)

        self._stream(at("hook_resid_pre"), block.pre)
        self._attention(layer, block.attention)
        after = block.attn.post is not None and block.ln1 is None and not block.normalises
        self._norm(at("ln1"), block.attn.post if after else block.ln1)
        if block.attn.post is not None and not after:
            self._norm(at("ln1_post"), block.attn.post)
        self._written(at("hook_attn_out"), block.attn)
        if block.mid is not None:
            self._stream(at("hook_resid_mid"), block.mid)
        self._mlp(layer, block)
        self._stream(at("hook_resid_post"), block.post)
        if block.normalises and block.end is not block.post:
            self._stream(at("hook_normalized_resid_post"), block.end)

    def _written(self, name: str, branch: Branch) -> None:
        self._stream(name, branch.written, branch.linear)
        if branch.layer_scale is not None:
            self.notes.append(
                "what sublayers write is multiplied by a vector (layer scale) before hook_attn_out and hook_mlp_out"
            )

    def _mlp(self, layer: int, block: Block) -> None:
        mlp = block.mlp
        if mlp is None:
            return
        branch = mlp.branch
        after = branch.post is not None and block.ln2 is None and not block.normalises
        name = in_block(layer, "ln2")
        ln2 = branch.post if after else block.ln2
        shared = block.parallel and ln2 is not None and block.ln1 is not None and ln2.norm is block.ln1.norm
        if shared:
            self.missing[f"{name}.hook_scale"] = self.missing[f"{name}.hook_normalized"] = _SHARED
        else:
            self._norm(name, ln2)
        if branch.post is not None and not after:
            self._norm(in_block(layer, "ln2_post"), branch.post)
        self._stream(in_block(layer, "mlp.hook_pre"), mlp.pre, mlp.first)
        if mlp.pre_linear is not None:
            self._stream(in_block(layer, "mlp.hook_pre_linear"), mlp.pre_linear, mlp.second)
        self._stream(in_block(layer, "mlp.hook_post"), mlp.post)
        self._written(in_block(layer, "hook_mlp_out"), branch)

    def _attention(self, layer: int, attention: Attention) -> None:
        core = attention.core

        def at(name: str) -> str:
            return in_block(layer, f"attn.{name}")

        for letter, operand in (("q", attention.q), ("k", attention.k), ("v", attention.v)):
            self._add(at(f"hook_{letter}"), self._spot(operand.plain), operand.linear)
            if operand.normed is not None:
                self._head_norm(at(f"{letter}_norm"), *operand.normed)
            if operand.rotated:
                repeated = _heads_of(operand.rotated[-1]) != _heads_of(operand.plain[-1])
                view = None if repeated else self._spot(operand.rotated)
                self._add(at(f"hook_rot_{letter}"), view, why=_REPEATED if repeated else _LAYOUT)
        self._scores(at("hook_attn_scores"), core.scores)
        self._scores(at("hook_pattern"), core.pattern)
        self._add(at("hook_z"), self._spot(attention.z[::-1]))
        if any(operand.clipped for operand in (attention.q, attention.k, attention.v)):
            self.notes.append("what attn.hook_q, attn.hook_k and attn.hook_v have is clipped after them")
        repeats = max(attention.k.repeats, 1)
        if repeats > 1:
            self.notes.append(f"each key and value head serves {repeats} query heads")
        if core.sinks is not None:
            self.notes.append("attention has a sink: rows of the pattern sum to less than 1")

    def _scores(self, name: str, value: ir.Value) -> None:
        shape = self._wires.shape(value)
        self._add(name, self._plain(value) if shape is not None and len(shape) == 4 else None)

    def _spot(self, trail: Sequence[Spot]) -> View | None:
        """The value to hook among several that hold the same numbers: one with TransformerLens's axes [b, p, heads, d_head].

        The first one from which a view gives them is taken, since all that is computed from the numbers comes after it; a
        later one that has the axes itself, if nothing else reads those before.
        """
        wires, best = self._wires, None
        ordered = list(reversed(trail))
        for place, (value, layout) in enumerate(ordered):
            heads = _head_axis(layout)
            hooked = wires.hooked(value)
            if heads is not None and hooked is not None:
                known = layout if heads in layout.held else Layout(layout.axes, {**layout.sizes, heads: 1})
                view = view_of(hooked, known, ("b", "p", heads, "d"))
                if view is not None and view.shape is None and view.permute is None:
                    return view
                best = best or view
            after = None if place + 1 == len(ordered) else wires.producer(ordered[place + 1][0])
            if best is not None and (after is None or wires.only_use(value) is not after or wires.is_output(value)):
                break
        return best

    def _head_norm(self, name: str, normed: Normed, layout: Layout) -> None:
        """The two hook points of a norm of queries or keys: of each head, or of all heads together."""
        norm = normed.norm
        whole = any(len(axis) > 1 and "d" in axis for axis in layout.axes)
        for end, value in (("hook_scale", norm.scale), ("hook_normalized", norm.normalized)):
            if value is None:
                self.missing[f"{name}.{end}"] = _NO_SCALE
            elif whole:
                self._stream(f"{name}.{end}", value)
            else:
                self._add(f"{name}.{end}", self._joint(value, layout, end == "hook_scale"))

    def _joint(self, value: ir.Value, layout: Layout, scale: bool) -> View | None:
        heads = _head_axis(layout)
        if heads is None:
            return None
        axes = tuple(() if scale and axis == ("d",) else axis for axis in layout.axes)
        sizes = {**layout.sizes, **({"d": 1} if scale else {}), **({heads: 1} if heads not in layout.held else {})}
        hooked = self._wires.hooked(value)
        return None if hooked is None else view_of(hooked, Layout(axes, sizes), ("b", "p", heads, "d"), joint=3)

    # -- after the blocks

    def ending(self) -> None:
        """The hook points after the blocks."""
        end, narrower = self._found.ending, self._found.reads_less()
        self._norm("ln_final", end.norm)
        if narrower is not None and end.unembed is not None:
            why = f"the head makes {narrower[0]} numbers of the residual stream's {narrower[1]}"
            names = ["mlm_head.ln.hook_scale", "mlm_head.ln.hook_normalized"] if end.dense_norm is not None else []
            self.missing |= dict.fromkeys([*names, "unembed.hook_in"], why)
            self._stream("unembed.hook_out", end.unembed.out, end.unembed)
            return
        self._norm("mlm_head.ln", end.dense_norm)
        if end.unembed is None or end.read is None:
            return
        if self._kind == "vision":
            self._add("head.hook_in", self._plain(end.read))
            self._add("head.hook_out", self._plain(end.unembed.out), end.unembed)
        elif end.picked:
            why = "the graph computes the logits of some tokens only"
            self.missing["unembed.hook_in"] = self.missing["unembed.hook_out"] = why
        else:
            self._stream("unembed.hook_in", end.read)
            self._stream("unembed.hook_out", end.unembed.out, end.unembed)


def _heads_of(spot: Spot) -> int:
    """How many heads a value holds."""
    layout = spot[1]
    return math.prod(layout.sizes[name] for name in layout.held if name not in ("b", "p", "d"))


def _head_axis(layout: Layout) -> str | None:
    """The logical axis of heads: all of them, or those that are repeated for several queries each."""
    names = [name for name in layout.held if name not in ("b", "p", "d")]
    if not names:
        return "h"
    return names[0] if len(names) == 1 and not names[0].endswith(">") else None
