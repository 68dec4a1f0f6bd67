"""Unfusing a model: the order of its steps, and how what a rule built takes a node's place."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from graphlens.errors import InputError
from graphlens.surgery.graph import drop_unused
from graphlens.surgery.unfusing import (
    Unfused,
    activations,
    attention,
    channels,
    embeddings,
    grouped,
    norms,
    products,
    quantised,
    rotary,
    standard,
)
from graphlens.surgery.unfusing.building import Builder, Kept, Workshop
from graphlens.surgery.unfusing.filling import fill
from graphlens.surgery.unfusing.opsets import LEAST, raised
from graphlens.surgery.unfusing.placing import install
from graphlens.surgery.unfusing.quantised import joined
from graphlens.surgery.unfusing.relus import restore_relus
from graphlens.surgery.unfusing.table import RULES, Rule, name_of
from graphlens.surgery.unfusing.unknown import why_kept

# Importing a file of rules puts its rules into the table.
_FILES = (activations, attention, channels, embeddings, grouped, norms, products, quantised, rotary, standard)


def unfuse(model: ir.Model, keep: Iterable[str] = (), block: int = 0) -> Unfused:
    """A copy of a model in which fused operators are written out in standard ones, so that what they compute inside has names.

    The copy computes what the model computes, and values that the model has keep their names. Where several nodes of it turn
    the same integers into the same numbers one is left, so that an edit of these numbers reaches all that read them.

    Args:
        model: Any model of standard operators and ONNX Runtime's.
        keep: Operators that stay as they are: "GroupQueryAttention", or with a domain "com.microsoft::Attention".
        block: How many channels a block has in files that ONNX Runtime optimised for one kind of processor (NCHWc): 8 or 16. 0
            where that is not known; a convolution whose sizes do not tell it is then left.

    Returns:
        The copy, with what was expanded and what was not.

    Raises:
        InputError: ``keep`` names an operator that is not in the model and has no rule.
        ModelFileError: An operator of an older opset that does not mean the same in opset 20.
    """
    left = set(keep)
    _check_names(model, left)
    model = model.clone()
    if model.functions:
        common_passes.InlinePass()(model)
    if "ai.onnx" in model.opset_imports:
        model.opset_imports[""] = model.opset_imports.pop("ai.onnx")
    _name_nodes(model.graph)
    shop = Workshop(model.graph, max(model.opset_imports.get("", LEAST), LEAST), block)
    raised(model, shop)
    expanded, kept = Counter[str](), dict[str, str]()
    for node in list(model.graph):
        operator = name_of(node.domain, node.op_type)
        if operator in left or node.op_type in left:
            kept[operator] = f"{operator} stays as it is because that was asked for."
        elif operator in RULES:
            builder = Builder(node, shop)
            try:
                found = RULES[operator].function(builder, node)
            except Kept as error:
                builder.discard()
                kept[operator] = f"{operator} {error}"
            else:
                install(node, builder, found)
                expanded[operator] += 1
                continue
        elif joined(shop, node):
            continue
        elif (reason := why_kept(node)) is not None:
            kept.setdefault(operator, reason)
        fill(node, shop.opset)
        shop.passed.add(node)
    restore_relus(shop)
    _in_branches(model.graph, kept)
    drop_unused(model)
    _tidy(model, shop.origin)
    return Unfused(model, dict(expanded), kept, shop.origin)


def table() -> list[Rule]:
    """The rules that there are, by the names of their operators: those of ONNX Runtime come after the standard ones."""
    return sorted(RULES.values(), key=lambda rule: ("::" in rule.operator, rule.operator))


def _check_names(model: ir.Model, names: Iterable[str]) -> None:
    """Refuses names of operators that are neither in a model nor in the table: one is misspelt."""
    known = set(RULES) | {name_of(node.domain, node.op_type) for node in model.graph.all_nodes()}
    known |= {name.rpartition("::")[2] for name in known}
    for name in sorted(set(names) - known):
        near = difflib.get_close_matches(name, sorted(known), 1)
        hint = f" Nearest: {near[0]!r}." if near else ""
        raise InputError(f"keep={name!r}: the model has no such operator, and unfuse has no rule for one.{hint}")


def _name_nodes(graph: ir.Graph) -> None:
    """Gives a name of its own to each node that has none, or one that another has."""
    seen: set[str] = set()
    for index, node in enumerate(graph.all_nodes()):
        name = node.name or f"{node.op_type}_{index}"
        while name in seen:
            name = f"{name}_{index}"
        seen.add(name)
        node.name = name


def _in_branches(graph: ir.Graph, kept: dict[str, str]) -> None:
    """Names the fused operators that stand inside branches and loops."""
    main = set(graph)
    for node in graph.all_nodes():
        operator = name_of(node.domain, node.op_type)
        if node not in main and (operator in RULES or why_kept(node) is not None):
            kept.setdefault(operator, f"{operator} is left as it is where it stands inside a branch or a loop.")


def _tidy(model: ir.Model, origin: dict[str, str]) -> None:
    """Drops what is left over: origins of nodes that nothing needs, and domains that no node has."""
    names = {node.name for node in model.graph.all_nodes()}
    for name in origin.keys() - names:
        del origin[name]
    used = {node.domain for node in model.graph.all_nodes()} | {""}
    for domain in [domain for domain in model.opset_imports if domain not in used]:
        del model.opset_imports[domain]
