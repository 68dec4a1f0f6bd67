"""Sessions that take turns do not multiply the threads of a machine with many cores."""

from __future__ import annotations

import gc
import os
import sys

import numpy as np
import pytest

import graphlens
from graphlens import HookedTransformer, LogitDiff, patching
from graphlens.engine.session_pool import LatelyUsed
from graphlens.runtime import threads
from tests.models import MODEL

TOKENS = np.random.default_rng(0).integers(0, 90, (1, 5))
counted = pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")


def running() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/task"))


def swept() -> tuple[HookedTransformer, np.ndarray]:
    """A model of its own after a sweep that opens many pieces, and what the sweep gave."""
    model = HookedTransformer.from_onnx(graphlens.embedded_model(), "cpu")
    _, clean = model.run_with_cache(TOKENS)
    metric = LogitDiff(3, 5)
    patching.get_act_patch_attn_head_all_pos_every(model, TOKENS + 1, clean, metric)
    return model, np.asarray(patching.get_act_patch_block_every(model, TOKENS + 1, clean, metric))


@counted
def test_on_64_cores_the_pieces_of_a_sweep_stay_within_their_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    _, expected = swept()
    gc.collect()
    monkeypatch.setattr(threads, "cores", lambda: 64)
    before = running()
    model, found = swept()
    each = threads.MOST_EACH - 1
    own = 2 * (os.cpu_count() or 1)  # of the session that runs whole, and of what Python itself starts
    assert running() - before > 2 * each, "the pieces have threads of their own"
    assert running() - before <= threads.MOST_IDLE + own
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)

    monkeypatch.setattr(threads, "MOST_IDLE", 8 * each)
    del model
    before = running()
    model, found = swept()
    assert running() - before <= 8 * each + own
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    del model


@counted
def test_a_session_that_takes_turns_asks_for_few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = HookedTransformer.from_onnx(graphlens.embedded_model(), "cpu").runner.engine
    monkeypatch.setattr(threads, "cores", lambda: 64)
    before = running()
    piece = engine.part(["blocks.1.hook_resid_mid"], ["blocks.1.hook_resid_post"])
    assert running() - before == threads.MOST_EACH - 1
    assert piece is engine.part(["blocks.1.hook_resid_mid"], ["blocks.1.hook_resid_post"])


@pytest.mark.parametrize(
    ("cores", "each", "sessions"), [(1, 0, 1024), (2, 0, 1024), (16, 0, 68), (17, 16, 68), (64, 16, 68)]
)
def test_the_bounds(cores: int, each: int, sessions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cores", lambda: cores)
    assert threads.of_each() == each
    assert threads.most_sessions() == sessions
    assert sessions * ((each or cores) - 1) <= threads.MOST_IDLE


def test_the_session_used_longest_ago_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "most_sessions", lambda: 2)
    kept, built = LatelyUsed(), list[str]()
    session = MODEL.runner.engine.part(["blocks.1.hook_resid_mid"], ["blocks.1.hook_resid_post"])

    def use(key: str) -> None:
        kept.get(key, lambda: (built.append(key), session)[1])

    for key in ("a", "b", "a", "c", "a", "b"):
        use(key)
    assert built == ["a", "b", "c", "b"]
