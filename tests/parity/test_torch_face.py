"""The torch face: TransformerLens scripts run unchanged, with the NumPy face's numbers and shared memory."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch_reference
import transformers

import graphlens
from graphlens.engine.plan import Plan
from graphlens.errors import HookResultError, InputError, RuntimeUnavailable
from graphlens.torch import HookedTransformer
from tests.core.test_public_names import MEMBERS, NAMES, assert_short_line

PROMPT = "When John and Mary went to the store, John gave a drink to"
OTHER = "When John and Mary went to the store, Mary gave a drink to"


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return HookedTransformer.from_pretrained_no_processing("tiny-gpt2")


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
    numpy_model = graphlens.HookedTransformer.from_pretrained_no_processing("tiny-gpt2")
    assert numpy_model.runner.engine.session(Plan()) is model.runner.engine.session(Plan())
    logits, cache = model.run_with_cache(PROMPT)
    numpy_logits, numpy_cache = numpy_model.run_with_cache(PROMPT)
    np.testing.assert_array_equal(logits.numpy(), numpy_logits)
    for name, value in numpy_cache.items():
        np.testing.assert_array_equal(cache[name].numpy(), value)
    assert model.to_tokens(PROMPT).dtype == torch.int64
    array = numpy_cache["hook_embed"]
    assert model.border.from_user(model.border.to_user(array)).ctypes.data == array.ctypes.data


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


def test_what_a_script_asks_of_a_module_is_answered_or_refused(model: HookedTransformer) -> None:
    assert model.cfg.dtype == torch.float32
    tokens = model.to_tokens(PROMPT).to(model.cfg.device)
    assert tokens.device == model.device == torch.device("cpu")
    for same in (model.to("cpu"), model.to(torch.device("cpu")), model.to(torch.float32), model.cpu(), model.eval()):
        assert same is model
    assert model.train(False) is model.requires_grad_(False) is model
    for refused in (lambda: model.to("cuda"), lambda: model.to(torch.device("cuda", 1)), model.cuda):
        with pytest.raises(RuntimeUnavailable, match='providers="cuda"'):
            refused()
    with pytest.raises(InputError, match=r"dtype='float16'"):
        model.to(torch.float16)
    with pytest.raises(InputError, match="'mps'"):
        model.to("mps")
    with pytest.raises(InputError, match="does not train"):
        model.train()
    with pytest.raises(InputError, match="no gradients"):
        model.requires_grad_()


def test_weights_are_tensors_over_the_mapped_file_that_no_write_reaches() -> None:
    model = HookedTransformer.from_onnx(graphlens.embedded_model(), "cpu")
    assert model.W_E.shape == (model.cfg.d_vocab, 128)
    (mapped,) = model.weights.opened.values()
    start, stop = mapped.bytes.ctypes.data, mapped.bytes.ctypes.data + mapped.bytes.size
    for weight in (model.W_E, model.W_U, model.blocks[1].attn.W_Q, model.blocks[0].mlp.W_out, model.ln_final.w):
        assert isinstance(weight, torch.Tensor)
        assert start <= weight.data_ptr() < stop
    before, expected = mapped.path.read_bytes(), model(PROMPT)
    with pytest.raises(InputError, match="set_weights"):
        model.W_E[:] = 0
    with torch._C.DisableTorchFunctionSubclass():  # whoever goes around the refusal
        model.W_E[:] = 0
    assert mapped.path.read_bytes() == before
    assert torch.equal(model(PROMPT), expected)


def test_weights_that_can_only_be_mapped_read_only_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    memmap = np.memmap

    def refusing(path: Any, dtype: Any, mode: str) -> Any:
        if mode == "c":
            raise OSError("Cannot allocate memory")
        return memmap(path, dtype=dtype, mode=mode)

    monkeypatch.setattr(np, "memmap", refusing)
    model = HookedTransformer.from_onnx(graphlens.embedded_model(), "cpu")
    kept = model.W_E.clone()
    with pytest.raises(InputError, match="set_weights"):
        model.W_E[:] = 0
    with torch._C.DisableTorchFunctionSubclass():
        model.W_E[:] = 0
    assert torch.equal(model.W_E, kept)


def test_factored_matrices_hold_tensors(model: HookedTransformer) -> None:
    ov = model.blocks[1].attn.OV
    whole = model.blocks[1].attn.W_V @ model.blocks[1].attn.W_O
    close(ov.AB, whole)
    close(ov[2].AB, whole[2])
    close((ov @ ov.T).AB, whole @ whole.transpose(-1, -2))
    close((2 * ov).AB, 2 * whole)
    close((model.W_E @ ov[0]).AB, model.W_E @ whole[0])
    u, s, v = ov.svd()
    close(u @ torch.diag_embed(s) @ v.transpose(-1, -2), whole)
    assert ov.eigenvalues.dtype == torch.complex64
    assert [type(each) for each in ov] == [type(ov)] * len(ov)
    assert ov.shape == (4, 128, 128)


def test_tokens_may_be_strided_and_bfloat16_is_refused(model: HookedTransformer) -> None:
    tokens = model.to_tokens([PROMPT, OTHER])
    assert torch.equal(model(tokens.repeat_interleave(2, 1)[:, ::2]), model(tokens))
    with pytest.raises(InputError, match="bfloat16"):
        model.unembed(torch.zeros(1, 128, dtype=torch.bfloat16))


def test_the_torch_face_has_every_name_of_before() -> None:
    module = importlib.import_module("graphlens.torch")
    assert [name for name in NAMES["graphlens.torch"].split() if not hasattr(module, name)] == []


def test_the_torch_model_has_every_method_of_before_and_one_class_more(model: HookedTransformer) -> None:
    assert set(MEMBERS["HookedTransformer"].split()) | {"to", "device", "eval", "train"} <= set(dir(model))
    assert_short_line(HookedTransformer, 8)
