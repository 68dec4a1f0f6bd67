"""Drawings of what pages tell: made of the graph, the names and the numbers of the real thing, and not from memory.

A test draws them again and compares; where numbers of a run are in them, to a step of what is shown.
"""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tools.drawing import box, drawing, line, rect, text
from tools.page_charts import DOCS, tables

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphlens import HookedTransformer
    from graphlens.interventions import Intervention

CLEAN = "When John and Mary went to the store, John gave a drink to"
CORRUPTED = CLEAN.replace("John gave", "Mary gave")
HOOK = "blocks.1.attn.hook_z"


@cache
def _model() -> HookedTransformer:
    from graphlens import HookedTransformer

    return HookedTransformer.from_pretrained_no_processing("tiny-gpt2")


def gate() -> str:
    """The nodes of a gate in tiny-gpt2's drivable file, between what computes the hook point and what reads it."""
    from graphlens import embedded_model, surgery, write_drivable

    with tempfile.TemporaryDirectory() as folder:
        write_drivable(embedded_model(), HOOK, Path(folder) / "driven", announce=lambda _: None)
        graph = surgery.load_plain(Path(folder) / "driven").graph
        fed = {each.name: each for each in graph.inputs} | dict(graph.initializers)
        steps, value = [], None
        for part in ("scale", "add", "where"):
            (node,) = (use.node for use in fed[surgery.gate_input(HOOK, part)].uses())
            before = [item for item in node.inputs if item is not None and item.name not in fed]
            if value is not None and before != [value]:
                raise RuntimeError(f"the gate's {node.op_type} does not follow what comes before it.")
            first = before[0].producer() if value is None else None
            steps += [first] if first is not None else []
            steps.append(node)
            value = node.outputs[0]
        assert value is not None
        steps.append(next(use.node for use in value.uses()))
        names = [node.op_type for node in steps if node is not None]
        return _gate_drawn(names)


def _gate_drawn(operators: Sequence[str]) -> str:
    """The row of nodes, with the gate's inputs above those that read them."""
    parts = [text(14, 24, f"The gate at {HOOK}, as it stands in the drivable file", "head")]
    fed = {1: (("scale", "1"),), 2: (("add", "0"),), 3: (("where", "false"), ("patch", "0"))}
    says = ("computes hook_z", "x * scale", "+ add", "where(where, patch, …)", "reads the edited value")
    wide, gap = 138, 26
    for at, name in enumerate(operators):
        x = 14 + at * (wide + gap)
        parts.append(box(x, 148, wide, name, says[at], "hot" if at in fed else "box"))
        if at:
            parts.append(line(x - gap, 168, x - 2, 168, tip=True))
        for row, (part, neutral) in enumerate(fed.get(at, ())):
            y = 82 if len(fed[at]) == 1 else (48, 82)[row]
            parts.append(text(x + wide / 2, y, f"…/{part}", "mono", "middle"))
            parts.append(text(x + wide / 2, y + 14, f"nothing changes at {neutral}", "says", "middle"))
        if at in fed:
            parts.append(line(x + wide / 2, 102, x + wide / 2, 146, tip=True))
    parts.append(
        text(14, 214, "Orange: what the gate adds to the graph. Above it: the inputs that a program feeds.", "says")
    )
    words = f"A gate in the graph: {', then '.join(operators)}; inputs scale, add, where and patch come in from above."
    return drawing(228, words, parts)


def edits() -> str:
    """The first example of docs/edits.md: what it touches, and what tiny-gpt2 then says."""
    from graphlens import interventions

    page = (DOCS / "edits.md").read_text(encoding="utf-8")
    example = page.partition("```json\n")[2].partition("```")[0]
    found = interventions.from_json(example)
    model = _model()
    parts = [text(14, 24, "What the example edits in tiny-gpt2, and what the model says then", "head")]
    for part in range(model.cfg.n_layers):
        parts.append(text(14, 62 + 44 * part + 20, f"block {part}", "says"))
        for head in range(model.cfg.n_heads):
            mine = [each for each in found if each.hook.startswith(f"blocks.{part}.") and _has(each, head)]
            words = ", ".join(dict.fromkeys(each.kind for each in mine))
            parts.append(rect(74 + 80 * head, 58 + 44 * part, 72, 36, "hot" if mine else "box", ' rx="4"'))
            parts.append(text(110 + 80 * head, 73 + 44 * part, f"head {head}", "says", "middle"))
            if words:
                parts.append(text(110 + 80 * head, 88 + 44 * part, words, "", "middle"))
    tokens = model.to_tokens(CLEAN)
    runs = {"as it is": model(tokens), "edited": model.run_with_interventions(tokens, found)}
    for at, (name, logits) in enumerate(runs.items()):
        y = 62 + 92 * at
        parts.append(text(430, y + 8, f"next token, {name}", "says"))
        row = logits[0, -1].astype(np.float64)
        chances = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        for rank, token in enumerate(np.argsort(-row)[:3]):
            top = y + 16 + 20 * rank
            parts.append(text(520, top + 12, repr(model.to_string([int(token)])), "mono", "end"))
            parts.append(rect(530, top, round(max(1.0, 200 * chances[token])), 15, "blue" if not at else "orange"))
            parts.append(text(538 + round(200 * chances[token]), top + 12, f"{chances[token]:.2f}", "says"))
    parts.append(text(14, 252, CLEAN + " …", "says"))
    return drawing(
        264,
        "The heads of tiny-gpt2 that the example's edits touch, and the likeliest next tokens without and with them",
        parts,
    )


def _has(edit: Intervention, head: int) -> bool:
    """True if an edit touches a head."""
    heads = edit.heads
    return heads is None or head in (heads if isinstance(heads, (list, tuple)) else [heads])


def kinds() -> str:
    """The four kinds of edits at one hook point, as the size of each head's output at each position."""
    from graphlens import Ablate, Patch, Scale, Steer

    model = _model()
    tokens = model.to_tokens(CLEAN)
    other = model.run_with_cache(CORRUPTED, names_filter=HOOK)[1][HOOK]
    vector = other[0, 10, 0] - model.run_with_cache(CLEAN, names_filter=HOOK)[1][HOOK][0, 10, 0]
    panels = {
        "as it is": [],
        "Ablate, heads=2": [Ablate(HOOK, heads=2)],
        "Patch, positions=10": [Patch(HOOK, other[:, 10], positions=10)],
        "Steer, heads=0": [Steer(HOOK, vector, 2.0, heads=0)],
        "Scale 0.5, heads=[0, 3]": [Scale(HOOK, 0.5, heads=[0, 3])],
    }
    sizes = {}
    for name, edits_ in panels.items():
        cache_ = model.run_with_interventions(tokens, edits_, names_filter=HOOK)[1]
        sizes[name] = np.linalg.norm(cache_[HOOK][0], axis=-1)
    most = max(float(each.max()) for each in sizes.values())
    parts = [text(14, 24, f"{HOOK} of tiny-gpt2: how large each head's output is at each position", "head")]
    for at, (name, each) in enumerate(sizes.items()):
        left = 14 + 161 * at
        parts.append(text(left, 52, name))
        changed = np.abs(each - sizes["as it is"]) > 1e-3
        for position, head in np.ndindex(*each.shape):
            x, y = left + 34 * head, 62 + 15 * position
            parts.append(rect(x, y, 32, 13, "box"))
            size = each[position, head] / most
            if round(float(size), 2):
                mark = "orange" if changed[position, head] else "blue"
                parts.append(rect(x, y, 32, 13, mark, f' fill-opacity="{size:.2f}"'))
            elif changed[position, head]:
                parts.append(line(x, y, x + 32, y + 13) + line(x, y + 13, x + 32, y))
    bottom = 62 + 15 * len(next(iter(sizes.values())))
    parts.append(
        text(
            14,
            bottom + 18,
            "Columns: heads 0 to 3. Rows: positions, from the first. Orange: changed; crossed out: 0 now.",
            "says",
        )
    )
    return drawing(
        bottom + 28,
        "Five grids of positions and heads: an activation as it is, ablated, patched, steered and scaled",
        parts,
    )


# From below: what a BERT-like block computes; the norms lie on the stream itself.
ENCODER = (
    (("blocks.0.hook_resid_pre",), "what the block reads", True),
    (("blocks.0.attn.hook_q", "blocks.0.attn.hook_k", "blocks.0.attn.hook_v"), "queries, keys, values", False),
    (("blocks.0.attn.hook_pattern",), "who looks at whom, both ways", False),
    (("blocks.0.hook_attn_out",), "what attention found", False),
    (("blocks.0.hook_resid_mid",), "the sum", True),
    (("blocks.0.ln1.hook_normalized",), "its norm, which goes on", True),
    (("blocks.0.mlp.hook_post",), "neurons", False),
    (("blocks.0.hook_mlp_out",), "what the MLP found", False),
    (("blocks.0.hook_resid_post",), "the sum", True),
    (("blocks.0.hook_normalized_resid_post",), "its norm: the next block's hook_resid_pre", True),
)
# From left to right: an image on its way through a vision transformer.
VISION = (
    ("hook_embed", "class token, patches"),
    ("hook_pos_embed", "+ where each lies"),
    ("blocks.0.hook_resid_pre", "blocks, as GPT-2's"),
    ("ln_final.hook_normalized", "the last norm"),
    ("head.hook_in", "position 0 alone"),
    ("head.hook_out", "a logit for each class"),
)


def encoder() -> str:
    """A block of BERT: its norms come after each sum."""
    parts = [text(14, 24, "A block of BERT: each sum is normalised before it goes on (read from below)", "head")]
    bottom, step, stream, side = 560, 54, 90, 440
    branch = 0.0
    for at, (names, says, on_stream) in enumerate(ENCODER):
        y = bottom - step * at
        x, wide = (stream, 300) if on_stream else (side, 360)
        shown = ", ".join([names[0], *(name.rpartition(".")[2] for name in names[1:])])
        parts.append(
            box(
                x,
                y - 40,
                wide,
                shown.replace("blocks.0.", ""),
                says,
                "hot" if ".ln" in names[0] or "normalized" in names[0] else "box",
            )
        )
        if on_stream:
            before = max((place for place in range(at) if ENCODER[place][2]), default=None)
            if before is not None:
                parts.append(line(stream + 150, bottom - step * before - 40, stream + 150, y + 2, tip=True))
            if at and not ENCODER[at - 1][2]:  # what the sublayer found comes in from the side
                parts.append(line(side + 180, y + 14 - 40 + step - 40 + 26, side + 180, y - 20, "line"))
                parts.append(line(side + 180, y - 20, stream + 302, y - 20, tip=True))
            branch = y
        elif ENCODER[at - 1][2]:
            parts.append(line(stream + 300, branch - 20, side + 180, branch - 20))
            parts.append(line(side + 180, branch - 20, side + 180, y + 2, tip=True))
        else:
            parts.append(line(side + 180, y + step - 40, side + 180, y + 2, tip=True))
    return drawing(
        bottom + 20,
        "One block of BERT from below: attention, sum, norm, MLP, sum, norm, with the names of the hook points",
        parts,
    )


def vision() -> str:
    """From pixels to classes."""
    parts = [
        text(14, 24, "An image on its way through a vision transformer, with the names of its hook points", "head")
    ]
    for row in range(4):
        for column in range(4):
            parts.append(rect(14 + 24 * column, 48 + 24 * row, 22, 22, "box"))
            parts.append(text(25 + 24 * column, 63 + 24 * row, str(1 + 4 * row + column), "says", "middle"))
    parts.append(text(14, 160, "patches, row by row:", "says") + text(14, 174, "positions 1, 2, …", "says"))
    x = 150
    row = [(x + 24 * at, "box" if at else "hot", str(at)) for at in range(6)]  # the class token, then patches
    parts += [rect(left, 84, 22, 22, look) + text(left + 11, 99, at, "says", "middle") for left, look, at in row]
    parts.append(text(x + 150, 100, "…  position 0 is the class token", "says"))
    parts.append(line(112, 95, x - 4, 95, tip=True))
    for at, (name, says) in enumerate(VISION):
        row, column = divmod(at, 3)
        left, top = 14 + 270 * column, 200 + 76 * row
        parts.append(box(left, top, 240, name, says))
        if column:
            parts.append(line(left - 30, top + 20, left - 2, top + 20, tip=True))
    parts.append(line(x + 11, 108, x + 11, 198, tip=True))
    parts.append(line(674, 240, 674, 258) + line(674, 258, 134, 258) + line(134, 258, 134, 274, tip=True))
    return drawing(
        330, "An image becomes patches, patches become positions, and the blocks and the classifier follow", parts
    )


def families() -> str:
    """How a file for a family serves the one forward."""
    from graphlens.export.families.family import families as registered

    # Without those that somebody has registered in this process.
    names = sorted(each.architecture for each in registered() if each.spec.__module__.startswith("graphlens."))
    parts = [
        text(14, 24, "One forward for all families: a family says what its config means, and nothing else", "head")
    ]
    chain = (
        ("config.json", "a checkpoint's"), ("Family", "a file in families/"), ("Spec", "names and numbers"),
        ("Decoder", "the one forward"), ("model.onnx", "hooked, compared"),
    )  # fmt: skip
    for at, (name, says) in enumerate(chain):
        parts.append(box(14 + 163 * at, 44, 139, name, says, "hot" if name == "Family" else "box"))
        if at:
            parts.append(line(14 + 163 * at - 24, 64, 14 + 163 * at - 2, 64, tip=True))
    parts.append(line(246, 86, 246, 108))
    for at, name in enumerate(names):
        row, column = divmod(at, 4)
        parts.append(text(14 + 202 * column, 128 + 18 * row, name, "mono"))
    bottom = 128 + 18 * ((len(names) - 1) // 4)
    return drawing(
        bottom + 20,
        f"From config.json through a Family and its Spec to the Decoder and model.onnx; {len(names)} architectures",
        parts,
    )


def configs() -> str:
    """What the first model of a config makes, and what later ones find; the seconds are those of the benchmark's page."""
    (table,) = (each for each in tables("benchmarks-configs") if "target" in each.header)
    took = {row[0]: row[1].partition(" (")[0] for row in table.rows}
    parts = [text(14, 24, "Two models of one config: the graph is made once", "head")]
    weights = ("weights", "in memory")
    made = (("the config", "any seed"), ("trace, compare", "with NumPy"), ("the graph", "in the cache folder"), weights)
    found = (("the config", "another seed"), ("the graph", "from the cache folder"), weights)
    rows: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
        ("the first", took["first time"], made),
        ("the next", took["again, another seed"], found),
        ("load_state_dict", took["load_state_dict"], (("state_dict", "of TransformerLens"), weights)),
    )
    for at, (name, seconds, steps) in enumerate(rows):
        y = 52 + 66 * at
        parts.append(text(14, y + 17, name, "head") + text(14, y + 34, seconds, "says"))
        for column, (says, more) in enumerate(steps):
            x = 130 + 174 * column
            parts.append(box(x, y, 152, says, more, "hot" if "trace" in says else "box", mono="_" in says))
            if column:
                parts.append(line(x - 22, y + 20, x - 2, y + 20, tip=True))
    words = "; ".join(f"{name}: {seconds}" for name, seconds, _ in rows)
    return drawing(52 + 66 * len(rows), f"What is made for a model of a config. {words}", parts)


def operators() -> str:
    """What unfuse writes in the place of one operator."""
    import onnx_ir
    from onnx import TensorProto, helper

    from graphlens import surgery

    inputs = ["x", "skip", "gamma", "beta"]
    node = helper.make_node("SkipLayerNormalization", inputs, ["y", "", "", "sum"], name="norm", domain="com.microsoft")
    shapes = [["b", "s", 8], ["b", "s", 8], [8], [8]]
    given = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in zip(inputs, shapes, strict=True)
    ]
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", "s", 8]) for name in ("y", "sum")]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = onnx_ir.from_proto(helper.make_model(helper.make_graph([node], "g", given, made), opset_imports=opsets))
    return _unfused(node.op_type, list(surgery.unfuse(model).model.graph))


def _unfused(name: str, nodes: Sequence[ir.Node]) -> str:
    """The operator, and the row of operators that compute the same."""
    parts = [text(14, 24, f"What surgery.unfuse writes in the place of {name}", "head")]
    parts.append(box(14, 44, 240, name, "one operator: nothing inside has a name", "hot"))
    parts.append(line(134, 86, 134, 108, tip=True))
    across = 6
    for at, node in enumerate(nodes):
        row, column = divmod(at, across)
        x, y = 14 + 134 * column, 112 + 62 * row
        made = next((value.name or "" for value in node.outputs if value.name in ("sum", "y")), "")
        parts.append(box(x, y, 116, node.op_type, f"makes “{made}”" if made else ""))
        if column:
            parts.append(line(x - 18, y + 20, x - 2, y + 20, tip=True))
    high = 112 + 62 * ((len(nodes) - 1) // across + 1)
    parts.append(
        text(14, high + 6, "In the order of the graph. What each of them gives can be read and edited.", "says")
    )
    return drawing(
        high + 18,
        f"{name} and the standard operators that stand for it: {', '.join(node.op_type for node in nodes)}",
        parts,
    )


def bridge_names() -> str:
    """Names of TransformerLens 3.9 and 4 for the same tensors, as docs/parity.md has them."""
    table = next(tables("parity"))
    pairs = []
    for row in table.rows:
        later = re.findall(r"`([^`]+)`", row[-1].partition("4.x:")[2])
        if later:
            pairs.append((row[0].strip("`"), later[0]))
    parts = [
        text(14, 24, "Two names for one tensor", "head"),
        text(300, 48, "TransformerLens 3.9", "says", "end") + text(470, 48, "TransformerLens 4", "says"),
    ]
    for at, (old, new) in enumerate(pairs):
        y = 70 + 22 * at
        parts.append(text(300, y, old, "mono", "end") + line(314, y - 4, 456, y - 4) + text(470, y, new, "mono"))
        parts.append(f'<circle class="blue" cx="385" cy="{y - 4}" r="5"/>')
    return drawing(
        70 + 22 * len(pairs), f"{len(pairs)} hook points with their names in TransformerLens 3.9 and 4", parts
    )


def harvest() -> str:
    """Documents as rows of runs, and the shards that their tokens are written to: those of a real harvest."""
    import graphlens

    texts = (CLEAN, "John saw Mary", "When Mary went to the school, John gave a book to Mary", "Tom and Anna")
    with tempfile.TemporaryDirectory() as folder:
        found = graphlens.harvest(
            _model(),
            list(texts),
            HOOK,
            Path(folder) / "out",
            context=12,
            batch_tokens=24,
            shard_tokens=24,
            verbose=False,
        )
        documents, starts = found.documents[:], list(found.starts)
    fills = ("blue", "orange", "grey", "pale")
    parts = [text(30, 28, "A harvest: each token of the corpus gives one row of a shard", "head")]
    parts += [
        f'<rect class="{fills[at]}" x="30" y="{44 + 20 * at}" width="12" height="12"/>'
        + text(50, 54 + 20 * at, words, "mono")
        for at, words in enumerate(texts)
    ]
    top = 144
    for shard, (start, stop) in enumerate(itertools.pairwise(starts)):
        y = top + 34 * shard
        parts.append(text(30, y + 15, f"shard-{shard:06}.safetensors", "mono"))
        parts += [
            rect(240 + 21 * (token - start), y, 18, 20, fills[int(documents[token])]) for token in range(start, stop)
        ]
    high = top + 34 * (len(starts) - 1) + 40
    parts.append(
        text(30, high - 22, f"{HOOK} [token, 4, 32] in each, with the token's id, document and position", "says")
    )
    return drawing(high, "The tokens of four documents, and the shards of a harvest that they are written to", parts)


def window() -> str:
    """A model that runs block by block: the blocks of the real file, and those that are in memory while one runs."""
    model = _model()
    blocks = range(model.cfg.n_layers)
    sizes = [
        sum(value.nbytes for name, value in model.state_dict().items() if name.startswith(f"blocks.{layer}."))
        for layer in blocks
    ]
    parts = [text(30, 28, "max_memory: the weights stay in the file, and a window of blocks is in memory", "head")]
    wide, running = 150, 1
    for layer in blocks:
        x = 60 + (wide + 30) * layer
        state = {running: "runs", running + 1: "is read ahead"}.get(layer, "on the disk")
        parts.append(
            box(x, 60, wide, f"blocks.{layer}", f"{sizes[layer] / 1e6:.2f} MB", "hot" if state == "runs" else "box")
        )
        parts.append(text(x + wide / 2, 122, state, "says", "middle"))
        if layer:
            parts.append(line(x - 28, 80, x - 4, 80, tip=True))
    parts.append(line(60 + (wide + 30) * running, 138, 60 + (wide + 30) * (running + 2) - 30, 138, "bar"))
    parts.append(
        text(60 + (wide + 30) * running, 156, "in memory at once; one session runs all blocks that are alike", "says")
    )
    return drawing(176, "Blocks of a model: one runs, the next is read ahead, the others stay on the disk", parts)


def sae() -> str:
    """An SAE's hook points in the order in which they have values, with the shapes that a real one gives."""
    from graphlens import Sae
    from graphlens.edits.sae import HOOKS

    model = _model()
    width, features = model.cfg.d_model, 6 * model.cfg.d_model
    random = np.random.default_rng(0)
    made = Sae.from_arrays(
        random.standard_normal((width, features)),
        np.zeros(features),
        random.standard_normal((features, width)),
        np.zeros(width),
        "blocks.2.hook_resid_post",
    )
    values = made.values(np.ones((1, len(model.to_str_tokens(CLEAN)), width)), error_term=True)
    steps = {
        "hook_sae_input": "what it reads",
        "hook_sae_acts_pre": "W_enc, b_enc",
        "hook_sae_acts_post": "the features",
        "hook_sae_recons": "W_dec, b_dec",
        "hook_sae_error": "read - recons",
        "hook_sae_output": "recons + error",
    }
    assert tuple(steps) == HOOKS
    parts = [text(14, 24, f"The hook points of an SAE at {made.cfg.hook}, and their values' shapes", "head")]
    wide, gap = 168, 36
    for at, (name, says) in enumerate(steps.items()):
        row, column = divmod(at, 4)
        x, y = 14 + column * (wide + gap), 44 + 96 * row
        parts.append(box(x, y, wide, name, says, "hot" if name == "hook_sae_acts_post" else "box"))
        parts.append(text(x + wide / 2, y + 56, str(list(values[name].shape)), "mono", "middle"))
        if column:
            parts.append(line(x - gap, y + 20, x - 2, y + 20, tip=True))
    parts.append(
        text(14 + 2 * (wide + gap), 44 + 96 + 18, "The error is what the features leave out of what was read:", "says")
    )
    parts.append(
        text(14 + 2 * (wide + gap), 44 + 96 + 34, "with it, an SAE that nothing edits changes nothing.", "says")
    )
    return drawing(210, "The six hook points of an SAE, in order, each with the shape of its value", parts)


DIAGRAMS: dict[str, Callable[[], str]] = {
    "harvest.svg": harvest,
    "saes.svg": sae,
    "large-models.svg": window,
    "drivable.svg": gate,
    "edits.svg": edits,
    "interventions.svg": kinds,
    "encoders.svg": encoder,
    "vision.svg": vision,
    "families.svg": families,
    "configs.svg": configs,
    "operators.svg": operators,
    "transformerlens4.svg": bridge_names,
}
