"""Interventions: by data as by Python hook, as a file, and as plain records; and what is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings

import graphlens
from graphlens import Ablate, HookedTransformer, KeyValueCache, Patch, Scale, Steer, interventions, surgery
from graphlens.errors import InputError, UnknownHookPoint
from graphlens.file.names import split_name
from graphlens.interventions import Intervention
from tests.intervention_specs import FLAG_SETS, close, python_hooks, runs, set_flags, shape_of
from tests.models import MODEL

few = settings(max_examples=25, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
CFG = MODEL.cfg
Z, RESID, SCORES = "blocks.1.attn.hook_z", "blocks.2.hook_resid_post", "blocks.1.attn.hook_attn_scores"
PATTERN = "blocks.1.attn.hook_pattern"
VECTOR = np.random.default_rng(5).standard_normal(CFG.d_model)  # LayerNorm would absorb a constant one


@pytest.fixture(autouse=True)
def no_flags() -> Iterator[None]:
    yield
    set_flags(MODEL, ())


# By data as by Python hook


@pytest.mark.filterwarnings("ignore:two patches of the same elements")
@pytest.mark.parametrize("flags", FLAG_SETS, ids=str)
def test_by_data_as_by_python_hook(flags: tuple[str, ...]) -> None:
    set_flags(MODEL, flags)

    @few
    @given(runs(MODEL, list(MODEL.hook_dict)))
    def check(run: tuple[np.ndarray, list[Any]]) -> None:
        tokens, items = run
        expected = MODEL.run_with_hooks(tokens, fwd_hooks=python_hooks(MODEL, items))
        close(MODEL.run_with_interventions(tokens, items), expected)

    check()


def test_the_same_edits_on_one_run_after_another(tokens: np.ndarray) -> None:
    """What is remembered of the last call's edits is used for no other run: lengths, flags, strictness, models."""
    item = Ablate(Z, heads=1, positions=-1)
    other = Ablate(Z, heads=1, positions=5)
    for ids in (tokens, tokens[:, :4], tokens[:1], tokens, tokens[:, ::-1].copy()):
        fresh = MODEL.run_with_interventions(ids, Ablate(Z, heads=1, positions=-1))
        for _ in range(2):
            np.testing.assert_array_equal(MODEL.run_with_interventions(ids, item), fresh)
        assert not np.allclose(fresh, MODEL(ids), atol=1e-4)
        np.testing.assert_array_equal(MODEL.run_with_interventions(ids, [item, item]), fresh)
    whole = MODEL.run_with_interventions(tokens, other)
    np.testing.assert_array_equal(MODEL.run_with_interventions(tokens, item), whole)
    with pytest.raises(InputError, match="there is no 5"):
        MODEL.run_with_interventions(tokens[:, :4], other)
    np.testing.assert_array_equal(
        MODEL.run_with_interventions(tokens[:, :4], other, strict=False), MODEL(tokens[:, :4])
    )
    with pytest.raises(InputError, match="there is no 5"):
        MODEL.run_with_interventions(tokens[:, :4], other)
    flagged = Ablate("blocks.1.attn.hook_result", heads=1)
    for _ in range(2):
        set_flags(MODEL, ("use_attn_result",))
        assert not np.allclose(MODEL.run_with_interventions(tokens, flagged), MODEL(tokens), atol=1e-4)
        set_flags(MODEL, ())
        with pytest.raises(UnknownHookPoint):
            MODEL.run_with_interventions(tokens, flagged)


@pytest.mark.parametrize(
    "name", [n for n in MODEL.hook_dict if n.startswith(("blocks.1.", "hook", "ln_final", "unembed"))]
)
def test_every_hook_point_takes_every_kind(name: str, tokens: np.ndarray) -> None:
    axes, shape = shape_of(MODEL, name, *tokens.shape)
    rng = np.random.default_rng(1)
    value = rng.standard_normal(shape).astype(np.float32)
    if name.endswith("hook_scale"):
        value = np.abs(value) + 0.5
    plain = MODEL(tokens)
    for item in (
        Ablate(name, value),
        Patch(
            name, value.take(-1, next(i for i, axis in enumerate(axes) if axis in ("pos", "query_pos"))), positions=-1
        ),
        Steer(name, value, 0.5),
        Scale(name, 1 + value**2),
    ):
        found, cache = MODEL.run_with_interventions(tokens, [item], names_filter=name)
        expected, seen = _hooked(tokens, [item], name)
        close(found, expected)
        close(cache[name], seen)  # what is read back is the edited value
        assert np.abs(found - plain).max() > 1e-4


def _hooked(tokens: np.ndarray, items: list[Any], name: str) -> tuple[np.ndarray, np.ndarray]:
    with MODEL.hooks(python_hooks(MODEL, items)):
        logits, cache = MODEL.run_with_cache(tokens, names_filter=name)
    return logits, cache[name]


def test_the_order_at_one_hook_point_counts_and_elsewhere_does_not(tokens: np.ndarray) -> None:
    scale, steer = Scale(RESID, 0.5), Steer(RESID, VECTOR)
    one, other = (MODEL.run_with_interventions(tokens, items) for items in ([scale, steer], [steer, scale]))
    assert np.abs(one - other).max() > 1e-3
    for items, expected in (([scale, steer], one), ([steer, scale], other)):
        close(MODEL.run_with_hooks(tokens, fwd_hooks=python_hooks(MODEL, items)), expected)
    elsewhere = [Ablate(Z, heads=1), Scale(PATTERN, 0.5, heads=2), steer]
    results = [MODEL.run_with_interventions(tokens, list(order)) for order in itertools.permutations(elsewhere)]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("tail", {split_name(name)[1]: None for name in MODEL.hook_dict})
def test_edits_that_change_nothing_are_no_edits(tail: str, tokens: np.ndarray) -> None:
    plain, cache = MODEL.run_with_cache(tokens)
    names = [name for name in MODEL.hook_dict if split_name(name)[1] == tail]
    kinds: list[Callable[[str], Intervention]] = [
        lambda name: Patch(name, np.where(np.isfinite(cache[name]), cache[name], 0)),
        lambda name: Scale(name, 1.0),
        lambda name: Steer(name, 0.0),
        lambda name: Steer(name, np.ones(cache[name].shape[-1]), 0.0),
    ]
    for kind in kinds:
        in_all_blocks = [kind(name) for name in names]
        close(MODEL.run_with_interventions(tokens, in_all_blocks), plain, 1e-6)
        for name in names:
            close(MODEL.run_with_interventions(tokens, kind(name)), plain, 1e-6)


def test_masked_scores_stay_masked(tokens: np.ndarray) -> None:
    masked = np.triu(np.ones((tokens.shape[1],) * 2, bool), 1)
    for item in (Ablate(SCORES), Patch(SCORES, 3.0, heads=1), Steer(SCORES, 2.0), Scale(SCORES, 0.0)):
        _, cache = MODEL.run_with_interventions(tokens, item, names_filter=[SCORES, PATTERN])
        assert np.isneginf(cache[SCORES][..., masked]).all()
        assert np.isfinite(cache[SCORES][..., ~masked]).all()
        assert (cache[PATTERN][..., masked] == 0).all()


def test_an_edit_at_an_alias_leaves_its_twin_as_cached(tokens: np.ndarray) -> None:
    before, after = "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"
    _, plain = MODEL.run_with_cache(tokens)
    _, cache = MODEL.run_with_interventions(tokens, Ablate(after), names_filter=[before, after])
    np.testing.assert_array_equal(cache[before], plain[before])
    assert (cache[after] == 0).all()
    _, cache = MODEL.run_with_interventions(tokens, Ablate(before), names_filter=[before, after])
    assert (cache[before] == 0).all()
    assert (cache[after] == 0).all()


def test_with_python_hooks_in_one_pass(tokens: np.ndarray) -> None:
    seen = []

    def double(activation: np.ndarray, hook: Any) -> np.ndarray:
        seen.append(activation.copy())
        return activation * 2

    items = [Ablate(Z, heads=1), Steer(RESID, VECTOR)]
    found = MODEL.run_with_interventions(tokens, items, fwd_hooks=[(Z, double)])
    assert (seen[0][:, :, 1] == 0).all()  # by data first
    close(found, MODEL.run_with_hooks(tokens, fwd_hooks=[*python_hooks(MODEL, items), (Z, double)]))


def test_blocks_nest_and_end(tokens: np.ndarray) -> None:
    plain = MODEL(tokens)
    with MODEL.intervene(Ablate(Z, heads=0)):
        one = MODEL(tokens)
        with MODEL.intervene([Ablate(Z, heads=1)]):
            both = MODEL(tokens)
        np.testing.assert_array_equal(MODEL(tokens), one)
    np.testing.assert_array_equal(MODEL(tokens), plain)
    close(both, MODEL.run_with_interventions(tokens, Ablate(Z, heads=[0, 1])))
    with pytest.raises(ZeroDivisionError), MODEL.intervene(Ablate(Z)):
        _ = 1 / 0
    np.testing.assert_array_equal(MODEL(tokens), plain)


def test_parts_of_a_model(tokens: np.ndarray) -> None:
    item = Scale("blocks.1.hook_mlp_out", 0.3, positions=slice(1, 4))
    whole = MODEL.run_with_interventions(tokens, item)
    start = MODEL(tokens, stop_at_layer=1)
    with MODEL.intervene(item):
        close(MODEL(start, start_at_layer=1), whole)
        with pytest.raises(InputError, match="does not pass it"):
            MODEL(tokens, stop_at_layer=1)


# Positions under a KV cache


@pytest.mark.parametrize(
    "positions",
    [None, 2, [1, 5], [6, 2], -1, slice(3, None), slice(-2, None), [False, True] * 4, "prompt", "generated"],
)
def test_positions_count_from_the_first_token_under_a_cache(positions: Any) -> None:
    tokens = np.random.default_rng(3).integers(0, CFG.d_vocab, (2, 8))
    vector = np.random.default_rng(4).standard_normal((1, 1, CFG.d_model))
    cache, pieces = KeyValueCache.init_cache(CFG, batch_size=2), []
    with MODEL.intervene(Steer(RESID, vector, positions=positions, strict=False)):
        for a, b in ((0, 4), (4, 5), (5, 8)):
            pieces.append(MODEL(tokens[:, a:b], past_kv_cache=cache))
    # Counted from the end, a position is that of the sequence as it was when each piece ran.
    end = {"-1": [3, 4, 7], "slice(-2, None, None)": [2, 3, 4, 6, 7], "prompt": slice(0, 4), "generated": slice(4, 8)}
    fixed = end.get(str(positions), positions)
    expected = MODEL.run_with_interventions(tokens, Steer(RESID, vector, positions=fixed))
    close(np.concatenate(pieces, 1), expected)
    assert np.abs(expected - MODEL(tokens)).max() > 1e-2


def test_a_value_per_position_under_a_cache() -> None:
    tokens = np.random.default_rng(3).integers(0, CFG.d_vocab, (1, 8))
    values = np.random.default_rng(4).standard_normal((3, CFG.d_model)).astype(np.float32)
    item = Patch("blocks.1.hook_resid_pre", values, positions=[6, 1, 4])
    expected = MODEL.run_with_interventions(tokens, item)
    cache = KeyValueCache.init_cache(CFG, batch_size=1)
    with MODEL.intervene(Patch("blocks.1.hook_resid_pre", values, positions=[6, 1, 4], strict=False)):
        pieces = [MODEL(tokens[:, a:b], past_kv_cache=cache) for a, b in ((0, 3), (3, 8))]
    close(np.concatenate(pieces, 1), expected)


@pytest.mark.parametrize("positions", ["prompt", "generated", None, 4, [3, 9], -1])
def test_generating_with_a_cache_and_without_gives_the_same(positions: Any) -> None:
    tokens = np.random.default_rng(8).integers(0, CFG.d_vocab, (2, 6))
    options: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
    vector = np.random.default_rng(9).standard_normal(CFG.d_model) * 10
    plain = MODEL.generate(tokens, 12, **options)
    with MODEL.intervene(Steer("blocks.1.hook_resid_post", vector, positions=positions)):
        cached = MODEL.generate(tokens, 12, **options)
        if positions != -1:  # the last position moves: without a cache earlier ones are run again, unedited
            np.testing.assert_array_equal(cached, MODEL.generate(tokens, 12, use_past_kv_cache=False, **options))
    if positions != 4:  # one token of a prompt need not change what is likeliest after it
        assert not np.array_equal(cached, plain)
    if positions == "generated":
        assert np.array_equal(cached[:, :7], plain[:, :7])  # the first new token comes from the prompt alone


def test_left_padded_rows_take_a_mask_per_row() -> None:
    tokens = np.random.default_rng(3).integers(0, CFG.d_vocab, (2, 6))
    grid = np.asarray([[0, 0, 0, 1, 0, 1], [1, 0, 0, 0, 0, 0]], bool)
    found = MODEL.run_with_interventions(tokens, Ablate("blocks.1.hook_resid_pre", positions=grid))

    def edit(x: np.ndarray, hook: Any) -> None:
        x[grid] = 0

    close(found, MODEL.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_pre", edit)]))


# Sessions


def test_other_values_positions_heads_and_coefficients_build_no_session(tokens: np.ndarray) -> None:
    model = HookedTransformer.from_onnx(graphlens.embedded_model(), "cpu")
    rng = np.random.default_rng(0)
    model.run_with_interventions(tokens, [Ablate(Z, heads=0), Steer(RESID, rng.standard_normal(CFG.d_model))])
    before = model.runner.engine.sessions_built
    results = []
    for head, position, coefficient in itertools.product(range(4), (0, -1, slice(2, 4)), (0.5, 2.0)):
        items = [
            Patch(Z, rng.standard_normal(CFG.d_head), heads=head, positions=position),
            Steer(RESID, rng.standard_normal(CFG.d_model), coefficient, batch=0),
        ]
        results.append(model.run_with_interventions(tokens, items))
    assert model.runner.engine.sessions_built == before
    assert len({result.tobytes() for result in results}) == len(results)
    gated = [plan for plan in model.sessions if plan.gates]
    assert [plan.gates for plan in gated] == [((Z, ("patch",)), (RESID, ("add",)))]


def test_a_loop_over_layers_ends_with_one_session(tokens: np.ndarray, tiny_copy: Path) -> None:
    model = HookedTransformer.from_onnx(tiny_copy, "cpu")  # its sessions are nobody else's
    model(tokens)
    before = model.runner.engine.sessions_built
    for _ in range(3):
        for layer in range(CFG.n_layers):
            item = Ablate(f"blocks.{layer}.attn.hook_z", heads=2)
            expected = MODEL.run_with_hooks(tokens, fwd_hooks=python_hooks(MODEL, [item]))
            close(model.run_with_interventions(tokens, item), expected)
    assert model.runner.engine.sessions_built - before == 2  # the first layer's, then one for all


def test_an_edited_run_that_reads_nothing_has_a_graph_without_hook_points_of_its_own(
    tokens: np.ndarray, tiny_copy: Path
) -> None:
    model, item = HookedTransformer.from_onnx(tiny_copy, "cpu"), Ablate(Z, heads=2)
    expected = MODEL.run_with_hooks(tokens, fwd_hooks=python_hooks(MODEL, [item]))
    for _ in range(2):
        close(model.run_with_interventions(tokens, item), expected)
        (plan,) = model.sessions
        assert plan.bare
        assert model.runner.engine.session(plan).outputs == ["logits"]
    for _ in range(2):  # one that reads has one that serves whatever is read
        logits, cache = model.run_with_interventions(tokens, item, names_filter=[Z, RESID])
        close(logits, expected)
        assert not cache[Z][:, :, 2].any()
        close(
            model.run_with_interventions(tokens, item, names_filter="unembed.hook_out")[1]["unembed.hook_out"], expected
        )
        assert model.sessions == [plan, replace(plan, bare=False)]
    assert model.runner.engine.sessions_built == 2


def test_edits_of_a_file_that_was_pruned(tokens: np.ndarray, tiny_copy: Path) -> None:
    path = tiny_copy / "model.onnx"
    pruned = surgery.prune(surgery.load(path), [RESID])
    path.unlink()
    surgery.save(pruned, path)
    model, item = HookedTransformer.from_onnx(tiny_copy, "cpu"), Ablate(Z, heads=2)
    expected = MODEL.run_with_interventions(tokens, item, names_filter=RESID)[1][RESID]
    close(model.run_with_interventions(tokens, item, None, names_filter=RESID)[1][RESID], expected)
    with pytest.raises(InputError, match=r"'logits' \(1 of 1 asked for\) is not an output.*pruned"):
        model.run_with_interventions(tokens, item)
    with pytest.raises(InputError, match=r"'hook_embed' .*is not an output.*pruned"):
        model.run_with_cache(tokens, return_type=None)


def test_sessions_are_bounded(tokens: np.ndarray) -> None:
    model = HookedTransformer.from_onnx(graphlens.embedded_model(), "cpu")
    for count, name in enumerate(list(model.hook_dict)[:12], 1):
        model.run_with_interventions(tokens, Scale(name, 0.9))
        assert len(model.sessions) == min(count, 6)  # those used last, none thrown away before there are too many
    assert model.sessions[-1].gates[0][0] == list(model.hook_dict)[11]


# Records


def test_records_compare_hash_and_print() -> None:
    vector = np.arange(3.0)
    one, same = (Steer("h", vector.copy(), 2.0, positions=[1, 2]) for _ in range(2))
    assert one == same
    assert len({one, same, Steer("h", vector, 2.5, positions=[1, 2])}) == 2
    assert one != Steer("h", vector + 1, 2.0, positions=[1, 2])
    assert Ablate("h") != Patch("h", 0.0)
    assert repr(one) == "Steer('h', vector=float64[3], coefficient=2.0, positions=(1, 2))"
    assert repr(Ablate("h", heads=np.asarray([True, False]))) == "Ablate('h', value=0.0, heads=(True, False))"
    with pytest.raises(AttributeError):
        one.coefficient = 3.0  # type: ignore[misc]
    vector[:] = 9
    assert (one.array == [0, 2, 4]).all()  # its own copy


@few
@given(runs(MODEL, list(MODEL.hook_dict)))
def test_a_json_round_trip_changes_nothing(run: tuple[np.ndarray, list[Any]]) -> None:
    _, items = run
    text, tensors = interventions.to_json(items)
    assert interventions.from_json(text, tensors) == items


def test_a_file_round_trip(tmp_path: Path) -> None:
    items = [
        Ablate(Z, heads=1, positions=slice(1, None, 2)),
        Patch(RESID, np.ones((2, CFG.d_model), np.float32), positions=np.asarray([[True, False], [False, True]])),
        Patch(RESID, float("nan"), allow_nonfinite=True, strict=False),
        Steer(RESID, VECTOR, -1.5, positions="generated", batch=-1),
    ]
    path = interventions.save(items, tmp_path / "edits.json")
    assert interventions.load(path) == items
    assert path.with_suffix(".safetensors").exists()
    interventions.save(items[:1], path)
    assert not path.with_suffix(".safetensors").exists()
    assert interventions.load(path) == items[:1]


# Bad input


@pytest.mark.parametrize(
    "record",
    [
        {"heads": {"slice": ["a", None, None]}},
        {"heads": {"slice": [1.5, None, None]}},
        {"positions": {"slice": [float("inf"), None, None]}},
        {"value": {"number": "abc"}},
        {"value": {"number": 10**400}},
        {"value": {"tensor": ["x"]}},
        {"positions": [True, [1]]},
        {"kind": ["ablate"]},
        {"hook": 3},
        {"heads": 1.5},
        {"layers": 1},
    ],
    ids=str,
)
def test_a_damaged_json_file_is_an_input_error(record: dict[str, Any]) -> None:
    data = {"format": interventions.FORMAT, "version": 1, "interventions": [{"kind": "ablate", "hook": Z, **record}]}
    with pytest.raises(InputError):
        interventions.from_json(json.dumps(data))
    with pytest.raises(InputError, match="not a file of interventions"):
        interventions.from_json(json.dumps({**data, "version": float("inf")}))


@pytest.mark.parametrize(
    ("item", "says"),
    [
        (Ablate(Z, heads=4), "heads=4: there is no 4; head_index has 4 (0-3)"),
        (Ablate(Z, heads=[0, -5]), "there is no -5"),
        (Ablate(Z, positions=6), "there is no 6; pos has 6 (0-5). Pass strict=False"),
        (Ablate(Z, positions=slice(7, 9)), "selects none of the 6"),
        (Ablate(Z, positions=[True] * 5), "is a mask of 5; pos has 6"),
        (Ablate(Z, heads=[True] * 3), "is a mask of 3; head_index has 4"),
        (Ablate(Z, batch=2), "there is no 2; batch has 2"),
        (Ablate(Z, np.zeros((5, 32))), "has shape [5, 32], which does not fit the activation [batch, pos, head_index, d_head]"),
        (Ablate(Z, np.zeros((2, 32)), heads=[0, 1, 2]), "along head_index it has 2, and the activation 4, of which 3"),
        (Steer(RESID, np.zeros(768)), "along d_model it has 768, and the activation 128"),
        (Patch(RESID, np.zeros((2, 7, 128))), "along pos it has 7, and the activation 6"),
        (Patch(RESID, np.zeros((1, 1, 1, 128))), "more axes than the activation's 3"),
        (Ablate(RESID, heads=1), "it has no heads"),
        (Patch(RESID, 1e39), "too large for float32"),
        (Ablate(RESID, positions=np.ones((3, 6), bool)), "positions is a mask [3, 6]; the run has 2 sequences of 6"),
    ],
    ids=lambda value: repr(value) if not isinstance(value, str) else "",
)  # fmt: skip
def test_what_does_not_fit_is_refused(item: Any, says: str, tokens: np.ndarray) -> None:
    with pytest.raises(InputError) as error:
        MODEL.run_with_interventions(tokens, item)
    assert says in str(error.value)
    assert item.hook in str(error.value)


def test_positions_beyond_the_sequence_are_ignored_when_asked(tokens: np.ndarray) -> None:
    expected = MODEL.run_with_interventions(tokens, Ablate(Z, positions=[1]))
    np.testing.assert_array_equal(
        MODEL.run_with_interventions(tokens, Ablate(Z, positions=[1, 6]), strict=False), expected
    )
    found = MODEL.run_with_interventions(tokens, Ablate(Z, positions=[1, 6], strict=False))
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(InputError, match="heads=4"):
        MODEL.run_with_interventions(tokens, Ablate(Z, heads=4), strict=False)
    with pytest.raises(InputError, match="there is no 40"), MODEL.intervene(Ablate(Z, positions=40)):
        MODEL.generate(tokens, 4, verbose=False, stop_at_eos=False)


@pytest.mark.parametrize("value", [np.nan, np.inf, [1.0, -np.inf]])
def test_values_that_are_not_finite_need_a_word(value: Any, tokens: np.ndarray) -> None:
    for make in (Ablate, Patch, Steer, Scale):
        with pytest.raises(InputError, match="allow_nonfinite=True"):
            make(RESID, value)
    if np.ndim(value) == 0:
        item = Patch("blocks.3.hook_resid_post", value, positions=-1, allow_nonfinite=True)
        logits = MODEL.run_with_interventions(tokens, item)
        assert np.isnan(logits[:, -1]).all()
        np.testing.assert_array_equal(logits[:, :-1], MODEL(tokens)[:, :-1])  # what is not edited is not touched


def test_an_unknown_hook_offers_the_nearest(tmp_path: Path, tokens: np.ndarray) -> None:
    path = interventions.save(Ablate("blocks.1.attn.hook_zz"), tmp_path / "edits.json")
    with pytest.raises(UnknownHookPoint, match=r"blocks\.1\.attn\.hook_z'"):
        MODEL.run_with_interventions(tokens, interventions.load(path))
    with pytest.raises(UnknownHookPoint, match="use_attn_result"):
        MODEL.run_with_interventions(tokens, Ablate("blocks.1.attn.hook_result"))
    assert MODEL.run_with_interventions(tokens, Ablate("blocks.1.attn.o.hook_in")).tobytes() == (
        MODEL.run_with_interventions(tokens, Ablate(Z)).tobytes()
    )


def test_two_patches_of_one_site_warn_and_the_later_wins(tokens: np.ndarray) -> None:
    with pytest.warns(UserWarning, match="the later one wins"):
        found = MODEL.run_with_interventions(tokens, [Patch(Z, 1.0, heads=1), Patch(Z, 2.0, heads=1)])
    np.testing.assert_array_equal(found, MODEL.run_with_interventions(tokens, Patch(Z, 2.0, heads=1)))


def test_tokens_take_patches_of_token_ids_alone(tokens: np.ndarray) -> None:
    set_flags(MODEL, ("use_hook_tokens",))
    edited = tokens.copy()
    edited[:, 2] = 7
    np.testing.assert_array_equal(
        MODEL.run_with_interventions(tokens, Patch("hook_tokens", 7, positions=2)), MODEL(edited)
    )
    for bad in (Ablate("hook_tokens"), Steer("hook_tokens", 1), Scale("hook_tokens", 2)):
        with pytest.raises(InputError, match="only Patch"):
            MODEL.run_with_interventions(tokens, bad)
    for value in (0.5, -1, CFG.d_vocab):
        with pytest.raises(InputError, match="token ids"):
            MODEL.run_with_interventions(tokens, Patch("hook_tokens", value))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not a file of interventions"),
        ("[]", "not a file of interventions"),
        ('{"format": "other", "version": 1, "interventions": []}', "its format is 'other'"),
        ('{"format": "graphlens.interventions", "version": 9, "interventions": []}', "Update graphlens"),
        ('{"format": "graphlens.interventions", "version": 1, "interventions": [{"kind": "erase"}]}', "kind 'erase'"),
        ('{"format": "graphlens.interventions", "version": 1, "interventions": [3]}', "kind 3"),
        (
            '{"format": "graphlens.interventions", "version": 1, "interventions": [{"kind": "patch", "hook": "h"}]}',
            "value",
        ),
        (
            '{"format": "graphlens.interventions", "version": 1, "interventions": '
            '[{"kind": "patch", "hook": "h", "value": {"tensor": "0.value"}}]}',
            "is missing from the safetensors file",
        ),
        (
            '{"format": "graphlens.interventions", "version": 1, "interventions": [{"kind": "ablate", "hook": "h", "head": 1}]}',
            "has no 'head'",
        ),
    ],
)
def test_files_that_are_none(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "edits.json"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        interventions.load(path)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Ablate(Z, heads="all"), "heads='all'"),
        (lambda: Ablate(Z, positions="everywhere"), "'prompt' or 'generated'"),
        (lambda: Ablate(Z, heads=[]), "selects nothing"),
        (
            lambda: Ablate(Z, heads=slice(0.5, None)),
            "the start of the slice at heads must be a whole number",
        ),
        (lambda: Ablate(Z, positions=[[True], [True, False]]), "ragged"),
        (lambda: Ablate(Z, heads=1.5), "takes an int"),
        (lambda: Ablate(Z, heads=[[1, 2]]), "takes an int"),
        (lambda: Ablate(3), "hook must be"),
        (lambda: Patch(Z, "x"), "must be a number or an array"),
        (lambda: Patch(Z, [[1], [1, 2]]), "ragged"),
        (lambda: Steer(Z, 1.0, np.ones(2)), "one number"),
        (lambda: MODEL.run_with_interventions([[1]], [lambda x: x]), "Python functions go into"),
    ],
)
def test_records_that_mean_nothing(make: Any, says: str) -> None:
    with pytest.raises(InputError) as error:
        make()
    assert says in str(error.value)
