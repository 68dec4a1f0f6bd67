"""The parts of a transformer that matching finds in a graph: plain records of nodes and values."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from graphlens.surgery.match.layout import Layout
from graphlens.surgery.match.wires import Wires

Spot = tuple[ir.Value, Layout]


@dataclass(frozen=True)
class Linear:
    """``x @ W + b``.

    Attributes:
        node: The product.
        x: What is multiplied, [.., in].
        source: The same before tokens were put into one axis, [b, p, in].
        weight: The matrix: [in, out], a plain value or one that is dequantised; for integers and packed numbers those.
        transposed: True if the matrix is [out, in].
        bias: What is added to each row; None for none.
        out: The result [.., out], the bias added.
        scale: The number that the product is multiplied by (Gemm's alpha).
        scales: The scales of an integer matrix, where the product is of integers; None otherwise.
    """

    node: ir.Node
    x: ir.Value
    source: ir.Value
    weight: ir.Value
    transposed: bool
    bias: ir.Value | None
    out: ir.Value
    scale: float = 1.0
    scales: ir.Value | None = None


@dataclass(frozen=True)
class Affine:
    """What follows a norm.

    Attributes:
        weight: What multiplies; None for nothing.
        bias: What is added; None for nothing.
        out: The result.
    """

    weight: ir.Value | None
    bias: ir.Value | None
    out: ir.Value


@dataclass(frozen=True)
class Norm:
    """A LayerNorm or an RMSNorm over the last axis.

    Attributes:
        x: What is normalised.
        centred: True if the mean is subtracted.
        eps: What is added to the variance.
        scale: The root of the variance; None where the graph computes only its inverse.
        normalized: What was divided by it; None where it is inside of an operator.
        affines: What follows, once for each that reads it: several where two norms of one value were merged.
    """

    x: ir.Value
    centred: bool
    eps: float
    scale: ir.Value | None
    normalized: ir.Value | None
    affines: tuple[Affine, ...]


@dataclass(frozen=True)
class Normed:
    """The result of a norm.

    Attributes:
        norm: The norm.
        affine: Which of its results.
    """

    norm: Norm
    affine: Affine


@dataclass(frozen=True)
class Core:
    """One layer's attention.

    Attributes:
        softmax: The node.
        scores: What it normalises: scores after scale, bound and mask.
        pattern: What is multiplied with the values.
        q: The first operand of the product of queries and keys.
        k: The second one.
        v: The second operand of the product of pattern and values.
        z: Its result.
        scale: What that first product is multiplied by until it becomes the scores.
        soft_cap: The bound of a tanh on the way; None for none.
        added: What is added to the scores or chosen instead of them: masks, and biases by position.
        sinks: What is put beside the scores as one more key; None for nothing.
    """

    softmax: ir.Node
    scores: ir.Value
    pattern: ir.Value
    q: ir.Value
    k: ir.Value
    v: ir.Value
    z: ir.Value
    scale: float
    soft_cap: float | None
    added: tuple[ir.Value, ...]
    sinks: ir.Value | None = None


@dataclass(frozen=True)
class Rotation:
    """A rotation of queries or keys.

    Attributes:
        before: What is rotated.
        dimensions: How many of a head's dimensions are rotated.
        adjacent: True if neighbouring dimensions are rotated together; False for one of each half; None if it cannot be told.
        angles: What it is multiplied by: cosines and sines.
    """

    before: ir.Value
    dimensions: int
    adjacent: bool | None
    angles: tuple[ir.Value, ...]


@dataclass
class Operand:
    """What is known of an operand of attention.

    Attributes:
        plain: Where the projection's result is, the nearest to the operand first.
        rotated: The same after rotation; empty where nothing is rotated.
        normed: (the norm of heads, the layout of what it normalises), where there is one.
        rotation: The rotation, where there is one.
        linear: The projection; None where the way back ends before one.
        source: What the projection gives, from which parts are taken.
        scale: What queries or keys are multiplied by after all hook points.
        repeats: How many query heads share each of them.
        past: The input of the graph that holds earlier tokens, or None.
        joined: What both together are.
        end: Where the way back ended without a projection.
        clipped: True if what the projection gives is clipped.
    """

    plain: list[Spot] = field(default_factory=list)
    rotated: list[Spot] = field(default_factory=list)
    normed: tuple[Normed, Layout] | None = None
    rotation: Rotation | None = None
    linear: Linear | None = None
    source: ir.Value | None = None
    scale: float = 1.0
    repeats: int = 1
    past: ir.Value | None = None
    joined: ir.Value | None = None
    end: ir.Value | None = None
    clipped: bool = False


@dataclass(frozen=True)
class Branch:
    """The end of a sublayer.

    Attributes:
        linear: Its last projection.
        post: The norm after it; None for none.
        written: What is added to the residual stream, [b, p, D].
        times: The number that the projection's result is multiplied by.
        layer_scale: A vector that it is multiplied by; None for none.
        add: The sum that reads it; None where something else does.
    """

    linear: Linear
    post: Normed | None
    written: ir.Value
    times: float
    layer_scale: ir.Value | None
    add: ir.Node | None


@dataclass(frozen=True)
class Mlp:
    """An MLP.

    Attributes:
        branch: What it writes.
        post: What its last projection reads.
        pre: What the activation function is of.
        pre_linear: What its result is multiplied by; None without a gate.
        first: The projection that gives ``pre``.
        second: That which gives ``pre_linear``; the same one where both are halves of its result.
        act_fn: The activation function as transformers calls it; None if it is none that is known.
        source: What the projections read.
        normed: The norm that gives that; None where it is no norm's result.
    """

    branch: Branch
    post: ir.Value
    pre: ir.Value
    pre_linear: ir.Value | None
    first: Linear
    second: Linear | None
    act_fn: str | None
    source: ir.Value
    normed: Normed | None


@dataclass(frozen=True)
class Attention:
    """A core with its operands and its last projection.

    Attributes:
        core: The core.
        q: Its queries.
        k: Its keys.
        v: Its values.
        z: The values from the product of pattern and values to the last projection.
        out: That projection.
        source: What the first projections read.
        normed: The norm that gives that; None where it is no norm's result.
    """

    core: Core
    q: Operand
    k: Operand
    v: Operand
    z: list[tuple[ir.Value, Layout]]
    out: Linear
    source: ir.Value
    normed: Normed | None


@dataclass(frozen=True)
class Block:
    """A block of a transformer.

    Attributes:
        attention: Its attention.
        pre: The residual stream before it.
        ln1: The norm that attention reads; in blocks that normalise the residual stream that after attention.
        attn: What attention writes.
        mid: The residual stream between the sublayers; None in a parallel block, or without an MLP.
        mlp: The MLP; None for none.
        ln2: The norm that the MLP reads; in blocks that normalise the residual stream that after the MLP.
        post: The residual stream after the block.
        normalises: True if the norms are of the residual stream itself.
        end: What the next block begins with: ``post``, or its norm.
        parallel: True if attention and MLP read the same residual stream.
    """

    attention: Attention
    pre: ir.Value
    ln1: Normed | None
    attn: Branch
    mid: ir.Value | None
    mlp: Mlp | None
    ln2: Normed | None
    post: ir.Value
    normalises: bool
    end: ir.Value
    parallel: bool


@dataclass(frozen=True)
class Table:
    """An embedding.

    Attributes:
        value: What it gives, multiplied by ``times``.
        table: The table of rows that it takes, or of all positions; None for patches.
        node: The node that takes them; None where all rows are added.
        index: Which rows; None for all of them.
        input: The graph's input that the rows are, or None.
        times: What the rows are multiplied by.
    """

    value: ir.Value
    table: ir.Value | None
    node: ir.Node | None
    index: ir.Value | None
    input: ir.Value | None
    times: float


@dataclass
class Beginning:
    """The embeddings of a model.

    Attributes:
        tokens: Those of tokens, or an image's patches with what is put before them.
        positions: Those of positions; None for none.
        types: Those of types of tokens; None for none.
        norm: The norm of their sum; None for none.
        whole: What the first block reads.
        projected: What makes the residual stream of narrower embeddings (ALBERT, ELECTRA); None where they are as wide.
        pixels: The input of pixels of a vision model; None for a model of tokens.
        patches: The convolution of a vision model.
    """

    tokens: Table
    positions: Table | None = None
    types: Table | None = None
    norm: Normed | None = None
    whole: ir.Value = field(default_factory=ir.Value)
    projected: Linear | None = None
    pixels: ir.Value | None = None
    patches: ir.Node | None = None


@dataclass
class Ending:
    """The end of a model.

    Attributes:
        norm: The last norm; None for none.
        unembed: The projection to logits; None for a model that ends in hidden states.
        read: What it reads.
        logits: The output of logits.
        soft_cap: The bound that a tanh keeps the logits in.
        times: What the logits are multiplied by after the projection, before that bound.
        dense: The first projection of a head of masked tokens.
        dense_act: Its activation function.
        dense_norm: The norm of such a head.
        hidden: The output of the last hidden states.
        picked: True if the projection reads one token only.
    """

    norm: Normed | None = None
    unembed: Linear | None = None
    read: ir.Value | None = None
    logits: ir.Value | None = None
    soft_cap: float | None = None
    times: float = 1.0
    dense: Linear | None = None
    dense_act: str | None = None
    dense_norm: Normed | None = None
    hidden: ir.Value | None = None
    picked: bool = False


@dataclass(frozen=True)
class Found:
    """A transformer found in a graph.

    Attributes:
        wires: The graph.
        blocks: Its blocks, the first one first.
        beginning: Its embeddings.
        ending: Its end.
        batch: How many prompts there are in the run that shapes are of.
        tokens: How many tokens each of them has.
        heads: How many query heads there are.
    """

    wires: Wires
    blocks: list[Block]
    beginning: Beginning
    ending: Ending
    batch: int
    tokens: int
    heads: int

    def reads_less(self) -> tuple[int, int] | None:
        """(what the unembedding reads, what the residual stream has) in numbers, where a head makes it narrower (ALBERT)."""
        read = None if self.ending.read is None else self.wires.shape(self.ending.read)
        stream = self.wires.shape(self.blocks[0].pre)
        return (read[-1], stream[-1]) if read and stream and read[-1] != stream[-1] else None
