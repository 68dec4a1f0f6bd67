"""Activations and edits by Hugging Face's own modules and torch hooks: what graphlens must reproduce."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

ODD_CONFIG: dict[str, Any] = {
    "n_layer": 3,
    "n_head": 5,
    "n_embd": 40,
    "n_inner": 77,
    "vocab_size": 101,
    "n_positions": 33,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def activations(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Every unflagged hook point of an unmasked run of a GPT2LMHeadModel with eager attention, by its definition."""
    found: dict[str, Tensor] = {}
    handles = []

    def keep(module: Any, name: str, take: Callable[[Any, Any], Tensor]) -> None:
        handles.append(
            module.register_forward_hook(lambda _, args, out: found.__setitem__(name, take(args, out).clone()))
        )

    def into(args: Any, _: Any) -> Tensor:
        return args[0]

    def out_of(_: Any, out: Any) -> Tensor:
        return out[0] if isinstance(out, tuple) else out

    body, b, p = model.transformer, *tokens.shape
    heads = model.config.n_head
    keep(body.wte, "hook_embed", out_of)
    keep(body.wpe, "hook_pos_embed", lambda _, out: out.expand(b, -1, -1))
    norms = {"ln_final": body.ln_f}
    for i, block in enumerate(body.h):
        norms |= {f"blocks.{i}.ln1": block.ln_1, f"blocks.{i}.ln2": block.ln_2}
        at = f"blocks.{i}."
        keep(block, at + "hook_resid_pre", into)
        keep(block, at + "hook_resid_post", out_of)
        keep(block.ln_2, at + "hook_resid_mid", into)
        keep(block.attn, at + "hook_attn_out", out_of)
        keep(block.attn, at + "attn.hook_pattern", lambda _, out: out[1])
        for part, letter in enumerate("qkv"):
            keep(
                block.attn.c_attn,
                f"{at}attn.hook_{letter}",
                lambda _, out, part=part: out.chunk(3, -1)[part].reshape(b, p, heads, -1),
            )
        keep(block.attn.c_proj, at + "attn.hook_z", lambda args, _: args[0].reshape(b, p, heads, -1))
        keep(block.mlp.c_fc, at + "mlp.hook_pre", out_of)
        keep(block.mlp.c_proj, at + "mlp.hook_post", into)
        keep(block.mlp, at + "hook_mlp_out", out_of)
    for name, norm in norms.items():
        keep(norm, name + ".input", into)
    keep(model.lm_head, "unembed.hook_in", into)
    keep(model.lm_head, "unembed.hook_out", out_of)
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    for name, norm in norms.items():
        x = found.pop(name + ".input")
        centred = x - x.mean(-1, keepdim=True)
        found[name + ".hook_scale"] = (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
        found[name + ".hook_normalized"] = centred / found[name + ".hook_scale"]
    causal = torch.ones(p, p, dtype=torch.bool).tril()
    for i, block in enumerate(body.h):
        q, k = (found[f"blocks.{i}.attn.hook_{letter}"].transpose(1, 2) for letter in "qk")
        scores = q @ k.transpose(-1, -2) * block.attn.scaling
        found[f"blocks.{i}.attn.hook_attn_scores"] = scores.masked_fill(~causal, -torch.inf)
    return found


@contextlib.contextmanager
def edited(model: Any, name: str, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The Hugging Face model with one hook point's activation replaced by ``edit(activation)``, where modules allow."""
    body, heads = model.transformer, model.config.n_head
    parts = name.split(".")
    block = body.h[int(parts[1])] if parts[0] == "blocks" else None

    def before(module: Any, change: Callable[[Tensor], Tensor]) -> Any:
        return module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))

    def after(module: Any, change: Callable[[Tensor], Tensor]) -> Any:
        return module.register_forward_hook(
            lambda _, __, out: (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)
        )

    def by_head(x: Tensor) -> Tensor:
        return edit(x.reshape(*x.shape[:2], heads, -1)).reshape(x.shape)

    def part_of(index: int) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            chunks = list(x.chunk(3, -1))
            chunks[index] = by_head(chunks[index])
            return torch.cat(chunks, -1)

        return change

    tail = ".".join(parts[2:]) if block is not None else name
    handle = {
        "hook_embed": lambda: after(body.wte, edit),
        "unembed.hook_in": lambda: before(model.lm_head, edit),
        "unembed.hook_out": lambda: after(model.lm_head, edit),
        "hook_resid_pre": lambda: before(block, edit),
        "hook_resid_post": lambda: after(block, edit),
        "attn.hook_q": lambda: after(block.attn.c_attn, part_of(0)),
        "attn.hook_k": lambda: after(block.attn.c_attn, part_of(1)),
        "attn.hook_v": lambda: after(block.attn.c_attn, part_of(2)),
        "attn.hook_z": lambda: before(block.attn.c_proj, by_head),
        "hook_attn_out": lambda: after(block.attn, edit),
        "mlp.hook_pre": lambda: after(block.mlp.c_fc, edit),
        "mlp.hook_post": lambda: before(block.mlp.c_proj, edit),
        "hook_mlp_out": lambda: after(block.mlp, edit),
    }[tail]()
    try:
        yield
    finally:
        handle.remove()


EDITABLE_IN_BLOCK = (
    "hook_resid_pre", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "hook_attn_out", "mlp.hook_pre",
    "mlp.hook_post", "hook_mlp_out", "hook_resid_post",
)  # fmt: skip
EDITABLE_OUTSIDE = ("hook_embed", "unembed.hook_in", "unembed.hook_out")
