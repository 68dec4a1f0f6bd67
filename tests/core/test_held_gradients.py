"""Gradients that take hook points for constants: those of a run in which the same values are patched in."""

from __future__ import annotations

import numpy as np
import pytest

import graphlens
from graphlens import LogitDiff, Patch, surgery
from graphlens.engine.plan import Plan
from graphlens.file.io_names import SEED, SEED_POSITIONS, SEED_TOKENS, SPARSE, gradient_output
from tests.models import MODEL

WRT = ("blocks.0.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.2.attn.hook_v")
HELD = tuple(name for name in MODEL.hook_dict if name.endswith(("hook_pattern", "hook_scale")))
PROMPT = "When John and Mary went to the store"


def plan(held: tuple[str, ...]) -> Plan:
    return Plan(gradients=WRT, seed=SPARSE, held=held)


def gradients(held: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Of the difference of two logits at the last position."""
    tokens = np.asarray(MODEL.to_tokens(PROMPT))
    ids = np.asarray([[[MODEL.to_single_token(" Mary"), MODEL.to_single_token(" John")]]])
    places = np.asarray([[tokens.shape[1] - 1]])
    feeds = {
        "input_ids": tokens,
        SEED: np.asarray([[[1.0, -1.0]]], np.float32),
        SEED_POSITIONS: places,
        SEED_TOKENS: ids,
    }
    return dict(MODEL.runner.engine.run(feeds, [gradient_output(name) for name in WRT], plan=plan(held)).values)


def test_what_is_held_is_as_if_it_were_patched_in() -> None:
    assert len(HELD) == 4 * 3 + 1
    _, cache = MODEL.run_with_cache(PROMPT, names_filter=list(HELD))
    with MODEL.intervene([Patch(name, np.asarray(cache[name])) for name in HELD]):
        expected = MODEL.gradients(PROMPT, LogitDiff(" Mary", " John"), list(WRT))
    found, plain = gradients(HELD), gradients(())
    for name in WRT:
        key = gradient_output(name)
        largest = np.abs(expected[name]).max()
        assert np.abs(found[key] - expected[name]).max() <= 1e-5 * largest
        assert np.abs(plain[key] - expected[name]).max() > 1e-2 * largest  # it does make a difference


def test_a_piece_of_the_backward_pass_alone_gives_the_same_for_many_seeds() -> None:
    of = "blocks.2.hook_resid_pre"
    wrt = ("blocks.0.hook_resid_pre", "blocks.1.attn.hook_z")
    made = Plan(gradients=wrt, of=of, held=(*HELD, *(f"blocks.{k}.hook_mlp_out" for k in range(4))))
    piece = MODEL.runner.engine.part([SEED], [gradient_output(name) for name in wrt], HELD, made)
    tokens = np.asarray(MODEL.to_tokens(PROMPT))
    _, cache = MODEL.run_with_cache(tokens, names_filter=list(HELD))
    seeds = np.random.default_rng(0).standard_normal((3, tokens.shape[1], MODEL.cfg.d_model)).astype(np.float32)
    assert "input_ids" not in piece.inputs
    assert not any("mlp" in name or name.startswith("blocks.2") for name in piece.inputs)
    feeds = {name: np.asarray(cache[name]) for name in piece.inputs if name != SEED}
    found = piece.run(piece.outputs, {SEED: seeds, **feeds})
    for row, seed in enumerate(seeds):
        whole = MODEL.runner.engine.run({"input_ids": tokens, SEED: seed[None]}, piece.outputs, output=False, plan=made)
        for name, array in zip(piece.outputs, found, strict=True):
            expected = whole.values[name][0]
            assert np.abs(array[row] - expected).max() <= 1e-5 * np.abs(expected).max()
            assert np.abs(expected).max() > 0


def test_a_held_hook_point_that_is_not_there_is_named() -> None:
    model = surgery.load(graphlens.embedded_model() / "model.onnx")
    with pytest.raises(graphlens.UnknownHookPoint, match=r"blocks.9.attn.hook_pattern"):
        surgery.differentiate(model, ["blocks.0.hook_resid_pre"], held=["blocks.9.attn.hook_pattern"])
