"""Bad input to the TransformerLens-shaped calls: each is refused, and told what is wrong and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphlens import HookedTransformer, surgery
from graphlens.errors import ExportError, HookResultError, InputError, UnknownHookPoint
from graphlens.file.folder import TOKENIZER_FILES
from graphlens.file.names import FLAGGED
from graphlens.metrics import LogitDiff
from graphlens.model.kv_cache import KeyValueCache

FLAGS = sorted(set(FLAGGED.values()))


def keep(activation: np.ndarray, hook: Any) -> None:
    """A hook that changes nothing."""


@pytest.fixture
def model(tiny: HookedTransformer) -> Iterator[HookedTransformer]:
    """The embedded model without flags or hooks, before and after."""
    yield tiny
    tiny.reset_hooks(including_permanent=True)
    for flag in FLAGS:
        getattr(tiny, f"set_{flag}")(False)


def residual(model: HookedTransformer, tokens: np.ndarray, layer: int = 2) -> np.ndarray:
    found = model.forward(tokens, stop_at_layer=layer)
    assert isinstance(found, np.ndarray)
    return found


# Layers


@pytest.mark.parametrize("layer", [5, 100, -5])
@pytest.mark.parametrize("argument", ["start_at_layer", "stop_at_layer"])
def test_a_layer_past_the_end_is_answered_with_those_there_are(
    argument: str, layer: int, model: HookedTransformer, tokens: np.ndarray
) -> None:
    given = tokens if argument == "stop_at_layer" else residual(model, tokens)
    with pytest.raises(InputError, match=rf"{argument}={layer}: this model has 4 layers \(0-3\); 4 is their end"):
        model.forward(given, **{argument: layer})


@pytest.mark.parametrize(("start", "stop"), [(3, 2), (4, 0), (-1, 1)])
def test_a_start_after_the_stop_is_refused(start: int, stop: int, model: HookedTransformer, tokens: np.ndarray) -> None:
    says = rf"start at layer {start % 4 if start < 0 else start} comes after stop at layer {stop}: .*nothing to run"
    given = residual(model, tokens)
    for _ in range(2):  # the second time no graph is built
        with pytest.raises(InputError, match=says):
            model.forward(given, start_at_layer=start, stop_at_layer=stop)


def wide(array: np.ndarray) -> np.ndarray:
    return np.concatenate([array, array], -1)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (wide, r"residual has shape \[2, 6, 256\]; this model's is \[batch, pos, 128\] \(d_model\)"),
        (lambda array: array[0], r"residual has shape \[6, 128\]; this model's is \[batch, pos, 128\]"),
        (lambda array: array[:, :0], r"residual has shape \[2, 0, 128\]"),
        (lambda array: array[:0], r"residual has shape \[0, 6, 128\]"),
        (lambda array: array.astype(np.float64), r"residual is float64; .* computes in float32\. Cast it"),
        (lambda array: array.astype(np.float16), r"residual is float16; .* computes in float32\. Cast it"),
        (lambda array: array.astype(np.int64), r"residual is int64; .* computes in float32\. Cast it"),
        (
            lambda array: array.tolist(),
            r"start_at_layer the input is the residual stream.*\[batch, pos, 128\], not list",
        ),
        (lambda array: "some text", r"start_at_layer the input is the residual stream.*, not str"),
        (lambda array: np.zeros((1, 129, 128), np.float32), r"129 positions, and .* at most 128 \(n_ctx\)"),
    ],
)
def test_something_else_than_the_residual_is_refused(
    spoil: Callable[[np.ndarray], Any], says: str, model: HookedTransformer, tokens: np.ndarray
) -> None:
    with pytest.raises(InputError, match=says):
        model.forward(spoil(residual(model, tokens)), start_at_layer=2)


@pytest.mark.parametrize("return_type", ["loss", "both"])
def test_a_loss_of_a_residual_needs_its_tokens(return_type: str, model: HookedTransformer, tokens: np.ndarray) -> None:
    given = residual(model, tokens)
    with pytest.raises(InputError, match=r"loss needs the tokens: with start_at_layer pass them as tokens="):
        model.forward(given, start_at_layer=2, return_type=return_type)
    with pytest.raises(InputError, match=r"tokens have shape \[2, 5\]; the residual has \[2, 6\] positions"):
        model.forward(given, start_at_layer=2, return_type=return_type, tokens=tokens[:, :5])


# Caches


@pytest.mark.parametrize("change", [{"n_layers": 5}, {"d_head": 64}, {"n_key_value_heads": 2}, {"model_name": "other"}])
def test_a_cache_of_another_model_is_refused(
    change: dict[str, Any], model: HookedTransformer, tokens: np.ndarray
) -> None:
    cache = KeyValueCache.init_cache(replace(model.cfg, **change), batch_size=2)
    with pytest.raises(InputError, match=rf"cache was made for .*, and the model is {re.escape(model.cfg.model_name)}"):
        model.forward(tokens, past_kv_cache=cache)
    assert cache.length == 0


def test_a_cache_of_another_batch_is_refused(model: HookedTransformer, tokens: np.ndarray) -> None:
    cache = KeyValueCache.init_cache(model.cfg)
    with pytest.raises(InputError, match=r"cache holds 1 sequences and the input 2: make a cache per batch"):
        model.forward(tokens, past_kv_cache=cache)


def test_a_cache_without_room_is_refused_and_kept(model: HookedTransformer) -> None:
    cache = KeyValueCache.init_cache(model.cfg)
    model.forward(np.ones((1, 125), np.int64), past_kv_cache=cache)
    with pytest.raises(InputError, match=r"125 cached positions and 4 new ones are too many: .* at most 128 \(n_ctx\)"):
        model.forward(np.ones((1, 4), np.int64), past_kv_cache=cache)
    assert cache.length == 125
    assert model.forward(np.ones((1, 3), np.int64), past_kv_cache=cache).shape[1] == 3


def test_a_cache_that_skipped_layers_is_refused(model: HookedTransformer, tokens: np.ndarray) -> None:
    cache = KeyValueCache.init_cache(model.cfg, batch_size=2)
    model.forward(tokens, stop_at_layer=2, past_kv_cache=cache)
    with pytest.raises(InputError, match=r"cache holds nothing of layer 2: .* skipped it"):
        model.forward(tokens, past_kv_cache=cache)


# Masks


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (np.ones((2, 5), int), r"attention_mask has shape \[2, 5\]; the tokens have \[2, 6\]"),
        (np.ones((1, 6), int), r"attention_mask has shape \[1, 6\]; the tokens have \[2, 6\]"),
        (np.ones((2, 6, 1), int), r"attention_mask has shape \[2, 6, 1\]"),
        ([[1] * 6, [0] * 6], r"attention_mask is 0 everywhere in row 1: there is nothing to attend to"),
        (np.full((2, 6), 2), r"attention_mask must hold 1 at real tokens and 0 at padding"),
        (np.full((2, 6), 0.5), r"attention_mask must hold 1 at real tokens and 0 at padding"),
        (np.full((2, 6), -1), r"attention_mask must hold 1 at real tokens and 0 at padding"),
        (np.full((2, 6), np.nan), r"attention_mask must hold 1 at real tokens and 0 at padding"),
    ],
)
@pytest.mark.parametrize("call", ["forward", "run_with_cache", "generate", "cached", "start_at_layer"])
def test_an_impossible_mask_is_refused(
    call: str, mask: Any, says: str, model: HookedTransformer, tokens: np.ndarray
) -> None:
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: model.forward(tokens, attention_mask=mask),
        "run_with_cache": lambda: model.run_with_cache(tokens, attention_mask=mask),
        "generate": lambda: model.generate(tokens, 2, attention_mask=mask),
        "cached": lambda: model.forward(
            tokens, attention_mask=mask, past_kv_cache=KeyValueCache.init_cache(model.cfg, batch_size=2)
        ),
        "start_at_layer": lambda: model.forward(residual(model, tokens), start_at_layer=2, attention_mask=mask),
    }
    if call == "cached" and "0 everywhere" in says:  # others of that row may be in the cache, or follow
        calls[call]()
        return
    with pytest.raises(InputError, match=says):
        calls[call]()


# Generating


@pytest.mark.parametrize("call", ["generate", "generate_stream"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"max_new_tokens": 123},
            r"prompt of 6 tokens and 123 new ones are too many: .* at most 128 \(n_ctx\)\. Shorten",
        ),
        ({"max_new_tokens": -1}, r"max_new_tokens=-1: max_new_tokens must be a whole number of 0 or more"),
        ({"temperature": -0.1}, r"temperature=-0\.1: temperature must be a finite number of 0 or more"),
        ({"top_k": 0}, r"top_k=0: top_k must be a whole number of 1 or more"),
        ({"top_k": -3}, r"top_k=-3: top_k must be a whole number of 1 or more"),
        ({"top_p": 0.0}, r"top_p=0\.0: top_p must be more than 0"),
        ({"top_p": 1.5}, r"top_p=1\.5: top_p must be a finite number of 1 or less"),
        ({"return_type": "text"}, r"return_type must be one of .*'str', 'tokens'.*, not 'text'"),
        ({"return_type": "logits"}, r"return_type must be one of .*'str', 'tokens'.*, not 'logits'"),
        ({"padding_side": "middle"}, r"padding_side must be 'right' or 'left', not 'middle'"),
        ({"attention_mask": [[1] * 6, [1] * 5 + [0]]}, r"last token of a prompt is padding: pad prompts on the left"),
        ({"eos_token_id": []}, r"eos_token_id is an empty list: pass an id, or stop_at_eos=False"),
    ],
)
def test_impossible_generation_is_refused_at_once(
    call: str, options: dict[str, Any], says: str, model: HookedTransformer, tokens: np.ndarray
) -> None:
    with pytest.raises(InputError, match=says):
        getattr(model, call)(tokens, **options)  # a stream too: before anything is taken from it


def test_a_stream_of_nothing_at_a_time_is_refused(model: HookedTransformer, tokens: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"max_tokens_per_yield must be a whole number of 1 or more"):
        model.generate_stream(tokens, 2, 0)
    with pytest.raises(InputError, match=r"stream of text has one prompt.*return_type='tokens'"):
        model.generate_stream(["The", "A"], 2, return_type="str")


# Text


@pytest.fixture
def tokenless(tiny_copy: Path) -> HookedTransformer:
    for name in TOKENIZER_FILES:
        (tiny_copy / name).unlink(missing_ok=True)
    return HookedTransformer.from_onnx(tiny_copy, "cpu")


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.forward("text"),
        lambda model: model.run_with_cache("text"),
        lambda model: model.generate("text", 2, eos_token_id=0),
        lambda model: model.generate([5], 2, eos_token_id=0, return_type="str"),
        lambda model: model.to_tokens("text"),
        lambda model: model.to_string([1]),
        lambda model: model.to_str_tokens("text"),
        lambda model: model.to_single_token("a"),
        lambda model: model.test_prompt("text", "a"),
    ],
)
def test_a_model_without_tokenizer_says_so_of_text(
    call: Callable[[HookedTransformer], Any], tokenless: HookedTransformer
) -> None:
    with pytest.raises(InputError, match=r"tiny has no tokenizer: pass token ids, not text"):
        call(tokenless)


def test_a_model_without_tokenizer_has_no_end_token(tokenless: HookedTransformer) -> None:
    with pytest.raises(InputError, match=r"no end token: pass eos_token_id=, or stop_at_eos=False"):
        tokenless.generate([5], 2)
    assert tokenless.generate([5], 2, stop_at_eos=False).shape == (1, 3)


def test_two_tokens_are_not_a_single_one(model: HookedTransformer) -> None:
    with pytest.raises(InputError, match=r"'xyzzy qwv' is \d+ tokens \(\[.*\]\), not one"):
        model.to_single_token("xyzzy qwv")
    with pytest.raises(InputError, match=r"'' is 0 tokens"):
        model.to_single_token("")


@pytest.mark.parametrize("side", ["middle", "LEFT", "both"])
def test_another_padding_side_is_refused(side: str, model: HookedTransformer, tiny_folder: Path) -> None:
    says = rf"padding_side must be 'right' or 'left', not '{side}'"
    for call in (model.forward, model.to_tokens, model.to_str_tokens):
        with pytest.raises(InputError, match=says):
            call(["a b", "c"], padding_side=side)
    with pytest.raises(InputError, match=rf"default_padding_side must be 'left' or 'right', not '{side}'"):
        HookedTransformer.from_onnx(tiny_folder, "cpu", default_padding_side=side)


# Flags


@pytest.mark.parametrize("rest", FLAGGED)
@pytest.mark.parametrize("how", ["names_filter", "fwd_hooks", "hooks", "add_hook", "add_perma_hook", "cache"])
def test_a_hook_point_whose_flag_is_off_is_answered_with_its_switch(
    how: str, rest: str, model: HookedTransformer, tokens: np.ndarray
) -> None:
    name = rest if rest == "hook_tokens" else f"blocks.1.{rest}"
    flag = FLAGGED[rest]

    def enter() -> None:
        with model.hooks(fwd_hooks=[(name, keep)]):
            pass

    calls: dict[str, Callable[[], Any]] = {
        "names_filter": lambda: model.run_with_cache(tokens, names_filter=name),
        "fwd_hooks": lambda: model.run_with_hooks(tokens, fwd_hooks=[(name, keep)]),
        "hooks": enter,
        "add_hook": lambda: model.add_hook(name, keep),
        "add_perma_hook": lambda: model.add_perma_hook(name, keep),
        "cache": lambda: model.run_with_cache(tokens)[1][name],
    }
    with pytest.raises(UnknownHookPoint, match=rf"'{re.escape(name)}'.*model\.set_{flag}\(True\)"):
        calls[how]()
    getattr(model, f"set_{flag}")(True)
    calls[how]()


def test_attn_in_and_split_inputs_exclude_each_other(model: HookedTransformer) -> None:
    for first, second in (("use_attn_in", "use_split_qkv_input"), ("use_split_qkv_input", "use_attn_in")):
        getattr(model, f"set_{first}")(True)
        with pytest.raises(
            InputError, match=rf"{second} and {first} exclude each other: call model\.set_{first}\(False\)"
        ):
            getattr(model, f"set_{second}")(True)
        assert getattr(model.cfg, first)
        assert not getattr(model.cfg, second)
        getattr(model, f"set_{first}")(False)


# Gradients


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda model, tokens: model.run_with_hooks(tokens, bwd_hooks=[("hook_embed", keep)]), "would never fire"),
        (lambda model, tokens: model.run_with_hooks(tokens, "logits", bwd_hooks=[("hook_embed", keep)]), "never fire"),
        (lambda model, tokens: model.run_with_cache(tokens, incl_bwd=True), "incl_bwd runs backward from a scalar"),
        (lambda model, tokens: model.run_with_cache(tokens, return_type="both", incl_bwd=True), "scalar"),
        (lambda model, tokens: model.gradients(tokens, keep), "'keep' has no derivative"),
        (lambda model, tokens: model.gradients(tokens, LogitDiff(5, 7), start_at_layer=1), "residual"),
        (lambda model, tokens: model.gradients(tokens, LogitDiff(5, 7), stop_at_layer=1), "whole prompts"),
        (lambda model, tokens: model.gradients(tokens, LogitDiff(5, 900)), "token ids go from 0 to 799"),
        (lambda model, tokens: model.gradients(tokens, Shapeless()), r"gave \[2, 3\]"),
    ],
)
def test_gradients_that_cannot_be(call: Any, what: str, model: HookedTransformer, tokens: np.ndarray) -> None:
    with pytest.raises(InputError, match=what):
        call(model, tokens)


class Shapeless:
    """A metric of one's own whose derivative is not of the logits' shape."""

    def gradient(self, logits: Any) -> Any:
        return np.zeros((2, 3))


def test_a_backward_hook_at_no_hook_point_is_refused(model: HookedTransformer) -> None:
    with pytest.raises(UnknownHookPoint, match="hook_embd"):
        model.add_hook("hook_embd", keep, dir="bwd")
    with (
        pytest.raises(HookResultError, match="shape"),
        model.hooks(bwd_hooks=[("hook_embed", lambda g, hook: g[:1, :1])]),
    ):
        model.gradients(np.arange(6).reshape(2, 3), LogitDiff(5, 7), "hook_embed")


def test_another_direction_is_refused(model: HookedTransformer) -> None:
    with pytest.raises(InputError, match=r"dir must be 'fwd' or 'bwd', not 'sideways'"):
        model.add_hook("hook_embed", keep, dir="sideways")


@pytest.mark.parametrize("return_type", ["logit", "LOGITS", 1])
def test_an_unknown_return_type_is_refused(return_type: Any, model: HookedTransformer, tokens: np.ndarray) -> None:
    says = rf"return_type must be one of \('logits', 'loss', 'both', None\), not {return_type!r}"
    for call in (model.forward, model.run_with_cache, model.run_with_hooks):
        with pytest.raises(InputError, match=says):
            call(tokens, return_type=return_type)


# Hooks and names outside the blocks that are run


OUTSIDE = [
    ({"stop_at_layer": 2}, "blocks.2.hook_resid_pre"),
    ({"stop_at_layer": 2}, "ln_final.hook_scale"),
    ({"start_at_layer": 2}, "blocks.1.hook_resid_post"),
    ({"start_at_layer": 2}, "hook_embed"),
]


@pytest.mark.parametrize(("options", "name"), OUTSIDE)
def test_a_hook_that_would_never_fire_is_refused(
    options: dict[str, int], name: str, model: HookedTransformer, tokens: np.ndarray
) -> None:
    given = residual(model, tokens) if "start_at_layer" in options else tokens
    expected = model.forward(given, **options)
    says = rf"hook at '{re.escape(name)}' would never fire: .*start_at_layer or stop_at_layer leaves it out"
    with pytest.raises(InputError, match=says):
        model.run_with_hooks(given, fwd_hooks=[(name, keep)], **options)
    model.add_hook(name, keep)
    with pytest.raises(InputError, match=says):
        model.forward(given, **options)
    model.reset_hooks()
    # Chosen by a function, or there for good: it fires where it can.
    fired: list[str] = []

    def record(activation: np.ndarray, hook: Any) -> None:
        fired.append(hook.name)

    model.run_with_hooks(
        given, fwd_hooks=[(lambda other: other in (name, "blocks.2.ln1.hook_scale"), record)], **options
    )
    assert fired == (["blocks.2.ln1.hook_scale"] if "start_at_layer" in options else [])
    model.add_perma_hook(name, record)
    fired.clear()
    np.testing.assert_array_equal(model.forward(given, **options), expected)
    assert fired == []
    model.forward(tokens)
    assert fired == [name]


@pytest.mark.parametrize(("options", "name"), OUTSIDE)
def test_a_name_outside_the_run_is_refused(
    options: dict[str, int], name: str, model: HookedTransformer, tokens: np.ndarray
) -> None:
    given = residual(model, tokens) if "start_at_layer" in options else tokens
    for asked in (name, [name, "blocks.1.hook_mlp_out", "blocks.3.hook_mlp_out"]):
        with pytest.raises(
            InputError, match=r"is not computed in this run: start_at_layer or stop_at_layer leaves it out"
        ):
            model.run_with_cache(given, names_filter=asked, **options)
    assert name not in model.run_with_cache(given, **options)[1]


def test_a_hook_whose_flag_went_off_is_refused(model: HookedTransformer, tokens: np.ndarray) -> None:
    model.set_use_attn_result(True)
    model.add_hook("blocks.0.attn.hook_result", keep)
    model.set_use_attn_result(False)
    with pytest.raises(InputError, match=r"'blocks\.0\.attn\.hook_result' would never fire: .*flag was switched off"):
        model.forward(tokens)


def test_a_position_beyond_the_run_is_refused(model: HookedTransformer, tokens: np.ndarray) -> None:
    for positions in (6, [0, 6], -7):
        with pytest.raises(InputError, match=r"beyond the 6 positions"):
            model.run_with_cache(tokens, pos_slice=positions)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps"])
def test_a_cache_on_another_device_is_refused(device: str, model: HookedTransformer, tokens: np.ndarray) -> None:
    with pytest.raises(InputError, match=rf"model runs on cpu; its activations cannot be put on {device}"):
        model.run_with_cache(tokens, device=device)
    assert len(model.run_with_cache(tokens, device="cpu")[1]) > 0


# Opening


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "cuda:1"}, r"device 'cuda:1': choose 'cpu' or 'cuda' \(its first GPU\)"),
        ({"device": "tpu"}, r"device 'tpu': choose 'cpu' or 'cuda'"),
        ({"device": "cpu", "providers": "cpu"}, r"device or providers, not both"),
        ({"dtype": "int8"}, r"dtype 'int8': choose one of float32, float64, float16, bfloat16"),
        ({"dtype": np.int64}, r"dtype .*int64.*: choose one of float32"),
        ({"n_devices": 2}, r"from_pretrained cannot honour n_devices=2"),
        ({"checkpoint_index": 3}, r"from_pretrained cannot honour checkpoint_index=3"),
        ({"checkpoint_value": 1000}, r"from_pretrained cannot honour checkpoint_value=1000"),
        ({"move_to_device": False}, r"from_pretrained cannot honour move_to_device=False"),
        ({"fold_layernorm": True}, r"from_pretrained cannot honour fold_layernorm=True"),
        ({"default_padding_side": "top"}, r"default_padding_side must be 'left' or 'right', not 'top'"),
        ({"n_ctx": 129}, r"n_ctx=129: this model was trained for 1 to 128 tokens"),
        ({"n_ctx": 0}, r"n_ctx=0: this model was trained for 1 to 128 tokens"),
        ({"first_n_layers": 5}, r"first_n_layers=5.*4 layers"),
        ({"first_n_layers": 0}, r"first_n_layers=0.*4 layers"),
    ],
)
def test_from_pretrained_refuses_what_it_cannot_honour(
    options: dict[str, Any], says: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=says):
        HookedTransformer.from_pretrained_no_processing(tiny_folder, **options)


# Processing


def test_weights_are_processed_once(tiny_folder: Path, tmp_path: Path) -> None:
    once = surgery.process_weights(tiny_folder, tmp_path / "once")
    with pytest.raises(ExportError, match=r"its weights are processed already \(fold_ln, .*\)"):
        surgery.process_weights(once, tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_a_folder_that_holds_something_is_not_written_to(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"exists and is not empty\. Choose another folder"):
        surgery.process_weights(tiny_folder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(ExportError, match=r"exists and is not empty"):
        surgery.process_weights(tiny_folder, tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "mine"
