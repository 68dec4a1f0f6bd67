"""Sweeps: each equals a loop of whole runs with one patch each, whatever is recomputed, batched, interrupted or mixed."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import graphlens
from graphlens import Ablate, HookedTransformer, Patch, Scale
from graphlens.errors import InputError, UnknownHookPoint
from graphlens.experiments import sweep as sweeps
from graphlens.experiments.stages import STAGES
from graphlens.metrics import CrossEntropy, KLDivergence, LogitDiff, Probability, normalised
from graphlens.patching import (
    Cache,
    Mean,
    Noise,
    Site,
    SweepResult,
    Zero,
    act_patch_sites,
    get_act_patch_attn_head_out_all_pos,
    grid,
    sweep,
)
from tests.intervention_specs import fields_of, selections, shape_of

few = settings(max_examples=60, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
MODEL = HookedTransformer.from_onnx(graphlens.embedded_model(), "cpu")
CFG = MODEL.cfg
RNG = np.random.default_rng(11)
CLEAN, CORRUPTED = (RNG.integers(0, CFG.d_vocab, (3, 7)) for _ in range(2))
PADDING = np.ones((3, 7), int)
PADDING[0, :3] = PADDING[2, :1] = 0
MASKS = pytest.mark.parametrize("options", [{}, {"attention_mask": PADDING}], ids=["whole", "left-padded"])
DIFFERENCE = LogitDiff([5, 17, 200], [9, 300, 4])
GENERAL = ("ln1.hook_scale", "ln1.hook_normalized", "ln2.hook_scale", "ln2.hook_normalized")
PROMPTS = (
    "When John and Mary went to the store, John gave a drink to",
    "When John and Mary went to the store, Mary gave a drink to",
)


@pytest.fixture(autouse=True)
def no_flags() -> Iterator[None]:
    yield
    for flag in ("attn_result", "split_qkv_input", "hook_mlp_in"):
        getattr(MODEL, f"set_use_{flag}")(False)


@pytest.fixture(scope="module")
def clean() -> Mapping[str, Any]:
    """The clean run's activations: with the flagged hook point, without padding."""
    MODEL.set_use_attn_result(True)
    _, cache = MODEL.run_with_cache(CLEAN)
    MODEL.set_use_attn_result(False)
    return dict(cache)


# The loop: whole runs, one patch each


def loop(tokens: Any, sites: Sequence[Site], values: Any, metrics: Any, **options: Any) -> Any:
    """Each metric [metric, site, ...] (or [site, ...] of one alone) with ``values`` (by hook name) patched at each site."""
    every = metrics if isinstance(metrics, list) else [metrics]
    rows = []
    for site in sites:
        logits = MODEL.run_with_interventions(tokens, site.patch(values[site.hook]), **options)
        rows.append([np.asarray(metric(logits)) for metric in every])
    found = np.stack([np.stack(column) for column in zip(*rows, strict=True)])
    return found if isinstance(metrics, list) else found[0]


def apart(found: Any, expected: Any, baselines: Mapping[str, Any]) -> float:
    """The largest difference, as a share of the largest value there is."""
    assert found.shape == expected.shape
    known = [np.abs(value).max() for value in baselines.values() if value is not None]
    return float(np.abs(found - expected).max() / max(np.abs(found).max(), np.abs(expected).max(), *known))


def agrees(result: SweepResult, expected: Any, quick: bool | None = True) -> None:
    """Within 1e-5 of each metric's scale; and the quick path was taken, or (``quick=False``) it says why not."""
    if "metric" in result.axes:
        for name, other in zip(result.labels["metric"], expected, strict=True):
            one = result.sel(metric=name)
            assert apart(one.values, other, one.baselines) <= 1e-5, name
    else:
        assert apart(result.values, expected, result.baselines) <= 1e-5
    if quick is not None:
        assert ("general_path" not in result.metadata) == quick, result.metadata


def at(tail: str, layer: int) -> str:
    return tail if tail in ("hook_embed", "hook_pos_embed") else f"blocks.{layer}.{tail}"


def places(tail: str) -> list[Site]:
    """Sites of every form at one kind of hook point: whole and in part, early and late, in the first block and the last."""
    part: dict[str, list[Any]] = {"position": [None, 3, -2, [1, 4], slice(2, 6), slice(None, None, 3)]}
    axes, _ = shape_of(MODEL, at(tail, 0), 3, 7)
    fields = fields_of(axes)
    part["head"] = [None, 1, -1, [0, 3], slice(1, 3), [True, False, False, True]] if "heads" in fields else [None]
    # At scores and patterns these are keys, at the MLP's neurons.
    part["dims"] = [None, 2, [4, 1], [0, 5, 3], slice(0, 4), None] if "dims" in fields else [None]
    found = []
    for layer in (0, 2, 3) if "embed" not in tail else (0,):
        for turn in range(6):
            chosen = {name: some[(turn + shift) % len(some)] for shift, (name, some) in enumerate(part.items())}
            found.append(Site(at(tail, layer), **chosen))
        found += [Site(at(tail, layer)), Site(at(tail, layer), position=[1, 4], head=-1 if "heads" in fields else None)]
    return found


# The sweep equals the loop


@MASKS
@pytest.mark.parametrize("tail", STAGES)
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
        hook = at(draw(st.sampled_from(list(STAGES))), draw(st.integers(0, CFG.n_layers - 1)))
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


def entropy(logits: Any) -> Any:
    """A metric of one's own, of all logits."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return -(weights * np.log(weights)).sum(-1).mean()


def scaled(logits: Any) -> float:
    return float(logits[1, 2, 7] - 2 * logits[0, -1, 30])


SOME = [
    *(Site("resid_pre", layer, position=place) for layer in (0, 3) for place in (0, 3, 6)),
    *(Site("z", layer, head=2) for layer in range(4)),
    Site("blocks.1.mlp.hook_post", dims=[3, 100, 511]),
    Site("pattern", 2, position=4, head=1, dims=0),
    Site("k", 3, position=5),
    Site("attn_scores", 3, position=slice(2, None)),
]
FEW = [SOME[1], SOME[7], SOME[-1], SOME[-3]]
METRICS: dict[str, Any] = {
    "difference": DIFFERENCE,
    "not the last": LogitDiff(5, 9, position=3),
    "positions": LogitDiff(5, 9, position=[2, -1, 0], reduction="none"),
    "probability": Probability([5, 8, 400], position=4),
    "probability per prompt": Probability(77, reduction="none"),
    "cross-entropy": CrossEntropy([1, 2, 3], position=[6, 2, 4]),
    "loss": CrossEntropy(CORRUPTED, position=None),
    "loss per prompt": CrossEntropy(CORRUPTED, position=None, reduction="none"),
    "KL": KLDivergence(MODEL(CLEAN)),
    "KL at one position": KLDivergence(MODEL(CLEAN)[:, 2], position=2, reduction="none"),
    "KL everywhere": KLDivergence(MODEL(CLEAN), position=None),
    "a function of all logits": entropy,
    "a function of a few": scaled,
}


@MASKS
@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_with_every_metric(metric: Any, options: dict[str, Any], clean: Mapping[str, Any]) -> None:
    result = sweep(MODEL, CORRUPTED, SOME, clean, metric, verbose=False, **options)
    agrees(result, loop(CORRUPTED, SOME, clean, metric, **options))
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


@pytest.mark.parametrize("how", ["intervene", "hooks", "a filter", "added"])
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


# What changes nothing


@MASKS
def test_a_run_patched_from_itself_is_itself(options: dict[str, Any]) -> None:
    MODEL.set_use_attn_result(True)
    sites = [site for tail in STAGES for site in places(tail)]
    for tokens in (CLEAN, CORRUPTED):
        logits, cache = MODEL.run_with_cache(tokens, **options)
        for metric in (DIFFERENCE, METRICS["loss"], entropy):
            result = sweep(MODEL, tokens, sites, cache, metric, verbose=False, **options)
            np.testing.assert_array_equal(result.values, result.baselines["corrupted"])
            assert apart(result.values, np.full(len(sites), metric(logits)), result.baselines) <= 1e-5
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
    late = [Site(at(tail, 1), position=place) for tail in STAGES for place in (4, 6) if tail != "attn.hook_result"]
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
    sites = [site for tail in STAGES for site in places(tail)[2:5]]
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


# Sources


@MASKS
@pytest.mark.parametrize("tail", STAGES)
def test_zero_is_ablation(tail: str, options: dict[str, Any]) -> None:
    MODEL.set_use_attn_result(tail == "attn.hook_result")
    sites = places(tail)
    result = sweep(MODEL, CORRUPTED, sites, "zero", DIFFERENCE, verbose=False, **options)
    expected = [
        DIFFERENCE(MODEL.run_with_interventions(CORRUPTED, ablation, **options))
        for site in sites
        for ablation in [Ablate(site.hook, heads=site.head, positions=site.position, dims=site.dims)]
    ]
    agrees(result, np.asarray(expected))
    assert result.baselines["clean"] is None
    assert sweep(MODEL, CORRUPTED, sites, Zero(), DIFFERENCE, verbose=False, **options) == result


def mean_of(hook: str, array: Any, mask: Any) -> Any:
    """The mean activation, a number at a time over prompts and positions that are no padding."""
    if "attn_scores" in hook or "pattern" in hook:
        return np.stack([array[:, head].sum(0) / len(array) for head in range(array.shape[1])])[None]
    rows = [array[b, p].astype(np.float64) for b, p in np.ndindex(*mask.shape) if mask[b, p]]
    return (sum(rows) / len(rows))[None, None]


@MASKS
@pytest.mark.parametrize("tail", STAGES)
def test_mean_is_that_of_the_real_tokens(tail: str, options: dict[str, Any]) -> None:
    MODEL.set_use_attn_result(tail == "attn.hook_result")
    sites = places(tail)
    _, cache = MODEL.run_with_cache(CORRUPTED, **options)
    mask = options.get("attention_mask", np.ones_like(CORRUPTED))
    values = {}
    for hook in {site.hook for site in sites}:
        values[hook] = np.broadcast_to(mean_of(hook, cache[hook], mask), cache[hook].shape)
        if options and "attn_" not in hook:  # the padding counts for nothing, and would count
            assert np.abs(Mean().value(hook, cache[hook], mask) - mean_of(hook, cache[hook], mask)).max() < 1e-5
            unlike = np.abs(Mean().value(hook, cache[hook], None) - mean_of(hook, cache[hook], mask)).max()
            assert unlike > 1e-3 or "pattern" in hook
    result = sweep(MODEL, CORRUPTED, sites, "mean", DIFFERENCE, verbose=False, **options)
    agrees(result, loop(CORRUPTED, sites, values, DIFFERENCE, **options))
    agrees(sweep(MODEL, CORRUPTED, sites, Mean(), DIFFERENCE, verbose=False, **options), result.values)


def noised(hook: str, array: Any, scale: float, seed: int) -> Any:
    """The documented noise, written out."""
    digest = int.from_bytes(hashlib.sha256(hook.encode()).digest()[:8], "little")
    noise = np.random.default_rng([seed, digest]).standard_normal(array.shape)
    finite = array[np.isfinite(array)].astype(np.float64)
    noise[array == 0 if "pattern" in hook else np.isinf(array)] = 0
    return (array + scale * np.sqrt(((finite - finite.mean()) ** 2).mean()) * noise).astype(np.float32)


@MASKS
@pytest.mark.parametrize("tail", STAGES)
def test_noise_is_seeded_by_hook_and_seed(tail: str, options: dict[str, Any]) -> None:
    MODEL.set_use_attn_result(tail == "attn.hook_result")
    sites = places(tail)
    _, cache = MODEL.run_with_cache(CORRUPTED, **options)
    for source, scale, seed in (("noise", 3.0, 0), (Noise(0.5, seed=4), 0.5, 4)):
        values = {hook: noised(hook, cache[hook], scale, seed) for hook in {site.hook for site in sites}}
        result = sweep(MODEL, CORRUPTED, sites, source, DIFFERENCE, verbose=False, **options)
        agrees(result, loop(CORRUPTED, sites, values, DIFFERENCE, **options))
        again = sweep(MODEL, CORRUPTED, sites[::-1], source, DIFFERENCE, verbose=False, **options)
        agrees(again, result.values[::-1])
    other = sweep(MODEL, CORRUPTED, sites, Noise(0.5, seed=5), DIFFERENCE, verbose=False, **options)
    assert apart(other.values, result.values, other.baselines) > 1e-3


@pytest.mark.parametrize("tail", ["attn.hook_attn_scores", "attn.hook_pattern"])
@pytest.mark.parametrize("source", ["noise", "zero", "mean"])
def test_no_source_looks_ahead(tail: str, source: str) -> None:
    """What is read at a position does not change with the tokens after it, whatever is put into the attention there."""
    later = CORRUPTED.copy()
    later[:, 5:] = CLEAN[:, 5:]
    # With the last position read too, everything up to there is computed, and could be looked at.
    metrics = [LogitDiff(5, 9, position=place, reduction="none") for place in (4, 6)]
    sites = [Site(at(tail, layer), position=place) for layer in range(4) for place in (None, [2, 4])]
    one, two = (
        # The noise's size is that of the whole activation, so here it is taken from one of the two.
        sweep(MODEL, tokens, sites, _Fixed(CORRUPTED, source), metrics, verbose=False).sel(metric=0)
        for tokens in (CORRUPTED, later)
    )
    assert apart(one.values, two.values, one.baselines) <= 1e-5
    assert apart(one.values, np.broadcast_to(one.baselines["corrupted"], one.shape), one.baselines) > 1e-3


class _Fixed:
    """A source of one's own: what another makes of some tokens' run."""

    def __init__(self, tokens: Any, source: str) -> None:
        self._cache = MODEL.run_with_cache(tokens)[1]
        self._source = {"noise": Noise(), "zero": Zero(), "mean": Mean()}[source]

    def value(self, hook: str, corrupted: Any, mask: Any) -> Any:
        return self._source.value(hook, self._cache[hook], mask)


def test_a_source_of_ones_own() -> None:
    class Twice:
        def value(self, hook: str, corrupted: Any, mask: Any) -> Any:
            return corrupted * 2

    result = sweep(MODEL, CORRUPTED, SOME[:10], Twice(), DIFFERENCE, verbose=False)
    expected = [
        DIFFERENCE(MODEL.run_with_interventions(CORRUPTED, Scale(s.hook, 2, heads=s.head, positions=s.position)))
        for s in SOME[:10]
    ]
    agrees(result, np.asarray(expected))


# Saving, and going on


class Counted:
    """A metric that counts its calls, and is interrupted at one of them."""

    __name__ = "counted"

    def __init__(self, stop: int | None = None) -> None:
        self.calls, self.stop = 0, stop

    def __call__(self, logits: Any) -> float:
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        return float(logits[0, -1, 5] - logits[1, -1, 9])


BASELINES = 2  # calls of a metric for the baselines, clean and corrupted
ONE_BY_ONE: dict[str, Any] = {"max_batch_tokens": 1, "verbose": False}


@pytest.mark.parametrize("name", ["sweep", "sweep.json", "sweep.v2", "gpt2-0.5"])
@pytest.mark.parametrize("recompute", [True, False])
def test_an_interrupted_sweep_goes_on(name: str, recompute: bool, clean: Mapping[str, Any], tmp_path: Path) -> None:
    options = {**ONE_BY_ONE, "recompute": recompute}
    whole = sweep(MODEL, CORRUPTED, SOME, clean, Counted(), save_to=tmp_path / "whole", **options)
    path, first = tmp_path / name, Counted(stop=BASELINES + 6)
    with pytest.raises(KeyboardInterrupt):
        sweep(MODEL, CORRUPTED, SOME, clean, first, save_to=path, **options)
    held = SweepResult.load(path)
    done = ~np.isnan(held.values)
    assert done.sum() == 5
    np.testing.assert_array_equal(held.values[done], whole.values[done])
    assert (held.labels, held.baselines) == (whole.labels, whole.baselines)
    rest = Counted()
    result = sweep(MODEL, CORRUPTED, SOME, clean, rest, save_to=path, resume=True, **options)
    assert rest.calls == BASELINES + len(SOME) - 5
    assert result == whole
    assert SweepResult.load(path) == whole
    nothing = Counted()
    assert sweep(MODEL, CORRUPTED, SOME, clean, nothing, save_to=path, resume=True, **options) == whole
    assert nothing.calls == 0


def test_going_on_with_several_metrics(clean: Mapping[str, Any], tmp_path: Path) -> None:
    sites = grid("z", ("layer", "head"), {"layer": range(4), "head": range(4)})
    options = {**ONE_BY_ONE, "save_to": tmp_path / "sweep"}

    def metrics(stop: int | None = None) -> dict[str, Any]:
        return {"difference": DIFFERENCE, "counted": Counted(stop), "loss": METRICS["loss"]}

    with pytest.raises(KeyboardInterrupt):
        sweep(MODEL, CORRUPTED, sites, clean, metrics(BASELINES + 8), **options)
    held = SweepResult.load(tmp_path / "sweep")
    assert (np.isnan(held.values).sum((1, 2)) == 16 - 7).all()
    result = sweep(MODEL, CORRUPTED, sites, clean, metrics(), resume=True, **options)
    expected = loop(CORRUPTED, sites.sites, clean, list(metrics().values()))
    agrees(result, expected.reshape(3, 4, 4))


def test_going_on_with_a_value_for_each_prompt(clean: Mapping[str, Any], tmp_path: Path) -> None:
    metric, path = METRICS["positions"], tmp_path / "sweep"
    whole = sweep(MODEL, CORRUPTED, SOME, clean, metric, save_to=path, verbose=False)
    values = whole.values.copy()
    values[[1, 4]] = np.nan
    SweepResult(values, whole.axes, whole.labels, whole.baselines, whole.metadata).save(path)
    agrees(sweep(MODEL, CORRUPTED, SOME, clean, metric, save_to=path, resume=True, verbose=False), whole.values)
    assert not np.isnan(SweepResult.load(path).values).any()


def test_it_is_saved_on_the_way(clean: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "_SAVE_EVERY", -1.0)
    done = []

    class Watching(Counted):
        def __call__(self, logits: Any) -> float:
            if (tmp_path / "sweep.json").exists():
                done.append(int((~np.isnan(SweepResult.load(tmp_path / "sweep").values)).sum()))
            return super().__call__(logits)

    sweep(MODEL, CORRUPTED, SOME[:5], clean, Watching(), save_to=tmp_path / "sweep", **ONE_BY_ONE)
    assert done == [1, 2, 3, 4]


def test_without_resume_a_sweep_starts_anew(clean: Mapping[str, Any], tmp_path: Path) -> None:
    for _ in range(2):
        counted = Counted()
        sweep(MODEL, CORRUPTED, SOME, clean, counted, save_to=tmp_path / "sweep", verbose=False)
        assert counted.calls == BASELINES + len(SOME)
    counted = Counted()
    sweep(MODEL, CORRUPTED, SOME, clean, counted, save_to=tmp_path / "new", resume=True, verbose=False)
    assert counted.calls == BASELINES + len(SOME)  # there is nothing to go on from yet


@pytest.mark.parametrize(
    "other",
    [
        {"corrupted_tokens": CLEAN},
        {"sites": SOME[1:]},
        {"sites": [*SOME[:-1], Site("attn_scores", 3, position=slice(1, None))]},
        {"metric": LogitDiff([5, 17, 200], [9, 300, 5])},
        {"metric": [DIFFERENCE]},
        {"metric": KLDivergence(MODEL(CLEAN))},
        {"source": "mean"},
        {"attention_mask": PADDING},
    ],
    ids=lambda other: "-".join(other),
)
def test_going_on_with_another_sweep_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    asked: dict[str, Any] = {
        **{"corrupted_tokens": CORRUPTED, "sites": SOME, "source": "zero", "metric": DIFFERENCE},
        **{"save_to": tmp_path / "sweep", "resume": True, "verbose": False},
    }
    first = sweep(MODEL, **asked)
    with pytest.raises(InputError) as error:
        sweep(MODEL, **{**asked, **other})
    assert f"{tmp_path / 'sweep'} holds another sweep" in str(error.value)
    assert SweepResult.load(tmp_path / "sweep") == first


def test_going_on_with_another_long_mask_is_refused(tmp_path: Path) -> None:
    """NumPy prints no more than a few of a thousand numbers: what is compared must not be its text."""
    tokens = np.random.default_rng(2).integers(0, CFG.d_vocab, (11, 100))
    masks = [np.ones((11, 100), int) for _ in range(2)]
    masks[1][5, :50] = 0
    asked: dict[str, Any] = {"metric": LogitDiff(5, 9), "save_to": tmp_path / "sweep", "verbose": False}
    sites = [Site("resid_post", 3, position=-1)]
    sweep(MODEL, tokens, sites, "zero", **asked, attention_mask=masks[0])
    with pytest.raises(InputError, match="holds another sweep"):
        sweep(MODEL, tokens, sites, "zero", **asked, attention_mask=masks[1], resume=True)


def test_going_on_with_another_model_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    sweep(MODEL, CORRUPTED, SOME, "zero", DIFFERENCE, save_to=tmp_path / "sweep", verbose=False)
    folder = graphlens.process_weights(tiny_folder, tmp_path / "processed")
    other = HookedTransformer.from_onnx(folder, "cpu")
    with pytest.raises(InputError, match="holds another sweep"):
        sweep(other, CORRUPTED, SOME, "zero", DIFFERENCE, save_to=tmp_path / "sweep", resume=True, verbose=False)


def test_going_on_under_other_edits_is_refused(tmp_path: Path) -> None:
    """Half of the values would be those of another model."""
    asked: dict[str, Any] = {"save_to": tmp_path / "sweep", "verbose": False}
    with MODEL.intervene(Scale("blocks.1.hook_mlp_out", 0.5)):
        sweep(MODEL, CORRUPTED, FEW, "zero", DIFFERENCE, **asked)
    with pytest.raises(InputError, match="holds another sweep"):
        sweep(MODEL, CORRUPTED, FEW, "zero", DIFFERENCE, resume=True, **asked)


def test_where_nothing_can_be_saved_nothing_is_computed(tmp_path: Path) -> None:
    counted = Counted()
    said = refused(metric=counted, save_to=tmp_path / "missing" / "sweep")
    assert str(tmp_path / "missing") in said
    assert counted.calls == 0


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


# Bad input


def refused(kind: type[Exception] = InputError, **changes: Any) -> str:
    """The message with which a sweep refuses to start, or ends."""
    asked: dict[str, Any] = {
        **{"corrupted_tokens": CORRUPTED, "sites": SOME, "source": "zero", "metric": DIFFERENCE, "verbose": False},
        **changes,
    }
    with pytest.raises(kind) as error:
        sweep(MODEL, **asked)
    return str(error.value)


@pytest.mark.parametrize("length", [1, 6, 8])
def test_clean_and_corrupted_of_different_lengths(length: int) -> None:
    _, cache = MODEL.run_with_cache(np.ones((3, length), int))
    for hook, shapes in (
        ("blocks.0.hook_resid_pre", (f"[3, {length}, 128]", "[3, 7, 128]")),
        ("blocks.1.attn.hook_pattern", (f"[3, 4, {length}, {length}]", "[3, 4, 7, 7]")),
    ):
        said = refused(source=cache, sites=[Site(hook)])
        assert f"{hook!r} has shape {shapes[0]} in the clean cache and {shapes[1]} in the corrupted run" in said
        assert "same number of tokens" in said


def test_clean_and_corrupted_of_different_batches(clean: Mapping[str, Any]) -> None:
    said = refused(source={name: array[:2] for name, array in clean.items()})
    assert "[2, 7, 128] in the clean cache and [3, 7, 128] in the corrupted run" in said


@pytest.mark.parametrize("kind", ["cache", "dict"])
def test_a_cache_without_what_is_patched(kind: str) -> None:
    _, cache = MODEL.run_with_cache(CLEAN, names_filter=lambda name: not name.endswith("blocks.3.attn.hook_z"))
    said = refused(UnknownHookPoint, source=cache if kind == "cache" else dict(cache))
    assert "blocks.3.attn.hook_z" in said
    assert "clean cache" in said
    assert "names_filter" in said


def test_a_cache_of_other_weight_processing(tiny_folder: Path, tmp_path: Path) -> None:
    folder = graphlens.process_weights(tiny_folder, tmp_path / "processed")
    _, cache = HookedTransformer.from_onnx(folder, "cpu").run_with_cache(CLEAN)
    said = refused(source=cache)
    assert "fold_ln" in said
    assert "than this one (none)" in said


def returned(value: Any) -> Callable[[Any], Any]:
    return lambda logits: value


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        (lambda logits: logits[:, -1, 5], "the metric returned ndarray of shape [3]; it must return one number"),
        (returned("large"), "the metric returned str"),
        (returned(None), "the metric returned NoneType"),
        (returned([1.0, 2.0]), "the metric returned list of shape [2]"),
        (returned(1j), "one number"),
        (returned(float("nan")), "the metric '<lambda>' is NaN"),
        (lambda logits: np.nan if logits[0, -1, 0] != MODEL(CORRUPTED)[0, -1, 0] else 1.0, "the metric '<lambda>' is NaN"),
        ([], "metric is one of graphlens.metrics"),
        (["logits"], "metric is one of graphlens.metrics"),
        ({"one": 3}, "metric is one of graphlens.metrics"),
        ([DIFFERENCE, METRICS["positions"]], "reduction='none'"),
        ([METRICS["positions"], entropy], "reduction='none'"),
        (LogitDiff(5, 9, position=7), "LogitDiff.position is 7: prompts of 7 tokens have positions 0 to 6"),
        (LogitDiff(5, 9, position=[0, 1]), "LogitDiff.position is of 2 prompts; there are 3"),
        (LogitDiff(5, CFG.d_vocab), f"LogitDiff.incorrect is {CFG.d_vocab}: token ids go from 0 to {CFG.d_vocab - 1}"),
        (LogitDiff([1, 2], 3), "LogitDiff.correct is of 2 prompts; there are 3"),
        (LogitDiff(" Mary and", " John"), "' Mary and'"),
        (KLDivergence(np.zeros((3, 6, CFG.d_vocab))), "KLDivergence.reference has 6 positions; there are 7"),
        (CrossEntropy(CORRUPTED[:, 1:], position=None), "CrossEntropy.target has 6 tokens a prompt"),
        (normalised(DIFFERENCE), "lacks a baseline: pass clean and corrupted"),
    ],
)  # fmt: skip
def test_metrics_that_do_not_fit(metric: Any, says: str) -> None:
    assert says in refused(metric=metric)


def test_a_metric_that_is_nan_at_a_site_names_it(clean: Mapping[str, Any]) -> None:
    broken = {**clean, "blocks.2.attn.hook_z": np.full_like(clean["blocks.2.attn.hook_z"], np.nan)}
    for metric in (DIFFERENCE, Probability(3), METRICS["loss"]):
        said = refused(source=broken, metric=metric, max_batch_tokens=4096)
        assert "is NaN at blocks.2.attn.hook_z[head 2]" in said
        assert metric.name in said
    assert "the metric 'entropy' is NaN" in refused(source=broken, metric=entropy)


def test_nothing_to_normalise_by() -> None:
    _, cache = MODEL.run_with_cache(CORRUPTED)
    assert "the same on a clean and its corrupted prompt" in refused(source=cache, metric=normalised(DIFFERENCE))


@pytest.mark.parametrize(
    ("sites", "kind", "says"),
    [
        ([], InputError, "the list of sites is empty"),
        (["blocks.0.hook_resid_pre"], InputError, "a sweep takes Site(hook, ...), not str"),
        ([Patch("blocks.0.hook_resid_pre", 0.0)], InputError, "a sweep takes Site(hook, ...), not Patch"),
        ([Site("z", 9)], UnknownHookPoint, "4 layers (0-3). Nearest: 'blocks.3.attn.hook_z'"),
        ([Site("z", 1, head=4)], InputError, "'blocks.1.attn.hook_z': heads=4: there is no 4; head_index has 4 (0-3)"),
        ([Site("z", 1, head=[0, -5])], InputError, "there is no -5"),
        ([Site("z", 1, position=7)], InputError, "'blocks.1.attn.hook_z': positions=7: there is no 7; pos has 7 (0-6)"),
        ([Site("blocks.1.ln1.hook_scale", position=7)], InputError, "there is no 7; pos has 7 (0-6)"),
        ([Site("z", 1, dims=32)], InputError, "dims=32: there is no 32; d_head has 32 (0-31)"),
        ([Site("blocks.1.mlp.hook_post", dims=512)], InputError, "dims=512: there is no 512; d_mlp has 512 (0-511)"),
        ([Site("pattern", 1, dims=7)], InputError, "dims=7: there is no 7; key_pos has 7 (0-6)"),
        ([Site("resid_pre", 1, head=0)], InputError, "'blocks.1.hook_resid_pre': it has no heads"),
        ([Site("z", 0), Site("blocks.1.attn.hook_zz")], UnknownHookPoint, "'blocks.1.attn.hook_z'"),
        ([Site("result", 1)], UnknownHookPoint, "use_attn_result"),
    ],
    ids=lambda value: "" if not isinstance(value, str) else value[:30],
)
def test_places_that_there_are_not(sites: list[Any], kind: type[Exception], says: str) -> None:
    assert says in refused(kind, sites=sites)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"source": "random"}, "source 'random': there is 'zero', 'mean', 'noise', or a cache"),
        ({"source": 3}, "not int"),
        ({"source": None}, "not NoneType"),
        ({"max_batch_tokens": 0}, "max_batch_tokens=0: it must be at least 1"),
        ({"max_batch_tokens": -4}, "max_batch_tokens=-4"),
        ({"resume": True}, "resume=True needs save_to="),
        ({"stop_at_layer": 2}, "a sweep runs whole prompts"),
        ({"attention_mask": np.ones((3, 6), int)}, "attention_mask has shape [3, 6]; the tokens have [3, 7]"),
        ({"corrupted_tokens": np.full((1, 4), CFG.d_vocab)}, str(CFG.d_vocab)),
    ],
)
def test_other_things_that_do_not_fit(changes: dict[str, Any], says: str) -> None:
    assert says in refused(**changes)


@pytest.mark.parametrize("tokens", [1.5, "64", None])
def test_a_number_of_tokens_that_is_none(tokens: Any) -> None:
    assert f"max_batch_tokens={tokens!r}" in refused(max_batch_tokens=tokens)


def test_what_is_refused_leaves_no_file(tmp_path: Path) -> None:
    refused(sites=[Site("z", 9)], kind=UnknownHookPoint, save_to=tmp_path / "sweep")
    refused(metric=returned("x"), save_to=tmp_path / "sweep")
    assert not list(tmp_path.iterdir())
