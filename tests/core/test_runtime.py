"""Sessions: who shares one, when it goes, and that what it gave and was given stays as it was."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path

import numpy as np

from graphlens import HookedTransformer
from graphlens.engine.plan import Plan

CPU = "CPUExecutionProvider"
PRE = "blocks.1.hook_resid_pre"


def assert_near(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())


def test_opening_a_file_twice_shares_one_session(tiny_copy: Path, tokens: np.ndarray) -> None:
    model = HookedTransformer.from_onnx(tiny_copy, "cpu")
    (tiny_copy.parent / "link").symlink_to(tiny_copy)
    places = [tiny_copy, tiny_copy / "model.onnx", tiny_copy.parent / "link", os.path.relpath(tiny_copy)]
    for place in places:
        other = HookedTransformer.from_onnx(place, "cpu")
        assert other.runner.engine.session(Plan()) is model.runner.engine.session(Plan())
        assert other.runner.engine.session(Plan(python=True)) is model.runner.engine.session(Plan(python=True))
    assert HookedTransformer.from_onnx(tiny_copy, [CPU]).runner.engine.session(
        Plan()
    ) is not model.runner.engine.session(Plan())


def test_a_file_that_changed_gets_a_session_of_its_own(tiny_copy: Path, tokens: np.ndarray) -> None:
    model = HookedTransformer.from_onnx(tiny_copy, "cpu")
    before = model(tokens)
    data = (tiny_copy / "model.onnx").read_bytes()
    (tiny_copy / "new.onnx").write_bytes(data)
    os.replace(tiny_copy / "new.onnx", tiny_copy / "model.onnx")
    other = HookedTransformer.from_onnx(tiny_copy, "cpu")
    assert other.runner.engine.session(Plan()) is not model.runner.engine.session(Plan())
    np.testing.assert_array_equal(other(tokens), before)


def test_a_session_goes_with_the_last_model_that_uses_it(tiny_copy: Path, tokens: np.ndarray) -> None:
    model, other = (HookedTransformer.from_onnx(tiny_copy, "cpu") for _ in range(2))
    for opened in (model, other):
        opened.run_with_hooks(tokens, fwd_hooks=[(PRE, lambda x, hook: x)])
        opened(tokens)
    sessions = [
        weakref.ref(model.runner.engine.session(Plan())),
        weakref.ref(model.runner.engine.session(Plan(python=True))),
    ]
    del model, opened
    gc.collect()
    assert all(session() is not None for session in sessions)
    del other
    gc.collect()
    assert all(session() is None for session in sessions)


def test_arrays_already_fetched_are_not_touched_by_later_runs(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    hooks = [(PRE, lambda x, hook: x * 2)]
    logits, cache = tiny.run_with_cache(tokens)
    hooked = tiny.run_with_hooks(tokens, fwd_hooks=hooks)
    kept = {name: value.copy() for name, value in cache.items()}
    kept_logits, kept_hooked = logits.copy(), hooked.copy()
    for seed in range(10, 15):
        others = np.random.default_rng(seed).integers(0, tiny.cfg.d_vocab, tokens.shape)
        other_logits, _ = tiny.run_with_cache(others)
        tiny.run_with_hooks(others, fwd_hooks=hooks)
        assert not np.array_equal(other_logits, kept_logits)
    np.testing.assert_array_equal(logits, kept_logits)
    np.testing.assert_array_equal(hooked, kept_hooked)
    for name, value in cache.items():
        np.testing.assert_array_equal(value, kept[name], name)


def test_fetched_arrays_outlive_their_model(tiny_copy: Path, tokens: np.ndarray) -> None:
    model = HookedTransformer.from_onnx(tiny_copy, "cpu")
    logits = model(tokens)
    kept = logits.copy()
    del model
    gc.collect()
    np.testing.assert_array_equal(logits, kept)


def test_changing_a_fetched_array_changes_no_later_run(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    logits, cache = tiny.run_with_cache(tokens)
    kept = {name: value.copy() for name, value in cache.items()}
    for value in cache.values():
        value[...] = np.nan
    logits[...] = np.nan
    for name, value in tiny.run_with_cache(tokens)[1].items():
        np.testing.assert_array_equal(value, kept[name], name)


def test_each_prompt_of_a_batch_is_run_as_if_alone(tiny: HookedTransformer) -> None:
    tokens = np.random.default_rng(3).integers(0, tiny.cfg.d_vocab, (3, 9))
    logits, cache = tiny.run_with_cache(tokens)
    for row in range(3):
        alone, alone_cache = tiny.run_with_cache(tokens[row])
        assert_near(alone[0], logits[row])
        for name, value in alone_cache.items():
            masked = np.isneginf(value[0])
            assert_near(np.where(masked, 0, value[0]), np.where(masked, 0, cache[name][row % cache[name].shape[0]]))


def test_later_positions_change_nothing_before_them(tiny: HookedTransformer) -> None:
    tokens = np.random.default_rng(4).integers(0, tiny.cfg.d_vocab, (2, 12))
    logits = tiny(tokens)
    for length in (1, 2, 7):
        assert_near(tiny(tokens[:, :length]), logits[:, :length])


def test_strided_and_read_only_tokens_are_read_as_they_are(tiny: HookedTransformer) -> None:
    tokens = np.random.default_rng(5).integers(0, tiny.cfg.d_vocab, (6, 8))
    part = tokens[::-2, 1::3]
    assert not part.flags.c_contiguous
    expected = tiny(part.copy())
    part.setflags(write=False)
    np.testing.assert_array_equal(tiny(part), expected)
