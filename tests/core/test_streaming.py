"""Models that are run block by block over their files give what they give when they are opened whole."""

from __future__ import annotations

import copy
import gc
import gzip
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest

import graphlens
from graphlens import Ablate, HookedTransformer, InputError, LogitDiff, Patch, Scale, Steer, patching
from graphlens.engine.max_memory import checked_memory
from graphlens.engine.plan import Plan
from graphlens.errors import ModelFileError, RunError
from graphlens.runtime.mapped_weights import MappedWeights
from graphlens.runtime.staged import Staged
from tests.models import MODEL

NAMES = ("tiny-gpt2", "tiny-llama")
TOKENS = np.random.default_rng(0).integers(0, 90, (2, 7))


def folder(name: str) -> Path:
    return Path(graphlens.embedded_model(name))


def weights_of(name: str) -> int:
    return sum(file.stat().st_size for file in folder(name).glob("*.safetensors"))


@pytest.fixture(scope="module", params=NAMES)
def both(request: pytest.FixtureRequest) -> tuple[HookedTransformer, HookedTransformer]:
    """(the model opened whole, the model that runs block by block)."""
    name = request.param
    whole = MODEL if name == NAMES[0] else HookedTransformer.from_onnx(folder(name), "cpu")
    streamed = HookedTransformer.from_onnx(folder(name), "cpu", max_memory=weights_of(name))
    streamed.runner.engine.max_sessions = 48
    return whole, streamed


def close(one: object, other: object) -> None:
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)  # the same kernels, fused otherwise


Both = tuple[HookedTransformer, HookedTransformer]


def test_blocks_that_are_alike_share_a_session_that_holds_no_weights(both: Both) -> None:
    _, streamed = both
    streamed(TOKENS)
    session = streamed.runner.engine.session(Plan())
    assert isinstance(session, Staged)
    stages = session.stages
    assert len(stages) == streamed.cfg.n_layers + 2
    assert len({id(stage.session) for stage in stages}) == 3
    blocks = [set(stage.weights.values()) for stage in stages]
    assert all(len(names) > 2 for names in blocks[1:-1])
    assert len(set().union(*blocks[1:-1])) == sum(map(len, blocks[1:-1])), "each block has weights of its own"


def test_logits_and_a_full_cache(both: Both) -> None:
    whole, streamed = both
    mask = np.ones_like(TOKENS)
    mask[0, :3] = 0
    for options in ({}, {"attention_mask": mask}):
        logits, cache = whole.run_with_cache(TOKENS, **options)
        other_logits, other = streamed.run_with_cache(TOKENS, **options)
        close(other_logits, logits)
        assert list(cache) == list(other)
        for name, value in cache.items():
            close(other[name], value)
        close(streamed(TOKENS, **options), logits)


@pytest.mark.parametrize("flags", [("use_attn_result",), ("use_split_qkv_input", "use_hook_mlp_in"), ("use_attn_in",)])
def test_flags(both: Both, flags: tuple[str, ...]) -> None:
    caches = []
    if "use_attn_in" in flags and both[0].cfg.n_key_value_heads is not None:
        pytest.skip("keys and values of several heads are one there")
    for model in map(copy.deepcopy, both):
        for flag in flags:
            getattr(model, f"set_{flag}")(True)
        caches.append(model.run_with_cache(TOKENS)[1])
    assert list(caches[0]) == list(caches[1])
    for name, value in caches[0].items():
        close(caches[1][name], value)


@pytest.mark.parametrize(
    "edit",
    [
        Ablate("blocks.1.attn.hook_z", heads=1),
        Scale("blocks.2.hook_resid_pre", 0.5),
        Steer("blocks.1.hook_resid_post", np.linspace(-1, 1, 64, dtype=np.float32), 2.0),
        Patch("blocks.3.attn.hook_pattern", np.full((1, 1, 7, 7), 1 / 7, np.float32)),
        Scale("blocks.0.hook_resid_pre", 2.0, positions=[1, 2]),
        Ablate("hook_embed", positions=0),
    ],
    ids=lambda edit: f"{type(edit).__name__} {edit.hook}",
)
def test_interventions(both: Both, edit: graphlens.Intervention) -> None:
    whole, streamed = both
    if edit.hook.endswith("resid_post"):
        edit = Steer(edit.hook, np.linspace(-1, 1, whole.cfg.d_model, dtype=np.float32), 2.0)
    plain = whole(TOKENS)
    expected = whole.run_with_interventions(TOKENS, edit)
    assert np.abs(expected - plain).max() > 1e-3
    close(streamed.run_with_interventions(TOKENS, edit), expected)
    with whole.intervene(edit), streamed.intervene(edit):
        for name, value in whole.run_with_cache(TOKENS)[1].items():
            close(streamed.run_with_cache(TOKENS, names_filter=name)[1][name], value)
            if "blocks.3" in name:
                break


def test_python_hooks_are_called_in_firing_order_and_change_the_run(both: Both) -> None:
    names = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.1.attn.hook_v", "blocks.3.mlp.hook_post"]
    outcomes = []
    for model in both:
        called: list[tuple[str, np.ndarray]] = []

        def half(value: np.ndarray, hook: graphlens.HookPoint, called: list = called) -> np.ndarray:
            called.append((hook.name, value.copy()))
            return value * np.float32(0.5)

        logits = model.run_with_hooks(TOKENS, fwd_hooks=[(name, half) for name in names])
        outcomes.append((called, logits))
    (called, logits), (others, other_logits) = outcomes
    assert [name for name, _ in others] == [name for name, _ in called] == names
    for (_, value), (_, other) in zip(called, others, strict=True):
        close(other, value)
    close(other_logits, logits)


def test_a_hook_after_what_is_read_is_called_too_and_its_error_reaches_the_caller(both: Both) -> None:
    _, streamed = both
    last = f"blocks.{streamed.cfg.n_layers - 1}.hook_resid_post"
    called: list[int] = []
    with streamed.hooks([(last, lambda value, hook: called.append(1))]):
        streamed.run_with_cache(TOKENS, names_filter="blocks.0.hook_resid_pre", return_type=None)
    assert called == [1]

    def fails(value: np.ndarray, hook: graphlens.HookPoint) -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        streamed.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.hook_resid_pre", fails)])
    close(streamed(TOKENS), both[0](TOKENS))


def test_segments_begin_and_end_where_they_should(both: Both) -> None:
    whole, streamed = both
    residual = whole(TOKENS, stop_at_layer=2)
    close(streamed(TOKENS, stop_at_layer=2), residual)
    close(streamed(residual, start_at_layer=2), whole(TOKENS))
    close(streamed(TOKENS, stop_at_layer=0), whole(TOKENS, stop_at_layer=0))


def test_a_run_that_reads_early_blocks_runs_no_later_ones(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    _, streamed = both
    asked: list[set[str]] = []
    monkeypatch.setattr(MappedWeights, "let_go", lambda self, names: asked.append(set(names)))
    streamed.run_with_cache(TOKENS, names_filter="blocks.1.hook_resid_pre", return_type=None)
    assert len(asked) == 2, "what is before the blocks, and the first"


def test_generation_and_its_cache(both: Both) -> None:
    whole, streamed = both
    options = {"do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
    tokens = whole.generate(TOKENS, 9, **options)
    np.testing.assert_array_equal(streamed.generate(TOKENS, 9, **options), tokens)
    np.testing.assert_array_equal(streamed.generate(TOKENS, 9, use_past_kv_cache=False, **options), tokens)


@pytest.mark.parametrize("metric", [LogitDiff(3, 5)], ids=["logit difference"])
def test_gradients_at_every_hook_point(both: Both, metric: LogitDiff) -> None:
    whole, streamed = both
    expected = whole.gradients(TOKENS, metric)
    found = streamed.gradients(TOKENS, metric)
    assert list(found) == list(expected)
    for name, value in expected.items():
        scale = max(float(np.abs(value).max()), 1e-6)
        np.testing.assert_allclose(found[name] / scale, value / scale, rtol=1e-4, atol=1e-5)


def test_a_backward_pass_reads_each_blocks_weights_twice(both: Both) -> None:
    _, streamed = both
    names = tuple(f"blocks.{layer}.hook_resid_pre" for layer in range(streamed.cfg.n_layers))
    session = streamed.runner.engine.session(Plan(gradients=names))
    assert isinstance(session, Staged)
    read = [name for stage in session.stages for name in stage.weights.values()]
    assert max(read.count(name) for name in set(read)) == 2
    blocks = [
        {name.split(".layers.")[-1].split(".h.")[-1].split(".")[0] for name in stage.weights.values()}
        for stage in session.stages[1 : streamed.cfg.n_layers + 1]
    ]
    assert all(len(block) == 1 for block in blocks), blocks


def test_a_sweep_is_the_same(both: Both) -> None:
    whole, streamed = both
    corrupted = TOKENS[:1] + 1
    _, clean = whole.run_with_cache(TOKENS[:1])
    metric = LogitDiff(3, 5)
    for sweep in (patching.get_act_patch_resid_pre, patching.get_act_patch_attn_head_out_all_pos):
        close(sweep(streamed, corrupted, clean, metric), sweep(whole, corrupted, clean, metric))


def test_weights_that_are_set_are_those_that_are_run(both: Both) -> None:
    models = [copy.deepcopy(model) for model in both]
    for model in models:
        model.set_weights({"blocks.1.attn.W_O": np.asarray(model.blocks[1].attn.W_O) * 0.5})
    changed = models[0](TOKENS)
    assert np.abs(changed - both[0](TOKENS)).max() > 1e-3
    close(models[1](TOKENS), changed)
    assert isinstance(models[1].runner.engine.session(Plan()), Staged)


def test_an_embedding_that_is_set_apart_from_the_unembedding(both: Both) -> None:
    models = [copy.deepcopy(model) for model in both]
    for model in models:
        model.set_weights({"embed.W_E": np.asarray(model.W_E) * 0.5})
    close(models[1](TOKENS), models[0](TOKENS))
    assert np.abs(models[0](TOKENS) - both[0](TOKENS)).max() > 1e-3


def test_a_pickled_model_stays_within_its_memory(both: Both) -> None:
    whole, streamed = both
    other = pickle.loads(pickle.dumps(streamed))
    assert other.runner.engine.max_memory == streamed.runner.engine.max_memory
    close(other(TOKENS), whole(TOKENS))
    assert isinstance(other.runner.engine.session(Plan()), Staged)


def test_threads_may_run_it_at_once(both: Both) -> None:
    whole, streamed = both
    inputs = [TOKENS + number for number in range(6)]
    expected = [whole(tokens) for tokens in inputs]
    found: dict[int, np.ndarray] = {}

    def run(number: int) -> None:
        for _ in range(3):
            found[number] = streamed(inputs[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, logits in enumerate(expected):
        close(found[number], logits)


def test_results_outlive_the_model() -> None:
    model = HookedTransformer.from_onnx(folder(NAMES[0]), "cpu", max_memory=weights_of(NAMES[0]))
    logits, cache = model.run_with_cache(TOKENS)
    kept = {name: value.copy() for name, value in cache.items()}
    del model
    gc.collect()
    for name, value in cache.items():
        np.testing.assert_array_equal(value, kept[name])
    close(logits, MODEL(TOKENS))


@pytest.mark.parametrize("factor", [2, 100])
def test_a_model_that_fits_is_opened_whole(factor: int) -> None:
    model = HookedTransformer.from_onnx(folder(NAMES[0]), "cpu", max_memory=factor * weights_of(NAMES[0]))
    assert not isinstance(model.runner.engine.session(Plan()), Staged)
    assert not isinstance(MODEL.runner.engine.session(Plan()), Staged)


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ("4GB", 4_000_000_000),
        (" 1.5 gb ", 1_500_000_000),
        ("600MB", 600_000_000),
        ("2GiB", 1 << 31),
        ("512", 512),
        (7, 7),
        (2.5e9, 2_500_000_000),
        (None, None),
    ],
)
def test_how_memory_is_asked_for(given: str | float | None, size: int | None) -> None:
    assert checked_memory(given) == size


@pytest.mark.parametrize(
    "given", ["", "many", "4 XB", "-1GB", 0, -5, True, float("nan"), float("inf"), "1e9", [4], b"4GB"]
)
def test_what_is_no_amount_of_memory(given: object) -> None:
    with pytest.raises(InputError, match=r"max_memory=.*give a number of bytes, or text such as '4GB'"):
        HookedTransformer.from_onnx(folder(NAMES[0]), "cpu", max_memory=given)  # type: ignore[arg-type]


def test_too_little_memory_for_one_block_is_said() -> None:
    model = HookedTransformer.from_onnx(folder(NAMES[0]), "cpu", max_memory=1000)
    with pytest.raises(InputError, match=r"too little for .*: one block, or the unembedding, has [0-9]+ MB of weights"):
        model(TOKENS)


def test_a_run_that_fails_names_the_model_and_the_prompt(both: Both) -> None:
    session = both[1].runner.engine.session(Plan())
    with pytest.raises(RunError, match=r"model\.onnx: ONNX Runtime could not run it with input_ids \[2, 7\]"):
        session.run(["logits"], {"input_ids": np.full((2, 7), 10**6)})


def test_operators_that_are_not_onnxs_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    committed = Path(__file__).parents[1] / "adopt" / "committed" / "small-llama.genai-int4.onnx.gz"
    file.write_bytes(gzip.decompress(committed.read_bytes()))
    folder = graphlens.adopt(file, tmp_path / "adopted").folder
    assert folder is not None
    with pytest.raises(InputError, match=r"operators that are not ONNX's \(.*MatMulNBits.*\)"):
        HookedTransformer.from_onnx(folder, "cpu", max_memory=20_000)


def test_a_missing_or_unknown_input_is_refused(both: Both) -> None:
    session = both[1].runner.engine.session(Plan())
    with pytest.raises(RunError, match="'input_ids' was not fed"):
        session.run(["logits"], {})
    with pytest.raises(RunError, match="no input 'tokens'"):
        session.run(["logits"], {"input_ids": TOKENS, "tokens": TOKENS})
    with pytest.raises(RunError, match="no output 'nothing'"):
        session.run(["nothing"], {"input_ids": TOKENS})


def test_a_file_that_is_written_over_is_noticed(tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder(NAMES[0]), tmp_path / "model")
    model = HookedTransformer.from_onnx(tmp_path / "model", "cpu", max_memory=weights_of(NAMES[0]))
    model(TOKENS)
    (file,) = (tmp_path / "model").glob("*.safetensors")
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        opened.write(b"\0" * 4096)
    with pytest.raises(ModelFileError, match="was replaced since the model was opened"):
        model(TOKENS)
