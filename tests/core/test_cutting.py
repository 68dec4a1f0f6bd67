"""Cutting: the pieces of a model, put together again, are the model; and what a piece needs of the rest is said."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphlens import HookedTransformer, surgery
from graphlens.engine.block_pieces import BlockPieces
from graphlens.errors import InputError, UnknownHookPoint
from graphlens.runtime import open_session
from tests.intervention_specs import close

RUNS = pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 1), (1, 7), (3, 7)])
RESID_PRE, MID, Z = "blocks.1.hook_resid_pre", "blocks.1.hook_resid_mid", "blocks.1.attn.hook_z"


@pytest.fixture(scope="session")
def shared(tiny: HookedTransformer) -> ir.Model:
    """The embedded model's graph; every test leaves it as it was."""
    return surgery.load(tiny.runner.engine.path)


@pytest.fixture
def model(shared: ir.Model) -> Iterator[ir.Model]:
    """The embedded model's graph, compared with itself after the test: cutting never changes its input."""
    before = serialised(shared)
    yield shared
    assert serialised(shared) == before


def serialised(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


def prompts(model: HookedTransformer, batch: int, length: int) -> Any:
    return np.random.default_rng(batch * 10 + length).integers(0, model.cfg.d_vocab, (batch, length))


def causal(length: int) -> Any:
    return np.tril(np.ones((1, 1, length, length), bool))


def run(model: HookedTransformer, piece: ir.Model, feeds: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    """Runs a piece with its own model's weights: the values of hook points, or of outputs, of these names."""
    hooks = surgery.read_manifest(piece).hooks
    found = {name: hooks[name].value if name in hooks else name for name in names}
    session = open_session(serialised(piece), "cpu", model.runner.engine.folder)
    fed = {hooks[name].value if name in hooks else name: array for name, array in feeds.items()}
    return session.run([found[name] for name in names], fed)


def pieces_are_the_model(model: HookedTransformer, tokens: Any, max_rows: int = 1000) -> None:
    """Every piece of every block against the run's own activations, and all of them one after the other."""
    batch, length = tokens.shape
    logits, cache = model.run_with_cache(tokens)
    pieces, mask = BlockPieces(model.runner.engine, max_rows), {"mask": causal(length)}
    positions = np.tile(np.arange(length), batch)

    def rows(array: Any) -> Any:
        return array.reshape(batch * length, *array.shape[2:])

    joined = rows(cache["blocks.0.hook_resid_pre"])
    for layer in range(model.cfg.n_layers):
        at = f"blocks.{layer}."
        before, between, after = (rows(cache[f"{at}hook_resid_{name}"]) for name in ("pre", "mid", "post"))
        q, k, v, z = (cache[f"{at}attn.hook_{name}"] for name in "qkvz")
        for heads in (pieces.qkv(layer, before), pieces.compared(layer, before, positions)):
            for found, expected in zip(heads, (q, k, v), strict=True):
                close(found, rows(expected))
        close(pieces.z(layer, q, k, v, mask), z)
        for hook in (f"{at}attn.hook_attn_scores", f"{at}attn.hook_pattern"):
            close(pieces.z_from(hook, layer, cache[hook], v), z)
        close(pieces.resid_mid(layer, rows(z), before), between)
        close(pieces.attn_out(layer, rows(z)), rows(cache[f"{at}hook_attn_out"]))
        for hook in (f"{at}mlp.hook_pre", f"{at}mlp.hook_post"):
            close(pieces.mlp_out_from(layer, {hook: rows(cache[hook])}), rows(cache[f"{at}hook_mlp_out"]))
        close(pieces.mlp_out(layer, between), rows(cache[f"{at}hook_mlp_out"]))
        close(pieces.resid_post_of(layer, rows(z), before), after)
        close(pieces.resid_post(layer, between), after)
        # Joined: each piece takes what the one before gave.
        q, k, v = (a.reshape(batch, length, *a.shape[1:]) for a in pieces.compared(layer, joined, positions))
        joined = pieces.resid_post(layer, pieces.resid_mid(layer, rows(pieces.z(layer, q, k, v, mask)), joined))
        close(joined, after)
    close(pieces.end(joined, "unembed.hook_in"), rows(cache["unembed.hook_in"]))
    close(pieces.end(joined, "logits"), rows(logits))


@RUNS
@pytest.mark.parametrize("max_rows", [1, 5, 1000])
def test_cut_then_join_is_the_whole(tiny: HookedTransformer, batch: int, length: int, max_rows: int) -> None:
    pieces_are_the_model(tiny, prompts(tiny, batch, length), max_rows)


@RUNS
def test_a_piece_computes_every_hook_point_inside(
    tiny: HookedTransformer, model: ir.Model, batch: int, length: int
) -> None:
    """From the residual before block 1 to the logits, in one piece that makes every hook point between an output."""
    logits, cache = tiny.run_with_cache(prompts(tiny, batch, length))
    names = tiny.runner.engine.hook_names
    inside = names[names.index(RESID_PRE) + 1 :]
    piece, frontier = surgery.cut(model, [RESID_PRE], [*inside[:-1], "logits"])
    assert frontier == ("mask",)
    found = run(tiny, piece, {RESID_PRE: cache[RESID_PRE], "mask": causal(length)}, [*inside, "logits"])
    for name, value, expected in zip([*inside, "logits"], found, [*(cache[n] for n in inside), logits], strict=True):
        assert value.shape == expected.shape, name
        close(value, expected)


def test_tokens_of_different_sequences_go_through_as_one_row(tiny: HookedTransformer) -> None:
    """Without attention a piece knows no positions: any tokens, in any order, in a batch of one."""
    tokens = prompts(tiny, 3, 7)
    _, cache = tiny.run_with_cache(tokens)
    order = np.random.default_rng(0).permutation(21)[:13]
    mid, post = (cache[f"blocks.2.hook_resid_{name}"].reshape(21, -1)[order] for name in ("mid", "post"))
    close(BlockPieces(tiny.runner.engine, 1000).resid_post(2, mid), post)


@pytest.mark.parametrize("queries", [[6], [0], [4, 5, 6], [6, 1]])
def test_fewer_queries_than_keys(tiny: HookedTransformer, model: ir.Model, queries: list[int]) -> None:
    _, cache = tiny.run_with_cache(prompts(tiny, 3, 7))
    q, k, v, z = (cache[f"blocks.1.attn.hook_{name}"] for name in "qkvz")
    found = BlockPieces(tiny.runner.engine, 5).z(1, q[:, queries], k, v, {"mask": causal(7)[:, :, queries]})
    close(found, z[:, queries])
    names = ["blocks.1.attn.hook_q", "blocks.1.attn.hook_k", "mask"]
    piece, _ = surgery.cut(model, names, ["blocks.1.attn.hook_pattern"])
    feeds = dict(zip(names, (q[:, queries], k, causal(7)[:, :, queries]), strict=True))
    close(
        run(tiny, piece, feeds, ["blocks.1.attn.hook_pattern"])[0], cache["blocks.1.attn.hook_pattern"][:, :, queries]
    )


def test_a_mask_of_each_row(tiny: HookedTransformer) -> None:
    tokens, padding = prompts(tiny, 3, 7), np.ones((3, 7), int)
    padding[0, :3], padding[2, :1] = 0, 0
    _, cache = tiny.run_with_cache(tokens, attention_mask=padding)
    q, k, v, z = (cache[f"blocks.1.attn.hook_{name}"] for name in "qkvz")
    mask = causal(7) & padding.astype(bool)[:, None, None]
    found = BlockPieces(tiny.runner.engine, 1000).z(1, q, k, v, {"mask": mask})
    close(found, z)


@pytest.mark.parametrize(
    ("inputs", "outputs", "needed"),
    [
        ([Z], [MID], (RESID_PRE,)),
        ([Z, RESID_PRE], [MID], ()),
        ([RESID_PRE], [Z], ("mask",)),
        ([f"blocks.1.attn.hook_{name}" for name in "qkv"], [Z], ("mask",)),
        (["blocks.1.hook_attn_out"], ["blocks.1.hook_resid_post"], (RESID_PRE,)),
        (["blocks.1.mlp.hook_pre"], ["blocks.1.hook_resid_post"], (MID,)),
        (["blocks.3.hook_resid_post"], ["logits"], ()),
    ],
)
def test_the_frontier_is_what_else_is_needed(
    tiny: HookedTransformer, model: ir.Model, inputs: list[str], outputs: list[str], needed: tuple[str, ...]
) -> None:
    hooks = surgery.read_manifest(model).hooks
    piece, frontier = surgery.cut(model, inputs, outputs)
    assert set(frontier) == {hooks[name].value if name in hooks else name for name in needed}
    assert len(frontier) == len(needed)
    # It is enough, and it is wanted: the piece runs on exactly these, asked-for inputs first.
    assert [value.name for value in piece.graph.inputs] == [*inputs, *frontier]
    logits, cache = tiny.run_with_cache(prompts(tiny, 2, 5))
    feeds = {name: causal(5) if name == "mask" else cache[name] for name in (*inputs, *needed)}
    (found,) = run(tiny, piece, feeds, outputs)
    close(found, logits if outputs == ["logits"] else cache[outputs[0]])


def test_a_frontier_is_refused_where_pieces_are_run(tiny: HookedTransformer) -> None:
    with pytest.raises(InputError, match=rf"'{MID}' needs more than {Z}: blocks\.0\.hook_resid_post"):
        tiny.runner.engine.part([Z], [MID])


def test_a_part_is_opened_once(tiny_copy: Any) -> None:
    model = HookedTransformer.from_onnx(tiny_copy, "cpu")
    first = model.runner.engine.part([Z, RESID_PRE], [MID])
    built = model.runner.engine.sessions_built
    assert model.runner.engine.part([Z, RESID_PRE], [MID]) is first
    assert model.runner.engine.sessions_built == built
    assert model.runner.engine.part([MID], ["blocks.1.hook_resid_post"]) is not first


@pytest.mark.parametrize(
    ("inputs", "output"),
    [
        ([RESID_PRE], "blocks.0.attn.hook_z"),
        ([Z], "blocks.1.attn.hook_v"),
        ([MID], "blocks.1.hook_attn_out"),
        (["mask"], "hook_embed"),
    ],
)
def test_an_output_that_does_not_depend_on_the_inputs_is_refused(
    model: ir.Model, inputs: list[str], output: str
) -> None:
    with pytest.raises(InputError) as error:
        surgery.cut(model, inputs, [output])
    assert f"{output!r} does not depend on {', '.join(map(repr, inputs))}" in str(error.value)


@pytest.mark.parametrize(("inputs", "outputs"), [([], ["logits"]), ([Z], [])])
def test_a_piece_without_beginning_or_end_is_refused(model: ir.Model, inputs: list[str], outputs: list[str]) -> None:
    with pytest.raises(InputError, match="name at least one of either"):
        surgery.cut(model, inputs, outputs)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("blocks.1.hook_resid_pree", "'blocks.1.hook_resid_pre'"),
        ("blocks.9.hook_resid_pre", "4 layers (0-3). Nearest: 'blocks.3.hook_resid_pre'"),
        ("blocks.1.attn.hook_result", "use_attn_result"),
        ("ln_final.hook_normalised", "'ln_final.hook_normalized'"),
    ],
)
def test_an_unknown_name_offers_the_nearest(model: ir.Model, name: str, says: str) -> None:
    for inputs, outputs in (([name], ["logits"]), ([RESID_PRE], [name])):
        with pytest.raises(UnknownHookPoint) as error:
            surgery.cut(model, inputs, outputs)
        assert repr(name) in str(error.value)
        assert says in str(error.value)


def test_aliases_are_one_value(tiny: HookedTransformer, model: ir.Model) -> None:
    """The residual after one block is that before the next, whichever of its names is asked for."""
    post, pre = "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"
    _, cache = tiny.run_with_cache(prompts(tiny, 2, 5))
    feeds = {"mask": causal(5)}
    for name in (post, pre):
        piece, _ = surgery.cut(model, [name], ["blocks.1.hook_resid_post"])
        hooks = surgery.read_manifest(piece).hooks
        assert hooks[post].value == hooks[pre].value == name
        for output in ("blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"):
            (found,) = run(tiny, piece, {name: cache[name], **feeds}, [output])
            close(found, cache["blocks.1.hook_resid_post"])
    for name in ("blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"):
        piece, _ = surgery.cut(model, [post], [name])
        assert [value.name for value in piece.graph.outputs] == [name]
    piece, frontier = surgery.cut(model, [post], [pre])  # nothing between
    assert frontier == ()
    assert not list(piece.graph)
    both, _ = surgery.cut(model, [post, pre], [MID])  # one input, not two
    assert [value.name for value in both.graph.inputs] == [post, "mask"]


def test_both_names_of_one_value_as_outputs(tiny: HookedTransformer, model: ir.Model) -> None:
    names = ["blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"]
    _, cache = tiny.run_with_cache(prompts(tiny, 2, 5))
    piece, _ = surgery.cut(model, [RESID_PRE], names)
    for found in run(tiny, piece, {RESID_PRE: cache[RESID_PRE], "mask": causal(5)}, names):
        close(found, cache[names[0]])


def test_the_hook_map_keeps_what_is_inside_and_nothing_else(model: ir.Model) -> None:
    piece, _ = surgery.cut(model, [RESID_PRE], [MID])
    values = {value.name for value in piece.graph.inputs} | {o.name for node in piece.graph for o in node.outputs}
    hooks = surgery.read_manifest(piece).hooks
    assert {entry.value for entry in hooks.values()} <= values
    inside = ("ln1.hook_scale", "ln1.hook_normalized", *(f"attn.hook_{n}" for n in "qkvz"), "attn.hook_attn_scores")
    inside += ("attn.hook_pattern", "hook_attn_out", "hook_resid_pre", "hook_resid_mid")
    assert set(hooks) == {"blocks.0.hook_resid_post", *(f"blocks.1.{name}" for name in inside)}
