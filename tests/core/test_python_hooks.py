"""Python hooks inside a run: what they see and change, in which order, in threads, and beside onnxruntime-extensions."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphlens import HookedTransformer
from graphlens.engine.plan import Plan
from graphlens.runtime import callbacks
from graphlens.runtime.entry import Called

PRE = "blocks.1.hook_resid_pre"


def noise(shape: Sequence[int], seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


# Hooks: what they see and what they change


def test_a_hook_gets_the_activation_and_may_change_it_in_place(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    _, cache = tiny.run_with_cache(tokens)

    def set_zero(activation: np.ndarray, hook: Any) -> None:
        assert activation.flags.writeable
        assert activation.flags.c_contiguous
        assert activation.dtype == np.float32
        np.testing.assert_array_equal(activation, cache[hook.name])
        activation[:, :, 1] = 0

    def as_zero(activation: np.ndarray, hook: Any) -> np.ndarray:
        changed = activation.copy()
        changed[:, :, 1] = 0
        return changed

    for name in (PRE, "blocks.2.attn.hook_z", "blocks.0.mlp.hook_post"):
        in_place = tiny.run_with_hooks(tokens, fwd_hooks=[(name, set_zero)])
        np.testing.assert_array_equal(in_place, tiny.run_with_hooks(tokens, fwd_hooks=[(name, as_zero)]))
        assert not np.allclose(in_place, tiny(tokens), atol=1e-3)


def test_hooks_that_only_look_change_no_bit(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    logits, cache = tiny.run_with_cache(tokens)
    seen: dict[str, np.ndarray] = {}

    def look(activation: np.ndarray, hook: Any) -> None:
        seen[hook.name] = activation

    def give_back(activation: np.ndarray, hook: Any) -> np.ndarray:
        return activation

    for hook in (look, give_back):
        with tiny.hooks([(lambda name: True, hook)]):
            hooked_logits, hooked_cache = tiny.run_with_cache(tokens)
        np.testing.assert_array_equal(hooked_logits, logits)
        for name, value in cache.items():
            np.testing.assert_array_equal(hooked_cache[name], value, name)
    assert set(seen) == set(cache)
    for name, value in seen.items():
        np.testing.assert_array_equal(value, cache[name], name)


def test_what_a_hook_keeps_stays_its_own(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    kept: list[np.ndarray] = []

    def keep(activation: np.ndarray, hook: Any) -> np.ndarray:
        kept.append(activation)
        return activation

    tiny.run_with_hooks(tokens, fwd_hooks=[(PRE, keep)])
    expected = tiny.run_with_cache(tokens, names_filter=PRE)[1][PRE]
    for seed in range(5):
        others = np.random.default_rng(seed).integers(0, tiny.cfg.d_vocab, tokens.shape)
        tiny.run_with_hooks(others, fwd_hooks=[(PRE, keep)])
    np.testing.assert_array_equal(kept[0], expected)
    before = tiny(tokens)
    for array in kept:
        array[...] = np.nan
    np.testing.assert_array_equal(tiny.run_with_hooks(tokens, fwd_hooks=[("hook_embed", keep)]), before)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: np.asfortranarray(x),
        lambda x: np.broadcast_to(x[:, :1], x.shape),
        lambda x: x[:, ::-1],
        lambda x: np.ma.masked_array(x),
    ],
    ids=["transposed", "broadcast", "reversed", "subclass"],
)
def test_a_hook_may_return_any_view(
    view: Callable[[np.ndarray], np.ndarray], tiny: HookedTransformer, tokens: np.ndarray
) -> None:
    found = tiny.run_with_hooks(tokens, fwd_hooks=[(PRE, lambda x, hook: view(x))])
    expected = tiny.run_with_hooks(tokens, fwd_hooks=[(PRE, lambda x, hook: np.array(view(x), order="C"))])
    np.testing.assert_array_equal(found, expected)


def test_the_cache_holds_what_the_hooks_left(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    plain = tiny.run_with_cache(tokens)[1]
    names = [PRE, "blocks.1.attn.hook_q", "blocks.3.ln2.hook_scale"]
    with tiny.hooks([(PRE, lambda x, hook: x + np.float32(1))]):
        cache = tiny.run_with_cache(tokens, names_filter=[*names, "blocks.0.hook_resid_post"])[1]
    np.testing.assert_array_equal(cache[PRE], plain[PRE] + np.float32(1))
    np.testing.assert_array_equal(cache["blocks.0.hook_resid_post"], plain["blocks.0.hook_resid_post"])
    assert list(cache) == ["blocks.0.hook_resid_post", *names]


BLOCK = [
    "hook_resid_pre",
    "ln1.hook_scale",
    "ln1.hook_normalized",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "ln2.hook_scale",
    "ln2.hook_normalized",
    "mlp.hook_pre",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
]


def firing_order(n_layers: int) -> list[str]:
    """The order in which TransformerLens's HookedTransformer calls its hooks."""
    blocks = [f"blocks.{layer}.{name}" for layer in range(n_layers) for name in BLOCK]
    after = ["ln_final.hook_scale", "ln_final.hook_normalized", "unembed.hook_in", "unembed.hook_out"]
    return ["hook_embed", "hook_pos_embed", *blocks, *after]


def test_every_hook_point_fires_exactly_once(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    fired: list[str] = []
    tiny.run_with_hooks(tokens, fwd_hooks=[(lambda name: True, lambda x, hook: fired.append(hook.name))])
    assert sorted(fired) == sorted(firing_order(tiny.cfg.n_layers))


def test_hooks_fire_in_firing_order(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    fired: list[str] = []
    names = firing_order(tiny.cfg.n_layers)
    assert list(tiny.hook_dict) == names
    hooks = [(name, lambda x, hook: fired.append(hook.name)) for name in reversed(names)]
    tiny.run_with_hooks(tokens, fwd_hooks=hooks)
    assert fired == names


def test_hooks_fire_in_the_order_of_the_data(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    # Of two hook points the later of which is computed from the earlier, the earlier fires first.
    fired: list[str] = []
    names = [name for name in firing_order(tiny.cfg.n_layers) if name.split("hook_")[1] not in ("k", "v", "pos_embed")]
    with tiny.hooks([(lambda name: True, lambda x, hook: fired.append(hook.name))]):
        tiny(tokens)
    assert [name for name in fired if name in names] == names


def test_several_hooks_at_one_name_run_in_the_order_they_were_given(
    tiny: HookedTransformer, tokens: np.ndarray
) -> None:
    change = noise(tiny.run_with_cache(tokens, names_filter=PRE)[1][PRE].shape)

    def add(activation: np.ndarray, hook: Any) -> np.ndarray:
        return activation + change

    def flip(activation: np.ndarray, hook: Any) -> None:
        activation *= -1

    def both(activation: np.ndarray, hook: Any) -> np.ndarray:
        return -(activation + change)

    def other(activation: np.ndarray, hook: Any) -> np.ndarray:
        return -activation + change

    first, second, expected_first, expected_second = (
        tiny.run_with_hooks(tokens, fwd_hooks=[(PRE, hook) for hook in hooks])
        for hooks in ((add, flip), (flip, add), (both,), (other,))
    )
    np.testing.assert_array_equal(first, expected_first)
    np.testing.assert_array_equal(second, expected_second)
    assert not np.allclose(first, second, atol=1e-3)


def test_a_hook_is_told_by_keyword_where_it_is(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(*arrays: Any, **keywords: Any) -> None:
        given.append((arrays, keywords))

    tiny.run_with_hooks(tokens, fwd_hooks=[("blocks.2.attn.hook_z", record), ("hook_embed", record)])
    (outside,), (inside,) = (
        [k["hook"] for _, k in given if k["hook"].name == n] for n in ("hook_embed", "blocks.2.attn.hook_z")
    )
    assert all(len(arrays) == 1 and list(keywords) == ["hook"] for arrays, keywords in given)
    assert inside.layer() == 2
    assert inside is tiny.hook_dict["blocks.2.attn.hook_z"]
    with pytest.raises(ValueError, match=r"'hook_embed' is not in a block"):
        outside.layer()


def test_a_hooks_context_lasts_until_it_is_cleared(tiny_copy: Path, tokens: np.ndarray) -> None:
    model = HookedTransformer.from_onnx(tiny_copy, "cpu")

    def count(activation: np.ndarray, hook: Any) -> None:
        hook.ctx["runs"] = hook.ctx.get("runs", 0) + 1

    counts = []
    for _ in range(3):
        model.run_with_hooks(tokens, fwd_hooks=[(PRE, count), ("hook_embed", count)])
        counts.append((model.hook_dict[PRE].ctx["runs"], model.hook_dict["hook_embed"].ctx["runs"]))
    assert counts == [(1, 1), (2, 2), (3, 3)]
    assert model.hook_dict["hook_pos_embed"].ctx == {}
    model.run_with_hooks(tokens, fwd_hooks=[(PRE, count)], clear_contexts=True)
    assert model.hook_dict[PRE].ctx == model.hook_dict["hook_embed"].ctx == {}
    with model.hooks([(PRE, count)], clear_contexts=True):
        model(tokens)
        model(tokens)
        assert model.hook_dict[PRE].ctx == {"runs": 2}
    assert model.hook_dict[PRE].ctx == {}


def test_blocks_of_hooks_nest(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    ran: list[str] = []

    def named(name: str) -> Callable[..., None]:
        return lambda activation, hook: ran.append(name)

    def run() -> list[str]:
        ran.clear()
        tiny(tokens)
        return list(ran)

    with tiny.hooks([(PRE, named("outer"))]) as model:
        assert model is tiny
        assert run() == ["outer"]
        with tiny.hooks([(PRE, named("inner")), ("hook_embed", named("early"))]):
            assert run() == ["early", "outer", "inner"]
            tiny.run_with_hooks(tokens, fwd_hooks=[(PRE, named("run"))])
            assert ran[3:] == ["early", "outer", "inner", "run"]
        assert run() == ["outer"]
    assert run() == []


def test_a_function_picks_the_hook_points_to_hook(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    fired: list[str] = []
    tiny.run_with_hooks(
        tokens, fwd_hooks=[(lambda name: name.endswith("hook_z"), lambda x, hook: fired.append(hook.name))]
    )
    assert fired == [f"blocks.{layer}.attn.hook_z" for layer in range(tiny.cfg.n_layers)]


def test_a_hook_may_run_the_model_itself(tiny: HookedTransformer, tiny_folder: Path, tokens: np.ndarray) -> None:
    inner = HookedTransformer.from_onnx(tiny_folder, "cpu")
    assert inner.runner.engine.session(Plan(python=True)) is tiny.runner.engine.session(Plan(python=True))
    others = np.asarray(tokens[:, ::-1])

    def double(activation: np.ndarray, hook: Any) -> np.ndarray:
        return activation * np.float32(2)

    def patch(activation: np.ndarray, hook: Any) -> np.ndarray:
        with inner.hooks([("blocks.0.hook_mlp_out", double)]):
            return inner.run_with_cache(tokens, names_filter=hook.name)[1][hook.name]

    with inner.hooks([("blocks.0.hook_mlp_out", double)]):
        value = inner.run_with_cache(tokens, names_filter=PRE)[1][PRE]
    np.testing.assert_array_equal(
        tiny.run_with_hooks(others, fwd_hooks=[(PRE, patch)]),
        tiny.run_with_hooks(others, fwd_hooks=[(PRE, lambda x, hook: value)]),
    )


def test_what_caused_a_hooks_error_is_told(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    z = "blocks.1.attn.hook_z"

    def fail(activation: np.ndarray, hook: Any) -> None:
        try:
            activation[99, 99, 99, 99] = 0
        except IndexError as error:
            raise LookupError("no such head") from error

    with pytest.raises(LookupError, match="no such head") as caught:
        tiny.run_with_hooks(tokens, fwd_hooks=[(z, fail)])
    assert isinstance(caught.value.__cause__, IndexError)


@pytest.mark.parametrize("name", ["hook_embed", "blocks.1.attn.hook_pattern", "unembed.hook_out"])
def test_a_callback_may_end_its_run(tiny: HookedTransformer, tokens: np.ndarray, name: str) -> None:
    engine, expected = tiny.runner.engine, np.array(tiny(tokens))
    seen: list[str] = []

    def ends(activation: np.ndarray) -> np.ndarray:
        seen.append(name)
        raise callbacks.Enough("nothing more is wanted.")

    later = engine.hook_names[engine.hook_names.index(name) + 1 :]
    calls = {name: ends, **{other: lambda _: pytest.fail("called after the end") for other in later}}
    with pytest.raises(callbacks.Enough):
        engine.run({"input_ids": tokens}, [], calls, output=False)
    assert seen == [name]
    assert np.array_equal(tiny.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: x)]), expected)


def test_after_a_callback_raised_no_other_is_called_even_if_the_run_goes_on() -> None:
    # ONNX Runtime stops at the next operator when told to; what is called until then must not reach the user's code.
    raised, activation = ZeroDivisionError("mine"), np.ones(3, np.float32)

    def fault(_: np.ndarray) -> np.ndarray:
        raise raised

    def never(_: np.ndarray) -> np.ndarray:
        pytest.fail("a callback was called after another raised")

    def work() -> None:
        for index in (0, 1, 1):
            op, shape, values = Called(7, [activation, calls.run_id], {"index": str(index)})
            assert (op, shape) == (7, (3,))
            np.testing.assert_array_equal(values, np.ones(3, np.float32))

    calls = callbacks.PythonCalls({0: fault, 1: never})
    with pytest.raises(ZeroDivisionError) as caught:
        calls.run(work)
    assert caught.value is raised


# Threads


EDITS = [noise((2, 6, 128), seed) for seed in range(4)]


def in_threads(work: Callable[[int], Any], count: int = 4) -> list[Any]:
    """What ``work(0..count-1)`` returned, each in a thread of its own; raises what one raised."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


def expected_of(model: HookedTransformer, tokens: np.ndarray) -> list[np.ndarray]:
    expected = [model.run_with_hooks(tokens, fwd_hooks=[(PRE, lambda x, hook, e=e: x + e)]) for e in EDITS]
    assert all(not np.allclose(expected[0], other, atol=1e-3) for other in expected[1:])
    return expected


def test_runs_at_the_same_time_each_see_their_own_hooks(
    tiny: HookedTransformer, tiny_folder: Path, tokens: np.ndarray
) -> None:
    expected = expected_of(tiny, tokens)
    models = [HookedTransformer.from_onnx(tiny_folder, "cpu") for _ in EDITS]
    assert len({id(model.runner.engine.session(Plan(python=True))) for model in models}) == 1
    together = threading.Barrier(len(EDITS), timeout=30)

    def work(index: int) -> list[np.ndarray]:
        def edit(activation: np.ndarray, hook: Any) -> np.ndarray:
            together.wait()  # all runs are inside their hook at once
            return activation + EDITS[index]

        return [models[index].run_with_hooks(tokens, fwd_hooks=[(PRE, edit)]) for _ in range(3)]

    for index, results in enumerate(in_threads(work)):
        for result in results:
            np.testing.assert_array_equal(result, expected[index])


def test_threads_that_share_a_model_each_see_their_own_hooks(
    tiny_copy: Path, tiny: HookedTransformer, tokens: np.ndarray
) -> None:
    model, expected = HookedTransformer.from_onnx(tiny_copy, "cpu"), expected_of(tiny, tokens)
    together = threading.Barrier(len(EDITS), timeout=30)

    def work(index: int) -> np.ndarray:
        with model.hooks([(PRE, lambda x, hook: x + EDITS[index])]):
            together.wait()
            result = model(tokens)
            together.wait()
        return result

    for found, wanted in zip(in_threads(work), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_no_hook_is_left_behind_by_threads_that_share_a_model(
    tiny_copy: Path, tiny: HookedTransformer, tokens: np.ndarray
) -> None:
    model = HookedTransformer.from_onnx(tiny_copy, "cpu")
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()

    def work(index: int) -> None:
        if index == 0:
            with model.hooks([(PRE, lambda x, hook: x + EDITS[0])]):
                first_in.set()
                assert second_in.wait(30)
            first_out.set()
        else:
            assert first_in.wait(30)
            with model.hooks([(PRE, lambda x, hook: x + EDITS[1])]):
                second_in.set()
                assert first_out.wait(30)

    in_threads(work, 2)
    np.testing.assert_array_equal(model(tokens), tiny(tokens))


def test_a_hook_that_raises_in_one_thread_disturbs_no_other(
    tiny: HookedTransformer, tiny_folder: Path, tokens: np.ndarray
) -> None:
    expected = expected_of(tiny, tokens)
    models = [HookedTransformer.from_onnx(tiny_folder, "cpu") for _ in EDITS]
    together = threading.Barrier(len(EDITS), timeout=30)

    def work(index: int) -> Any:
        def edit(activation: np.ndarray, hook: Any) -> np.ndarray:
            together.wait()
            if index == 2:
                raise ZeroDivisionError
            return activation + EDITS[index]

        if index != 2:
            return models[index].run_with_hooks(tokens, fwd_hooks=[(PRE, edit)])
        with pytest.raises(ZeroDivisionError):
            models[index].run_with_hooks(tokens, fwd_hooks=[(PRE, edit)])
        return expected[2]

    for found, wanted in zip(in_threads(work), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_plain_runs_at_the_same_time_agree(tiny: HookedTransformer) -> None:
    prompts = [np.random.default_rng(seed).integers(0, tiny.cfg.d_vocab, (1, 5 + seed)) for seed in range(4)]
    expected = [tiny.run_with_cache(prompt) for prompt in prompts]

    def work(index: int) -> Any:
        return [tiny.run_with_cache(prompts[index]) for _ in range(5)]

    for runs, (logits, cache) in zip(in_threads(work), expected, strict=True):
        for found, found_cache in runs:
            np.testing.assert_array_equal(found, logits)
            for name, value in cache.items():
                np.testing.assert_array_equal(found_cache[name], value, name)


# Beside other users of onnxruntime-extensions


PRELUDE = """
import sys
import numpy as np
import onnxruntime
from onnx import TensorProto, helper
import graphlens

model = graphlens.HookedTransformer.from_onnx(sys.argv[1], "cpu")
plain = model([1, 2, 3])

def hooked():
    return model.run_with_hooks([1, 2, 3], fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: -x)])

def theirs():
    import onnxruntime_extensions
    from onnxruntime_extensions import PyCustomOpDef, get_library_path, onnx_op

    @onnx_op(op_type="TimesThree", inputs=[PyCustomOpDef.dt_float], outputs=[PyCustomOpDef.dt_float])
    def times_three(x):
        return x * 3

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    node = helper.make_node("TimesThree", ["x"], ["y"], domain="ai.onnx.contrib")
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.onnx.contrib", 1)]
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(get_library_path())
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": np.asarray([1, 2], np.float32)})[0].tolist()
"""


def in_a_process(code: str, folder: Path, cwd: Path) -> str:
    """What a program printed that starts with PRELUDE; it must end well."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, str(folder)], capture_output=True, text=True, cwd=cwd, timeout=120
    )
    lines = [line for line in done.stderr.splitlines() if "[W:onnxruntime" not in line]
    assert done.returncode == 0, (done.returncode, done.stdout, lines[-20:])
    return done.stdout.strip()


def test_hooks_go_on_after_a_genuine_import_of_onnxruntime_extensions_and_beside_its_operators(
    tiny_folder: Path, tmp_path: Path
) -> None:
    code = """
before = hooked()
assert not np.allclose(before, plain, atol=1e-3)
import onnxruntime_extensions
assert (hooked() == before).all()
run = theirs()
assert run() == [3, 6]
assert (hooked() == before).all()
# The package's list of operators moves in memory as it grows, and open sessions point into it.
for index in range(40):
    onnxruntime_extensions.onnx_op(op_type=f"Another{index}", inputs=[1], outputs=[1])(lambda x: x)
    assert (hooked() == before).all()
assert run() == [3, 6]
print("done")
"""
    assert in_a_process(code, tiny_folder, tmp_path) == "done"


def test_hooks_work_where_onnxruntime_extensions_was_imported_before(tiny_folder: Path, tmp_path: Path) -> None:
    # Without torch its import is quick; with torch it is the test before.
    code = """
sys.modules["torch"] = sys.modules["transformers"] = None
import onnxruntime_extensions
before = hooked()
assert not np.allclose(before, plain, atol=1e-3)
assert (hooked() == before).all()
print("done")
"""
    assert in_a_process(code, tiny_folder, tmp_path) == "done"
