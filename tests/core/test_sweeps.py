"""Sweeps: each equals a loop of whole runs with one patch each, whatever is recomputed, batched, interrupted or mixed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from graphlens import HookedTransformer, Scale
from graphlens.errors import InputError
from graphlens.experiments import sweep as sweeps
from graphlens.metrics import CrossEntropy, KLDivergence, LogitDiff, Metric, Probability, normalised
from graphlens.patching import (
    Cache,
    Site,
    act_patch_sites,
    get_act_patch_attn_head_out_all_pos,
    grid,
    path_patch,
    sweep,
)
from tests.intervention_specs import fields_of, selections, shape_of
from tests.sweep_cases import (
    CFG,
    CLEAN,
    CORRUPTED,
    DIFFERENCE,
    FEW,
    KINDS,
    MASKS,
    METRICS,
    MODEL,
    PROMPTS,
    SOME,
    TAILS,
    agrees,
    apart,
    at,
    entropy,
    loop,
    places,
    scaled,
)

pytestmark = pytest.mark.usefixtures("no_flags")
few = settings(max_examples=60, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
GENERAL = ("ln1.hook_scale", "ln1.hook_normalized", "ln2.hook_scale", "ln2.hook_normalized")


# The sweep equals the loop


@MASKS
@TAILS
def test_at_every_kind_of_place(tail: str, options: dict[str, Any], clean: Mapping[str, Any]) -> None:
    MODEL.set_use_attn_result(tail == "attn.hook_result")
    sites = places(tail)
    if tail == "hook_pos_embed":  # the same in every run: so another order of it
        clean = {**clean, tail: clean[tail][:, ::-1]}
    metrics = [LogitDiff(5, 9, position=[-1, 4, 3]), KLDivergence(MODEL(CLEAN), position=-2)]
    result = sweep(MODEL, CORRUPTED, sites, clean, metrics, verbose=False, **options)
    assert result.axes == ("metric", "site")
    agrees(result, loop(CORRUPTED, sites, clean, metrics, **options))
    assert result.values.std(1).min() > 1e-3, "patching changes nothing, so this tests nothing"


@st.composite
def random_sweeps(draw: Callable[..., Any]) -> dict[str, Any]:
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    corrupted, clean = (rng.integers(0, CFG.d_vocab, (batch, length)) for _ in range(2))
    if draw(st.booleans()):  # the same but for a few tokens, as people's prompts are
        keep = rng.random((batch, length)) < 0.7
        clean = np.where(keep, corrupted, clean)
    options: dict[str, Any] = {}
    masked = draw(st.sampled_from(["not", "left", "anywhere"]))
    if masked != "not":
        starts = np.asarray(draw(st.lists(st.integers(0, length - 1), min_size=batch, max_size=batch)))[:, None]
        mask = np.arange(length) >= starts
        if masked == "anywhere":
            mask = (rng.random((batch, length)) < 0.7) | (np.arange(length) == starts)
        options["attention_mask"] = mask.astype(int)
    sites = []
    for _ in range(draw(st.integers(1, 5))):
        hook = at(draw(st.sampled_from(KINDS)), draw(st.integers(0, CFG.n_layers - 1)))
        axes, sizes = shape_of(MODEL, hook, batch, length)
        names = {"positions": "position", "heads": "head", "dims": "dims"}
        chosen = {
            names[field]: draw(selections(size))
            for field, size in zip(fields_of(axes), sizes, strict=True)
            if field in names
        }
        sites.append(Site(hook, **chosen))
    places = st.integers(-length, length - 1)
    position = draw(st.one_of(places, st.lists(places, min_size=batch, max_size=batch)))
    reduction = draw(st.sampled_from(["mean", "none"]))
    ids = rng.integers(0, CFG.d_vocab, (2, batch))
    metric = draw(
        st.sampled_from(
            [
                LogitDiff(ids[0], ids[1], position, reduction),
                Probability(int(ids[0, 0]), position, reduction),
                CrossEntropy(ids[1], position, reduction),
            ]
        )
    )
    tokens = draw(st.sampled_from([1, 5, 16, 64, 4096]))
    return {"corrupted": corrupted, "clean": clean, "sites": sites, "metric": metric, "tokens": tokens, **options}


@few
@given(random_sweeps())
def test_anywhere_at_random(drawn: dict[str, Any]) -> None:
    MODEL.set_use_attn_result(True)
    tokens, sites, metric = drawn["corrupted"], drawn["sites"], drawn["metric"]
    options = {name: drawn[name] for name in ("attention_mask",) if name in drawn}
    try:
        metric.masked(options.get("attention_mask"))
    except InputError:  # it would read padding: the sweep says so too
        with pytest.raises(InputError, match="which is padding in prompt"):
            sweep(MODEL, tokens, sites, "zero", metric, verbose=False, **options)
        return
    _, cache = MODEL.run_with_cache(drawn["clean"], **options)
    result = sweep(MODEL, tokens, sites, cache, metric, max_batch_tokens=drawn["tokens"], verbose=False, **options)
    agrees(result, loop(tokens, sites, cache, metric, **options))


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_prompts_of_different_lengths(padding_side: str) -> None:
    """On the right each prompt is read at its own last token; on the left all are read at the end."""
    texts = [[f"{opening} John and Mary went to the store, {name} gave a drink to" for opening in ("When", "Then, when")]
             for name in ("John", "Mary")]  # fmt: skip
    texts = [[*some, "Mary and"] for some in texts]
    tokens = [MODEL.to_tokens(some, padding_side=padding_side) for some in texts]
    lengths = [MODEL.to_tokens(text).shape[1] for text in texts[0]]
    assert len(set(lengths)) == 3
    position = -1 if padding_side == "left" else [length - 1 for length in lengths]
    metric = LogitDiff(" Mary", " John", position=position, reduction="none").bound(MODEL.to_single_token)
    _, cache = MODEL.run_with_cache(texts[0], padding_side=padding_side)
    sites = [
        *grid("resid_pre", ("layer", "pos"), {"layer": range(4), "pos": range(0, tokens[0].shape[1], 3)}).sites,
        *grid("z", ("layer", "head"), {"layer": range(4), "head": (0, 3)}).sites,
        *(Site("pattern", layer, position=-2, head=1) for layer in range(4)),
    ]
    result = sweep(MODEL, texts[1], sites, cache, metric, verbose=False, padding_side=padding_side)
    agrees(result, loop(texts[1], sites, cache, metric, padding_side=padding_side))
    assert result.axes == ("site", "batch")
    # What padding holds changes nothing: each prompt alone gives the same.
    if padding_side == "right":
        for row, text in enumerate(texts[1][:1]):
            alone = [site for site in sites if "resid_pre" in site.hook and site.position < lengths[row]]
            _, own = MODEL.run_with_cache(texts[0][row])
            one = sweep(MODEL, text, alone, own, LogitDiff(" Mary", " John"), verbose=False)
            same = np.asarray([result.values[sites.index(site), row] for site in alone])
            assert apart(one.values, same, one.baselines) <= 1e-5


@MASKS
@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_with_every_metric(metric: Any, options: dict[str, Any], clean: Mapping[str, Any]) -> None:
    result = sweep(MODEL, CORRUPTED, SOME, clean, metric, verbose=False, **options)
    agrees(result, loop(CORRUPTED, SOME, clean, metric, **options))
    if isinstance(metric, Metric):
        metric = metric.masked(options.get("attention_mask"))
    assert np.allclose(result.baselines["corrupted"], metric(MODEL(CORRUPTED, **options)), rtol=1e-5, atol=1e-5)
    assert np.allclose(result.baselines["clean"], metric(MODEL(CLEAN)), rtol=1e-5, atol=1e-5)


def test_with_several_metrics_in_one_pass(clean: Mapping[str, Any]) -> None:
    chosen = {name: METRICS[name] for name in ("difference", "KL everywhere", "not the last", "a function of a few")}
    chosen["loss"] = METRICS["loss"]
    expected = loop(CORRUPTED, SOME, clean, list(chosen.values()))
    named = sweep(MODEL, CORRUPTED, SOME, clean, chosen, verbose=False)
    agrees(named, expected)
    assert named.labels["metric"] == list(chosen)
    listed = sweep(MODEL, CORRUPTED, SOME, clean, list(chosen.values()), verbose=False)
    agrees(listed, expected)
    names = ["logit difference 0", "KL divergence", "logit difference 2", "scaled", "cross-entropy"]
    assert listed.labels["metric"] == names
    for name, size in (("clean", 5), ("corrupted", 5)):
        assert listed.baselines[name].shape == (size,)
    # Without the function only a few logits are computed, and the values are those.
    del chosen["a function of a few"]
    agrees(sweep(MODEL, CORRUPTED, SOME, clean, chosen, verbose=False), np.delete(expected, 3, 0))


def test_several_metrics_that_keep_each_prompt(clean: Mapping[str, Any]) -> None:
    chosen = [
        METRICS[name] for name in ("positions", "probability per prompt", "loss per prompt", "KL at one position")
    ]
    result = sweep(MODEL, CORRUPTED, SOME, clean, chosen, verbose=False)
    assert result.axes == ("metric", "site", "batch")
    assert result.baselines["clean"].shape == (4, 3)
    agrees(result, loop(CORRUPTED, SOME, clean, chosen))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_normalised_metric(reduction: str, clean: Mapping[str, Any]) -> None:
    metric = LogitDiff([5, 17, 200], [9, 300, 4], reduction=reduction)
    high, low = metric(MODEL(CLEAN)), metric(MODEL(CORRUPTED))
    result = sweep(MODEL, CORRUPTED, SOME, clean, normalised(metric), verbose=False)
    expected = (loop(CORRUPTED, SOME, clean, metric) - low) / (high - low)
    # What is 1e-5 of the metric is more of the difference that it is divided by.
    raw = max(np.abs(high).max(), np.abs(low).max()) / np.abs(high - low).min()
    assert np.abs(result.values - expected).max() <= 2e-5 * max(raw, np.abs(expected).max())
    assert np.abs(result.baselines["corrupted"]).max() <= 1e-5 * raw
    assert np.abs(result.baselines["clean"] - 1).max() <= 1e-5 * raw
    # Baselines of one's own stand, where the source knows none.
    result = sweep(MODEL, CORRUPTED, SOME, "zero", normalised(metric, clean=9.0, corrupted=2.0), verbose=False)
    zeros = {site.hook: np.zeros(1, np.float32) for site in SOME}
    assert apart(result.values, (loop(CORRUPTED, SOME, zeros, metric) - 2) / 7, result.baselines) <= 2e-5


def test_tokens_as_text(clean: Mapping[str, Any]) -> None:
    _, cache = MODEL.run_with_cache(PROMPTS[0])
    sites = [Site("resid_pre", layer, position=-1) for layer in range(4)]
    result = sweep(MODEL, PROMPTS[1], sites, cache, LogitDiff(" Mary", " John"), verbose=False)
    ids = LogitDiff(MODEL.to_single_token(" Mary"), MODEL.to_single_token(" John"))
    agrees(result, loop(PROMPTS[1], sites, cache, ids))
    assert result.baselines["clean"] > 5 > -5 > result.baselines["corrupted"]
    # Without a first token of its own.
    _, cache = MODEL.run_with_cache(PROMPTS[0], prepend_bos=False)
    bare = sweep(MODEL, PROMPTS[1], sites, cache, ids, verbose=False, prepend_bos=False)
    agrees(bare, loop(PROMPTS[1], sites, cache, ids, prepend_bos=False))
    assert np.abs(bare.values - result.values).max() > 1e-2


def test_a_grid_has_its_axes(clean: Mapping[str, Any]) -> None:
    ranges = {"layer": (0, 3), "pos": (1, 4, 6), "head": (3, 0)}
    sites = grid("q", ("layer", "pos", "head"), ranges)
    result = sweep(MODEL, CORRUPTED, sites, clean, DIFFERENCE, verbose=False)
    assert (result.axes, result.shape) == (("layer", "pos", "head"), (2, 3, 2))
    agrees(result, loop(CORRUPTED, sites.sites, clean, DIFFERENCE).reshape(2, 3, 2))
    assert result.metadata == {"model": "tiny-gpt2", "metrics": ["logit difference"]}
    found = sweep(MODEL, CORRUPTED, Site("q", 3, position=4, head=3), clean, DIFFERENCE, verbose=False)
    assert (found.axes, found.shape) == (("site",), (1,))
    assert apart(found.values[0], result.sel(layer="L3", pos="4", head="H3").values, result.baselines) <= 1e-5
    one_by_one = sweep(MODEL, CORRUPTED, iter(sites.sites), clean, DIFFERENCE, verbose=False)
    agrees(one_by_one, result.values.ravel())


def test_positions_of_each_prompt(clean: Mapping[str, Any]) -> None:
    """A mask [b, p]: in one run each prompt is patched at places of its own."""
    where = np.asarray([[0, 0, 1, 0, 0, 0, 1], [0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0]], bool)
    sites = [Site("resid_mid", 1, position=where), Site("z", 2, position=where, head=[0, 3])]
    metric = LogitDiff(5, 9, position=[-1, 1, 4], reduction="none")
    result = sweep(MODEL, CORRUPTED, sites, clean, metric, verbose=False)
    agrees(result, loop(CORRUPTED, sites, clean, metric))
    # The third prompt is read before it is patched; the first is not.
    np.testing.assert_allclose(result.values[:, 2], result.baselines["corrupted"][2], rtol=1e-4)
    assert np.abs(result.values[:, 0] - result.baselines["corrupted"][0]).min() > 1e-3


def test_names_of_transformerlens_4(clean: Mapping[str, Any]) -> None:
    sites = [Site("blocks.1.hook_in", position=3), Site("blocks.2.attn.q.hook_out", head=1), Site("embed.hook_out")]
    own = [Site("blocks.1.hook_resid_pre", position=3), Site("q", 2, head=1), Site("embed")]
    result = sweep(MODEL, CORRUPTED, sites, clean, DIFFERENCE, verbose=False)
    agrees(result, loop(CORRUPTED, own, clean, DIFFERENCE))


def test_other_flags_take_nothing_away(clean: Mapping[str, Any]) -> None:
    for flag in ("attn_result", "split_qkv_input", "hook_mlp_in"):
        getattr(MODEL, f"set_use_{flag}")(True)
    agrees(sweep(MODEL, CORRUPTED, SOME, clean, DIFFERENCE, verbose=False), loop(CORRUPTED, SOME, clean, DIFFERENCE))


# What cannot be recomputed takes whole runs, and says so


@pytest.mark.parametrize("tail", GENERAL)
def test_where_there_is_no_shortcut(tail: str, clean: Mapping[str, Any]) -> None:
    sites = [Site(f"blocks.{layer}.{tail}", position=place) for layer in (0, 3) for place in (None, 4)]
    result = sweep(MODEL, CORRUPTED, sites, clean, DIFFERENCE, verbose=False)
    agrees(result, loop(CORRUPTED, sites, clean, DIFFERENCE), quick=False)
    assert tail in result.metadata["general_path"]


def test_after_the_blocks_and_flagged_inputs() -> None:
    MODEL.set_use_split_qkv_input(True)
    _, cache = MODEL.run_with_cache(CLEAN)
    sites = [
        Site("unembed.hook_in", position=-1),
        Site("ln_final.hook_normalized"),
        Site("ln_final.hook_scale", position=6),
        Site("blocks.1.hook_q_input", head=2),
        Site("unembed.hook_out", dims=[5, 17, 200]),
    ]
    result = sweep(MODEL, CORRUPTED, sites, cache, DIFFERENCE, verbose=False)
    agrees(result, loop(CORRUPTED, sites, cache, DIFFERENCE), quick=False)
    for tail in ("unembed.hook_in", "ln_final.hook_normalized", "hook_q_input"):
        assert tail in result.metadata["general_path"]


def test_both_ways_in_one_sweep(
    clean: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    monkeypatch.setattr(sweeps, "note", said.append)
    sites = [
        Site("z", 1, head=0),
        Site("blocks.1.ln1.hook_scale"),
        Site("resid_post", 2),
        Site("blocks.0.ln2.hook_scale"),
    ]
    result = sweep(MODEL, CORRUPTED, sites, clean, [DIFFERENCE, METRICS["loss"]])
    agrees(result, loop(CORRUPTED, sites, clean, [DIFFERENCE, METRICS["loss"]]), quick=False)
    why = "no shortcut from ln1.hook_scale, ln2.hook_scale"
    assert result.metadata["general_path"] == why
    assert said == [f"2 of 4 patches took a forward each: {why}."]
    sweep(MODEL, CORRUPTED, sites, clean, DIFFERENCE, verbose=False)
    sweep(MODEL, CORRUPTED, sites[::2], clean, DIFFERENCE)
    assert len(said) == 1  # where nobody asked for it, and where there is nothing to say
    assert capsys.readouterr() == ("", "")  # no bar where there is no terminal


@pytest.mark.parametrize("how", ["intervene", "hooks", "a filter", "added"], scope="module")  # together: see TAILS
@pytest.mark.parametrize(
    "metric", [METRICS["positions"], METRICS["loss"], scaled], ids=["positions", "loss", "function"]
)
def test_under_other_edits(how: str, metric: Any, clean: Mapping[str, Any]) -> None:
    def halved(activation: Any, hook: Any) -> Any:
        return activation * 0.5

    hook = "blocks.1.hook_mlp_out"
    contexts = {
        "intervene": lambda: MODEL.intervene(Scale(hook, 0.5)),
        "hooks": lambda: MODEL.hooks([(hook, halved)]),
        "a filter": lambda: MODEL.hooks([(lambda name: name == hook, halved)]),
        "added": contextlib.ExitStack,
    }
    plain = sweep(MODEL, CORRUPTED, FEW, clean, metric, verbose=False)
    with contexts[how]() as stack:
        if how == "added":
            MODEL.add_hook(hook, halved)
            stack.callback(MODEL.reset_hooks)
        result = sweep(MODEL, CORRUPTED, FEW, clean, metric, verbose=False)
        agrees(result, loop(CORRUPTED, FEW, clean, metric), quick=False)
        base = metric(MODEL(CORRUPTED))
    assert "hooks or interventions are active" in result.metadata["general_path"]
    assert np.allclose(result.baselines["corrupted"], base)
    assert np.abs(result.values - plain.values).max() > 0.05 * np.abs(plain.values).max()
    agrees(sweep(MODEL, CORRUPTED, FEW, clean, metric, verbose=False), plain.values)  # and afterwards as before


def test_a_file_whose_residual_is_no_sum(tmp_path: Path) -> None:
    """With a factor baked in, what an MLP writes is not added to the residual stream as it is."""
    MODEL.bake([Scale("blocks.1.hook_resid_post", 0.5)], tmp_path / "baked", keep_hooks=True)
    model = HookedTransformer.from_onnx(tmp_path / "baked", "cpu")
    _, cache = model.run_with_cache(CLEAN)
    sites = [Site("mlp_out", 1, position=3), Site("blocks.1.mlp.hook_post", dims=[4, 9]), Site("attn_out", 1)]
    found = sweep(model, CORRUPTED, sites, cache, DIFFERENCE, verbose=False)
    whole = sweep(model, CORRUPTED, sites, cache, DIFFERENCE, recompute=False, verbose=False)
    np.testing.assert_allclose(found.values, whole.values, atol=1e-5 * np.abs(whole.values).max())
    assert found.metadata["general_path"] == "hook_resid_post is not the sum of hook_resid_mid, hook_mlp_out"
    with pytest.raises(InputError, match=r"'blocks\.1\.hook_mlp_out' in this model: hook_resid_post is not the sum"):
        path_patch(model, CORRUPTED, cache, DIFFERENCE, verbose=False)


# What changes nothing


@MASKS
def test_a_run_patched_from_itself_is_itself(options: dict[str, Any]) -> None:
    MODEL.set_use_attn_result(True)
    sites = [site for tail in KINDS for site in places(tail)]
    for tokens in (CLEAN, CORRUPTED):
        logits, cache = MODEL.run_with_cache(tokens, **options)
        for metric in (DIFFERENCE, METRICS["loss"], entropy):
            result = sweep(MODEL, tokens, sites, cache, metric, verbose=False, **options)
            np.testing.assert_array_equal(result.values, result.baselines["corrupted"])
            own = metric.masked(options.get("attention_mask")) if isinstance(metric, Metric) else metric
            assert apart(result.values, np.full(len(sites), own(logits)), result.baselines) <= 1e-5
            assert result.baselines["clean"] == result.baselines["corrupted"]


def test_a_run_patched_wholly_is_the_clean_one(clean: Mapping[str, Any]) -> None:
    """The residual stream at every position is all there is."""
    sites = [Site(f"resid_{name}", layer) for layer in range(4) for name in ("pre", "post")]
    for metric in (DIFFERENCE, METRICS["loss"], METRICS["positions"], entropy):
        result = sweep(MODEL, CORRUPTED, sites, clean, metric, verbose=False)
        expected = np.broadcast_to(result.baselines["clean"], result.shape)
        assert apart(result.values, expected, result.baselines) <= 1e-5
        assert np.abs(result.baselines["clean"] - result.baselines["corrupted"]).max() > 1e-2


def test_patches_after_what_is_read_change_nothing(clean: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    metric = LogitDiff(5, 9, position=[2, 3, 1])
    late = [Site(at(tail, 1), position=place) for tail in KINDS for place in (4, 6) if tail != "attn.hook_result"]
    runs, run = [], MODEL.runner.engine.run
    monkeypatch.setattr(MODEL.runner.engine, "run", lambda *given, **named: runs.append(given) or run(*given, **named))
    result = sweep(MODEL, CORRUPTED, [*late, Site("resid_pre", 1, position=3)], clean, metric, verbose=False)
    assert len(runs) == 1  # the corrupted prompt's own
    np.testing.assert_array_equal(result.values[:-1], result.baselines["corrupted"])
    assert abs(result.values[-1] - result.baselines["corrupted"]) > 1e-3


def test_parts_that_agree_change_nothing(clean: Mapping[str, Any]) -> None:
    """Clean and corrupted share their first tokens: up to there they are the same."""
    tokens = np.concatenate([CLEAN[:, :3], CORRUPTED[:, 3:]], 1)
    sites = [Site(at(tail, 0), position=place) for tail in ("hook_embed", "hook_pos_embed") for place in range(3)]
    result = sweep(MODEL, tokens, [*sites, Site("embed", position=3)], clean, DIFFERENCE, verbose=False)
    np.testing.assert_array_equal(result.values[:-1], result.baselines["corrupted"])
    assert abs(result.values[-1] - result.baselines["corrupted"]) > 1e-3


# How it is done does not matter


@pytest.mark.parametrize("metric", [DIFFERENCE, METRICS["loss per prompt"], entropy], ids=["few", "all", "function"])
def test_neither_order_nor_batches_matter(metric: Any, clean: Mapping[str, Any]) -> None:
    MODEL.set_use_attn_result(True)
    sites = [site for tail in KINDS for site in places(tail)[2:5]]
    first = sweep(MODEL, CORRUPTED, sites, clean, metric, verbose=False)
    for tokens in (1, 7, 64, 4096):
        agrees(sweep(MODEL, CORRUPTED, sites, clean, metric, max_batch_tokens=tokens, verbose=False), first.values)
    order = np.random.default_rng(3).permutation(len(sites))
    shuffled = sweep(MODEL, CORRUPTED, [sites[i] for i in order], clean, metric, verbose=False)
    agrees(shuffled, first.values[order])
    assert shuffled.labels["site"][0].startswith(str(sites[order[0]]))
    whole = sweep(MODEL, CORRUPTED, sites, clean, metric, recompute=False, verbose=False)
    agrees(whole, first.values, quick=False)
    assert whole.metadata["general_path"] == "recompute=False"


def test_a_sweep_leaves_the_model_and_the_cache_as_they_were(clean: Mapping[str, Any]) -> None:
    before, copies = MODEL(CORRUPTED), {name: array.copy() for name, array in clean.items()}
    tokens = CORRUPTED.copy()
    sweep(MODEL, tokens, SOME, clean, DIFFERENCE, verbose=False)
    np.testing.assert_array_equal(tokens, CORRUPTED)
    np.testing.assert_array_equal(MODEL(CORRUPTED), before)
    for name, array in clean.items():
        np.testing.assert_array_equal(array, copies[name])


def test_longer_sweeps_open_no_more_sessions(tiny_copy: Path) -> None:
    model = HookedTransformer.from_onnx(tiny_copy, "cpu")
    _, cache = model.run_with_cache(CLEAN)
    sites = [Site("z", layer, head=0) for layer in range(4)]
    sweep(model, CORRUPTED, sites, cache, DIFFERENCE, verbose=False)
    built = model.runner.engine.sessions_built
    for head in range(1, 4):
        more = [Site("z", layer, head=head, position=[head, 5]) for layer in range(4)]
        sweep(model, CORRUPTED, more, cache, DIFFERENCE, verbose=False)
    assert model.runner.engine.sessions_built == built


@pytest.mark.parametrize("form", ["dict", "without batch", "ActivationCache", "Cache", "one clean prompt for all"])
def test_any_cache_will_do(form: str, clean: Mapping[str, Any]) -> None:
    tokens, source = CORRUPTED[:1], MODEL.run_with_cache(CLEAN[:1])[1]
    values = {name: np.array(array) for name, array in source.items()}
    if form == "dict":
        source = values
    elif form == "without batch":
        source = source.remove_batch_dim()
    elif form == "Cache":
        source = Cache(values)
    elif form == "one clean prompt for all":
        tokens = CORRUPTED
        values = {name: np.broadcast_to(array, (3, *array.shape[1:])) for name, array in values.items()}
    metric = LogitDiff(5, 9, position=5, reduction="none")
    agrees(sweep(MODEL, tokens, SOME, source, metric, verbose=False), loop(tokens, SOME, values, metric))


# On a task that the model was trained for


def test_patching_finds_the_head_that_moves_the_name() -> None:
    """One head of the 16 carries which name was given. Patching it restores the clean answer, and no other does more than a
    few percent; ablating it loses the answer.

    Under ablation by zero two heads of the earlier half come before it: their outputs are much the same for either name,
    which a patch from the one to the other leaves and an ablation takes away. Ablation by the mean over both prompts takes
    away only what differs between them, and there the head is first, too.
    """
    difference = LogitDiff(" Mary", " John")
    _, cache = MODEL.run_with_cache(PROMPTS[0])
    found = get_act_patch_attn_head_out_all_pos(MODEL, PROMPTS[1], cache, difference)
    bound = difference.bound(MODEL.to_single_token)
    high, low = bound(MODEL(PROMPTS[0])), bound(MODEL(PROMPTS[1]))
    assert high > 5 > -5 > low
    restored = (found - low) / (high - low)
    mover = np.unravel_index(np.abs(restored).argmax(), restored.shape)
    assert mover[0] >= 2, "names are moved to the end in the later half of the layers"
    assert restored[mover] > 0.95
    assert np.sort(np.abs(restored).ravel())[-2] < 0.05

    heads = act_patch_sites(MODEL, PROMPTS[0], "attn_head_out_all_pos")
    zero = sweep(MODEL, PROMPTS[0], heads, "zero", difference, verbose=False)
    change = np.abs(zero.values - zero.baselines["corrupted"])
    assert (change > change[mover]).sum() <= 2
    assert change[mover] == change[2:].max()
    assert zero.values[mover] < 0.05 * zero.baselines["corrupted"], "without it neither name is the likelier"

    names = [MODEL.to_single_token(name) for name in (" Mary", " John")]
    at_the_end = [Site("z", layer, position=-1, head=head) for layer in range(4) for head in range(4)]
    mean = sweep(MODEL, list(PROMPTS), at_the_end, "mean", LogitDiff(names, names[::-1]), verbose=False)
    change = np.abs(mean.values - mean.baselines["corrupted"]).reshape(4, 4)
    assert np.unravel_index(change.argmax(), change.shape) == mover
    assert np.sort(change.ravel())[-2] < change[mover] / 3
