"""The residual stream through a block: what attention and MLP read of it, and where they are added to it."""

from __future__ import annotations

import onnx_ir as ir

from graphlens.errors import ModelFileError
from graphlens.surgery.match.branches import Branches
from graphlens.surgery.match.mlp import Mlps
from graphlens.surgery.match.norms import Norms
from graphlens.surgery.match.parts import Attention, Block, Branch, Mlp, Normed
from graphlens.surgery.match.wires import Wires

_TERMS = 4


class Residuals:
    """Follows the residual stream.

    Args:
        wires: The graph.
        norms: Its norms.
        branches: Finds what sublayers write.
        mlps: Finds MLPs.
    """

    def __init__(self, wires: Wires, norms: Norms, branches: Branches, mlps: Mlps) -> None:
        self._wires, self._norms, self._branches, self._mlps = wires, norms, branches, mlps

    def block(self, attention: Attention) -> Block:
        """The block that an attention is part of.

        Args:
            attention: The attention.

        Raises:
            ModelFileError: Its result is not added to a residual stream in a way that is known.
        """
        wires = self._wires
        attn = self._branches.onward(attention.out)
        where = f"the attention at {attention.core.softmax.name!r}"
        if attn.add is None:
            raise ModelFileError(
                f"what {where} gives is not added to a residual stream, so its block is none that graphlens knows. "
                "graphlens expose adds any values of the graph as outputs."
            )
        normed = attention.normed
        streams = [attention.source] if normed is None else [normed.norm.x, attention.source]
        other = self._other(attn.add, attn.written)
        total = wires.first(attn.add.outputs[0])
        for stream in streams:
            if other is stream:
                pre_norm = normed if normed is not None and stream is normed.norm.x else None
                late = self._late(total, stream, pre_norm)
                if late is not None:
                    return self._parallel(attention, stream, pre_norm, attn, *late)
                return self._serial(attention, stream, pre_norm, attn, total)
        return self._summed(attention, streams, attn, other, total, where)

    def _other(self, add: ir.Node, value: ir.Value) -> ir.Value:
        """The other term of a sum."""
        wires = self._wires
        terms = [wires.first(one) for one in add.inputs if one is not None]
        others = [one for one in terms if one is not wires.first(value)]
        return others[0] if others else terms[0]

    # -- serial blocks

    def _serial(self, attention: Attention, pre: ir.Value, ln1: Normed | None, attn: Branch, mid: ir.Value) -> Block:
        wires = self._wires
        norms = self._norms.of(mid)
        readers = {node for node, _ in wires.uses(mid)}
        only_normed = bool(norms) and not wires.is_output(mid) and all(self._norms.reads(node, mid) for node in readers)
        # A norm of the residual stream itself: nothing else reads the stream, and the MLP is added to the norm.
        if ln1 is None and attn.post is None and only_normed and len(norms) == 1:
            after = Normed(norms[0], norms[0].affines[0])
            stream = wires.first(after.affine.out)
            read = self._flat(stream)
            found = self._mlp_after(read)
            if found is not None:
                mlp, post = found
                post = post if read is stream else self._flat(post)
                last = self._norm_of_stream(post)
                end = post if last is None else last.affine.out
                return Block(attention, pre, after, attn, mid, mlp, last, post, True, end, False)
        read = self._flat(mid)
        found = self._mlp_after(read)
        if found is None:
            return Block(attention, pre, ln1, attn, None, None, None, mid, False, mid, False)
        mlp, post = found
        ln2 = mlp.normed if mlp.normed is not None and mlp.normed.norm.x is read else None
        post = post if read is mid else self._flat(post)
        return Block(attention, pre, ln1, attn, mid, mlp, ln2, post, False, post, False)

    def _flat(self, stream: ir.Value) -> ir.Value:
        """The residual stream with tokens and prompts in one axis, or back in two, where a model does so (OPT)."""
        wires = self._wires
        node = wires.only_use(stream)
        if node is None or node.op_type != "Reshape":
            return stream
        whole, other = wires.shape(stream), wires.shape(node.outputs[0])
        same = whole is not None and other is not None and len(whole) != len(other) and whole[-1] == other[-1]
        return wires.first(node.outputs[0]) if same else stream

    def _mlp_after(self, stream: ir.Value) -> tuple[Mlp, ir.Value] | None:
        """The MLP that reads a residual stream, or its norm, and the sum of both."""
        wires = self._wires
        for node, _ in wires.uses(stream):
            if node.op_type != "Add" or len(wires.loose_operands(node)) != 2:
                continue
            branch = self._branches.back(self._other(node, stream))
            mlp = None if branch is None or branch.add is not node else self._mlps.of(branch)
            if mlp is not None and self._reads(mlp, stream):
                return mlp, wires.first(node.outputs[0])
        return None

    def _reads(self, mlp: Mlp, stream: ir.Value) -> bool:
        source, x = self._wires.first(mlp.source), self._wires.first(mlp.first.x)
        return stream in (source, x) or (mlp.normed is not None and mlp.normed.norm.x is stream)

    def _norm_of_stream(self, stream: ir.Value) -> Normed | None:
        norms = self._norms.of(stream)
        return Normed(norms[0], norms[0].affines[0]) if len(norms) == 1 else None

    # -- parallel blocks

    def _late(self, total: ir.Value, stream: ir.Value, pre_norm: Normed | None) -> tuple[Mlp, ir.Value] | None:
        """(MLP, sum) where an MLP that reads the stream before attention is added to the sum of stream and attention."""
        wires = self._wires
        node = wires.only_use(total)
        if node is None or node.op_type != "Add":
            return None
        branch = self._branches.back(self._other(node, total))
        mlp = None if branch is None else self._mlps.of(branch)
        if mlp is None or not self._reads(mlp, stream):
            return None
        return mlp, wires.first(node.outputs[0])

    def _parallel(
        self, attention: Attention, pre: ir.Value, ln1: Normed | None, attn: Branch, mlp: Mlp, post: ir.Value
    ) -> Block:
        ln2 = mlp.normed if mlp.normed is not None and mlp.normed.norm.x is pre else None
        return Block(attention, pre, ln1, attn, None, mlp, ln2, post, False, post, True)

    def _summed(
        self, attention: Attention, streams: list[ir.Value], attn: Branch, other: ir.Value, total: ir.Value, where: str
    ) -> Block:
        """A parallel block whose sublayers are added to each other, or the MLP to the stream, first."""
        wires = self._wires
        terms = [other]
        for _ in range(_TERMS):
            flat = [one for term in terms for one in self._terms(term, streams)]
            streams_met = [one for one in flat if one in streams]
            rest = [one for one in flat if one not in streams]
            if len(streams_met) == 1 and len(rest) == 1:
                branch = self._branches.back(rest[0])
                mlp = None if branch is None else self._mlps.of(branch)
                pre = streams_met[0]
                if mlp is not None and self._reads(mlp, pre):
                    normed = attention.normed
                    ln1 = normed if normed is not None and normed.norm.x is pre else None
                    return self._parallel(attention, pre, ln1, attn, mlp, total)
            node = wires.only_use(total)
            if node is None or node.op_type != "Add":
                break
            terms.append(self._other(node, total))
            total = wires.first(node.outputs[0])
        raise ModelFileError(
            f"{where} is added to something that is neither what it reads nor an MLP beside it: an encoder-decoder, or a block "
            "that graphlens does not know. graphlens expose adds any values of the graph as outputs."
        )

    def _terms(self, value: ir.Value, streams: list[ir.Value]) -> list[ir.Value]:
        """The terms of a sum of a stream and one more; any other value alone."""
        wires = self._wires
        node = value.producer()
        if value in streams or node is None or node.op_type != "Add":
            return [value]
        terms = [wires.first(one) for one in node.inputs if one is not None]
        return terms if any(one in streams for one in terms) else [value]
