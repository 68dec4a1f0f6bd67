"""Every whole or finite number that a user gives is checked: nothing is cut to an int, and NaN gets nowhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import graphlens
from graphlens import Ablate, FactoredMatrix, HookedTransformer, KeyValueCache, surgery
from graphlens.attribution import attribution_patch, circuit, compare_with_sweep, edge_attribution
from graphlens.errors import HookResultError, InputError, checked_number
from graphlens.metrics import LogitDiff, Probability
from graphlens.patching import Noise, Site, SweepResult, generic_activation_patch, sweep
from graphlens.utils import Slice, detect_head, induction_loss
from tests.models import MODEL

CFG = MODEL.cfg
PROMPT = "When John and Mary went"
TOKENS = MODEL.to_tokens(PROMPT)
FOLDER = graphlens.embedded_model()
RESULT = SweepResult(np.arange(3.0), ("edge",), {"edge": ("a", "b", "c")}, {"corrupted": 0.0}, {})
MATRIX = FactoredMatrix(np.ones((2, 5, 3)), np.ones((2, 3, 4)))
NO_INTEGERS: list[Any] = [
    1.5,
    2.0,
    float("nan"),
    float("inf"),
    True,
    "1",
    [1],
    np.float32(1),
    np.bool_(True),
    np.ones(1, int),
    1j,
]
NO_NUMBERS: list[Any] = [float("nan"), float("inf"), -float("inf"), np.float64("nan"), True, "1", [1.0], 10**400, 1j]
NO_BOOLS: list[Any] = [1, 0, 1.0, "no", np.int64(1)]


def generate(**options: Any) -> Any:
    return MODEL.generate(TOKENS, **{"max_new_tokens": 2, "verbose": False, "seed": 0, **options})


def cached() -> Any:
    return MODEL.run_with_cache(TOKENS)[1]


INTEGERS: dict[str, Callable[[Any], Any]] = {
    "max_new_tokens": lambda value: generate(max_new_tokens=value),
    "top_k": lambda value: generate(top_k=value),
    "seed": lambda value: generate(seed=value),
    "eos_token_id": lambda value: generate(eos_token_id=[value, 3]),
    "max_tokens_per_yield": lambda value: MODEL.generate_stream(TOKENS, 2, value, verbose=False),
    "start_at_layer": lambda value: MODEL(cached()["resid_pre", 1], start_at_layer=value),
    "stop_at_layer": lambda value: MODEL(TOKENS, stop_at_layer=value),
    "n_ctx": lambda value: HookedTransformer.from_onnx(FOLDER, "cpu", n_ctx=value),
    "batch_size": lambda value: KeyValueCache.init_cache(CFG, batch_size=value),
    "batch_size of induction_loss": lambda value: induction_loss(MODEL, batch_size=value, subseq_len=4),
    "subseq_len": lambda value: induction_loss(MODEL, batch_size=1, subseq_len=value),
    "seed of induction_loss": lambda value: induction_loss(MODEL, 1, 4, seed=value),
    "seed of Noise": lambda value: Noise(seed=value),
    "layer of a site": lambda value: Site("z", value),
    "position of a site": lambda value: Site("z", 1, position=value),
    "heads": lambda value: Ablate("x", heads=slice(value, None)),
    "step": lambda value: Ablate("x", positions=slice(None, None, value)),
    "position of a metric": lambda value: LogitDiff(1, 2, position=value),
    "detect_head": lambda value: detect_head(MODEL, PROMPT, "previous_token_head", [(1, value)]),
    "layer of detect_head": lambda value: detect_head(MODEL, PROMPT, "previous_token_head", [(value, 1)]),
    "accumulated_resid": lambda value: cached().accumulated_resid(value),
    "decompose_resid": lambda value: cached().decompose_resid(value),
    "stack_activation": lambda value: cached().stack_activation("z", value),
    "get_neuron_results": lambda value: cached().get_neuron_results(value),
    "accumulated_bias": lambda value: MODEL.accumulated_bias(value),
    "get_token_position": lambda value: MODEL.get_token_position(value, PROMPT),
    "max_batch_tokens": lambda value: sweep(
        MODEL, TOKENS, Site("z", 1), "zero", LogitDiff(1, 2), max_batch_tokens=value, verbose=False
    ),
    "steps": lambda value: attribution_patch(
        MODEL, TOKENS, Site("z", 1), "zero", LogitDiff(1, 2), steps=value, verbose=False
    ),
    "steps of edges": lambda value: edge_attribution(MODEL, TOKENS, cached(), LogitDiff(1, 2), steps=value),
    "top": lambda value: RESULT.top(value),
    "sel": lambda value: RESULT.sel(edge=value),
    "circuit": lambda value: circuit(RESULT, value),
    "compare_with_sweep": lambda value: compare_with_sweep(RESULT, RESULT, value),
    "get_corner": lambda value: MATRIX.get_corner(value),
    "unsqueeze": lambda value: MATRIX.unsqueeze(value),
    "slice": lambda value: Slice((value, 3)),
    "segment": lambda value: surgery.segment(surgery.load(FOLDER / "model.onnx"), stop=value),
}
ALSO: dict[str, tuple[type[Any], ...]] = {  # what these take besides
    "position of a site": (list, np.ndarray),
    "position of a metric": (list, np.ndarray),
    "get_token_position": (str,),
}
NUMBERS: dict[str, Callable[[Any], Any]] = {
    "temperature": lambda value: generate(temperature=value),
    "freq_penalty": lambda value: generate(freq_penalty=value),
    "top_p": lambda value: generate(top_p=value),
    "scale": lambda value: Noise(scale=value),
}
BOOLS: dict[str, Callable[[Any], Any]] = {
    "prepend_bos": lambda value: MODEL(PROMPT, prepend_bos=value),
    "prepend_bos of to_tokens": lambda value: MODEL.to_tokens(PROMPT, prepend_bos=value),
    "do_sample": lambda value: generate(do_sample=value),
    "stop_at_eos": lambda value: generate(stop_at_eos=value),
    "use_past_kv_cache": lambda value: generate(use_past_kv_cache=value),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_what_is_no_whole_number_is_refused(name: str) -> None:
    for value in NO_INTEGERS:
        if isinstance(value, ALSO.get(name, ())):
            continue
        with pytest.raises(InputError):
            INTEGERS[name](value)
    INTEGERS[name](np.int32({"subseq_len": 4, "get_token_position": TOKENS[0, 1]}.get(name, 1)))


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_finite_number_is_refused(name: str) -> None:
    for value in NO_NUMBERS:
        with pytest.raises(InputError, match=f"{name} must be a finite number"):
            NUMBERS[name](value)
    NUMBERS[name](np.float32(0.5))
    NUMBERS[name](1)


@pytest.mark.parametrize("name", BOOLS)
def test_what_is_no_bool_is_refused(name: str) -> None:
    for value in NO_BOOLS:
        with pytest.raises(InputError, match="must be True or False"):
            BOOLS[name](value)
    BOOLS[name](np.bool_(True))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": -0.5}, "temperature=-0.5: temperature must be a finite number of 0 or more"),
        ({"top_k": 0}, "top_k=0: top_k must be a whole number of 1 or more"),
        ({"top_p": 0.0}, "top_p must be more than 0"),
        ({"top_p": 1.5}, "a finite number of 1 or less"),
        ({"max_new_tokens": -1}, "a whole number of 0 or more"),
        ({"seed": -1}, "a whole number of 0 or more"),
        ({"max_new_tokens": 2.0}, "max_new_tokens=2.0: max_new_tokens must be a whole number"),
    ],
    ids=str,
)
def test_the_sentence_names_the_argument_and_its_limits(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as error:
        generate(**options)
    assert says in str(error.value)


def test_a_number_comes_back_as_python_s_own() -> None:
    for value in (3, np.int8(3), np.uint64(3), np.asarray(3)):
        found = checked_number(value, "n", least=3, most=3)
        assert (found, type(found)) == (3, int)
    assert checked_number(10**30, "n") == 10**30
    number = checked_number(np.float16(0.5), "n", float)
    assert (number, type(number)) == (0.5, float)
    with pytest.raises(InputError, match="n=7: n must be a whole number from 1 to 6"):
        checked_number(7, "n", least=1, most=6)


@pytest.mark.parametrize("bad", [-1, CFG.d_vocab, 2**40])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_hook_that_returns_no_token_is_refused(bad: int, in_place: bool) -> None:
    def edit(tokens: np.ndarray, hook: Any) -> np.ndarray | None:
        changed = tokens if in_place else tokens.copy()
        changed[0, 1] = bad
        return None if in_place else changed

    MODEL.set_use_hook_tokens(True)
    try:
        with pytest.raises(
            HookResultError, match=rf"'edit' at 'hook_tokens' returned the token id {bad}: ids go from 0 to"
        ):
            MODEL.run_with_hooks(TOKENS, fwd_hooks=[("hook_tokens", edit)])
        last = CFG.d_vocab - 1

        def allowed(tokens: np.ndarray, hook: Any) -> None:
            tokens[0, 1] = last

        found = MODEL.run_with_hooks(TOKENS, fwd_hooks=[("hook_tokens", allowed)])
    finally:
        MODEL.set_use_hook_tokens(False)
    ids = TOKENS.copy()
    ids[0, 1] = last
    np.testing.assert_allclose(found, MODEL(ids), atol=1e-5)


def test_an_index_table_of_floats_is_refused(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    from graphlens.patching import generic_activation_patch, layer_head_vector_patch_setter

    table = pandas.DataFrame([[0.5, 1.0]], columns=["layer", "head"])
    with pytest.raises(InputError, match="an index of index_df must be a whole number"):
        generic_activation_patch(
            MODEL, TOKENS, cached(), LogitDiff(1, 2), layer_head_vector_patch_setter, "z", index_df=table
        )


def test_a_tiny_temperature_takes_the_likeliest_token() -> None:
    expected = generate(temperature=0)
    for temperature in (1e-30, 1e-308, 1e-320):
        np.testing.assert_array_equal(generate(temperature=temperature, do_sample=True), expected)


@pytest.mark.parametrize("large", [2**63, 2**64 - 1])  # as int64 they would be negative: the last token, say
def test_a_number_beyond_int64_is_no_other_number(large: int) -> None:
    for refused in (
        lambda: Probability(large),
        lambda: LogitDiff(large, 1),
        lambda: LogitDiff(np.asarray([large, 1], np.uint64), 1),
        lambda: LogitDiff(0, 1, position=large),
        lambda: MATRIX[large],
        lambda: MATRIX[:, large],
    ):
        with pytest.raises(InputError):
            refused()


def test_what_is_no_number_is_no_factor() -> None:
    for value in ("2", b"2", None, 1j, [[1], [2, 3]], np.ones(2)):
        with pytest.raises(InputError):
            _ = MATRIX * value


@pytest.mark.parametrize("value", [None, "x", np.ones(2), [[1], [2, 3]], 1j], ids=str)
def test_what_a_metric_returns_is_one_number(value: Any) -> None:
    cache = cached()
    for run in (
        lambda: sweep(MODEL, TOKENS, [Site("z", 1)], cache, lambda logits: value, verbose=False),
        lambda: generic_activation_patch(
            MODEL, TOKENS, cache, lambda logits: value, lambda new, *_: new, "z", ["layer"]
        ),
    ):
        with pytest.raises(InputError):
            run()


@pytest.mark.parametrize("name", ["clear_contexts", "remove_batch_dim", "return_cache_object"])
def test_what_a_run_is_to_give_is_checked_before_it_runs(name: str) -> None:
    called = []
    hooks = [("hook_embed", lambda activation, hook: called.append(hook.name))]
    with MODEL.hooks(hooks), pytest.raises(InputError, match=name):
        MODEL.run_with_cache(TOKENS, **{name: 2})
    assert not called
