"""TransformerLens 4's face: its names over the same model, its arguments, and compatibility mode; no TransformerLens 4 needed.

What only TransformerLens 4 itself can tell is in tests/transformerlens4.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import graphlens
from graphlens.errors import InputError, UnknownHookPoint
from graphlens.metrics import LogitDiff
from graphlens.torch import HookedTransformer, KeyValueCache
from graphlens.transformer_lens4 import TransformerBridge

TOKENS = torch.tensor([[3, 14, 15, 92, 6, 5], [35, 8, 97, 9, 3, 2]])
LOWEST = torch.finfo(torch.float32).min
Q, SCORES = "blocks.1.attn.q.hook_out", "blocks.1.attn.hook_attn_scores"


@pytest.fixture(scope="module")
def bridge() -> TransformerBridge:
    return TransformerBridge.boot_transformers("tiny-gpt2", device="cpu")


@pytest.fixture
def clean(bridge: TransformerBridge) -> Iterator[TransformerBridge]:
    yield bridge
    bridge.reset_hooks(including_permanent=True)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-5)


# Names


def test_hook_points_are_called_by_transformerlens_4s_names(
    bridge: TransformerBridge, model: HookedTransformer
) -> None:
    points = bridge.hook_dict
    assert points[Q].name == Q
    assert points["blocks.1.attn.hook_q"] is points[Q]
    assert points[Q].layer() == 1
    assert {"embed.hook_out", "blocks.0.hook_in", "blocks.3.hook_out", "blocks.0.attn.hook_out", "unembed.hook_in"} <= {
        point.name for point in points.values()
    }
    for name in model.hook_dict:  # those of 3.9 are keys too, and mean the same
        assert name in list(points)
        assert bridge.get_hook_point(name) is points[name] is bridge.hook_dict[name]
    assert len(bridge.hook_points()) == len(model.hook_dict) == len({id(point) for point in points.values()})
    assert list(bridge.hook_points())[:4] == [
        "embed.hook_out",
        "pos_embed.hook_out",
        "blocks.0.hook_in",
        "blocks.0.ln1.hook_scale",
    ]
    assert bridge.get_hook_point("blocks.1.nope") is None
    assert bridge.blocks[1].attn.q.hook_out is points[Q] is bridge.blocks[1].attn.hook_q
    assert getattr(bridge.blocks[1].mlp, "in").hook_out is points["blocks.1.mlp.hook_pre"]
    assert bridge.blocks[1].hook_in is points["blocks.1.hook_in"]
    with pytest.raises(AttributeError, match=r"Nearest: 'blocks\.1\.ln1\.hook_normalized', before the norm's weight"):
        _ = bridge.blocks[1].attn.q.hook_in
    with pytest.raises(AttributeError, match="no 'w'"):
        _ = bridge.blocks[1].attn.w


def test_a_cache_has_both_names_of_each_activation(bridge: TransformerBridge, model: HookedTransformer) -> None:
    logits, cache = bridge.run_with_cache(TOKENS)
    expected, ours = model.run_with_cache(TOKENS)
    assert torch.equal(logits, expected)
    assert list(cache) == list(bridge.hook_dict)
    for name, value in ours.items():
        twin = bridge.hook_dict[name].name
        assert cache[twin] is cache[name]
        if not name.endswith("hook_attn_scores"):
            assert torch.equal(cache[name], value), name
    assert torch.equal(cache["resid_post", 1], ours["resid_post", 1])
    assert torch.equal(cache.accumulated_resid(apply_ln=True), ours.accumulated_resid(apply_ln=True))
    assert torch.equal(cache.stack_head_results(2), ours.stack_head_results(2))
    assert torch.equal(cache.logit_attrs(cache.decompose_resid(), 5, 7), ours.logit_attrs(ours.decompose_resid(), 5, 7))


@pytest.mark.parametrize(
    ("names_filter", "keys"),
    [
        (Q, [Q]),
        ("blocks.1.attn.hook_q", [Q, "blocks.1.attn.hook_q"]),
        (
            ["blocks.0.hook_resid_pre", "embed.hook_out"],
            ["embed.hook_out", "blocks.0.hook_in", "blocks.0.hook_resid_pre"],
        ),
        (lambda name: name.endswith("1.attn.hook_q"), ["blocks.1.attn.hook_q"]),
        (lambda name: name.endswith("1.attn.q.hook_out"), [Q]),
        (lambda name: name.startswith("blocks.1.attn.o."), ["blocks.1.attn.o.hook_in", "blocks.1.attn.o.hook_out"]),
    ],
)
def test_a_cache_is_keyed_by_what_was_asked_for(bridge: TransformerBridge, names_filter: Any, keys: list[str]) -> None:
    """As in TransformerLens 4: the name itself, and its own name of the point; of a function, what it says True to."""
    _, cache = bridge.run_with_cache(TOKENS, names_filter=names_filter)
    assert list(cache) == keys
    for key in keys:  # and any name of the point finds it
        point = bridge.hook_dict[key]
        for other in (name for name, same in bridge.hook_dict.items() if same is point):
            assert cache[other] is cache[key]
            assert other in cache


def test_a_function_is_asked_for_all_names_once(bridge: TransformerBridge) -> None:
    asked: list[str] = []
    bridge.run_with_cache(TOKENS, names_filter=lambda name: asked.append(name) or name == "hook_embed")
    assert asked == list(bridge.hook_dict)


@pytest.mark.parametrize(
    "name", [Q, "blocks.1.attn.hook_q", lambda name: name == Q, lambda name: name == "blocks.1.attn.hook_q"]
)
def test_hooks_are_found_by_any_name_and_told_transformerlens_4s(
    clean: TransformerBridge, model: HookedTransformer, name: Any
) -> None:
    told: list[str] = []

    def hook(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        told.append(hook.name)
        return activation * 0.5

    expected = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.attn.hook_q", hook)])
    told.clear()
    close(clean.run_with_hooks(TOKENS, [(name, hook)]), expected)
    with clean.hooks([(name, hook)]):
        close(clean(TOKENS), expected)
    clean.add_hook(name, hook)
    close(clean(TOKENS), expected)
    assert told == [Q] * 3
    point = clean.hook_dict["blocks.1.attn.hook_q"]
    assert [active.user_hook for active in point.fwd_hooks] == [hook]
    point.remove_hooks()
    assert not point.has_hooks()
    assert torch.equal(clean(TOKENS), model(TOKENS))
    point.add_hook(hook)
    close(clean(TOKENS), expected)


def test_gradients_are_called_by_transformerlens_4s_names(clean: TransformerBridge, model: HookedTransformer) -> None:
    metric = LogitDiff(5, 7)
    found = clean.gradients(TOKENS, metric, [Q, "hook_embed"])
    assert list(found) == ["embed.hook_out", Q]
    assert torch.equal(found[Q], model.gradients(TOKENS, metric, ["blocks.1.attn.hook_q"])["blocks.1.attn.hook_q"])
    _, cache = clean.run_with_cache(TOKENS, names_filter=Q, incl_bwd=True, return_type="loss")
    assert list(cache) == [Q, f"{Q}_grad"]
    _, expected = model.run_with_cache(TOKENS, "loss", names_filter="blocks.1.attn.hook_q", incl_bwd=True)
    assert torch.equal(cache[f"{Q}_grad"], expected["blocks.1.attn.hook_q_grad"])
    seen: list[str] = []
    clean.run_with_hooks(
        TOKENS, bwd_hooks=[(Q, lambda gradient, hook: seen.append(hook.name))], return_type="loss"
    ).backward()
    assert seen == [Q]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("blocks.1.attn.q.hook_outt", r"Nearest: 'blocks\.1\.attn\.q\.hook_out'"),
        ("blocks.1.attn.q.hook_in", r"'blocks\.1\.attn\.q\.hook_in' .* Nearest: 'blocks\.1\.ln1\.hook_normalized'"),
        ("blocks.1.mlp.hook_in", r"Nearest: 'blocks\.1\.ln2\.hook_normalized'"),
        ("blocks.1.ln1.hook_in", r"Nearest: 'blocks\.1\.hook_in'"),
        ("blocks.7.attn.q.hook_out", r"4 layers \(0-3\)"),
        ("blocks.1.attn.hook_q_input", r"set_use_split_qkv_input\(True\)"),
        ("embed.hook_in", r"set_use_hook_tokens\(True\)"),
    ],
)
def test_a_name_that_is_none_is_refused_with_the_nearest(bridge: TransformerBridge, name: str, told: str) -> None:
    for run in (
        lambda: bridge.run_with_cache(TOKENS, names_filter=[name]),
        lambda: bridge.run_with_hooks(TOKENS, [(name, lambda x, hook: x)]),
        lambda: bridge.add_hook(name, lambda x, hook: x),
    ):
        with pytest.raises(UnknownHookPoint, match=told):
            run()


def test_flagged_hook_points_have_transformerlens_4s_names() -> None:
    bridge = TransformerBridge.boot_transformers("tiny-gpt2", device="cpu")
    bridge.set_use_split_qkv_input(True)
    assert bridge.hook_dict["blocks.1.hook_q_input"].name == "blocks.1.attn.hook_q_input"
    told: list[str] = []
    bridge.run_with_hooks(TOKENS, [("blocks.1.hook_q_input", lambda x, hook: told.append(hook.name))])
    assert told == ["blocks.1.attn.hook_q_input"]


# Its way of calling


def test_arguments_come_in_transformerlens_4s_order(bridge: TransformerBridge, model: HookedTransformer) -> None:
    found, cache = bridge.run_with_cache(TOKENS[:1], False, True, "blocks.0.hook_in", return_type="loss")
    assert isinstance(cache, dict)
    assert cache["blocks.0.hook_in"].shape == (6, 128)
    assert torch.equal(found, model(TOKENS[:1], return_type="loss"))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    expected = model(TOKENS, attention_mask=mask)
    assert torch.equal(bridge(TOKENS, "logits", False, None, None, mask), expected)
    assert torch.equal(bridge.run_with_hooks(TOKENS, [], attention_mask=mask), expected)
    assert torch.equal(
        bridge(model(TOKENS, stop_at_layer=2), start_at_layer=2, stop_at_layer=3), model(TOKENS, stop_at_layer=3)
    )
    shapes: list[tuple[int, ...]] = []

    def halve(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        shapes.append(tuple(activation.shape))
        return activation * 0.5

    close(
        bridge.run_with_hooks(TOKENS[:1], [(Q, halve)], remove_batch_dim=True),
        bridge.run_with_hooks(TOKENS[:1], [(Q, halve)]),
    )
    assert shapes == [(6, 4, 32), (1, 6, 4, 32)]
    with pytest.raises(TypeError, match="names_filter"):
        bridge.run_with_hooks(TOKENS, [], names_filter=Q)


def test_a_kv_cache_under_either_name(bridge: TransformerBridge, model: HookedTransformer) -> None:
    for name in ("past_key_values", "past_kv_cache"):
        cache = KeyValueCache.init_cache(bridge.cfg, "cpu", 2)
        bridge(TOKENS[:, :4], **{name: cache})
        close(bridge(TOKENS[:, 4:], **{name: cache}), model(TOKENS)[:, 4:])
    with pytest.raises(InputError, match="same argument"):
        bridge(TOKENS, past_key_values=cache, past_kv_cache=cache)
    with pytest.raises(InputError, match="KeyValueCache"):
        bridge(TOKENS, past_key_values=object())


@pytest.mark.parametrize(
    "asked",
    [
        {"hf_config_overrides": {"n_layer": 2}},
        {"load_weights": False},
        {"trust_remote_code": True},
        {"model_class": object},
        {"checkpoint_index": 3},
        {"device_map": "auto"},
        {"n_devices": 2},
        {"no_such_argument": 1},
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(asked: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(asked))):
        TransformerBridge.boot_transformers("tiny-gpt2", **asked)


def test_what_asks_for_nothing_is_taken() -> None:
    TransformerBridge.boot_transformers(
        "tiny-gpt2", None, "cpu", torch.float32, None, True, False, None, n_devices=1, device_map=None
    )


def test_labels_are_refused(bridge: TransformerBridge) -> None:
    with pytest.raises(InputError, match="loss_fn"):
        bridge(TOKENS, labels=TOKENS)


# Masked scores and compatibility mode


def test_masked_scores_are_the_lowest_number(clean: TransformerBridge, model: HookedTransformer) -> None:
    _, cache = clean.run_with_cache(TOKENS, names_filter=SCORES)
    _, ours = model.run_with_cache(TOKENS, names_filter=SCORES)
    masked = torch.isneginf(ours[SCORES])
    assert masked.any()
    assert (cache[SCORES][masked] == LOWEST).all()
    assert torch.equal(cache[SCORES][~masked], ours[SCORES][~masked])
    seen: list[torch.Tensor] = []

    def look(scores: torch.Tensor, hook: Any) -> None:
        seen.append(scores.clone())

    assert torch.equal(clean.run_with_hooks(TOKENS, [(SCORES, look)]), model(TOKENS))
    assert torch.equal(seen[0], cache[SCORES])

    def halve(scores: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.where(scores == LOWEST, scores, scores * 0.5)

    def halve_in_place(scores: torch.Tensor, hook: Any) -> None:
        scores[scores > LOWEST] *= 0.5

    expected = model.run_with_hooks(TOKENS, fwd_hooks=[(SCORES, lambda scores, hook: scores * 0.5)])
    for hook in (halve, halve_in_place):
        close(clean.run_with_hooks(TOKENS, [(SCORES, hook)]), expected)


def test_compatibility_mode_is_transformerlens_3s_model(lens: Any) -> None:
    """Weights as its from_pretrained processes them, its mask, its names in every cache; hooks and flags stay."""
    from lens_oracle import PROCESSING, oracle

    bridge = TransformerBridge.boot_transformers("tiny-gpt2", device="cpu")
    assert not bridge.compatibility_mode
    told: list[str] = []
    bridge.add_hook("blocks.2.hook_out", lambda x, hook: told.append(hook.name))
    close(bridge(TOKENS), lens(TOKENS))
    bridge.enable_compatibility_mode()
    assert bridge.compatibility_mode
    expected, lens_cache = oracle(graphlens.embedded_model(), **dict.fromkeys(PROCESSING, True)).run_with_cache(TOKENS)
    logits, cache = bridge.run_with_cache(TOKENS)
    close(logits, expected)
    assert told == ["blocks.2.hook_out"] * 2
    points = bridge.hook_dict  # called as TransformerLens 4 calls them then
    assert points[Q].name == "blocks.1.attn.hook_q"
    assert points["blocks.1.hook_resid_pre"].name == "blocks.1.hook_in"
    assert points["unembed.hook_out"].name == "hook_unembed"
    assert list(bridge.gradients(TOKENS, LogitDiff(5, 7), Q)) == ["blocks.1.attn.hook_q"]
    for name, value in lens_cache.items():
        assert torch.equal(torch.isneginf(cache[name]), torch.isneginf(value)), name
        close(cache[name], value)
    _, some = bridge.run_with_cache(TOKENS, names_filter=Q)
    assert list(some) == [Q, "blocks.1.attn.hook_q"]
    close(bridge.run_with_cache(TOKENS, names_filter=SCORES)[1][SCORES], lens_cache[SCORES])
    assert bridge.cfg.processing[0] == "fold_ln"
    with pytest.warns(UserWarning, match="processed already"):
        bridge.enable_compatibility_mode(fold_ln=False)
    close(bridge(TOKENS), expected)


def test_compatibility_mode_without_processing() -> None:
    bridge = TransformerBridge.boot_transformers("tiny-gpt2", device="cpu")
    before = bridge(TOKENS)
    bridge.enable_compatibility_mode(no_processing=True)
    assert torch.equal(bridge(TOKENS), before)
    assert bridge.cfg.processing == ()
    _, cache = bridge.run_with_cache(TOKENS, names_filter=SCORES)
    assert torch.isneginf(cache[SCORES]).any()
    bridge.process_weights(fold_ln=False, fold_value_biases=False, center_writing_weights=False)
    assert bridge.cfg.processing == ("center_unembed",)


def test_weights_that_were_set_are_not_processed_over() -> None:
    bridge = TransformerBridge.boot_transformers("tiny-gpt2", device="cpu")
    bridge.set_weights({"blocks.1.attn.b_O": bridge.blocks[1].attn.b_O * 2})
    changed = bridge(TOKENS)
    with pytest.raises(InputError, match="reset_weights"):
        bridge.enable_compatibility_mode()
    assert not bridge.compatibility_mode
    assert torch.equal(bridge(TOKENS), changed)


def test_other_dtypes_are_processed_from_float32(odd_checkpoint: Path) -> None:
    bridge = TransformerBridge.boot_transformers(str(odd_checkpoint), device="cpu", dtype=torch.float64)
    bridge.enable_compatibility_mode()
    expected = HookedTransformer.from_pretrained(odd_checkpoint, device="cpu", dtype=torch.float64)
    tokens = TOKENS % bridge.cfg.d_vocab
    assert torch.equal(bridge(tokens), expected(tokens))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda bridge: pickle.loads(pickle.dumps(bridge))])
def test_copies_have_the_names_and_the_mode(copied: Any) -> None:
    bridge = TransformerBridge.boot_transformers("tiny-gpt2", device="cpu")
    bridge.enable_compatibility_mode(no_processing=True)
    other = copied(bridge)
    assert other.compatibility_mode
    assert other.hook_dict[Q].name == "blocks.1.attn.hook_q"
    logits, cache = other.run_with_cache(TOKENS, names_filter=[Q, SCORES])
    assert torch.equal(logits, bridge(TOKENS))
    assert list(cache) == [Q, "blocks.1.attn.hook_q", SCORES]
    assert torch.isneginf(cache[SCORES]).any()


def test_weights_have_transformerlens_names(bridge: TransformerBridge, model: HookedTransformer) -> None:
    named, given = dict(bridge.tl_named_parameters()), bridge.tl_parameters()
    assert list(named) == list(given) == list(bridge.get_params()) == [name for name, _ in model.named_parameters()]
    assert "blocks.0.attn.W_Q" in named
    for name, weight in model.named_parameters():
        assert torch.equal(named[name], weight), name
