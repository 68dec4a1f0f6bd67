"""The Runner: one run with what is active, the same whichever way it is asked for; and nothing of a model stays behind."""

from __future__ import annotations

import contextvars
import copy
import dataclasses
import gc
import pickle
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import numpy as np
import pytest

import graphlens
from graphlens import Ablate, HookedTransformer, InputError, Steer
from graphlens.attribution import attribution_patch
from graphlens.engine.engine import Engine
from graphlens.file.io_names import INPUT_IDS
from graphlens.metrics import LogitDiff
from graphlens.model.per_thread import PerThread
from graphlens.patching import Site

Z = "blocks.1.attn.hook_z"
TEXT = "When John and Mary went to the store, John gave a drink to"


def test_a_run_is_what_the_facade_gives(tiny: HookedTransformer) -> None:
    runner = tiny.runner
    ran = runner.run(runner.request(TEXT), [Z])
    logits, cache = tiny.run_with_cache(TEXT, names_filter=Z)
    np.testing.assert_array_equal(ran.logits, logits)
    np.testing.assert_array_equal(ran.values[Z], cache[Z])
    assert runner.run(runner.request(TEXT), [Z], output=False).output is None


def test_what_is_active_reaches_every_run(tiny: HookedTransformer) -> None:
    runner, edit = tiny.runner, Ablate(Z, heads=2)
    request = runner.request(TEXT)
    plain = runner.run(request).logits
    assert runner.active().plain
    with runner.editing(edit), tiny.hooks([(Z, lambda z, hook: z * 2)]):
        active = runner.active()
        assert active.interventions == (edit,)
        assert [name for name, _ in active.hooks] == [Z]
        assert not active.plain
        then = runner.snapshot()
        edited = runner.run(request).logits
    assert np.abs(edited - plain).max() > 1e-3
    np.testing.assert_array_equal(runner.run(request).logits, plain)
    with runner.hooks.only(then.hooks), runner.edits.only(then.interventions):
        np.testing.assert_array_equal(runner.run(request).logits, edited)
    other = tiny.hooks([(Z, lambda z, hook: z * 0)])
    with other, runner.hooks.only(then.hooks), runner.edits.only(then.interventions):  # and nothing else
        np.testing.assert_array_equal(runner.run(request).logits, edited)


def test_a_run_with_one_hook_looks_at_no_other_hook_point(tiny: HookedTransformer) -> None:
    package, calls = str(Path(graphlens.__file__).parent), 0

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename.startswith(package)

    hooks = [(Z, lambda z, hook: None)]
    tiny.run_with_hooks([[1, 2, 3]], fwd_hooks=hooks)  # opens the session
    sys.setprofile(count)
    try:
        tiny.run_with_hooks([[1, 2, 3]], fwd_hooks=hooks)
    finally:
        sys.setprofile(None)
    assert 0 < calls < 170  # a call for each of the 74 hook points would make it 226


def test_a_value_of_its_own_in_each_thread() -> None:
    one, other = PerThread(()), PerThread(())
    seen: list[object] = []
    with one.during((1,)):
        thread = threading.Thread(target=lambda: seen.append(one.get()))
        thread.start()
        thread.join()
        assert (one.get(), other.get()) == ((1,), ())
        with one.during((1, 2)), other.during((3,)):
            assert (one.get(), other.get()) == ((1, 2), (3,))
        assert one.get() == (1,)
    assert seen == [()]
    assert one.get() == ()


def test_blocks_of_two_models_may_end_in_any_order() -> None:
    one, other = PerThread(0), PerThread(0)
    first, second = one.during(1), other.during(2)
    with first:
        second.__enter__()
    assert (one.get(), other.get()) == (0, 2)
    second.__exit__(None, None, None)
    assert (one.get(), other.get()) == (0, 0)


def test_a_block_ends_where_it_began(tiny: HookedTransformer) -> None:
    def doubled() -> Iterator[None]:
        with tiny.hooks([(Z, lambda z, hook: z * 2)]):
            with tiny.hooks([(Z, lambda z, hook: z * 0)]), tiny.intervene(Ablate(Z, heads=0)):
                yield
            yield

    def elsewhere() -> tuple[str, bool]:
        with pytest.raises(InputError) as caught:
            next(blocks)
        return str(caught.value), tiny.runner.active().plain

    blocks = doubled()
    context = contextvars.copy_context()  # which keeps what is never ended
    context.run(next, blocks)
    with ThreadPoolExecutor(1) as pool:
        message, plain = pool.submit(elsewhere).result()
    assert "leave it where it was entered" in message
    assert plain
    assert tiny.runner.active().plain


def held() -> int:
    """How much this thread's context holds: its variables, and the entries of those that are mappings."""
    values = contextvars.copy_context().values()
    return sum(1 + (len(value) if isinstance(value, Mapping) else 0) for value in values)


def test_dropped_models_leave_nothing(tiny_copy: Path) -> None:
    def used() -> weakref.ref[Any]:
        model = HookedTransformer.from_onnx(tiny_copy, "cpu")
        with model.intervene(Ablate(Z, heads=0)):
            model.run_with_hooks([[1, 2, 3]], fwd_hooks=[(Z, lambda z, hook: None)])
        model.reset_hooks()
        return weakref.ref(model.runner.engine)

    used()
    gc.collect()
    before = held()
    engines = [used() for _ in range(2)]
    gc.collect()
    assert held() == before
    assert [engine() for engine in engines] == [None] * 2


def test_a_hook_point_of_a_part_is_looked_up_alone(tiny: HookedTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("every hook point was collected for one")

    point = tiny.hook_dict[Z]
    monkeypatch.setattr("graphlens.model.hooks.HookDict.__init__", fail)
    assert tiny.blocks[1].attn.hook_z is point
    assert tiny.hook_embed.name == "hook_embed"


def test_integrated_gradients_share_a_session(tiny_copy: Path) -> None:
    model = HookedTransformer.from_onnx(tiny_copy, "cpu")
    _, clean = model.run_with_cache(TEXT)
    corrupted = TEXT.replace("and Mary", "and John")
    sites = [Site(name, layer) for layer in range(4) for name in ("resid_pre", "z", "mlp_post")]
    metric = LogitDiff(" Mary", " John")
    attribution_patch(model, corrupted, sites, clean, metric, verbose=False)
    built = model.runner.engine.sessions_built
    attribution_patch(model, corrupted, sites, clean, metric, steps=3, verbose=False)
    assert model.runner.engine.sessions_built - built == 1


def test_a_steering_vector_counts_in_gradients_as_in_runs(tiny: HookedTransformer) -> None:
    vector = np.random.default_rng(0).standard_normal(tiny.cfg.d_model).astype(np.float32)
    metric = LogitDiff(" Mary", " John")
    with tiny.intervene(Steer("blocks.0.hook_resid_pre", vector)):
        steered = tiny.gradients(TEXT, metric, "blocks.2.hook_resid_pre")
    plain = tiny.gradients(TEXT, metric, "blocks.2.hook_resid_pre")
    assert np.abs(steered["blocks.2.hook_resid_pre"] - plain["blocks.2.hook_resid_pre"]).max() > 1e-4


def test_gradients_are_of_whole_prompts(tiny: HookedTransformer) -> None:
    with pytest.raises(InputError, match="whole prompts"):
        tiny.gradients(TEXT, LogitDiff(" Mary", " John"), stop_at_layer=2)


# A model object is a plain object


def test_a_copy_has_a_tokenizer_and_interventions_of_its_own(tiny_copy: Path) -> None:
    model = HookedTransformer.from_onnx(tiny_copy, "cpu")
    other = copy.copy(model)
    other.tokenizer = None
    assert model.tokenizer is not None
    with other.intervene(Ablate(Z, heads=2)):
        assert not other.runner.active().plain
        assert model.runner.active().plain
    np.testing.assert_array_equal(other([[1, 2, 3]]), model([[1, 2, 3]]))


@pytest.mark.parametrize("copied", [lambda value: pickle.loads(pickle.dumps(value)), copy.deepcopy])
def test_a_model_that_is_pickled_or_copied_deeply_is_opened_again(tiny_copy: Path, copied: Any) -> None:
    model = HookedTransformer.from_onnx(tiny_copy, "cpu", default_prepend_bos=False, n_ctx=20)
    model.default_padding_side = "left"
    model.set_use_attn_result(True)
    with model.hooks(fwd_hooks=[(Z, lambda z, hook: z * 0)]), model.intervene(Ablate(Z, heads=2)):
        other, attention, point = copied((model, model.blocks[1].attn, model.hook_dict[Z]))
        assert not model.runner.active().plain
        assert other.runner.active().plain, "hooks and interventions are those of the model that they were added to"
        assert point.fwd_hooks == []
    assert (other.default_padding_side, other.cfg) == ("left", model.cfg)
    assert list(other.hook_dict) == list(model.hook_dict)
    np.testing.assert_array_equal(other("When Mary"), model("When Mary"))
    np.testing.assert_array_equal(attention.W_Q, model.blocks[1].attn.W_Q)
    other.set_use_attn_result(False)
    other.default_padding_side = "right"
    assert model.cfg.use_attn_result
    assert model.default_padding_side == "left"


def test_a_tokenizer_may_be_patched_for_a_while(tiny_copy: Path) -> None:
    model = HookedTransformer.from_onnx(tiny_copy, "cpu")
    own = model.tokenizer
    with mock.patch.object(model, "tokenizer", None), pytest.raises(InputError, match="has no tokenizer"):
        model.to_tokens("When")
    assert model.tokenizer is own


def test_a_subclass_may_take_what_it_passes_on_by_name(tiny_copy: Path) -> None:
    class Loud(HookedTransformer):
        def forward(self, input: Any, **options: Any) -> Any:  # type: ignore[override]
            return -super().forward(input, **options)

    model, edit = Loud.from_onnx(tiny_copy, "cpu"), Ablate(Z, heads=2)
    plain = HookedTransformer.from_onnx(tiny_copy, "cpu")
    found = model.run_with_interventions([[1, 2, 3]], edit)
    np.testing.assert_array_equal(found, -plain.run_with_interventions([[1, 2, 3]], edit))


def test_a_stream_of_text_has_one_prompt_whatever_it_is_given_as(tiny: HookedTransformer) -> None:
    with pytest.raises(InputError, match="a stream of text has one prompt"):
        tiny.generate_stream(np.asarray([[5, 6], [7, 8]]), return_type="str", verbose=False)


def test_a_metric_of_ones_own_may_be_a_proxy(tiny: HookedTransformer) -> None:
    class Sum:
        name = "own"

        def __getattr__(self, name: str) -> Any:
            if name != "gradient":
                raise AttributeError(name)
            return lambda logits: np.ones_like(logits) / logits.size

    found = tiny.gradients(TEXT, Sum(), "blocks.2.hook_resid_pre")
    assert np.isfinite(found["blocks.2.hook_resid_pre"]).all()


def test_what_follows_from_a_config_follows_a_changed_one(tiny: HookedTransformer) -> None:
    # -1: what follows from the others.
    changed = dataclasses.replace(tiny.cfg, d_head=64, d_vocab=10, d_vocab_out=-1, attn_scale=-1.0)
    assert (changed.attn_scale, changed.d_vocab_out) == (8.0, 10)


def test_integrated_gradients_of_one_hook_point_ignore_the_others(tiny: HookedTransformer) -> None:
    """One graph has the gates of all hook points; those that a run leaves alone change nothing in it."""
    _, clean = tiny.run_with_cache(TEXT)
    corrupted, metric = TEXT.replace("John gave", "Mary gave"), LogitDiff(" Mary", " John")
    sites = [
        Site("z", 3, head=1),
        Site("resid_pre", 0),
        Site("attn_scores", 1, head=0),  # of which masked ones are -inf in both runs
        Site("resid_pre", 0, position=3),
        Site("blocks.1.ln1.hook_scale"),
        Site("hook_embed"),
    ]

    def estimated(some: list[Site]) -> np.ndarray:
        return attribution_patch(tiny, corrupted, some, clean, metric, steps=4, verbose=False).values

    alone = np.concatenate([estimated([site]) for site in sites])
    assert np.isfinite(alone).all()
    assert len(np.unique(alone)) == len(sites)
    np.testing.assert_array_equal(estimated(sites), alone)
    np.testing.assert_array_equal(estimated(sites[::-1])[::-1], alone)


def test_an_interrupted_generation_leaves_nothing_active(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    def generated() -> np.ndarray:
        return tiny.generate(tokens, max_new_tokens=5, do_sample=False, verbose=False)

    def interrupt(z: np.ndarray, hook: Any) -> None:
        lengths.append(z.shape[1])
        if len(lengths) == 3:
            raise KeyboardInterrupt
        z[...] = 0

    logits, text = tiny(tokens), generated()
    lengths: list[int] = []
    with pytest.raises(KeyboardInterrupt), tiny.intervene([Ablate(Z, heads=2)]), tiny.hooks([(Z, interrupt)]):
        generated()
    assert lengths == [6, 1, 1]  # the prompt, then a token at a time
    np.testing.assert_array_equal(tiny(tokens), logits)
    np.testing.assert_array_equal(generated(), text)


def test_threads_share_a_model_each_with_its_own_changes(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    def steered() -> np.ndarray:
        with tiny.intervene([Ablate(Z, heads=0)]):
            return tiny(tokens)

    def hooked() -> np.ndarray:
        with tiny.hooks([("blocks.2.attn.hook_z", lambda z, hook: z * 2)]):
            return tiny(tokens)

    works = (lambda: tiny(tokens), steered, hooked)
    expected = [work() for work in works]
    assert all(np.abs(expected[i] - expected[j]).max() > 1e-2 for i, j in ((0, 1), (0, 2), (1, 2)))
    start = threading.Barrier(len(works), timeout=30)

    def repeat(index: int) -> list[np.ndarray]:
        start.wait()
        return [works[index]() for _ in range(10)]

    with ThreadPoolExecutor(len(works)) as pool:
        for index, found in enumerate(pool.map(repeat, range(len(works)))):
            for logits in found:
                np.testing.assert_array_equal(logits, expected[index])


def test_an_engine_that_nobody_holds_is_gone_at_once(tiny_folder: Path) -> None:
    """Its sessions map the weights: where it waited for a collection of circles, two were in memory at a time."""
    gc.disable()
    try:
        engine = Engine(tiny_folder, "cpu")
        engine.run({INPUT_IDS: np.arange(6)[None]}, engine.hook_names)
        watched = weakref.ref(engine)
        del engine
        assert watched() is None
    finally:
        gc.enable()
