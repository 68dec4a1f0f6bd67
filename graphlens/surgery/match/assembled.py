"""A whole transformer out of its pieces: blocks one after the other, what comes before the first and after the last."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from graphlens.errors import ModelFileError
from graphlens.surgery.match.branches import Branches
from graphlens.surgery.match.cores import cores_of
from graphlens.surgery.match.embeddings import FEW, beginning_of
from graphlens.surgery.match.ending import ending_of
from graphlens.surgery.match.heads import Heads
from graphlens.surgery.match.layout import Layout
from graphlens.surgery.match.linear import Linears
from graphlens.surgery.match.mlp import Mlps
from graphlens.surgery.match.norms import Norms
from graphlens.surgery.match.parts import Attention, Block, Core, Found, Operand
from graphlens.surgery.match.residual import Residuals
from graphlens.surgery.match.shapes import Shapes
from graphlens.surgery.match.wires import Wires

_EXPOSE = "graphlens expose adds any values of the graph as outputs."


def assemble(model: ir.Model, shapes: Mapping[str, tuple[int, ...]] | None) -> Found:
    """Finds the parts of a transformer in a graph.

    Args:
        model: A model with standard operators.
        shapes: Name of a value -> its shape in a run, or None.

    Raises:
        ModelFileError: The graph is none that graphlens knows.
    """
    wires = Wires(model, Shapes(model, shapes))
    linears, norms = Linears(wires), Norms(wires)
    cores = cores_of(wires)
    if not cores:
        raise ModelFileError(
            f"the graph has no attention: no Softmax whose result is multiplied with values. {_EXPOSE}"
        )
    branches, heads = Branches(wires, linears, norms), Heads(wires, linears, norms)
    residuals = Residuals(wires, norms, branches, Mlps(wires, linears, norms))
    attentions = [_attention(wires, core, heads, branches, norms) for core in cores]
    blocks = _in_order([residuals.block(attention) for attention in attentions])
    ending = ending_of(wires, linears, norms, blocks[-1].end)
    logits = None if ending.unembed is None else wires.shape(ending.unembed.out)
    # Logits of each token tell the tokens that there are; few of a whole prompt may be the classes of a classifier.
    vocabulary = None if not logits or (len(logits) < 3 and logits[-1] <= FEW) else logits[-1]
    rotated = any(block.attention.q.rotation is not None for block in blocks)
    beginning = beginning_of(wires, linears, norms, blocks[0].pre, vocabulary, rotated)
    batch, count, tokens = _sizes(wires, cores[0])
    return Found(wires, blocks, beginning, ending, batch, tokens, count)


def _sizes(wires: Wires, core: Core) -> tuple[int, int, int]:
    """(prompts, heads, tokens) in the run that shapes are of."""
    scores, q = wires.shape(core.scores), wires.shape(core.q)
    shape = scores if scores is not None and len(scores) == 4 else q
    if shape is None or len(shape) < 3:
        raise ModelFileError(
            f"the shape of the scores {core.scores.name!r} is not known. Give the shapes of a run: match(model, shapes)."
        )
    if len(shape) == 4:
        return shape[0], shape[1], shape[2]
    first = next(value for value in wires.graph.inputs if wires.shape(value) and value.const_value is None)
    batch = (wires.shape(first) or (1,))[0]
    return batch, shape[0] // batch, shape[1]


def _attention(wires: Wires, core: Core, heads: Heads, branches: Branches, norms: Norms) -> Attention:
    batch, count, _ = _sizes(wires, core)
    where = f"the attention at {core.softmax.name!r}"
    sizes = {"b": batch, "h": count}
    operands: list[Operand] = []
    for value, axes in ((core.q, "bhpd"), (core.k, "bhdp"), (core.v, "bhpd")):
        found = heads.operand(value, axes, dict(sizes))
        if found is None:
            raise ModelFileError(f"the layout of {value.name!r} in {where} is not understood. {_EXPOSE}")
        operands.append(found)
    q, k, v = operands
    for operand, what in ((q, "queries"), (k, "keys"), (v, "values")):
        if operand.linear is None:
            end = operand.end
            outside = end is not None and end.is_graph_input()
            raise ModelFileError(
                f"the {what} of {where} "
                + ("are an input of the graph" if outside else "do not come from a projection in a way that is known")
                + f": an encoder-decoder's second half, or attention that graphlens does not know. {_EXPOSE}"
            )
    sources = {operand.linear.source for operand in operands if operand.linear is not None}
    if len(sources) != 1:
        raise ModelFileError(
            f"queries and keys of {where} come from different activations: an encoder-decoder's cross-attention, which has no "
            f"hook points in graphlens. {_EXPOSE}"
        )
    (source,) = sources
    layout = _z_layout(wires, core, sizes)
    ahead = None if layout is None else branches.after_heads(core.z, layout)
    if ahead is None:
        raise ModelFileError(f"what {where} gives does not go through a projection in a way that is known. {_EXPOSE}")
    trail, out = ahead
    return Attention(core, q, k, v, trail, out, source, norms.giving(source))


def _z_layout(wires: Wires, core: Core, sizes: Mapping[str, int]) -> Layout | None:
    shape = wires.shape(core.z)
    if shape is None:
        return None
    known = {**sizes, "p": shape[-2], "d": shape[-1]}
    if len(shape) == 4:
        return Layout((("b",), ("h",), ("p",), ("d",)), known)
    return Layout((("b", "h"), ("p",), ("d",)), known) if len(shape) == 3 else None


def _in_order(blocks: list[Block]) -> list[Block]:
    """The blocks in the order in which the residual stream goes through them."""
    by_start = {block.pre: block for block in blocks}
    ends = {block.end for block in blocks}
    first = [block for block in blocks if block.pre not in ends]
    if len(first) != 1 or len(by_start) != len(blocks):
        raise ModelFileError(
            f"the {len(blocks)} attention blocks of the graph are no chain: the residual stream begins {len(first)} times. "
            f"Several models in one file, or layers of another kind between them, have no hook points in graphlens. {_EXPOSE}"
        )
    ordered = [first[0]]
    while (after := by_start.get(ordered[-1].end)) is not None:
        ordered.append(after)
    if len(ordered) != len(blocks):
        raise ModelFileError(
            f"only {len(ordered)} of the graph's {len(blocks)} attention blocks follow one another: layers of another kind "
            f"are between them. {_EXPOSE}"
        )
    return ordered
