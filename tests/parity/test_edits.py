"""An edit at every hook point, against GPT-2 written out in torch, itself checked against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch_reference import ODD_CONFIG

from graphlens import HookedTransformer


def gpt2(weights: dict[str, Tensor], tokens: Tensor, tap: Callable[[str, Tensor], Tensor]) -> Tensor:
    """Logits of ODD_CONFIG's model; each activation is replaced by ``tap(hook name, activation)``."""
    heads, eps = ODD_CONFIG["n_head"], 1e-5
    b, p = tokens.shape

    def norm(x: Tensor, at: str, module: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / tap(at + "hook_scale", (x.pow(2).mean(-1, keepdim=True) + eps).sqrt())
        return tap(at + "hook_normalized", x) * weights[module + ".weight"] + weights[module + ".bias"]

    def linear(x: Tensor, module: str) -> Tensor:
        return x @ weights[module + ".weight"] + weights[module + ".bias"]

    embed = tap("hook_embed", weights["transformer.wte.weight"][tokens])
    x = embed + tap("hook_pos_embed", weights["transformer.wpe.weight"][:p].expand(b, -1, -1))
    for i in range(ODD_CONFIG["n_layer"]):
        at, module = f"blocks.{i}.", f"transformer.h.{i}."
        x = tap(at + "hook_resid_pre", x)
        parts = linear(norm(x, at + "ln1.", module + "ln_1"), module + "attn.c_attn").chunk(3, -1)
        q, k, v = (
            tap(f"{at}attn.hook_{letter}", part.reshape(b, p, heads, -1))
            for letter, part in zip("qkv", parts, strict=True)
        )
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones(p, p).triu(1).bool(), -torch.inf)
        pattern = tap(at + "attn.hook_pattern", tap(at + "attn.hook_attn_scores", scores).softmax(-1))
        z = tap(at + "attn.hook_z", torch.einsum("bhqk,bkhd->bqhd", pattern, v))
        x = tap(at + "hook_resid_mid", x + tap(at + "hook_attn_out", linear(z.flatten(2), module + "attn.c_proj")))
        pre = tap(at + "mlp.hook_pre", linear(norm(x, at + "ln2.", module + "ln_2"), module + "mlp.c_fc"))
        post = tap(at + "mlp.hook_post", torch.nn.functional.gelu(pre, approximate="tanh"))
        x = tap(at + "hook_resid_post", x + tap(at + "hook_mlp_out", linear(post, module + "mlp.c_proj")))
    x = tap("unembed.hook_in", norm(x, "ln_final.", "transformer.ln_f"))
    return tap("unembed.hook_out", x @ weights["transformer.wte.weight"].T)


def test_an_edit_at_every_hook_point_has_the_effect_it_has_in_torch(odd_checkpoint: Path, odd_hooked: Path) -> None:
    reference = transformers.GPT2LMHeadModel.from_pretrained(odd_checkpoint).eval()
    weights, model = reference.state_dict(), HookedTransformer.from_onnx(odd_hooked)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 101, (2, 7))
    ids = torch.from_numpy(tokens)
    plain, cache = model.run_with_cache(tokens)
    with torch.no_grad():
        theirs = reference(ids).logits
        assert float((gpt2(weights, ids, lambda _, x: x) - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())
    assert len(model.hook_dict) == 57
    for name in model.hook_dict:
        noise = rng.standard_normal(cache[name].shape).astype(np.float32)
        change = torch.from_numpy(noise)

        def edit(activation: np.ndarray, hook: Any, noise: np.ndarray = noise) -> np.ndarray:
            return activation * np.float32(1.25) + noise

        def tap(at: str, x: Tensor, name: str = name, change: Tensor = change) -> Tensor:
            return x * 1.25 + change if at == name else x

        found = model.run_with_hooks(tokens, fwd_hooks=[(name, edit)])
        with torch.no_grad():
            expected = gpt2(weights, ids, tap).numpy()
        assert np.abs(expected - plain).max() > 1e-3, name
        assert np.abs(found - expected).max() <= 1e-4 * max(1.0, np.abs(expected).max()), name


def test_the_numpy_twin_of_the_workflow_gives_the_torch_faces_numbers() -> None:
    from graphlens.torch import HookedTransformer as TorchTransformer

    numpy_model, torch_model = (
        HookedTransformer.from_pretrained_no_processing("tiny-gpt2"),
        TorchTransformer.from_pretrained_no_processing("tiny-gpt2"),
    )
    prompt, other = (f"When John and Mary went to the store, {name} gave a drink to" for name in ("John", "Mary"))
    name, head = "blocks.2.hook_resid_pre", "blocks.1.attn.hook_z"
    results = []
    for model in (numpy_model, torch_model):
        tokens = model.to_tokens(prompt)
        logits, cache = model.run_with_cache(tokens, names_filter=lambda n: "hook_resid" in n or "hook_pattern" in n)

        def ablate(z: Any, hook: Any) -> None:
            z[:, :, 2, :] = 0.0

        ablated = model.run_with_hooks(tokens, fwd_hooks=[(head, ablate)])
        patched = model.run_with_hooks(
            model.to_tokens(other), fwd_hooks=[(name, lambda x, hook, cache=cache: cache[hook.name])]
        )
        lens = model.unembed(model.ln_final(cache["blocks.1.hook_resid_post"]))
        results.append([np.asarray(x) for x in (tokens, logits, ablated, patched, lens, cache["pattern", 0])])
    for mine, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(mine, theirs)
