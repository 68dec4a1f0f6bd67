"""Weights on the torch face: refused wherever torch would write into one, plain tensors otherwise; set as in TransformerLens."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lens_oracle import PROCESSING, oracle
from torch import nn

import graphlens
from graphlens.errors import InputError
from graphlens.model.torch_weight import Weight
from graphlens.torch import HookedTransformer, KeyValueCache

W_Q = "blocks.1.attn.W_Q"
OTHER = torch.ones(4, 128, 32)
TOKENS = np.random.default_rng(0).integers(0, 101, (2, 9))
PROMPT = "When John and Mary went to the store, John gave a drink to"

WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "zero_": lambda w: w.zero_(),
    "data.zero_": lambda w: w.data.zero_(),
    "a view's data": lambda w: w[0].data.zero_(),
    "a view of a view": lambda w: w[1:].transpose(0, 1)[2].mT.mul_(0),
    "copy_": lambda w: w.copy_(OTHER),
    "+=": lambda w: w.__iadd__(1),
    "*=": lambda w: w.__imul__(0),
    "**=": lambda w: w.__ipow__(2),
    "w[...] =": lambda w: w.__setitem__(..., 0),
    "w[mask] =": lambda w: w.__setitem__(w > 0, 0),
    "w[indices] =": lambda w: w.__setitem__((torch.tensor([0]), torch.tensor([1])), 0),
    "w[0] += 1": lambda w: w.__setitem__(0, w[0] + 1),
    "out=": lambda w: torch.add(OTHER, OTHER, out=w),
    "out= of a view": lambda w: torch.mul(OTHER[0], 0, out=w[0]),
    "out= by name, among several": lambda w: torch.max(
        OTHER, 2, out=(w[:, :, 0], torch.zeros(4, 128, dtype=torch.int64))
    ),
    "a function of torch": lambda w: torch.clamp_(w, 0, 1),
    "a list of tensors": lambda w: torch._foreach_mul_([OTHER.clone(), w], 0.0),
    "torch.ops": lambda w: torch.ops.aten.fill_(w, 1),
    "init.zeros_": lambda w: nn.init.zeros_(w),
    "init.constant_": lambda w: nn.init.constant_(w, 1.0),
    "init.normal_": lambda w: nn.init.normal_(w),
    "init.xavier_uniform_": lambda w: nn.init.xavier_uniform_(w),
    "init.trunc_normal_": lambda w: nn.init.trunc_normal_(w),
    "dropout": lambda w: F.dropout(w, 0.5, training=True, inplace=True),
    "relu": lambda w: F.relu(w, inplace=True),
    "threshold": lambda w: F.threshold(w, 0, 1, inplace=True),
    "embedding's max_norm": lambda w: F.embedding(torch.tensor([0]), w[0], max_norm=0.1),
    "detach": lambda w: w.detach().add_(1),
    "iteration": lambda w: [head.zero_() for head in w],
    "chunk": lambda w: w.chunk(2)[0].zero_(),
    "split": lambda w: torch.split(w, 1)[0].zero_(),
    "unbind": lambda w: torch.unbind(w, 1)[0].zero_(),
    "expand": lambda w: w[:1].expand(4, 128, 32).zero_(),
    "diagonal": lambda w: torch.diagonal(w[0]).fill_(1),
    "as another dtype": lambda w: w.view(torch.int32).zero_(),
    "narrow": lambda w: w.narrow(0, 0, 1).zero_(),
    "to what it is": lambda w: w.to("cpu").float().zero_(),
    "as_tensor": lambda w: torch.as_tensor(w).zero_(),
    "under no_grad": lambda w: torch.no_grad()(w.zero_)(),
    "data =": lambda w: setattr(w, "data", OTHER),
    "grad =": lambda w: setattr(w, "grad", OTHER),
    "requires_grad_": lambda w: w.requires_grad_(),
    "requires_grad =": lambda w: setattr(w, "requires_grad", True),
    "Parameter": lambda w: nn.Parameter(w),
    "vector_to_parameters": lambda w: nn.utils.vector_to_parameters(torch.zeros(w.numel()), [w]),
    "resize_": lambda w: w.resize_(2, 2),
    "set_": lambda w: w.set_(OTHER),
    "share_memory_": lambda w: w.share_memory_(),
    "map_": lambda w: w.map_(OTHER, lambda a, b: 0.0),
    "apply_": lambda w: w.apply_(lambda a: 0.0),
    "random_": lambda w: w.random_(),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", ["of a layer", "stacked", "that was set"])
def test_what_writes_into_a_weight_is_refused(write: str, kind: str, model: HookedTransformer) -> None:
    changed = copy.deepcopy(model)
    if kind == "that was set":
        changed.set_weights({W_Q: model.blocks[1].attn.W_Q * 2})
    weight = changed.W_Q[1] if kind == "stacked" else changed.blocks[1].attn.W_Q
    before = weight.clone()
    with pytest.raises(InputError, match=r"W_Q'.*model\.set_weights\(\{'blocks\.[01]\.attn\.W_Q': new\}\).*clone\(\)"):
        WRITES[write](weight)
    assert torch.equal(weight, before)
    assert torch.equal(changed.blocks[1].attn.W_Q, before)


def test_the_issues_own_lines(model: HookedTransformer) -> None:
    expected = model(PROMPT)
    for write in (
        lambda: model.W_O.data.zero_(),
        lambda: model.W_O[0].data.zero_(),
        lambda: model.W_E_pos.zero_(),
        lambda: model.unembed.b_U.add_(1),
        lambda: [parameter.data.mul_(0) for parameter in model.parameters()],
        lambda: model.state_dict()["embed.W_E"].zero_(),
        lambda: model.OV.A.zero_(),
        lambda: model.blocks[0].attn.QK.B.data.zero_(),
        lambda: torch.optim.SGD([nn.Parameter(model.W_E)], lr=1.0),
    ):
        with pytest.raises(InputError, match=r"model\.set_weights\("):
            write()
    assert torch.equal(model(PROMPT), expected)


def test_arrays_of_weights_are_read_only(model: HookedTransformer) -> None:
    weight = model.blocks[1].attn.W_Q
    for array in (
        weight.numpy(),
        np.asarray(weight),
        weight.mT.numpy(),
        weight[0].detach().numpy(),
        model.weights[W_Q],
    ):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    assert np.array(weight).flags.writeable
    before = weight.clone()
    for copied in (
        torch.from_dlpack(weight),
        weight.as_subclass(torch.Tensor),
        copy.deepcopy(weight),
        copy.copy(weight),
    ):
        copied.zero_()
        assert torch.equal(weight, before)


def test_what_is_computed_of_weights_is_plain(model: HookedTransformer) -> None:
    weight, plain = model.blocks[1].attn.W_Q, model.blocks[1].attn.W_Q.clone()
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
    computed = {
        "matmul": lambda w: x @ w,
        "einsum": lambda w: torch.einsum("pm,hmd->hpd", x, w),
        "sum": lambda w: w.sum((0, 1)),
        "stack": lambda w: torch.stack([w, w]),
        "where": lambda w: torch.where(w > 0, w, 0),
        "norm": lambda w: F.layer_norm(w, (32,)),
        "clone": lambda w: w.clone(),
        "copy": copy.copy,
        "deepcopy": copy.deepcopy,
        "pickle": lambda w: pickle.loads(pickle.dumps(w)),
        "as_subclass": lambda w: w.as_subclass(torch.Tensor),
        "double": lambda w: w.double(),
        "indices": lambda w: w[torch.tensor([2, 0])],
    }
    for name, of in computed.items():
        found = of(weight)
        assert type(found) is torch.Tensor, name
        assert torch.allclose(found, of(plain), atol=1e-5), name
    for view in (weight[0], weight.mT, weight.data, weight.detach(), weight.to("cpu"), next(iter(weight))):
        assert type(view) is Weight
    torch.einsum("pm,hmd->hpd", x, weight).sum().backward()
    assert torch.allclose(x.grad, plain.sum((0, 2)).expand(3, -1), atol=1e-5)
    assert weight.requires_grad_(False) is weight
    assert not nn.Parameter(weight, requires_grad=False).requires_grad
    assert torch.equal(torch.vmap(lambda row: row @ weight[0])(x), x @ plain[0])
    assert weight.tolist() == plain.tolist()
    assert f"{weight[0, 0, 0]:.3f}" == f"{plain[0, 0, 0]:.3f}"
    assert repr(weight[0, 0, :2]) == f"Weight({repr(plain[0, 0, :2])[7:]}"


def test_weights_may_be_given_to_modules_and_files(model: HookedTransformer) -> None:
    weight = model.blocks[1].mlp.W_in
    layer = nn.Linear(128, weight.shape[1], bias=False)
    layer.weight.data.copy_(weight.T)
    layer.load_state_dict({"weight": weight.T})
    x = torch.randn(2, 128)
    assert torch.allclose(layer(x), x @ weight, atol=1e-5)
    layer.weight.data.zero_()
    assert weight.any()
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    stored.seek(0)
    back = torch.load(stored, weights_only=True)
    assert all(
        type(value) is torch.Tensor and torch.equal(value, model.state_dict()[name]) for name, value in back.items()
    )


def test_caches_are_saved_by_torch(model: HookedTransformer) -> None:
    past = KeyValueCache.init_cache(model.cfg, batch_size=1)
    _, cache = model.run_with_cache(PROMPT)
    model(model.to_tokens(PROMPT), past_kv_cache=past)
    stored = io.BytesIO()
    torch.save((cache, past, model.hook_dict, model), stored)
    stored.seek(0)
    other, other_past, points, other_model = torch.load(stored, weights_only=False)
    assert all(torch.equal(other[name], value) for name, value in cache.items())
    assert list(points) == list(model.hook_dict)
    more = torch.tensor([[5]])
    assert torch.equal(other_model(more, past_kv_cache=other_past), model(more, past_kv_cache=past))
    deep = copy.deepcopy(cache)
    deep["hook_embed"].zero_()
    assert cache["hook_embed"].any()


# As in TransformerLens


@pytest.mark.parametrize("processed", [False, True])
def test_every_weight_that_is_set_counts_as_in_transformerlens(
    processed: bool, odd_checkpoint: Path, odd_hooked: Path, tmp_path: Path
) -> None:
    folder = graphlens.process_weights(odd_hooked, tmp_path / "model") if processed else odd_hooked
    ours = HookedTransformer.from_onnx(folder, "cpu")
    lens = oracle(odd_checkpoint, **dict.fromkeys(PROCESSING, processed))
    generator = torch.Generator().manual_seed(3)
    held = set(ours.weights)
    new = {
        name: torch.randn(w.shape, generator=generator) * 0.3 for name, w in ours.state_dict().items() if name in held
    }
    with torch.no_grad():
        for name, value in new.items():
            lens.get_parameter(name).copy_(value)
    ours.set_weights(new)
    tokens = torch.from_numpy(TOKENS)
    expected, expected_cache = lens.run_with_cache(tokens)
    reference = {"unembed.hook_out": expected, **dict(expected_cache.items())}
    heads = expected_cache.stack_head_results()
    for model in (ours, HookedTransformer.from_onnx(ours.bake([], tmp_path / "baked", keep_hooks=True), "cpu")):
        logits, cache = model.run_with_cache(tokens)
        assert torch.equal(logits, cache["unembed.hook_out"])
        for name, wanted in reference.items():
            finite = torch.isfinite(wanted)
            assert (cache[name] - wanted)[finite].abs().max() <= 1e-4 * max(1, wanted[finite].abs().max()), name
        for name in ("W_Q", "b_K", "W_V", "W_O", "b_O", "W_in", "b_out", "W_E", "W_pos", "W_U"):
            assert torch.equal(getattr(model, name), getattr(lens, name).detach()), name
        assert (cache.stack_head_results() - heads).abs().max() <= 1e-4 * heads.abs().max()


@pytest.mark.parametrize("kind", ["meta", "sparse"])
def test_a_tensor_without_an_array_is_refused_with_a_sentence(kind: str, model: HookedTransformer) -> None:
    plain = torch.ones(1, 3)
    value = plain.to("meta") if kind == "meta" else plain.to_sparse()
    with pytest.raises(InputError, match="cannot be read as an array"):
        model(value)
    with pytest.raises(InputError, match="cannot be read as an array"):
        model.set_weights({"blocks.0.attn.W_O": value})
    with pytest.raises(InputError, match="cannot be read as an array"):
        model.run_with_hooks(torch.tensor([[1, 2]]), fwd_hooks=[("hook_embed", lambda activation, hook: value)])
