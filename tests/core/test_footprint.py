"""Runs whose activations come to more than the weights: how many bytes those are, and what such runs give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphlens import HookedTransformer, KeyValueCache, Steer
from graphlens.engine import engine
from graphlens.engine.footprint import Footprint
from graphlens.engine.plan import LOGITS, Plan
from graphlens.file.names import axis_sizes

FLAGS = ["use_attn_result", "use_split_qkv_input", "use_hook_mlp_in", "use_hook_tokens"]
Z = "blocks.1.attn.hook_z"


@pytest.mark.parametrize("flags", [[], FLAGS], ids=["plain", "flagged"])
def test_the_bytes_are_those_of_the_cached_values(flags: list[str], tiny_copy: Path) -> None:
    model = HookedTransformer.from_onnx(tiny_copy, "cpu")
    for flag in flags:
        getattr(model, f"set_{flag}")(True)
    entries = model.runner.engine.hooks(Plan(tuple(sorted(flags))))
    found = Footprint.of(
        [entry for entry in entries.values() if entry.value != LOGITS], axis_sizes(model.runner.engine.manifest.config)
    )
    for batch, pos in ((1, 5), (3, 2)):
        _, cache = model.run_with_cache(np.ones((batch, pos), np.int64))
        held = {entry.value: cache[name].nbytes for name, entry in entries.items() if name in cache}
        further = [entry.value for name, entry in entries.items() if name not in cache]  # ln1's, with split inputs
        assert len(further) == (2 * 2 * model.cfg.n_layers if flags else 0)
        scale, normalized = (cache[f"blocks.0.ln1.{name}"].nbytes for name in ("hook_scale", "hook_normalized"))
        expected = sum(bytes_ for value, bytes_ in held.items() if value != LOGITS)
        assert found.of_run(batch, pos, pos) == expected + len(further) // 2 * (scale + normalized)


@pytest.fixture
def heavy(tiny_copy: Path, tiny: HookedTransformer, monkeypatch: pytest.MonkeyPatch) -> HookedTransformer:
    """The embedded model, with sessions of its own, where activations of 3.5 MB are too much to be held for nothing.

    ``tiny``, which it is compared with, goes on holding everything.
    """
    monkeypatch.setattr(engine, "_SMALL", 0)
    monkeypatch.setattr(tiny.runner.engine._opener, "weights", 1 << 40)
    return HookedTransformer.from_onnx(tiny_copy, "cpu")


def test_heavy_runs_that_read_nothing_hold_nothing(heavy: HookedTransformer, tiny: HookedTransformer) -> None:
    short, long = np.ones((1, 4), np.int64), np.random.default_rng(0).integers(0, tiny.cfg.d_vocab, (4, 60))
    seen: list[tuple[str, bool]] = []

    def note(z: np.ndarray, hook: Any) -> np.ndarray:
        seen.append((hook.name, bool(z.any())))
        return z * np.float32(0.5)

    heavy(short)
    assert heavy.sessions == [Plan()]
    near(heavy(long), tiny(long))
    assert heavy.sessions == [Plan(), Plan(bare=True)]
    assert heavy.runner.engine.session(Plan(bare=True)).outputs == [LOGITS]
    near(heavy(long, return_type="loss"), tiny(long, return_type="loss"))
    near(heavy(long, stop_at_layer=2), tiny(long, stop_at_layer=2))
    near(heavy.run_with_cache(long, names_filter=Z)[1][Z], tiny.run_with_cache(long, names_filter=Z)[1][Z])
    assert heavy.runner.engine.sessions_built == 3  # reading takes the first one again
    near(heavy.run_with_hooks(long, fwd_hooks=[(Z, note)]), tiny.run_with_hooks(long, fwd_hooks=[(Z, note)]))
    assert seen == [(Z, True)] * 2
    assert heavy.sessions[-1] == Plan(python=True, bare=True)
    assert heavy.runner.engine.session(heavy.sessions[-1]).outputs == [LOGITS]


def test_heavy_runs_with_hooks_edits_and_a_cache_of_keys(heavy: HookedTransformer, tiny: HookedTransformer) -> None:
    """Everything that a plan may hold besides, with the whole prompt before and without any."""
    long = np.random.default_rng(0).integers(0, tiny.cfg.d_vocab, (4, 60))
    vector = np.random.default_rng(1).standard_normal(tiny.cfg.d_model)

    def run(model: HookedTransformer) -> list[np.ndarray]:
        past = KeyValueCache.init_cache(model.cfg, batch_size=4)
        found = [model(long[:, :40], past_kv_cache=past), model(long[:, 40:], past_kv_cache=past)]
        residual = model(long, stop_at_layer=1)
        with model.intervene(Steer("blocks.2.hook_resid_post", vector, positions=-1)):
            found.append(model(long))
            found.append(model.run_with_hooks(long, fwd_hooks=[(Z, lambda z, hook: z * np.float32(0.5))]))
            found.append(model(residual, start_at_layer=1))
        return found

    for mine, expected in zip(run(heavy), run(tiny), strict=True):
        near(mine, expected)
    assert any(plan.past and plan.bare for plan in heavy.sessions)
    assert any(plan.python and plan.gates and plan.bare for plan in heavy.sessions)


def near(found: Any, expected: Any) -> None:
    assert np.abs(found - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())
