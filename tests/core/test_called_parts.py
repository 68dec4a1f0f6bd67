"""Parts that are called by themselves compute what they compute in a run, with the hooks and interventions that are theirs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from graphlens import (
    Ablate,
    HookedTransformer,
    InputError,
    KeyValueCache,
    Steer,
    UnknownHookPoint,
    embedded_model,
)
from graphlens.engine.plan import Plan
from graphlens.errors import InputTypeError
from graphlens.model.hooks import HookPoint
from tests.intervention_specs import close


@pytest.fixture(scope="module")
def llama() -> HookedTransformer:
    """Grouped keys and values, rotary positions, RMSNorm and a gated MLP."""
    return HookedTransformer.from_pretrained_no_processing("tiny-llama")


@pytest.fixture(params=["tiny", "llama"])
def model(request: pytest.FixtureRequest) -> Iterator[HookedTransformer]:
    found: HookedTransformer = request.getfixturevalue(request.param)
    yield found
    found.reset_hooks(including_permanent=True)
    for flag in ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in"):
        getattr(found, f"set_{flag}")(False)


def prompts(model: HookedTransformer, batch: int = 2, length: int = 6) -> np.ndarray:
    return np.random.default_rng(5).integers(1, model.cfg.d_vocab, (batch, length))


class Entry:
    """A block's keys and values [b, past, heads, d_head], as TransformerLens has them."""

    def __init__(self, model: HookedTransformer, batch: int) -> None:
        shape = (batch, 0, model.cfg.n_key_value_heads, model.cfg.d_head)
        self.past_keys = self.past_values = np.zeros(shape, np.float32)

    def append(self, new_keys: np.ndarray, new_values: np.ndarray) -> None:
        self.past_keys = np.concatenate([self.past_keys, new_keys], 1)
        self.past_values = np.concatenate([self.past_values, new_values], 1)


def test_blocks_and_their_parts_are_the_run(model: HookedTransformer) -> None:
    logits, cache = model.run_with_cache(prompts(model))
    residual = model.embed(prompts(model))
    if "pos_embed.W_pos" in model.weights:
        residual = residual + model.pos_embed(prompts(model))
    for layer, block in enumerate(model.blocks):
        close(residual, cache["resid_pre", layer])
        normal = block.ln1(residual)
        attended = block.attn(normal, normal, normal)
        close(attended, cache["attn_out", layer])
        middle = residual + attended
        fed = block.mlp(block.ln2(middle))
        close(fed, cache["mlp_out", layer])
        residual = block(residual)
        close(residual, middle + fed)
    close(model.unembed(model.ln_final(residual)), logits)


def test_the_hooks_of_a_part_fire_in_order_and_no_others(model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(prompts(model))
    residual, normal = cache["resid_pre", 1], model.blocks[1].ln1(cache["resid_pre", 1])
    fired: list[str] = []
    calls = {
        "blocks.1.": lambda: model.blocks[1](residual),
        "blocks.1.attn.": lambda: model.blocks[1].attn(normal, normal, normal),
        "blocks.1.mlp.": lambda: model.blocks[1].mlp(normal),
        "blocks.1.ln2.": lambda: model.blocks[1].ln2(residual),
        "ln_final.": lambda: model.ln_final(residual),
        "unembed.": lambda: model.unembed(residual),
        "pos_embed.": lambda: model.cfg.positional_embedding_type == "standard" and model.pos_embed([[1, 2]]),
        "embed.": lambda: model.embed([[1, 2]]),
    }
    names = list(model.hook_dict)
    with model.hooks([(name, lambda value, hook: fired.append(hook.name)) for name in names]):
        for start, call in calls.items():
            fired.clear()
            call()
            assert fired == [name for name in names if name.startswith(start)], start


def test_a_hook_in_a_part_changes_what_it_gives(model: HookedTransformer) -> None:
    tokens = prompts(model)

    def head_off(z: np.ndarray, hook: Any) -> None:
        z[:, :, 1] = 0

    name = "blocks.1.attn.hook_z"
    with model.hooks([(name, head_off)]):
        _, edited = model.run_with_cache(tokens)
        normal = model.blocks[1].ln1(edited["resid_pre", 1])
        close(model.blocks[1].attn(normal, normal, normal), edited["attn_out", 1])
        close(model.blocks[1](edited["resid_pre", 1]), edited["resid_post", 1])
    plain = model.blocks[1](edited["resid_pre", 1])
    assert np.abs(plain - edited["resid_post", 1]).max() > 1e-3
    double = lambda value, hook: value * 2  # noqa: E731
    with model.hooks([("ln_final.hook_scale", double), ("unembed.hook_out", double)]):
        halved, doubled = model.ln_final(plain), model.unembed(plain)
    weight, bias = model.ln_final.w, getattr(model.ln_final, "b", 0)
    close(halved, (model.ln_final(plain) - bias) / weight / 2 * weight + bias)
    close(doubled, model.unembed(plain) * 2)


def test_an_intervention_in_a_part_changes_what_it_gives(model: HookedTransformer) -> None:
    tokens = prompts(model)
    edits = [
        Ablate("blocks.1.attn.hook_z", heads=1),
        Steer("blocks.1.mlp.hook_post", np.ones(model.cfg.d_mlp, np.float32)),
        Ablate("blocks.2.hook_attn_out"),
    ]
    with model.intervene(edits):
        _, edited = model.run_with_cache(tokens)
        normal, read = model.blocks[1].ln1(edited["resid_pre", 1]), model.blocks[1].ln2(edited["resid_mid", 1])
        close(model.blocks[1].attn(normal, normal, normal), edited["attn_out", 1])
        close(model.blocks[1].mlp(read), edited["mlp_out", 1])
        close(model.blocks[1](edited["resid_pre", 1]), edited["resid_post", 1])
    with model.intervene(Ablate("ln_final.hook_normalized")), pytest.raises(InputError, match="called by itself"):
        model.ln_final(edited["resid_post", -1])


def test_queries_keys_and_values_have_inputs_of_their_own(model: HookedTransformer) -> None:
    rng = np.random.default_rng(1)
    q, k, v = rng.standard_normal((3, 2, 6, model.cfg.d_model)).astype(np.float32)
    attention = model.blocks[1].attn
    given: dict[str, np.ndarray] = {}
    with model.hooks(
        [(f"blocks.1.attn.hook_{letter}", lambda x, hook: given.update({hook.name[-1]: x})) for letter in "qkv"]
    ):
        attention(q, k, v)
    for letter, x in (("q", q), ("k", k), ("v", v)):
        each = letter if letter == "q" or model.cfg.n_heads == model.cfg.n_key_value_heads else f"_{letter}"
        matrix = getattr(attention, f"{'_' if each[0] == '_' else ''}W_{letter.upper()}")
        bias = getattr(attention, f"{'_' if each[0] == '_' else ''}b_{letter.upper()}")
        close(given[letter], np.einsum("bpd,hde->bphe", x, matrix) + bias)
    assert np.abs(attention(q, k, v) - attention(q, q, v)).max() > 1e-3
    assert np.abs(attention(q, k, v) - attention(q, k, k)).max() > 1e-3


def test_flags_give_every_head_an_input_of_its_own(model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(prompts(model))
    normal = model.blocks[1].ln1(cache["resid_pre", 1])
    heads, shared = model.cfg.n_heads, model.cfg.n_key_value_heads
    q, k = (np.repeat(normal[:, :, None], count, 2) for count in (heads, shared))
    model.set_use_split_qkv_input(True)
    model.set_use_attn_result(True)
    seen: dict[str, np.ndarray] = {}
    with model.hooks([("blocks.1.attn.hook_result", lambda x, hook: seen.update(result=x))]):
        found = model.blocks[1].attn(q, k, k)
    close(found, cache["attn_out", 1])
    close(seen["result"].sum(2) + model.blocks[1].attn.b_O, found)
    q[:, :, 1] = 0
    z: dict[str, np.ndarray] = {}
    with model.hooks([("blocks.1.attn.hook_z", lambda x, hook: z.update(z=x))]):
        model.blocks[1].attn(q, k, k)
    changed = np.abs(z["z"] - cache["z", 1]).max((0, 1, 3)) > 1e-4
    assert changed.tolist() == [head == 1 for head in range(heads)]
    with pytest.raises(InputError, match=r"query_input of blocks.1.attn has shape \[2, 6, "):
        model.blocks[1].attn(normal, normal, normal)


def test_padding_is_masked_and_moves_positions(model: HookedTransformer) -> None:
    tokens, mask = prompts(model), np.asarray([[0, 0, 1, 1, 1, 1], [1] * 6])
    _, cache = model.run_with_cache(tokens, attention_mask=mask)
    normal = model.blocks[1].ln1(cache["resid_pre", 1])
    close(model.blocks[1](cache["resid_pre", 1], attention_mask=mask), cache["resid_post", 1])
    close(model.blocks[1].attn(normal, normal, normal, attention_mask=mask), cache["attn_out", 1])
    if model.cfg.positional_embedding_type == "standard":
        close(model.pos_embed(tokens, attention_mask=mask), cache["hook_pos_embed"])


def test_earlier_keys_and_values_come_from_an_entry(model: HookedTransformer) -> None:
    tokens = prompts(model)
    _, cache = model.run_with_cache(tokens)
    resid, normal = cache["resid_pre", 1], model.blocks[1].ln1(cache["resid_pre", 1])
    for call, expected in (
        (lambda part, entry: model.blocks[1](resid[:, part], past_kv_cache_entry=entry), cache["resid_post", 1]),
        (lambda part, entry: model.blocks[1].attn(*[normal[:, part]] * 3, entry), cache["attn_out", 1]),
    ):
        entry = Entry(model, 2)
        found = [call(slice(start, start + 2), entry) for start in (0, 2, 4)]
        close(np.concatenate(found, 1), expected)
        assert entry.past_keys.shape == (2, 6, model.cfg.n_key_value_heads, model.cfg.d_head)
    if model.cfg.positional_embedding_type == "standard":
        close(entry.past_keys, cache["k", 1])
        close(model.pos_embed(tokens[:, 2:], 2), cache["hook_pos_embed"][:, 2:])
        one = np.ones((2, 6), int)
        close(model.pos_embed(tokens[:, 2:], 2, one), cache["hook_pos_embed"][:, 2:])
    close(entry.past_values, cache["v", 1])


def test_an_mlp_takes_tokens_of_any_layout(model: HookedTransformer) -> None:
    x = np.random.default_rng(2).standard_normal((2, 3, 4, model.cfg.d_model)).astype(np.float32)
    mlp = model.blocks[1].mlp
    expected = mlp(x.reshape(6, 4, -1)).reshape(x.shape)
    close(mlp(x), expected)
    close(mlp(x[0, 0, 0]), expected[0, 0, 0])
    with model.hooks([("blocks.1.mlp.hook_post", lambda value, hook: None)]):
        close(mlp(x[0]), expected[0])
        with pytest.raises(InputError, match=r"blocks.1.mlp was given \[2, 3, 4, "):
            mlp(x)
    with model.hooks([("blocks.2.mlp.hook_post", lambda value, hook: None)]):
        close(mlp(x), expected)


def test_what_does_not_fit_is_refused(tiny: HookedTransformer) -> None:
    block, d_model = tiny.blocks[1], tiny.cfg.d_model
    x = np.zeros((2, 6, d_model), np.float32)
    with pytest.raises(InputTypeError, match=r"resid_pre of blocks.1 is an array \[batch, pos, \d+\], not str"):
        block("text")
    with pytest.raises(InputError, match=r"x of blocks.1.mlp has shape \[2, 3\]"):
        block.mlp(np.zeros((2, 3), np.float32))
    with pytest.raises(InputError, match="is float64; this model computes in float32"):
        block(x.astype(np.float64))
    with pytest.raises(InputError, match="of the same tokens"):
        block.attn(x, x[:, :3], x)
    with pytest.raises(InputError, match="attention_mask has shape"):
        block(x, attention_mask=np.ones((2, 5), int))
    with pytest.raises(InputError, match="shortformer_pos_embed"):
        block(x, shortformer_pos_embed=x)
    with pytest.raises(InputError, match="takes no additive_attention_mask"):
        block.attn(x, x, x, additive_attention_mask=x)
    whole = KeyValueCache.init_cache(tiny.cfg, batch_size=2)
    with pytest.raises(InputError, match="past_kv_cache_entry is a KeyValueCache"):
        block(x, past_kv_cache_entry=whole)
    entry = Entry(tiny, 3)
    with pytest.raises(InputError, match=r"past_keys of past_kv_cache_entry has shape \[3, 0"):
        block(x, past_kv_cache_entry=entry)
    too_long = np.zeros((1, tiny.cfg.n_ctx + 1, d_model), np.float32)
    with pytest.raises(InputError, match="at most"):
        block(too_long)
    for tokens in ([1, 2], [[1] * (tiny.cfg.n_ctx + 1)]):
        with pytest.raises(InputError):
            tiny.pos_embed(tokens)
    with pytest.raises(InputError, match="attention_mask of pos_embed"):
        tiny.pos_embed([[1, 2]], attention_mask=np.ones((1, 3), int))
    with pytest.raises(InputError, match="past_kv_pos_offset"):
        tiny.pos_embed([[1, 2]], -1)


def test_a_model_without_learned_positions_has_no_pos_embed(llama: HookedTransformer) -> None:
    with pytest.raises(AttributeError, match="no weight"):
        llama.pos_embed([[1, 2]])


def test_a_name_that_is_none_is_still_an_error(tiny: HookedTransformer) -> None:
    x = np.zeros((1, 2, tiny.cfg.d_model), np.float32)
    with pytest.raises(UnknownHookPoint), tiny.hooks([("blocks.1.attn.hook_zz", lambda value, hook: None)]):
        tiny.blocks[1](x)


def test_a_hook_point_is_called_as_a_module(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    x, point = tiny.embed(tokens), tiny.hook_embed
    assert point(x) is x
    with tiny.hooks(
        [("hook_embed", lambda value, hook: value * 2), (lambda name: "pos" in name, lambda v, hook: v * 0)]
    ):
        close(tiny.hook_embed(x), x * 2)
        found = tiny.hook_embed(tiny.embed(tokens)) + tiny.hook_pos_embed(tiny.pos_embed(tokens))
        _, cache = tiny.run_with_cache(tokens)
        close(found, cache["resid_pre", 0])
        with pytest.raises(InputTypeError, match="'hook_embed' is called with an array"):
            point([1.0])

    def in_place(value: np.ndarray, hook: Any) -> None:
        value[:] = 0

    with tiny.hooks([("hook_embed", in_place)]):
        assert not point(x).any()
        assert not x.any()
    with tiny.intervene(Ablate("hook_embed")), pytest.raises(InputError, match="called by itself"):
        point(x)
    with pytest.raises(InputError, match="no model"):
        HookPoint("hook_embed")(x)


def test_a_loop_over_all_parts_opens_each_once(tokens: np.ndarray) -> None:
    model = HookedTransformer.from_onnx(embedded_model(), "cpu")
    model.runner.engine.max_sessions = 1
    x = model.embed(tokens)

    def loop() -> int:
        for block in model.blocks:
            block(x), block.attn(x, x, x), block.mlp(x)
        return model.runner.engine.sessions_built

    assert loop() == loop()
    assert len(model.sessions) == 3 * model.cfg.n_layers
    model.forward(tokens, stop_at_layer=1)
    model.forward(tokens, stop_at_layer=2)
    assert [plan.stop for plan in model.sessions if not plan.part and plan != Plan()] == [2]
    with model.hooks([("blocks.0.attn.hook_z", lambda value, hook: None)]):
        model.blocks[0](x)
    assert len([plan for plan in model.sessions if plan.part]) == 3 * model.cfg.n_layers


def test_parts_compute_with_the_weights_that_were_set(tokens: np.ndarray) -> None:
    model = HookedTransformer.from_onnx(embedded_model(), "cpu")
    x, block = model.embed(tokens), model.blocks[1]
    plain = block.mlp(x)
    model.set_weights({f"blocks.1.mlp.{name}": getattr(block.mlp, name) * 2 for name in ("W_out", "b_out")})
    close(block.mlp(x), plain * 2)
    close(block(x), model.forward(x, start_at_layer=1, stop_at_layer=2))
