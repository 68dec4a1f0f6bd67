"""Blocks, attention, MLPs and norms of every family, called by themselves, are TransformerLens 3.9's, hooks among them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graphlens import HookedEncoder, HookedTransformer, InputError
from tests.families.comparing import TOLERANCE, relative
from tests.families.variants import CHOSEN, VARIANTS

Folders = Callable[[str], Path]
WITH_LENS = [name for name in CHOSEN if VARIANTS[name].lens is not None]


def fired(model: Any, call: Callable[[], Any]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What a call gives, and every activation that it passes by name, in order."""
    seen: dict[str, np.ndarray] = {}

    def keep(value: Any, hook: Any) -> None:
        seen[hook.name] = np.asarray(value).copy()

    with model.hooks(fwd_hooks=[(lambda name: True, keep)]):
        return np.asarray(call()).copy(), seen


def calls(model: Any, layer: int, x: Any, q: Any, k: Any, v: Any) -> dict[str, Callable[[], Any]]:
    block = model.blocks[layer]
    found = {
        "block": lambda: block(x),
        "attn": lambda: block.attn(q, k, v),
        "mlp": lambda: block.mlp(x),
        "ln1": lambda: block.ln1(x),
        "ln2": lambda: block.ln2(x),
        "ln_final": lambda: model.ln_final(x),
        "unembed": lambda: model.unembed(x),
    }
    if hasattr(block, "ln1_post"):
        found |= {"ln1_post": lambda: block.ln1_post(x), "ln2_post": lambda: block.ln2_post(x)}
    return found


@pytest.mark.parametrize("name", WITH_LENS)
def test_every_part_is_transformerlenss(name: str, family_model: Any, family_checkpoint: Folders) -> None:
    from tests.families.lens import lens_of

    ours: HookedTransformer = family_model(name)
    theirs = lens_of(name, family_checkpoint(name))
    tokens = np.random.default_rng(2).integers(1, ours.cfg.d_vocab, (2, 7))
    (found, seen), (expected, passed) = (
        fired(model, lambda model=model, ids=ids: model.embed(ids))
        for model, ids in ((ours, tokens), (theirs, torch.from_numpy(tokens)))
    )
    assert relative(found, expected, "embed") <= TOLERANCE
    assert list(seen) == list(passed)
    if "pos_embed.W_pos" in ours.weights:
        mask = np.asarray([[0, 0, 0, *[1] * 6], [1] * 7 + [0] * 2])
        for rest in ((), (2,), (2, mask), (0, mask[:, 2:])):
            found = ours.pos_embed(tokens, *rest)
            given = [torch.from_numpy(each) if isinstance(each, np.ndarray) else each for each in rest]
            assert relative(found, theirs.pos_embed(torch.from_numpy(tokens), *given), f"pos_embed {rest}") <= TOLERANCE
    inputs = np.random.default_rng(3).standard_normal((4, 2, 7, ours.cfg.d_model)).astype(np.float32)
    for layer in (0, ours.cfg.n_layers - 1):
        mine, reference = (
            calls(model, layer, *arrays) for model, arrays in ((ours, inputs), (theirs, torch.from_numpy(inputs)))
        )
        for what, call in mine.items():
            (found, seen), (expected, passed) = fired(ours, call), fired(theirs, reference[what])
            assert relative(found, expected, f"{name} {layer} {what}") <= TOLERANCE, (layer, what)
            # Of an MLP of experts ours has no hook points of each expert.
            assert set(seen) == {hook for hook in passed if ".experts." not in hook}, (layer, what)
            for hook, value in seen.items():
                assert relative(value, passed[hook], hook) <= TOLERANCE, (layer, what, hook)


@pytest.mark.parametrize("name", CHOSEN)
def test_parts_joined_are_the_model(name: str, family_model: Any) -> None:
    ours: HookedTransformer = family_model(name)
    tokens = np.random.default_rng(4).integers(1, ours.cfg.d_vocab, (2, 9))
    mask = np.asarray([[0, 0, 0, *[1] * 6], [1] * 9])
    for given in (None, mask):
        _, cache = ours.run_with_cache(tokens, attention_mask=given)
        for layer, block in enumerate(ours.blocks):
            found = block(cache["resid_pre", layer], attention_mask=given)
            normed = f"blocks.{layer}.hook_normalized_resid_post"  # OPT-350m alone: its blocks end with a norm
            expected = cache[normed] if normed in cache else cache["resid_post", layer]
            assert relative(found, expected, f"{name} {layer}") <= TOLERANCE
            if layer + 1 < ours.cfg.n_layers:
                assert relative(found, cache["resid_pre", layer + 1], f"{name} {layer + 1}") <= TOLERANCE


def test_the_parts_of_an_encoder_are_transformerlenss(families_root: Path) -> None:
    from tests.families import encoders

    ours = HookedEncoder.from_onnx(encoders.hooked_of("bert", families_root), "cpu")
    theirs = encoders.lens_of(encoders.made("bert"))
    x, q, k = np.random.default_rng(3).standard_normal((3, 2, 7, ours.cfg.d_model)).astype(np.float32)
    mask = np.asarray([[1] * 5 + [0] * 2, [1] * 7])
    additive = np.where(mask[:, None, None] == 1, np.float32(0), np.finfo(np.float32).min)
    for layer in (0, ours.cfg.n_layers - 1):
        mine, reference = ours.blocks[layer], theirs.blocks[layer]
        parts: list[tuple[str, Callable[[Any, Callable[[Any], Any]], Any]]] = [
            ("block", lambda block, of: block(of(x))),
            ("masked", lambda block, of: block(of(x), of(additive))),
            ("attn", lambda block, of: block.attn(of(q), of(k), of(x))),
            ("masked attn", lambda block, of: block.attn(of(q), of(k), of(x), additive_attention_mask=of(additive))),
            ("mlp", lambda block, of: block.mlp(of(x))),
            ("ln1", lambda block, of: block.ln1(of(x))),
        ]
        for what, call in parts:
            found, seen = fired(ours, lambda call=call, block=mine: call(block, lambda a: a))
            expected, passed = fired(theirs, lambda call=call, block=reference: call(block, torch.from_numpy))
            assert relative(found, expected, what) <= TOLERANCE, (layer, what)
            assert list(seen) == list(passed), (layer, what)
    assert relative(mine(x, attention_mask=mask), mine(x, additive), "either mask") == 0
    with pytest.raises(InputError, match=r"must be \[batch, 1, 1, pos\]"):
        mine(x, mask)
