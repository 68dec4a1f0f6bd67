"""TransformerLens's weights as views of a graph's initializers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from graphlens.file.names import in_block
from graphlens.surgery.match.columns import Numbers, Stretch, columns_of, places_of, stretch_of, viewed
from graphlens.surgery.match.parts import Block, Found, Linear, Normed, Operand, Table
from graphlens.surgery.match.positions import offset_of
from graphlens.surgery.match.records import Kind, MatchedWeight, Quantised, View
from graphlens.surgery.match.stored import Stored, stored, stored_matrix


def weights_of(found: Found, kind: Kind, hooks: Mapping[str, View]) -> dict[str, MatchedWeight]:
    """The weights that can be read from initializers; those that cannot are absent.

    Args:
        found: The transformer.
        kind: Which kind it is.
        hooks: The views of its hook points.
    """
    weights = _Weights(found, kind, hooks)
    weights.embeddings()
    weights.ending()
    for layer, block in enumerate(found.blocks):
        weights.block(layer, block)
    # Integers whose scales were not found are no weight.
    return {
        name: weight
        for name, weight in weights.found.items()
        if weight.quantised is not None or _is_float(found.wires.graph.initializers.get(weight.tensor))
    }


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and value.const_value.dtype.is_floating_point()


class _Weights:
    """Collects weights.

    Args:
        found: The transformer.
        kind: Which kind it is.
        hooks: The views of its hook points.
    """

    def __init__(self, found: Found, kind: Kind, hooks: Mapping[str, View]) -> None:
        self._model, self._wires, self._kind, self._hooks = found, found.wires, kind, hooks
        self.found: dict[str, MatchedWeight] = {}

    def _vector(self, name: str, value: ir.Value | None, times: float = 1.0) -> None:
        """A weight of one axis."""
        source = stored(self._wires, value)
        if source is None:
            return
        size = int(np.prod(source.shape))
        flat = None if len(source.shape) == 1 else (size,)
        self.found[name] = _weight(source, times, shape=flat)

    def _matrix(self, name: str, linear: Linear, times: float = 1.0, columns: tuple[int, int] | None = None) -> None:
        """A matrix [in, out], or a stretch of its columns."""
        source = stored_matrix(self._wires, linear)
        if source is None or len(source.shape) != 2:
            return
        axis = 0 if source.transposed else 1
        cut = None if columns is None or columns == (0, source.shape[axis]) else (axis, *columns)
        self.found[name] = _weight(source, times, cut=cut, permute=(1, 0) if source.transposed else None)

    def _norm(self, name: str, normed: Normed | None) -> None:
        if normed is not None:
            self._vector(f"{name}.w", normed.affine.weight)
            self._vector(f"{name}.b", normed.affine.bias)

    # -- before and after the blocks

    def embeddings(self) -> None:
        """The tables of embeddings, and their norm."""
        begin, encoder = self._model.beginning, self._kind == "encoder"
        if begin.projected is not None:  # the tables are narrower than TransformerLens's
            return
        if begin.pixels is None:
            self._table("embed.embed.W_E" if encoder else "embed.W_E", begin.tokens)
        if begin.positions is not None:
            name = "embed.pos_embed.W_pos" if encoder else "pos_embed.W_pos"
            self._table(name, begin.positions, offset_of(self._wires, begin.positions))
        if begin.types is not None:
            self._table("embed.token_type_embed.W_token_type", begin.types)
        self._norm("embed.ln", begin.norm)

    def _table(self, name: str, table: Table, offset: int | None = 0) -> None:
        source = self._rows(table)
        if source is None or offset is None:
            return
        if source.transposed:  # one table for embedding and unembedding
            cut = (1, offset, source.shape[1]) if offset else None
            self.found[name] = _weight(source, table.times, cut=cut, permute=(1, 0))
            return
        rows = source.shape[-2]
        width, block = (self._wires.shape(self._model.blocks[0].pre) or (0,))[-1], None
        if source.quantised is not None:  # rows may be filled up to whole blocks
            block = source.quantised.block
        if source.shape[-1] != (width if block is None else -(-width // block) * block):  # widened by a matrix
            return
        shape = None if len(source.shape) == 2 else source.shape[-2:]
        self.found[name] = _weight(source, table.times, cut=(0, offset, rows) if offset else None, shape=shape)

    def _rows(self, table: Table) -> Stored | None:
        """The initializer of a table, also of one whose rows become numbers after they are taken."""
        wires, node = self._wires, table.node
        source = stored(wires, table.table)
        if source is None or node is None:
            return source
        if node.op_type == "GatherBlockQuantized":
            return _packed_rows(source, node)
        after = [reader for reader, _ in node.outputs[0].uses() if reader.op_type == "DequantizeLinear"]
        if not after or source.quantised is not None:
            return source
        last = after[0]
        if any(one.inputs[1:] != last.inputs[1:] for one in after):
            return None
        names = [None if one is None or one.const_value is None else str(one.name) for one in last.inputs[1:]]
        if not names or names[0] is None:
            return None
        many = self._wires.shape(last.inputs[1]) not in ((), (1,))
        if many:  # scales by row would have to be gathered as well
            return None
        quantised = Quantised(names[0], names[1] if len(names) > 1 else None)
        return Stored(source.tensor, source.shape, quantised, source.transposed)

    def ending(self) -> None:
        """The last norm, the head and the unembedding."""
        end = self._model.ending
        self._norm("ln_final", end.norm)
        if self._model.reads_less() is not None:  # no matrix of the head has TransformerLens's sizes
            return
        self._norm("mlm_head.ln", end.dense_norm)
        if end.dense is not None:
            self._matrix("mlm_head.W", end.dense)
            self._vector("mlm_head.b", end.dense.bias)
        if end.unembed is not None:
            matrix, bias = ("head.W_H", "head.b_H") if self._kind == "vision" else ("unembed.W_U", "unembed.b_U")
            self._matrix(matrix, end.unembed)
            self._vector(bias, end.unembed.bias)

    # -- a block

    def block(self, layer: int, block: Block) -> None:
        """The weights of a block.

        Args:
            layer: Its number.
            block: It.
        """

        def at(name: str) -> str:
            return in_block(layer, name)

        attention = block.attention
        after = block.attn.post is not None and block.ln1 is None and not block.normalises
        self._norm(at("ln1"), block.attn.post if after else block.ln1)
        if not after:
            self._norm(at("ln1_post"), block.attn.post)
        for letter, operand in (("q", attention.q), ("k", attention.k), ("v", attention.v)):
            self._heads(layer, letter, operand)
            if operand.normed is not None:
                self._norm(at(f"attn.{letter}_norm"), operand.normed[0])
        self._output(layer, block)
        mlp = block.mlp
        if mlp is None:
            return
        late = mlp.branch.post is not None and block.ln2 is None and not block.normalises
        self._norm(at("ln2"), mlp.branch.post if late else block.ln2)
        if not late:
            self._norm(at("ln2_post"), mlp.branch.post)
        first = "W_gate" if mlp.second is not None else "W_in"
        self._part(at(f"mlp.{first}"), at("mlp.b_gate" if mlp.second is not None else "mlp.b_in"), mlp.first, mlp.pre)
        if mlp.second is not None and mlp.pre_linear is not None:
            self._part(at("mlp.W_in"), at("mlp.b_in"), mlp.second, mlp.pre_linear)
        if mlp.branch.layer_scale is None:
            self._matrix(at("mlp.W_out"), mlp.branch.linear, mlp.branch.times)
            self._vector(at("mlp.b_out"), mlp.branch.linear.bias, mlp.branch.times)

    def _part(self, matrix: str, bias: str, linear: Linear, value: ir.Value) -> None:
        """The part of a projection that gives an activation: half of it where gate and its partner are one product."""
        width = (self._wires.shape(linear.out) or (0,))[-1]
        found = columns_of(self._wires, linear.out, value, width)
        if found is None:
            return
        columns = found.reshape(-1, found.shape[-1])[0]
        if np.any(np.diff(columns) != 1):
            return
        stretch = (int(columns[0]), int(columns[-1]) + 1)
        self._matrix(matrix, linear, 1.0, stretch)
        source = stored(self._wires, linear.bias)
        if source is not None and len(source.shape) == 1:
            self.found[bias] = _weight(source, 1.0, cut=None if stretch == (0, width) else (0, *stretch))

    def _heads(self, layer: int, letter: str, operand: Operand) -> None:
        """W_Q and b_Q, or those of keys or values."""
        view = self._hooks.get(in_block(layer, f"attn.hook_{letter}"))
        linear = operand.linear
        if view is None or linear is None:
            return
        width = (self._wires.shape(linear.out) or (0,))[-1]
        place = next(
            (
                one
                for one, _ in operand.plain
                if (hooked := self._wires.hooked(one)) is not None and hooked.name == view.value
            ),
            None,
        )
        numbers = None if place is None else columns_of(self._wires, linear.out, place, width)
        if numbers is None:
            return
        columns: Numbers = viewed(view, numbers)[0, 0]
        stretch = stretch_of(columns, width)
        if stretch is None:
            return
        capital = letter.upper()
        source = stored_matrix(self._wires, linear)
        if source is not None and len(source.shape) == 2:
            self.found[in_block(layer, f"attn.W_{capital}")] = _head_matrix(source, stretch)
        bias = stored(self._wires, linear.bias)
        if bias is not None and len(bias.shape) == 1:
            self.found[in_block(layer, f"attn.b_{capital}")] = _head_bias(bias, stretch)

    def _output(self, layer: int, block: Block) -> None:
        """W_O and b_O."""
        attention, branch = block.attention, block.attn
        source = stored_matrix(self._wires, attention.out)
        if branch.layer_scale is not None:
            return
        self._vector(in_block(layer, "attn.b_O"), attention.out.bias, branch.times)
        if source is None or len(source.shape) != 2 or not self._in_order(block):
            return
        size = (self._wires.shape(attention.core.z) or (0,))[-1]
        inner, outer = source.shape[::-1] if source.transposed else source.shape
        heads = inner // size
        weight = (
            _weight(source, branch.times, shape=(outer, heads, size), permute=(1, 2, 0))
            if source.transposed
            else _weight(source, branch.times, shape=(heads, size, outer))
        )
        self.found[in_block(layer, "attn.W_O")] = weight

    def _in_order(self, block: Block) -> bool:
        """True if the last projection reads the heads one after the other."""
        wires, attention = self._wires, block.attention
        z, x = wires.shape(attention.core.z), attention.out.x
        if z is None:
            return False
        heads = self._model.heads
        numbers: Numbers = np.zeros(z, np.int64) + np.arange(z[-1])
        if len(z) == 4:
            numbers = numbers + (np.arange(heads) * z[-1])[None, :, None, None]
        else:
            numbers = numbers + (np.arange(z[0]) % heads * z[-1])[:, None, None]
        places = places_of(wires, attention.core.z, x)
        if places is None:
            return False
        moved = numbers.reshape(-1)[places]
        return not np.any(moved.reshape(-1, moved.shape[-1]) != np.arange(heads * z[-1]))


def _weight(
    source: Stored,
    times: float,
    cut: tuple[int, int, int] | None = None,
    shape: tuple[int, ...] | None = None,
    within: tuple[int, int, int] | None = None,
    permute: tuple[int, ...] | None = None,
    joined: bool = False,
) -> MatchedWeight:
    """A view of an initializer."""
    factor = (1.0 if source.times is None else source.times) * times
    plus = None if source.plus is None else source.plus * times
    return MatchedWeight(
        source.tensor,
        source.quantised,
        None,
        cut,
        shape,
        within,
        permute,
        joined,
        None if factor == 1 else factor,
        plus,
    )


def _head_matrix(source: Stored, stretch: Stretch) -> MatchedWeight:
    """[heads, d_model, d_head] of a matrix."""
    each, size = stretch.each, stretch.width
    inner = source.shape[1] if source.transposed else source.shape[0]
    if stretch.groups == 1:
        first, count = stretch.first * size, stretch.heads * size
        axis = 0 if source.transposed else 1
        cut = None if count == each * size else (axis, first, first + count)
        if source.transposed:
            return _weight(source, 1.0, cut, (stretch.heads, size, inner), None, (0, 2, 1))
        return _weight(source, 1.0, cut, (inner, stretch.heads, size), None, (1, 0, 2))
    taken = (stretch.first, stretch.first + stretch.heads)
    if source.transposed:
        return _weight(source, 1.0, None, (stretch.groups, each, size, inner), (1, *taken), (0, 1, 3, 2), True)
    return _weight(source, 1.0, None, (inner, stretch.groups, each, size), (2, *taken), (1, 2, 0, 3), True)


def _head_bias(source: Stored, stretch: Stretch) -> MatchedWeight:
    """[heads, d_head] of a bias."""
    each, size = stretch.each, stretch.width
    if stretch.groups == 1:
        first, count = stretch.first * size, stretch.heads * size
        cut = None if count == each * size else (0, first, first + count)
        return _weight(source, 1.0, cut, (stretch.heads, size))
    taken = (stretch.first, stretch.first + stretch.heads)
    return _weight(source, 1.0, None, (stretch.groups, each, size), (1, *taken), None, True)


def _packed_rows(source: Stored, node: ir.Node) -> Stored | None:
    """The table that GatherBlockQuantized takes rows of."""
    attributes = node.attributes
    names = [None if one is None or one.const_value is None else str(one.name) for one in node.inputs[2:]]
    if not names or names[0] is None:
        return None
    bits = attributes["bits"].as_int() if "bits" in attributes else 4
    block = attributes["block_size"].as_int() if "block_size" in attributes else 128
    quantised = Quantised(names[0], names[1] if len(names) > 1 else None, 0, bits, block)
    columns = math.prod(source.shape[1:]) * 8 // bits  # shared with the unembedding, they may lie block by block
    return Stored(source.tensor, (source.shape[0], columns), quantised)
