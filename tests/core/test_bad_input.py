"""Bad input: each mistake gets an error of graphlens's own that says what exists instead or what to do."""

from __future__ import annotations

import functools
import re
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphlens import HookedTransformer
from graphlens.errors import GraphlensError, HookResultError, InputError, UnknownHookPoint
from graphlens.file.folder import TOKENIZER_FILES


class Boom(Exception):
    """An exception no library raises."""


def keep(activation: np.ndarray, hook: Any) -> None:
    """A hook that changes nothing."""


ASK_BY_NAME: dict[str, Callable[[HookedTransformer, Any, str], Any]] = {
    "names_filter": lambda model, tokens, name: model.run_with_cache(tokens, names_filter=name),
    "list": lambda model, tokens, name: model.run_with_cache(tokens, names_filter=["hook_embed", name]),
    "fwd_hooks": lambda model, tokens, name: model.run_with_hooks(tokens, fwd_hooks=[(name, keep)]),
}


def unknown(how: str, model: HookedTransformer, tokens: Any, name: str) -> str:
    """The message of the error that asking for ``name`` gives."""
    with pytest.raises(UnknownHookPoint) as caught:
        ASK_BY_NAME[how](model, tokens, name)
    assert isinstance(caught.value, GraphlensError)
    assert isinstance(caught.value, KeyError)
    return str(caught.value)


# Hook names


@pytest.mark.parametrize("how", ASK_BY_NAME)
@pytest.mark.parametrize(
    ("asked", "nearest"),
    [
        ("blocks.1.hook_resid_pots", "blocks.1.hook_resid_post"),
        ("blocks.2.attn.hook_patern", "blocks.2.attn.hook_pattern"),
        ("blocks.0.hook_z", "blocks.0.attn.hook_z"),
        ("hook_embedd", "hook_embed"),
        ("ln_final.hook_scal", "ln_final.hook_scale"),
    ],
)
def test_a_misspelt_hook_name_is_answered_with_the_nearest_one(
    how: str, asked: str, nearest: str, tiny: HookedTransformer, tokens: np.ndarray
) -> None:
    message = unknown(how, tiny, tokens, asked)
    assert message.startswith(repr(asked))
    assert repr(nearest) in message
    assert "model.hook_points()" in message


@pytest.mark.parametrize("how", ASK_BY_NAME)
@pytest.mark.parametrize("rest", ["attn.hook_z", "hook_resid_pre", "mlp.hook_post", "ln1.hook_scale"])
@pytest.mark.parametrize("beyond", [0, 1, 1000])
def test_a_layer_that_is_not_there_is_answered_with_the_last_one(
    how: str, rest: str, beyond: int, tiny: HookedTransformer, tokens: np.ndarray
) -> None:
    layers = tiny.cfg.n_layers
    message = unknown(how, tiny, tokens, f"blocks.{layers + beyond}.{rest}")
    assert f"{layers} layers (0-{layers - 1})" in message
    assert f"'blocks.{layers - 1}.{rest}'" in message


def test_a_negative_layer_is_answered_with_hook_points_of_that_kind(
    tiny: HookedTransformer, tokens: np.ndarray
) -> None:
    assert re.search(r"'blocks\.\d\.hook_resid_pre'", unknown("names_filter", tiny, tokens, "blocks.-1.hook_resid_pre"))


@pytest.mark.parametrize("how", ASK_BY_NAME)
@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("hook_tokens", "use_hook_tokens"),
        ("blocks.0.hook_attn_in", "use_attn_in"),
        ("blocks.1.hook_q_input", "use_split_qkv_input"),
        ("blocks.1.hook_k_input", "use_split_qkv_input"),
        ("blocks.1.hook_v_input", "use_split_qkv_input"),
        ("blocks.2.attn.hook_result", "use_attn_result"),
        ("blocks.3.hook_mlp_in", "use_hook_mlp_in"),
    ],
)
def test_a_hook_point_behind_a_flag_is_answered_with_that_flag(
    how: str, name: str, flag: str, tiny: HookedTransformer, tokens: np.ndarray
) -> None:
    message = unknown(how, tiny, tokens, name)
    assert repr(name) in message
    assert repr(flag) in message
    assert f"model.set_{flag}(True)" in message


@pytest.mark.parametrize("name", ["hook_attn_in", "blocks.0.hook_tokens", "blocks.9.hook_mlp_in"])
def test_no_flag_is_promised_for_a_name_that_no_flag_gives(
    name: str, tiny: HookedTransformer, tokens: np.ndarray
) -> None:
    assert "use_" not in unknown("names_filter", tiny, tokens, name)


def test_a_name_not_in_a_cache_is_answered_with_the_nearest_in_it(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    _, cache = tiny.run_with_cache(tokens, names_filter=["blocks.1.attn.hook_q", "blocks.1.attn.hook_k"])
    with pytest.raises(
        UnknownHookPoint, match=r"'blocks\.1\.attn\.hook_v'.*'blocks\.1\.attn\.hook_[qk]'.*names_filter"
    ):
        cache["v", 1]


# Filters that match nothing


@pytest.mark.parametrize("nothing", [[], (), set()], ids=repr)
def test_an_empty_filter_is_refused(nothing: Any, tiny: HookedTransformer, tokens: np.ndarray) -> None:
    with pytest.raises(UnknownHookPoint, match=r"empty.*None"):
        tiny.run_with_cache(tokens, names_filter=nothing)


@pytest.mark.parametrize("name", ["", "no such thing", "BLOCKS.0.HOOK_RESID_PRE", "blocks.*.hook_resid_pre"])
def test_a_name_that_matches_nothing_is_refused(name: str, tiny: HookedTransformer, tokens: np.ndarray) -> None:
    for how in ASK_BY_NAME:
        message = unknown(how, tiny, tokens, name)
        assert repr(name) in message
        assert "model.hook_points()" in message


def test_a_function_that_picks_nothing_is_refused(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    says = rf"matches none of the {len(tiny.hook_dict)} hook points.*'hook_embed'.*model\.hook_points\(\)"
    with pytest.raises(UnknownHookPoint, match=says):
        tiny.run_with_cache(tokens, names_filter=lambda name: name.endswith("resid"))
    with pytest.raises(UnknownHookPoint, match=says):
        tiny.run_with_hooks(tokens, fwd_hooks=[(lambda name: name.endswith("resid"), keep)])


# Tokens


@pytest.mark.parametrize("texts", ["", [""], ["", ""]], ids=repr)
def test_an_empty_prompt_without_bos_is_refused(texts: Any, tiny: HookedTransformer) -> None:
    for call in (tiny, tiny.run_with_cache, tiny.generate):
        with pytest.raises(InputError, match=r"empty.*prepend_bos=True"):
            call(texts, prepend_bos=False)
    none = tiny.to_tokens(texts, prepend_bos=False)
    assert (none.shape, none.dtype) == ((len(texts) or 1, 0), np.int64)
    with pytest.raises(InputError, match="empty"):
        tiny(none)
    with pytest.raises(InputError, match=r"empty.*prepend_bos=True"):
        tiny.test_prompt("", "a", prepend_bos=False)


@pytest.mark.parametrize(
    "empty", [[], (), [[]], np.zeros(0, np.int64), np.zeros((0, 4), np.int64), np.zeros((2, 0), np.int32)], ids=repr
)
def test_an_input_of_no_tokens_is_refused(empty: Any, tiny: HookedTransformer) -> None:
    with pytest.raises(InputError, match="empty"):
        tiny(empty)


@pytest.mark.parametrize("outside", ["first", "negative", "large", "unsigned"])
def test_a_token_outside_the_vocabulary_is_named_with_the_range(outside: str, tiny: HookedTransformer) -> None:
    size = tiny.cfg.d_vocab
    token = {"first": size, "negative": -1, "large": 2**62, "unsigned": np.uint64(2**63 + 1)}[outside]
    with pytest.raises(InputError, match=rf"token id {token} .*vocabulary.* 0 to {size - 1}\b"):
        tiny(np.asarray([[1, 2, 3], [4, 5, token]], type(token) if outside == "unsigned" else np.int64))


def test_tokens_may_be_integers_of_any_width_or_nested_lists(tiny: HookedTransformer) -> None:
    tokens = np.asarray([[3, 1, 4], [1, 5, 9]])
    expected = tiny(tokens)
    for dtype in (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.uint64, ">i4"):
        np.testing.assert_array_equal(tiny(tokens.astype(dtype)), expected)
    np.testing.assert_array_equal(tiny(tokens.tolist()), expected)
    np.testing.assert_array_equal(tiny([tuple(row) for row in tokens.tolist()]), expected)


def test_more_tokens_than_the_context_are_refused(tiny: HookedTransformer) -> None:
    n_ctx = tiny.cfg.n_ctx
    assert tiny(np.zeros(n_ctx, np.int64)).shape == (1, n_ctx, tiny.cfg.d_vocab)
    with pytest.raises(InputError, match=rf"{n_ctx + 1} tokens.*{n_ctx} \(n_ctx\)"):
        tiny(np.zeros((2, n_ctx + 1), np.int64))


def test_a_long_text_is_cut_with_a_warning_and_its_ids_are_refused(tiny: HookedTransformer) -> None:
    text, n_ctx = "a drink to Mary " * 100, tiny.cfg.n_ctx
    ids = tiny.to_tokens(text, truncate=False)
    says = rf"^{ids.shape[1] - n_ctx} tokens were cut from the end of the text: .* at most {n_ctx} \(n_ctx\)"
    for call in (tiny, lambda text: tiny.run_with_cache(text, names_filter="hook_embed")[0]):
        with pytest.warns(UserWarning, match=says) as caught:
            logits = call(text)
        assert caught[0].filename == __file__
        np.testing.assert_array_equal(logits, tiny(ids[:, :n_ctx]))
    with pytest.warns(UserWarning, match=rf"^{ids.shape[1] - n_ctx}, 3 tokens were cut"):
        tiny([text, "a", tiny.to_string(ids[0, 1 : n_ctx + 3])])
    with pytest.raises(InputError, match=rf"{ids.shape[1]} tokens.*{n_ctx} \(n_ctx\)"):
        tiny(ids)
    with pytest.raises(InputError, match=rf"{ids.shape[1]} tokens.*{n_ctx} \(n_ctx\)"):
        tiny.generate(text)  # nothing could follow it


@pytest.mark.parametrize(
    "ragged",
    [
        [[1, 2], [3]],
        ([1], [2, 3]),
        [[1, 2], 3],
        [np.asarray([1, 2]), np.asarray([3])],
        [[[1], [2, 3]]],
    ],
    ids=repr,
)
def test_ragged_tokens_are_refused(ragged: Any, tiny: HookedTransformer) -> None:
    with pytest.raises(InputError, match=r"ragged.*pad"):
        tiny(ragged)


@pytest.mark.parametrize(
    "kind",
    [
        np.asarray([1.0, 2.0]),
        [[1.0, 2.0]],
        np.asarray([1.0], np.float16),
        [float("nan")],
        [True, False],
        [1j],
        [None],
        None,
        ["text", 3],
        [b"text"],
        [2**70],
    ],
    ids=repr,
)
def test_tokens_that_are_not_integers_are_refused(kind: Any, tiny: HookedTransformer) -> None:
    with pytest.raises(InputError, match="tokens must be integers"):
        tiny(kind)


@pytest.mark.parametrize("shape", [(), (1, 2, 3), (1, 1, 1, 1)])
def test_tokens_of_another_rank_are_refused(shape: tuple[int, ...], tiny: HookedTransformer) -> None:
    with pytest.raises(InputError, match=rf"\[batch, pos\] or \[pos\], not {re.escape(str(list(shape)))}"):
        tiny(np.ones(shape, np.int64))


def test_a_loss_of_one_token_is_refused(tiny: HookedTransformer) -> None:
    with pytest.raises(InputError, match="at least 2 tokens"):
        tiny([3], return_type="loss")


# The attention mask and other options


@pytest.mark.parametrize("shape", [(2, 5), (1, 6), (6,), (2, 6, 1), (3, 6)])
def test_a_mask_of_another_shape_than_the_tokens_is_refused(
    shape: tuple[int, ...], tiny: HookedTransformer, tokens: np.ndarray
) -> None:
    with pytest.raises(InputError, match=r"attention_mask has shape .*; the tokens have \[2, 6\]"):
        tiny(tokens, attention_mask=np.ones(shape, np.int64))


@pytest.mark.parametrize("entry", [2, -1, 100, 0.5, float("nan"), float("-inf")])
def test_a_mask_of_something_else_than_0_and_1_is_refused(
    entry: float, tiny: HookedTransformer, tokens: np.ndarray
) -> None:
    mask = np.ones((2, 6), type(entry))
    mask[1, 0] = entry
    with pytest.raises(InputError, match="attention_mask"):
        tiny(tokens, attention_mask=mask)


def test_a_mask_may_be_of_any_type_that_holds_0_and_1(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    mask = np.asarray([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    expected = tiny(tokens, attention_mask=mask)
    assert not np.array_equal(expected, tiny(tokens))
    for other in (mask.astype(bool), mask.astype(np.int8), mask.astype(np.float32), mask.tolist()):
        np.testing.assert_array_equal(tiny(tokens, attention_mask=other), expected)


@pytest.mark.parametrize("asked", ["logit", "Loss", 3, "", False], ids=repr)
def test_an_unknown_return_type_is_answered_with_those_there_are(
    asked: Any, tiny: HookedTransformer, tokens: np.ndarray
) -> None:
    says = rf"'logits', 'loss', 'both', None\), not {re.escape(repr(asked))}"
    with pytest.raises(InputError, match=says):
        tiny(tokens, return_type=asked)
    with pytest.raises(InputError, match=says):
        tiny.run_with_cache(tokens, return_type=asked)


# Text


@pytest.mark.parametrize("text", ["", " Mary John", "store, store"])
def test_a_text_that_is_not_one_token_is_answered_with_its_tokens(text: str, tiny: HookedTransformer) -> None:
    pieces = [] if text == "" else tiny.to_str_tokens(text, prepend_bos=False)
    assert "".join(pieces) == text
    assert len(pieces) != 1
    with pytest.raises(InputError) as caught:
        tiny.to_single_token(text)
    for part in (repr(text), f"{len(pieces)} tokens", str(pieces)):
        assert part in str(caught.value)


def test_a_folder_without_tokenizer_takes_token_ids_and_says_so_of_text(
    tiny: HookedTransformer, tiny_copy: Path, tokens: np.ndarray
) -> None:
    for name in TOKENIZER_FILES:
        (tiny_copy / name).unlink(missing_ok=True)
    model = HookedTransformer.from_onnx(tiny_copy, "cpu")
    for call in (model, model.to_tokens, model.to_str_tokens, model.to_single_token, model.run_with_cache):
        with pytest.raises(InputError, match=rf"{re.escape(str(tiny_copy))} has no tokenizer: pass token ids"):
            call("When John")
    with pytest.raises(InputError, match="has no tokenizer"):
        model.to_string(tokens)
    np.testing.assert_array_equal(model(tokens), tiny(tokens))


# Hooks that raise


@pytest.mark.parametrize("at", ["hook_embed", "blocks.1.attn.hook_z", "unembed.hook_out"])
def test_what_a_hook_raises_reaches_the_caller_as_itself(at: str, tiny: HookedTransformer, tokens: np.ndarray) -> None:
    raised = Boom("mine")

    def a_hook_with_a_fault(activation: np.ndarray, hook: Any) -> None:
        raise raised

    with pytest.raises(Boom) as caught:
        tiny.run_with_hooks(tokens, fwd_hooks=[(at, a_hook_with_a_fault)])
    assert caught.value is raised
    frames = [frame.name for frame in traceback.extract_tb(raised.__traceback__)]
    assert frames[-1] == "a_hook_with_a_fault"
    assert "test_what_a_hook_raises_reaches_the_caller_as_itself" in frames
    shown = "".join(traceback.format_exception(raised))
    assert "raise raised" in shown
    assert "ONNXRuntime" not in shown


def test_hooks_after_one_that_raises_do_not_run(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    ran = []

    def record(activation: np.ndarray, hook: Any) -> None:
        ran.append(hook.name)

    def fault(activation: np.ndarray, hook: Any) -> None:
        raise Boom

    later = ["blocks.1.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.2.hook_resid_post", "unembed.hook_out"]
    hooks = [("blocks.0.hook_resid_pre", record), ("blocks.1.hook_resid_pre", fault), *((n, record) for n in later)]
    with pytest.raises(Boom):
        tiny.run_with_hooks(tokens, fwd_hooks=hooks)
    assert ran == ["blocks.0.hook_resid_pre"]
    tiny.run_with_hooks(tokens, fwd_hooks=[(name, record) for name in later])
    assert ran[1:] == later


@pytest.mark.parametrize("kind", [Boom, KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration, MemoryError])
def test_after_a_hook_raised_the_model_runs_as_before(
    kind: type[BaseException], tiny: HookedTransformer, tokens: np.ndarray
) -> None:
    def fault(activation: np.ndarray, hook: Any) -> None:
        activation[...] = np.nan
        raise raised

    raised = kind("stop")
    logits, cache = tiny.run_with_cache(tokens)
    hooked = tiny.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_mlp_out", lambda x, hook: x * 2)])
    for at in ("hook_embed", "blocks.2.attn.hook_attn_scores", "ln_final.hook_normalized"):
        with pytest.raises(kind) as caught:
            tiny.run_with_hooks(tokens, fwd_hooks=[(at, fault)])
        assert caught.value is raised
    again, cache_again = tiny.run_with_cache(tokens)
    np.testing.assert_array_equal(again, logits)
    for name, value in cache.items():
        np.testing.assert_array_equal(cache_again[name], value, name)
    np.testing.assert_array_equal(tiny.run_with_hooks(tokens, fwd_hooks=[(lambda name: True, keep)]), logits)
    np.testing.assert_array_equal(
        tiny.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_mlp_out", lambda x, hook: x * 2)]), hooked
    )


# Hooks that return something else


def refused(model: HookedTransformer, tokens: np.ndarray, hook: Callable[..., Any]) -> str:
    """The message of the error that a hook at blocks.1.hook_resid_pre gives; the model is unharmed after it."""
    before = model(tokens)
    with pytest.raises(HookResultError) as caught:
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_pre", hook)])
    np.testing.assert_array_equal(model(tokens), before)
    assert "'blocks.1.hook_resid_pre'" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        (lambda x: x[:, :1], [2, 1, 128]),
        (lambda x: x[0], [6, 128]),
        (lambda x: x[..., None], [2, 6, 128, 1]),
        (lambda x: x.swapaxes(0, 1), [6, 2, 128]),
        (lambda x: x[:0], [0, 6, 128]),
        (lambda x: x.sum(), None),
    ],
)
def test_a_result_of_another_shape_is_refused(
    change: Callable[[np.ndarray], Any], shape: list[int] | None, tiny: HookedTransformer, tokens: np.ndarray
) -> None:
    def a_careless_hook(activation: np.ndarray, hook: Any) -> Any:
        return change(activation)

    message = refused(tiny, tokens, a_careless_hook)
    assert "'a_careless_hook'" in message
    if shape is not None:
        assert f"shape {shape}; the activation's shape is [2, 6, 128]" in message


def test_an_activation_reshaped_in_place_is_refused(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    def flatten(activation: np.ndarray, hook: Any) -> None:
        with warnings.catch_warnings():  # newer NumPy deprecates what is still possible
            warnings.simplefilter("ignore", DeprecationWarning)
            activation.shape = (2, 6 * 128)

    assert "[2, 768]" in refused(tiny, tokens, flatten)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32, np.complex64, bool, object, ">f4"])
def test_a_result_of_another_dtype_is_refused(dtype: Any, tiny: HookedTransformer, tokens: np.ndarray) -> None:
    def a_careless_hook(activation: np.ndarray, hook: Any) -> Any:
        return (activation > 0).astype(dtype)

    message = refused(tiny, tokens, a_careless_hook)
    assert f"'a_careless_hook' at 'blocks.1.hook_resid_pre' returned dtype {np.dtype(dtype)}" in message
    assert "float32" in message


@pytest.mark.parametrize("result", [[[1.0]], "zeros", 0.0, (), np.float32(1), {}, object], ids=repr)
def test_a_result_that_is_no_array_is_refused(result: Any, tiny: HookedTransformer, tokens: np.ndarray) -> None:
    def a_careless_hook(activation: np.ndarray, hook: Any) -> Any:
        return result

    message = refused(tiny, tokens, a_careless_hook)
    assert f"'a_careless_hook' at 'blocks.1.hook_resid_pre' returned a {type(result).__name__}, not an array" in message


def test_of_several_hooks_the_error_names_the_one_at_fault(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    def guilty(activation: np.ndarray, hook: Any, scale: float) -> Any:
        return activation.astype(np.float64) * scale

    def never(activation: np.ndarray, hook: Any) -> None:
        pytest.fail("a hook ran after one whose result was refused")

    at = "blocks.1.hook_resid_pre"
    hooks = [(at, keep), (at, functools.partial(guilty, scale=2)), (at, never), ("blocks.2.hook_resid_pre", never)]
    with pytest.raises(HookResultError, match=r"'guilty' at 'blocks\.1\.hook_resid_pre'"):
        tiny.run_with_hooks(tokens, fwd_hooks=hooks)


# Hooks that are none


@pytest.mark.parametrize("hook", [None, 3, "keep", np.zeros(3)], ids=repr)
def test_a_hook_that_cannot_be_called_is_refused(hook: Any, tiny: HookedTransformer, tokens: np.ndarray) -> None:
    # A TypeError, as everywhere in Python for an argument of the wrong type.
    with pytest.raises(TypeError, match=rf"'hook_embed' is not callable but {type(hook).__name__}"):
        tiny.run_with_hooks(tokens, fwd_hooks=[("hook_embed", hook)])


@pytest.mark.parametrize("bad", [("blocks.9.hook_resid_pre", keep), ("hook_embed", None), (lambda name: False, keep)])
def test_of_hooks_with_one_bad_among_them_none_is_added(bad: Any, tiny: HookedTransformer, tokens: np.ndarray) -> None:
    def never(activation: np.ndarray, hook: Any) -> None:
        pytest.fail("a hook of a refused list ran")

    before = tiny(tokens)
    with pytest.raises((UnknownHookPoint, TypeError)), tiny.hooks([("hook_embed", never), bad]):
        pytest.fail("the block of a refused list ran")
    np.testing.assert_array_equal(tiny(tokens), before)


def test_hooks_go_when_their_block_raises(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    calls = []

    def record(activation: np.ndarray, hook: Any) -> None:
        calls.append(hook.name)

    def run_and_fail() -> None:
        with tiny.hooks([("hook_embed", record)]):
            tiny(tokens)
            raise Boom

    with pytest.raises(Boom):
        run_and_fail()
    tiny(tokens)
    with pytest.raises(Boom):
        tiny.run_with_hooks(tokens, fwd_hooks=[("hook_embed", record), ("hook_embed", fault)])
    tiny(tokens)
    assert calls == ["hook_embed", "hook_embed"]


def fault(activation: np.ndarray, hook: Any) -> None:
    raise Boom
