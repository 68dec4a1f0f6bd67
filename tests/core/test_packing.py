"""Packed weights: sessions that share them compute the same, and a copy that is not right is not used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import graphlens
from graphlens import Ablate, HookedTransformer, Patch, Scale, Steer, surgery
from graphlens.engine import engine, packed_weights
from graphlens.engine.session_pool import SessionPool
from graphlens.errors import ExportError, InputError, ModelFileError
from graphlens.metrics import LogitDiff
from graphlens.patching import get_act_patch_resid_pre
from graphlens.pipelines.check import check_folder
from graphlens.runtime.sessions import Chain
from tests.command_line import graphlens as graphlens_command
from tests.command_line import sentence
from tests.intervention_specs import python_hooks


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own, in which the embedded model is large enough to be packed."""
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GRAPHLENS_PACKED_LIMIT", raising=False)
    monkeypatch.setattr(packed_weights, "LEAST", 0)
    return tmp_path / "cache" / "packed"


def forget_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is opened from here on is opened anew. Sessions of the other tests' models are known again afterwards."""
    monkeypatch.setattr(engine, "POOL", SessionPool())


def results(model: HookedTransformer, tokens: np.ndarray) -> list[np.ndarray]:
    """What every kind of session gives."""
    past = graphlens.KeyValueCache.init_cache(model.cfg, batch_size=len(tokens))
    found = [
        model(tokens),
        model.run_with_interventions(tokens, Ablate("blocks.1.attn.hook_z", heads=2)),
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: z * 0.5)]),
        model(tokens, stop_at_layer=2),
        model(tokens, past_kv_cache=past),
        model.generate(tokens, 4, do_sample=False, stop_at_eos=False, return_type="tokens", verbose=False),
    ]
    _, cache = model.run_with_cache(tokens)
    found.append(get_act_patch_resid_pre(model, tokens[:, ::-1], cache, LogitDiff(5, 7)))
    model.set_use_attn_result(True)
    found.append(model.run_with_interventions(tokens, Ablate("blocks.1.attn.hook_result", heads=2)))
    return found


def opened(tiny_copy: Path) -> HookedTransformer:
    return HookedTransformer.from_onnx(tiny_copy, "cpu")


def test_sessions_that_share_weights_compute_the_same(
    cache: Path, tiny_copy: Path, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphlens.engine import opener as opening

    monkeypatch.setenv("GRAPHLENS_PACKED_LIMIT", "0")
    expected = results(opened(tiny_copy), tokens)
    assert not cache.exists() or not list(cache.iterdir())
    forget_sessions(monkeypatch)
    monkeypatch.delenv("GRAPHLENS_PACKED_LIMIT")
    folders: list[Any] = []
    open_session = opening.open_session

    def noting(model: Any, providers: Any = None, folder: Any = None, *others: Any) -> Any:
        folders.append(folder)
        return open_session(model, providers, folder, *others)

    monkeypatch.setattr(opening, "open_session", noting)
    for again in range(2):
        model = opened(tiny_copy)
        for found, wanted in zip(results(model, tokens), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
        (folder,) = cache.iterdir()
        # The very first session is there before the copy is made; all others open over it.
        assert folders[1 if again == 0 else 0 :].count(folder) == len(folders) - (1 if again == 0 else 0)
        folders.clear()
        forget_sessions(monkeypatch)
    table = packed_weights.find(tiny_copy / "model.onnx")
    assert table is not None
    assert any(key.startswith("prepacked") for entries in table.weights.values() for key in entries)


EDITS: dict[str, list[Any]] = {
    "in a block": [Ablate("blocks.1.attn.hook_z", heads=2)],
    "before the unembedding": [Scale("unembed.hook_in", 1.5)],
    "at the final norm": [Steer("ln_final.hook_normalized", 0.3)],
    "at the logits": [Steer("unembed.hook_out", 2.0, dims=5)],
    "at both ends": [Ablate("blocks.0.hook_resid_pre", dims=3), Patch("unembed.hook_out", 1.0, positions=0)],
}


@pytest.mark.parametrize("items", EDITS.values(), ids=EDITS)
def test_edits_where_the_unembedding_is_a_session_of_its_own(
    items: list[Any], cache: Path, tiny_copy: Path, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is read of the run: both sides of the cut, one, or neither, under a KV cache too."""

    def everything(apart: bool) -> list[np.ndarray]:
        model = opened(tiny_copy)
        logits, kept = model.run_with_interventions(tokens, items, names_filter=lambda name: True)
        some = ["unembed.hook_in", "unembed.hook_out", "blocks.2.hook_resid_post"]
        values = [model.run_with_interventions(tokens, items, names_filter=name)[1][name] for name in some]
        none = model.run_with_interventions(tokens, items, names_filter=some[2], return_type=None)[1][some[2]]
        past = graphlens.KeyValueCache.init_cache(model.cfg, batch_size=len(tokens))
        halves = [
            model.run_with_interventions(half, items[:1], past_kv_cache=past) for half in np.array_split(tokens, 2, 1)
        ]
        plain = model.run_with_interventions(tokens, items)
        np.testing.assert_allclose(plain, logits, rtol=1e-5, atol=1e-5)  # a graph of its own, fused otherwise
        np.testing.assert_array_equal(kept["unembed.hook_out"], logits)
        gated = {plan: model.runner.engine.session(plan) for plan in model.sessions if plan.gates}
        assert gated
        for plan, session in gated.items():
            at_the_end = any(name == "unembed.hook_out" for name, _ in plan.gates)
            assert isinstance(session, Chain) == (apart and not at_the_end)
        return [logits, *kept.values(), *values, none, *halves]

    found = everything(apart=True)
    forget_sessions(monkeypatch)
    monkeypatch.setenv("GRAPHLENS_PACKED_LIMIT", "0")
    monkeypatch.setattr(packed_weights, "find", lambda model: None)
    for mine, wanted in zip(found, everything(apart=False), strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=1e-5)


def test_kinds_of_gates_share_the_session_of_the_unembedding(
    cache: Path, tiny_copy: Path, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphlens.engine import opener as opening

    opened_graphs: list[Any] = []
    open_session = opening.open_session
    monkeypatch.setattr(opening, "open_session", lambda *given: opened_graphs.append(given[0]) or open_session(*given))
    model = opened(tiny_copy)
    model(tokens)
    kinds = [
        Ablate("blocks.1.attn.hook_z"),
        Steer("blocks.1.hook_resid_post", 1.0),
        Scale("blocks.2.hook_mlp_out", 2.0),
    ]
    counts = []
    for kind in kinds:
        opened_graphs.clear()
        model.run_with_interventions(tokens, kind)
        counts.append(len(opened_graphs))
    assert counts == [2, 1, 1]
    opened_graphs.clear()
    model.run_with_interventions(tokens, Steer("unembed.hook_out", 2.0))  # what is behind the cut keeps the whole
    assert len(opened_graphs) == 1


def test_two_threads_that_open_the_first_gates_at_once(
    cache: Path, tiny_copy: Path, tokens: np.ndarray, tiny: HookedTransformer
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = opened(tiny_copy)
    kinds = [Ablate("blocks.1.attn.hook_z"), Steer("blocks.1.hook_resid_post", 1.0)]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda kind: model.run_with_interventions(tokens, kind), kinds))
    for kind, logits in zip(kinds, found, strict=True):
        expected = tiny.run_with_hooks(tokens, fwd_hooks=python_hooks(tiny, [kind]))
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_file_with_more_at_its_end_stays_whole(
    cache: Path, tiny_copy: Path, tokens: np.ndarray, tiny: HookedTransformer
) -> None:
    """A file's own gate at the logits is an input that the unembedding alone would lack."""
    path = tiny_copy / "model.onnx"
    gated = surgery.with_gates(surgery.load(path), {"unembed.hook_out": ("add",)})
    path.unlink()
    surgery.save(gated, path)
    item = Ablate("blocks.1.attn.hook_z", heads=2)
    model = opened(tiny_copy)
    found = model.run_with_interventions(tokens, item)
    assert cache.exists()
    assert not any(isinstance(model.runner.engine.session(plan), Chain) for plan in model.sessions)
    np.testing.assert_allclose(found, tiny.run_with_interventions(tokens, item), rtol=1e-5, atol=1e-5)


def spoil_blobs(folder: Path) -> None:
    file = folder / packed_weights.WEIGHTS
    data = bytearray(file.read_bytes())
    for entries in packed_weights.find(folder.parent.parent.parent / "tiny" / "model.onnx").weights.values():  # type: ignore[union-attr]
        for key, value in entries.items():
            if key.startswith("prepacked"):
                start, length = map(int, value.split("|")[1].split(";")[:2])
                data[start : start + length] = bytes(length)
    file.write_bytes(data)


def cut_weights(folder: Path) -> None:
    (folder / packed_weights.WEIGHTS).write_bytes(b"short")


def spoil_table(folder: Path) -> None:
    (folder / packed_weights.TABLE).write_text("{")


def flip_a_byte(folder: Path) -> None:
    file = folder / packed_weights.WEIGHTS
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)


def zero_the_tail(folder: Path) -> None:
    file = folder / packed_weights.WEIGHTS
    data = bytearray(file.read_bytes())
    last = next(place for place in reversed(range(len(data))) if data[place])
    data[last - 100 :] = bytes(len(data) - last + 100)
    file.write_bytes(data)


def shift_the_offsets(folder: Path) -> None:
    table = json.loads((folder / packed_weights.TABLE).read_text())
    for entries in table["weights"].values():
        entries["offset"] = str(int(entries["offset"]) + 64)
    (folder / packed_weights.TABLE).write_text(json.dumps(table))


@pytest.mark.parametrize(
    "spoil", [spoil_blobs, cut_weights, spoil_table, flip_a_byte, zero_the_tail, shift_the_offsets]
)
def test_a_spoilt_copy_is_not_used(
    spoil: Callable[[Path], Any],
    cache: Path,
    tiny_copy: Path,
    tokens: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    item = Ablate("blocks.1.attn.hook_z", heads=2)
    expected = opened(tiny_copy).run_with_interventions(tokens, item)
    (folder,) = cache.iterdir()
    spoil(folder)
    forget_sessions(monkeypatch)
    np.testing.assert_allclose(opened(tiny_copy).run_with_interventions(tokens, item), expected, rtol=1e-5, atol=1e-5)


def test_a_cache_that_cannot_be_written_keeps_no_run_from_happening(
    cache: Path, tiny_copy: Path, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache.parent).parent.mkdir(exist_ok=True)
    cache.parent.write_text("not a folder")
    opened(tiny_copy).run_with_interventions(tokens, Ablate("blocks.1.attn.hook_z", heads=2))


def test_packed_weights_that_another_user_made_are_used(
    cache: Path, tiny_copy: Path, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(tiny_copy).run_with_interventions(tokens, Ablate("blocks.1.attn.hook_z"))
    assert packed_weights.find(tiny_copy / "model.onnx") is not None

    def refused(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(packed_weights.os, "utime", refused)
    assert packed_weights.find(tiny_copy / "model.onnx") is not None
    assert len(list(cache.iterdir())) == 1


def test_the_cache_is_bounded(cache: Path, tiny_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (tiny_copy / "model.safetensors").stat().st_size
    for name in ("a", "b"):
        (cache / name).mkdir(parents=True)
        (cache / name / "weights.bin").write_bytes(bytes(size))
    monkeypatch.setenv("GRAPHLENS_PACKED_LIMIT", str(int(3.3 * size)))
    assert packed_weights.make(tiny_copy / "model.onnx", size) is not None
    assert sum(file.stat().st_size for file in cache.rglob("*")) <= 3.4 * size
    assert not (cache / "a").exists()
    assert (cache / "b").exists()
    monkeypatch.setenv("GRAPHLENS_PACKED_LIMIT", "1000")
    assert packed_weights.make(tiny_copy / "model.onnx", size) is None


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), ModelFileError("refused"), ExportError("no")]
)
def test_a_copy_that_cannot_be_made_keeps_no_run_from_happening(
    error: Exception, cache: Path, tiny_copy: Path, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(packed_weights, "save_optimised", fail)
    opened(tiny_copy).run_with_interventions(tokens, Ablate("blocks.1.attn.hook_z", heads=2))
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("limit", ["lots", "inf", "nan", ""])
def test_a_limit_that_is_no_number_says_so(
    limit: str, cache: Path, tiny_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPHLENS_PACKED_LIMIT", limit)
    with pytest.raises(InputError, match="number of bytes"):
        packed_weights.make(tiny_copy / "model.onnx", 10)


def test_a_full_check_reads_every_packed_byte(cache: Path, tiny_copy: Path, tokens: np.ndarray) -> None:
    assert check_folder(tiny_copy, full=True).packed is None
    opened(tiny_copy).run_with_interventions(tokens, Ablate("blocks.1.attn.hook_z", heads=2))
    (folder,) = cache.iterdir()
    size = sum(file.stat().st_size for file in folder.iterdir())
    found = check_folder(tiny_copy, full=True)
    assert found.packed == size
    assert any(f"every byte of {size / 1e6:,.1f} MB is as it was written" in line for line in found.lines())
    for spoil in (flip_a_byte, shift_the_offsets, cut_weights):
        good = {file: file.read_bytes() for file in folder.iterdir()}
        spoil(folder)
        with pytest.raises(ModelFileError, match=r"packed weights are damaged.*cache-clear"):
            check_folder(tiny_copy, full=True)
        check_folder(tiny_copy)
        for file, data in good.items():
            file.write_bytes(data)
    done = graphlens_command("check", tiny_copy, "--full")
    assert done.returncode == 0, done.stderr
    assert "as it was written" in sentence(done.stdout)


@pytest.mark.parametrize("edits", [[], [Scale("unembed.hook_in", 0.5)], [Ablate("blocks.1.attn.hook_z", heads=2)]])
def test_a_generation_computes_the_logits_of_the_last_position_alone(
    edits: list[graphlens.Intervention],
    cache: Path,
    tiny_copy: Path,
    tokens: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GRAPHLENS_PACKED_LIMIT", "0")
    options: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
    plain = opened(tiny_copy)
    with plain.intervene(edits):
        expected = plain.generate(tokens, 5, **options)
    forget_sessions(monkeypatch)
    monkeypatch.delenv("GRAPHLENS_PACKED_LIMIT")
    model = opened(tiny_copy)
    shapes: list[tuple[int, ...]] = []
    run = engine.Engine.run

    def noted(self: engine.Engine, *arguments: Any) -> Any:
        ran = run(self, *arguments)
        shapes.append(ran.output.shape)
        return ran

    monkeypatch.setattr(engine.Engine, "run", noted)
    with model.intervene(edits):
        found = model.generate(tokens, 5, **options)
        np.testing.assert_array_equal(found, expected)
        assert shapes == [(len(tokens), 1, model.cfg.d_vocab)] * 5
        sessions = [model.runner.engine.session(plan) for plan in model.runner.engine.open_sessions if plan.past]
        assert len(sessions) == 1
        assert isinstance(sessions[0], Chain)
        # Whoever runs with a cache of their own gets every position's.
        past = graphlens.KeyValueCache.init_cache(model.cfg, batch_size=len(tokens))
        logits = model(tokens, past_kv_cache=past)
    assert logits.shape == (*tokens.shape, model.cfg.d_vocab)
    with plain.intervene(edits):
        np.testing.assert_allclose(logits, plain(tokens), rtol=1e-5, atol=1e-5)
