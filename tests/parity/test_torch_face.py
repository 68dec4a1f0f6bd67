"""The torch face: TransformerLens scripts run unchanged, with the NumPy face's numbers and shared memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch_reference
import transformers

import graphlens
from graphlens.errors import HookResultError
from graphlens.torch import HookedTransformer

PROMPT = "When John and Mary went to the store, John gave a drink to"
OTHER = "When John and Mary went to the store, Mary gave a drink to"


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return HookedTransformer.from_pretrained("tiny-gpt2")


@pytest.fixture(scope="module")
def reference() -> Any:
    return transformers.GPT2LMHeadModel.from_pretrained(graphlens.embedded_model(), attn_implementation="eager").eval()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-4 * max(1.0, float(expected.abs().max()))


def test_the_workflow_of_a_transformerlens_script(model: HookedTransformer, reference: Any) -> None:
    tokens = model.to_tokens(PROMPT)
    str_tokens = model.to_str_tokens(tokens[0])
    logits, cache = model.run_with_cache(
        tokens, names_filter=lambda n: "hook_resid_post" in n or "attn.hook_pattern" in n
    )
    expected = torch_reference.activations(reference, tokens)
    close(logits, expected["unembed.hook_out"])
    assert set(cache) == {n for n in expected if "hook_resid_post" in n or "attn.hook_pattern" in n}
    resid = cache["blocks.1.hook_resid_post"]
    pattern = cache["blocks.0.attn.hook_pattern"][0]
    close(resid, expected["blocks.1.hook_resid_post"])
    close(pattern, expected["blocks.0.attn.hook_pattern"][0])
    assert str_tokens[int(torch.argmax(pattern[0, -1]).item())] in str_tokens

    def ablate(z: torch.Tensor, hook: Any, head_idx: int) -> torch.Tensor:
        z = z.clone()
        z[:, :, head_idx, :] = 0.0
        return z

    ablated = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", partial(ablate, head_idx=2))])
    with torch_reference.edited(reference, "blocks.1.attn.hook_z", lambda z: ablate(z, None, 2)), torch.no_grad():
        close(ablated, reference(tokens).logits)
    p1, p2 = logits[0, -1].softmax(-1), ablated[0, -1].softmax(-1)
    kl = torch.sum(p1 * (p1.log() - p2.log())).item()
    assert kl > 0

    tokens_b = model.to_tokens(OTHER)
    _, cache_a = model.run_with_cache(tokens)
    for name in (
        "blocks.2.hook_resid_pre",
        "blocks.3.hook_resid_post",
        "blocks.1.attn.hook_z",
        "blocks.2.mlp.hook_post",
    ):
        patched = model.run_with_hooks(tokens_b, fwd_hooks=[(name, lambda resid, hook: cache_a[hook.name])])
        with torch_reference.edited(reference, name, lambda _, name=name: cache_a[name]), torch.no_grad():
            close(patched, reference(tokens_b).logits)

    lens = model.unembed(model.ln_final(resid))
    with torch.no_grad():
        close(lens, reference.lm_head(reference.transformer.ln_f(resid)))


def test_tensors_share_memory_with_the_run_and_the_numbers_are_the_numpy_faces(model: HookedTransformer) -> None:
    numpy_model = graphlens.HookedTransformer.from_pretrained("tiny-gpt2")
    assert numpy_model._engine._plain is model._engine._plain
    logits, cache = model.run_with_cache(PROMPT)
    numpy_logits, numpy_cache = numpy_model.run_with_cache(PROMPT)
    np.testing.assert_array_equal(logits.numpy(), numpy_logits)
    for name, value in numpy_cache.items():
        np.testing.assert_array_equal(cache[name].numpy(), value)
    assert model.to_tokens(PROMPT).dtype == torch.int64
    array = numpy_cache["hook_embed"]
    assert model._from_user(model._to_user(array)).ctypes.data == array.ctypes.data


def test_hooks_may_edit_in_place_return_none_or_a_numpy_array(model: HookedTransformer) -> None:
    name = "blocks.1.hook_mlp_out"

    def in_place(x: torch.Tensor, hook: Any) -> None:
        x *= 2

    expected = model.run_with_hooks(PROMPT, fwd_hooks=[(name, lambda x, hook: x * 2)])
    assert torch.equal(model.run_with_hooks(PROMPT, fwd_hooks=[(name, in_place)]), expected)
    assert torch.equal(model.run_with_hooks(PROMPT, fwd_hooks=[(name, lambda x, hook: x.numpy() * 2)]), expected)
    assert not torch.equal(model(PROMPT), expected)
    assert torch.equal(model.run_with_hooks(PROMPT, fwd_hooks=[(name, lambda x, hook: None)]), model(PROMPT))


def test_a_hook_may_return_a_strided_or_differentiable_tensor(model: HookedTransformer) -> None:
    name = "blocks.0.attn.hook_q"
    flipped = model.run_with_hooks(PROMPT, fwd_hooks=[(name, lambda q, hook: q.flip(2))])
    strided = model.run_with_hooks(
        PROMPT, fwd_hooks=[(name, lambda q, hook: q.transpose(0, 2).contiguous().transpose(0, 2).flip(2))]
    )
    assert torch.equal(flipped, strided)
    tracked = model.run_with_hooks(PROMPT, fwd_hooks=[(name, lambda q, hook: q.flip(2).requires_grad_())])
    assert torch.equal(flipped, tracked)


def test_a_wrong_result_is_refused(model: HookedTransformer) -> None:
    with pytest.raises(HookResultError, match="float64"):
        model.run_with_hooks(PROMPT, fwd_hooks=[("hook_embed", lambda x, hook: x.double())])
    with pytest.raises(HookResultError, match="shape"):
        model.run_with_hooks(PROMPT, fwd_hooks=[("hook_embed", lambda x, hook: x[:, :2])])


def test_the_tokenizer_agrees_with_transformers(model: HookedTransformer) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(graphlens.embedded_model())
    for text in (PROMPT, "naïve — 3.5€", " leading", "line\n\nbreak<|endoftext|>", "    "):
        assert model.to_tokens(text, prepend_bos=False)[0].tolist() == theirs(text)["input_ids"]
    assert model.tokenizer.bos_token_id == theirs.bos_token_id
    assert model.tokenizer.pad_token_id == theirs.pad_token_id


def test_loss_is_transformers(model: HookedTransformer, reference: Any) -> None:
    tokens = model.to_tokens(PROMPT)
    with torch.no_grad():
        close(model(tokens, return_type="loss"), reference(tokens, labels=tokens).loss)
