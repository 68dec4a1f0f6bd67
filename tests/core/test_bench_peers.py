"""The benchmark tool's side by side: prompts, cells, comparison of results, the floor's loop, and a worker's protocol."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import numpy as np
import pytest

import graphlens
from graphlens import Patch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # tools is no part of the package

from tools.bench import harvest_loop, peers, sweep_rows, sweeps  # noqa: E402
from tools.bench.environments import Environment  # noqa: E402
from tools.bench.workers.protocol import Job  # noqa: E402

LENGTH = 5


@pytest.mark.parametrize("batch", [1, 8])
def test_prompts_share_their_first_token_alone(batch: int) -> None:
    prompts = sweeps.random_prompts(101, batch)
    for tokens in (prompts.clean, prompts.corrupted):
        assert tokens.shape == (batch, 15)
        assert tokens.min() == 0
        assert tokens.max() < 101
    assert (prompts.clean[:, 0] == prompts.corrupted[:, 0]).all()
    assert (prompts.clean[:, 1:] != prompts.corrupted[:, 1:]).all()
    assert prompts.answers[0] != prompts.answers[1]


def test_prompts_are_the_same_every_time() -> None:
    one, two = sweeps.random_prompts(101, 3), sweeps.random_prompts(101, 3)
    assert np.array_equal(one.clean, two.clean)
    assert np.array_equal(one.corrupted, two.corrupted)
    assert one.answers == two.answers


@pytest.mark.parametrize(
    ("layers", "share", "expected"),
    [(12, None, None), (12, 12, None), (4, 9, None), (12, 2, [0, 11]), (12, 3, [0, 6, 11]), (5, 1, [2])],
)
def test_even_layers(layers: int, share: int | None, expected: list[int] | None) -> None:
    assert sweeps.even_layers(layers, share) == expected


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("resid_pre", (3, 7)),
        ("attn_head_out_all_pos", (3, 5)),
        ("attn_head_out_by_pos", (3, 7, 5)),
        ("attn_head_pattern_all_pos", (3, 5)),
    ],
)
def test_shapes(kind: str, shape: tuple[int, ...]) -> None:
    assert sweeps.KINDS[kind].shape(3, 7, 5) == shape


def _patch(kind: sweeps.Kind, layer: int, cell: tuple[int, ...], clean: np.ndarray) -> Patch:
    """The same patch as an intervention."""
    chosen = dict(zip(kind.axes, cell, strict=True))
    heads, position = chosen.get("head", chosen.get("head_index")), chosen.get("pos")
    part = clean if heads is None else clean.take(heads, 1 if "pattern" in kind.hook else 2)
    part = part if position is None else part[:, position]  # no pattern is patched by position here
    return Patch(kind.hook_name(layer), part, heads=heads, positions=position)


@pytest.mark.parametrize("name", sweeps.KINDS)
def test_floor_loop_is_one_intervention_for_each_patch(
    name: str, tiny: graphlens.HookedTransformer, tiny_folder: Path, tmp_path: Path
) -> None:
    kind = sweeps.KINDS[name]
    prompts = sweeps.random_prompts(tiny.cfg.d_vocab, 2, LENGTH)
    sweeps.write_gated(str(tiny_folder), str(tmp_path / "gated"), f"blocks.*.{kind.hook}", "patch")
    session = sweeps.open_bare(tmp_path / "gated")
    assert [output.name for output in session.get_outputs()] == ["logits"]
    clean = sweeps.clean_activations(tiny_folder, kind, prompts.clean)
    _, cache = tiny.run_with_cache(prompts.clean)
    for layer, array in enumerate(clean):
        np.testing.assert_allclose(array, cache[kind.hook_name(layer)], atol=1e-5)

    layers = [0, tiny.cfg.n_layers - 1]
    found = sweeps.floor_loop(session, kind, prompts.corrupted, clean, prompts.answers, layers)
    assert found.shape == (2, *kind.shape(tiny.cfg.n_layers, LENGTH, tiny.cfg.n_heads)[1:])
    plain = sweeps.unpatched(session, prompts.corrupted, prompts.answers)
    assert plain == pytest.approx(sweeps.logit_difference(tiny(prompts.corrupted), prompts.answers), abs=1e-4)
    assert np.abs(found - plain).max() > 1e-3  # patches do something
    for row, layer in enumerate(layers):
        for cell in product(*map(range, found.shape[1:])):
            logits = tiny.run_with_interventions(prompts.corrupted, _patch(kind, layer, cell, clean[layer]))
            assert found[(row, *cell)] == pytest.approx(sweeps.logit_difference(logits, prompts.answers), abs=1e-4)


def test_floor_loop_sweeps_every_layer_unless_told(tiny_folder: Path, tmp_path: Path) -> None:
    kind = sweeps.KINDS["attn_head_out_all_pos"]
    prompts = sweeps.random_prompts(101, 1, 3)
    sweeps.write_gated(str(tiny_folder), str(tmp_path / "gated"), f"blocks.*.{kind.hook}", "patch")
    session = sweeps.open_bare(tmp_path / "gated")
    clean = sweeps.clean_activations(tiny_folder, kind, prompts.clean)
    whole = sweeps.floor_loop(session, kind, prompts.corrupted, clean, prompts.answers)
    part = sweeps.floor_loop(session, kind, prompts.corrupted, clean, prompts.answers, [2])
    assert len(whole) == len(clean)
    np.testing.assert_allclose(part, whole[2:3], atol=1e-6)


def test_agreement() -> None:
    same = {"a": {"logits": [1.0, -2.0]}, "b": {"logits": [1.001, -2.0]}}
    assert len(peers.agreement(same)) == 1
    for other in ({"logits": [1.1, -2.0]}, {"logits": [1.0]}, {"other": [1.0, -2.0]}, {"logits": [float("nan"), -2.0]}):
        with pytest.raises(peers.Disagreement):
            peers.agreement({"a": same["a"], "b": other})


def test_sweep_agreement_of_some_layers() -> None:
    reference = np.linspace(1, 2, 12).reshape(4, 3)
    assert sweep_rows.sweep_agreement({"a": {"values": reference}, "b": {"values": reference[[0, 3]]}})
    with pytest.raises(peers.Disagreement):
        sweep_rows.sweep_agreement({"a": {"values": reference}, "b": {"values": reference[[0, 2]]}})


def test_sweep_agreement_sees_a_patch_that_was_not_applied() -> None:
    reference = 100 + np.linspace(0, 0.05, 12).reshape(4, 3)
    with pytest.raises(peers.Disagreement):
        sweep_rows.sweep_agreement({"a": {"values": reference}, "b": {"values": np.full((4, 3), 100.0)}})


def test_a_worker_measures_on_demand(tiny_folder: Path, tmp_path: Path) -> None:
    job = Job("forward", str(tiny_folder), files=[str(tiny_folder)], tokens=[[0, 5, 7]])
    found = peers.compare({peers.FLOOR: job}, 2, tmp_path, warmup=0)
    (times,) = found.times.values()
    assert len(times) == 2
    assert min(times) > 0
    assert found.peaks[peers.FLOOR.name] >= found.first_peaks[peers.FLOOR.name] > 0
    assert len(found.checks[peers.FLOOR.name]["logits"]) == 8


def test_a_harvest_is_measured_at_every_batch_size(tiny_folder: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 101, (11, 6))
    job = Job("harvest", "", str(tiny_folder), [str(tmp_path / "work")], tokens=ids.tolist())
    model = graphlens.HookedTransformer.from_onnx(tiny_folder)
    _, cache = model.run_with_cache(ids)
    with ExitStack() as stack:
        workers, _ = peers.start({peers.OURS: job}, tmp_path, stack)
        worker = workers[peers.OURS.name]
        for label, (names, stop) in harvest_loop.wanted(model.cfg.n_layers).items():
            for batch in harvest_loop.BATCHES:
                at = harvest_loop.label_of(label, batch)
                assert worker.measure(at) > 0
                for name in names:
                    assert stop is None or name == f"blocks.{stop - 1}.hook_resid_post"
                    found = worker.check[f"{at}: {name}"]
                    np.testing.assert_allclose(found, cache[name][-1, -1, :8], rtol=2e-3, atol=1e-3)
    assert not peers.LENS_9.can("harvest")


def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    job = Job("forward", str(tmp_path), files=[str(tmp_path)], tokens=[[0]])
    with pytest.raises(RuntimeError, match=r"plain ONNX Runtime failed:[\s\S]*model\.onnx"):
        peers.compare({peers.FLOOR: job}, 1, tmp_path)


def test_who_cannot_take_part_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    job = Job("forward", str(tiny_folder), files=[str(tiny_folder)], tokens=[[0, 5, 7]])
    idle = peers.Peer("idle", None, "bare", ())
    absent = peers.Peer("absent", Environment("none", ("no such requirement !",)), "bare", ("forward",))
    (tmp_path / "none" / "bin").mkdir(parents=True)
    (tmp_path / "none" / "bin" / "python").symlink_to(sys.executable)
    found = peers.compare({peers.FLOOR: job, idle: job, absent: job}, 1, tmp_path, warmup=0)
    assert list(found.times) == [peers.FLOOR.name]
    assert found.notes[0] == "idle NOT MEASURED: it has no forward."
    assert found.notes[1].startswith("absent NOT MEASURED: none: -m pip install")
