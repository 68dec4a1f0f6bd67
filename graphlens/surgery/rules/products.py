"""Gradient rules of products of matrices, of tensors by their letters, and of convolutions."""

from __future__ import annotations

import string

import onnx_ir as ir

from graphlens.errors import InputError
from graphlens.surgery.rules.builder import Builder, Gradient, dims, rank
from graphlens.surgery.rules.registry import Found, Grads, Needs, first_of, number, only, optional, rule, taken


@rule("Gemm")
def _gemm(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    left, right, added = taken(node, 0), taken(node, 1), optional(node, 2)
    alpha, beta = (node.attributes[name].as_float() if name in node.attributes else 1.0 for name in ("alpha", "beta"))
    turned_left, turned_right = number(node, "transA", 0), number(node, "transB", 0)
    g = b.whole(only(grads), node.outputs[0])
    found: Found = [None] * len(needs)
    if needs[0] and turned_left:
        found[0] = Gradient(b.op("Gemm", right, g, alpha=alpha, transA=turned_right, transB=1))
    elif needs[0]:
        found[0] = Gradient(b.op("Gemm", g, right, alpha=alpha, transB=1 - turned_right))
    if needs[1] and turned_right:
        found[1] = Gradient(b.op("Gemm", g, left, alpha=alpha, transA=1, transB=turned_left))
    elif needs[1]:
        found[1] = Gradient(b.op("Gemm", left, g, alpha=alpha, transA=1 - turned_left))
    if added is not None and needs[2]:
        found[2] = b.summed(Gradient(b.times(g, beta)), node.outputs[0], added)
    return found


@rule("MatMul")
def _matmul(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    g = b.whole(only(grads), node.outputs[0])
    return matmul_gradients(b, node, g, needs)


def matmul_gradients(
    b: Builder, node: ir.Node, g: ir.Value, needs: Needs, by: tuple[ir.Value, ir.Value] | None = None
) -> Found:
    """The gradients of both factors of a product of stacks of matrices.

    Args:
        b: Takes the nodes.
        node: The product. It reads [..., n, k] and [..., k, m]; either may be a vector [k].
        g: Its gradient.
        needs: Whose gradient is asked for.
        by: What the factors are multiplied by; the factors themselves by default.

    Returns:
        A gradient for each input, or None.
    """
    left, right = taken(node, 0), taken(node, 1)
    given_left, given_right = (left, right) if by is None else by
    many = rank(left), rank(right)
    if 1 in many:  # a vector is a matrix of one row or one column
        ends = [place for place, count in zip((-2, -1), many, strict=True) if count == 1]
        for place in ends:
            g = b.op("Unsqueeze", g, b.constant([place])) if len(ends) == 1 else g
        g = b.op("Reshape", g, b.constant([1, 1])) if len(ends) == 2 else g
        given_left = b.op("Unsqueeze", given_left, b.constant([0])) if many[0] == 1 else given_left
        given_right = b.op("Unsqueeze", given_right, b.constant([1])) if many[1] == 1 else given_right
    found: Found = [None] * len(needs)
    counts = max(many[0], 2), max(many[1], 2)
    outer = dims(node.outputs[0])[: max(counts) - 2]
    columns = dims(right)[-1] if many[1] > 1 else 1
    if needs[0] and counts[1] == 2 and isinstance(columns, int):
        # A weight: as rows, so that ONNX Runtime needs no turned copy of it.
        rows = b.op("Gemm", b.op("Reshape", g, b.constant([-1, columns])), given_right, transB=1)
        found[0] = Gradient(b.op("Reshape", rows, b.shape_of(left)))
    elif needs[0]:
        found[0] = _collected(b, b.op("MatMul", g, _turned(b, given_right, counts[1])), left, outer)
    if needs[1]:
        found[1] = _collected(b, b.op("MatMul", _turned(b, given_left, counts[0]), g), right, outer)
    return found


def _turned(b: Builder, value: ir.Value, count: int) -> ir.Value:
    """A stack of matrices, of so many axes, each transposed."""
    order = list(range(count))
    return b.op("Transpose", value, perm=[*order[:-2], order[-1], order[-2]])


def _collected(b: Builder, whole: ir.Value, factor: ir.Value, outer: list[int | str]) -> Gradient:
    """The gradient of a factor from that of each matrix that it was multiplied as; ``outer`` are the sizes of the stack."""
    sizes = dims(factor)
    if len(sizes) == 1:
        kept = b.op("ReduceSum", whole, b.constant(list(range(len(outer)))), keepdims=0) if outer else whole
        return Gradient(b.op("Reshape", kept, b.shape_of(factor)))
    return b.summed(Gradient(whole), ir.Value(name="", shape=ir.Shape([*outer, *sizes[-2:]])), factor)


@rule("Einsum")
def _einsum(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    terms, result = _letters(node)
    g = b.whole(only(grads), node.outputs[0])
    found: Found = []
    for place, needed in enumerate(needs):
        found.append(_einsum_gradient(b, node, g, terms, result, place) if needed else None)
    return found


def _letters(node: ir.Node) -> tuple[list[str], str]:
    """(the letters of each input's axes, those of the result), with letters in the place of dots."""
    equation = node.attributes["equation"].as_string().replace(" ", "")
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    free = [letter for letter in string.ascii_letters if letter not in equation]
    counts = [rank(taken(node, i)) - len(term.replace("...", "")) for i, term in enumerate(terms)]
    most = max((count for count, term in zip(counts, terms, strict=True) if "..." in term), default=0)
    dots = "".join(free[:most])
    named = [
        term.replace("...", dots[most - count :] if count else "") for term, count in zip(terms, counts, strict=True)
    ]
    if not arrow:
        plain = "".join(terms).replace("...", "")
        result = "..." + "".join(sorted(letter for letter in set(plain) if plain.count(letter) == 1))
    return named, result.replace("...", dots)


def _einsum_gradient(b: Builder, node: ir.Node, g: ir.Value, terms: list[str], result: str, place: int) -> Gradient:
    """The gradient of one input of an Einsum: the product of the others and the result's gradient."""
    own, x = terms[place], taken(node, place)
    if any(len(set(term)) < len(term) for term in (*terms, result)):
        raise InputError(f"{node.name!r}: an Einsum over a diagonal cannot be differentiated.")
    others = [(terms[i], taken(node, i)) for i in range(len(terms)) if i != place]
    given = {letter for term in (result, *(term for term, _ in others)) for letter in term}
    kept = "".join(letter for letter in own if letter in given)
    equation = f"{','.join([result, *(term for term, _ in others)])}->{kept}"
    found = b.op("Einsum", g, *(value for _, value in others), equation=equation)
    alone = [axis for axis, letter in enumerate(own) if letter not in given]
    if alone:  # an axis that nothing else has was summed
        found = b.op("Unsqueeze", found, b.constant(alone))
        found = b.op("Expand", found, b.shape_of(x))
    sizes: dict[str, int | str] = dict(zip(own, dims(x), strict=True))
    for term, value in (*others, (result, node.outputs[0])):
        sizes.update((letter, size) for letter, size in zip(term, dims(value), strict=True) if size != 1)
    return b.summed(Gradient(found), ir.Value(name="", shape=ir.Shape([sizes[letter] for letter in own])), x)


@rule("Conv")
def _convolution(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    if any(needs[1:]):
        raise InputError(f"{node.name!r}: a Conv is differentiated by its first input alone.")
    x, weight = taken(node, 0), taken(node, 1)
    spatial = rank(x) - 2

    def numbers(name: str, default: list[int]) -> list[int]:
        return list(node.attributes[name].as_ints()) if name in node.attributes else default

    padding = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else "NOTSET"
    if padding not in ("NOTSET", "VALID"):
        raise InputError(f"{node.name!r}: a Conv with auto_pad={padding!r} cannot be differentiated.")
    pads = numbers("pads", [0] * (2 * spatial)) if padding == "NOTSET" else [0] * (2 * spatial)
    ones = [1] * spatial
    found = b.op(
        "ConvTranspose",
        *(b.whole(only(grads), node.outputs[0]), weight),
        strides=numbers("strides", ones),
        dilations=numbers("dilations", ones),
        group=number(node, "group", 1),
    )
    # That is as large as what was read, padding included; entries that no window reached are missing at the end.
    ends = {}
    for axis in range(2, spatial + 2):
        place, before = b.constant([axis]), b.constant([-pads[axis - 2]])
        size, reached = (b.op("Gather", b.shape_of(value), place, axis=0) for value in (x, found))
        ends[axis] = before, b.op("Sub", b.op("Sub", size, reached), before)
    return first_of(Gradient(b.padded(found, spatial + 2, ends)), needs)
