"""Hook points of transformers' own modules, by torch hooks: the oracle where TransformerLens 3.9 is none.

A place says where in transformers' model a hook point's value lies and how to put an edited one there. What lies inside a
module (scores, queries after rotation) has no place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphlens.export.families import Spec
from graphlens.file.names import in_block
from tests.families.comparing import Difference, edit_of, edited, read


@dataclass(frozen=True)
class Place:
    """Where a hook point's value lies.

    Attributes:
        module: The module's path.
        into: True for the module's input, False for its output.
        get: The value, from (module, input, output).
        put: The module's input or output with another value, from (module, input, output, value).
    """

    module: str
    into: bool
    get: Callable[[Any, Tensor, Tensor], Tensor]
    put: Callable[[Any, Tensor, Tensor, Tensor], Tensor] | None


def _whole(module: str, into: bool, scale: float = 1.0) -> Place:
    """All of a module's input or output, times ``scale``."""
    return Place(module, into, lambda _m, x, y: (x if into else y) * scale, lambda _m, _x, _y, value: value / scale)


def _columns(module: str, into: bool, columns: np.ndarray) -> Place:
    """Some columns of it: an array of their numbers gives the value's last axes."""
    index = torch.from_numpy(columns)

    def put(_m: Any, x: Tensor, y: Tensor, value: Tensor) -> Tensor:
        changed = (x if into else y).clone()
        changed[..., index] = value
        return changed

    return Place(module, into, lambda _m, x, y: (x if into else y)[..., index], put)


def _normed(path: str, spec: Spec, centred: bool, shared: bool, heads: int = 0) -> Iterator[tuple[str, Place]]:
    """The hook points of a norm, worked out from its input.

    Args:
        path: The norm's path.
        spec: What the model computes.
        centred: True if the mean is subtracted.
        shared: True if the module is also another norm, so that none of the two can be edited alone.
        heads: The number of heads that are normalised each, as rows [b * s * h, d]; 0 for whole rows.
    """
    eps = spec.norms.eps

    def turned(x: Tensor) -> bool:
        return bool(heads) and x.ndim == 4 and x.shape[1] == heads  # Gemma normalises [b, h, s, d]

    def rows(x: Tensor) -> Tensor:
        x = x.transpose(1, 2) if turned(x) else x
        return x.reshape(-1, x.shape[-1]) if heads else x

    def back(x: Tensor, y: Tensor) -> Tensor:
        return x.reshape(y.transpose(1, 2).shape).transpose(1, 2) if turned(y) else x.reshape(y.shape)

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        x = rows(x)
        x = x - x.mean(-1, keepdim=True) if centred else x
        scale = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return x, scale

    def affine(module: Any, x: Tensor) -> Tensor:
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if weight is not None:
            x = x * (weight + 1 if spec.norms.plus_one else weight)
        return x if bias is None else x + bias

    def put_scale(module: Any, x: Tensor, y: Tensor, value: Tensor) -> Tensor:
        return back(affine(module, parts(x)[0] / value), y)

    def put_normalized(module: Any, _x: Tensor, y: Tensor, value: Tensor) -> Tensor:
        return back(affine(module, value), y)

    yield "hook_scale", Place(path, False, lambda _m, x, _y: parts(x)[1], None if shared else put_scale)
    yield (
        "hook_normalized",
        Place(path, False, lambda _m, x, _y: parts(x)[0] / parts(x)[1], None if shared else put_normalized),
    )


def places(spec: Spec) -> dict[str, Place]:
    """Hook name -> its place, for the hook points that have one."""
    found = {"unembed.hook_in": _whole(spec.head_in or spec.head, True), "unembed.hook_out": _whole(spec.head, False)}
    centred = spec.norms.kind == "LN"
    if spec.final_norm is not None:
        found |= {f"ln_final.{name}": place for name, place in _normed(spec.final_norm, spec, centred, False)}
    if spec.embed_in is not None:
        found["hook_embed"] = _whole(spec.embed_in, False)
    elif spec.pos_embed is None:
        found["hook_embed"] = _whole(f"{spec.blocks}.0", True)
    for layer in range(spec.n_layers):
        found |= {in_block(layer, name): place for name, place in _of_block(spec, f"{spec.blocks}.{layer}")}
    return found


def _of_block(spec: Spec, block: str) -> Iterator[tuple[str, Place]]:
    """The places of a block."""
    a, mlp, centred = spec.attention, spec.mlp, spec.norms.kind == "LN"
    attention = f"{block}.{a.module}"
    module = mlp.module if mlp.experts is None else mlp.experts.fused
    feed = f"{block}.{module}" if module else ""
    yield "hook_resid_pre", _whole(block, True)
    if spec.residual_norms:
        yield "hook_resid_mid", _whole(f"{block}.{spec.ln1}", True)
        yield "hook_resid_post", _whole(f"{block}.{spec.ln2}", True)
        yield "hook_normalized_resid_post", _whole(block, False)
    else:
        yield "hook_resid_post", _whole(block, False)
    if not spec.parallel and not spec.post_norm_only and not spec.residual_norms:
        # Another input of the norm would leave what is added to it later.
        yield "hook_resid_mid", replace(_whole(f"{block}.{spec.ln2}", True), put=None)
    # Bloom's modules add the residual stream themselves: there what their last matrices give is the sublayer's output.
    adds = a.alibi is not None
    after = f"{block}.{spec.ln1_post or spec.ln1}" if spec.ln1_post or spec.post_norm_only else attention
    yield "hook_attn_out", _whole(f"{attention}.{a.out}" if adds else after, False, spec.residual_scale)
    after = f"{block}.{spec.ln2_post or spec.ln2}" if spec.ln2_post or spec.post_norm_only else feed
    after = f"{feed}.{mlp.down}" if adds else after or f"{block}.{mlp.down}"
    yield "hook_mlp_out", _whole(after, False, spec.residual_scale)
    norms = {"ln1": spec.ln1, "ln2": spec.ln2, "ln1_post": spec.ln1_post, "ln2_post": spec.ln2_post}
    for name, path in norms.items():
        if path is not None:
            for hook, place in _normed(f"{block}.{path}", spec, centred, shared=spec.ln1 == spec.ln2):
                yield f"{name}.{hook}", place
    yield "attn.hook_z", _columns(f"{attention}.{a.out}", True, np.arange(a.n_heads * a.d_head).reshape(-1, a.d_head))
    for letter, path, columns in _projections(spec):
        yield f"attn.hook_{letter}", _columns(f"{attention}.{path}", False, columns)
    for letter, norm, heads in (("q", a.q_norm, a.n_heads), ("k", a.k_norm, a.n_key_value_heads)):
        if norm is not None:
            for hook, place in _normed(f"{attention}.{norm}", spec, centred, False, 0 if a.norm_of_all else heads):
                yield f"attn.{letter}_norm.{hook}", place
    if mlp.experts is not None:
        return
    at = f"{feed or block}."
    both, size = np.arange(2 * mlp.size).reshape(2, -1), np.arange(mlp.size)
    if mlp.gate_up is not None:
        yield "mlp.hook_pre", _columns(at + mlp.gate_up, False, both[0])
        yield "mlp.hook_pre_linear", _columns(at + mlp.gate_up, False, both[1])
    else:
        yield "mlp.hook_pre", _columns(at + (mlp.gate or mlp.up), False, size)
        if mlp.gate:
            yield "mlp.hook_pre_linear", _columns(at + mlp.up, False, size)
    yield "mlp.hook_post", _columns(at + mlp.down, True, size)


def _projections(spec: Spec) -> Iterator[tuple[str, str, np.ndarray]]:
    """(letter, matrix, the columns of its output [heads, d_head]) of queries, keys and values."""
    a = spec.attention
    heads, keys, width = a.n_heads, a.n_key_value_heads, a.d_head
    if a.fused is None:
        for letter, path, count in (("q", a.q, heads), ("k", a.k, keys), ("v", a.v, keys)):
            yield letter, path, np.arange(count * width).reshape(count, width)
        return
    columns = np.arange((heads + 2 * keys) * width).reshape(-1, width)
    if a.layout == "parts":
        rows = np.split(columns, [heads, heads + keys])
    elif a.layout == "heads":
        rows = list(columns.reshape(heads, 3, width).swapaxes(0, 1))
    else:
        each = columns.reshape(keys, -1, width)
        rows = [each[:, :-2].reshape(-1, width), each[:, -2], each[:, -1]]
    for letter, found in zip("qkv", rows, strict=True):
        yield letter, a.fused, found


def _first(value: Any) -> Tensor:
    """The activation of what a module takes or gives."""
    return value[0] if isinstance(value, tuple) else value


def hooked(model: Any, place: Place, use: Callable[[Any, Tensor, Tensor], Tensor | None]) -> Any:
    """Calls ``use`` with (module, input, output) where a value lies; what it gives back takes the value's place."""
    module = model.get_submodule(place.module)

    def before(_m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        new = use(module, x, x)
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    def after(_m: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        x = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
        new = use(module, x, _first(out))
        if new is None:
            return None
        return (new, *out[1:]) if isinstance(out, tuple) else new

    if place.into:
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after, with_kwargs=True)


def _put(place: Place, name: str) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """What puts ``edit_of`` a value in its place."""

    def use(module: Any, x: Tensor, y: Tensor) -> Tensor:
        assert place.put is not None
        value = place.get(module, x, y)
        return place.put(module, x, y, torch.from_numpy(edit_of(name, value.numpy())))

    return use


def against_torch_hooks(
    ours: Any, model: Any, spec: Spec, tokens: np.ndarray, edits: bool = True
) -> Iterator[Difference]:
    """Every hook point that has a place, read and edited, beside transformers with torch hooks."""
    known, ids = places(spec), torch.from_numpy(tokens)
    values: dict[str, np.ndarray] = {}

    def keep(name: str, place: Place) -> Callable[[Any, Tensor, Tensor], None]:
        return lambda module, x, y: values.update({name: place.get(module, x, y).numpy().copy()})

    handles = [hooked(model, place, keep(name, place)) for name, place in known.items()]
    model(ids)
    for handle in handles:
        handle.remove()
    assert values.keys() == known.keys(), known.keys() - values.keys()
    _, cache = ours.run_with_cache(tokens)
    if not spec.mlp.module:  # OPT's MLP takes batch and positions in one axis
        values = {name: value.reshape(cache[name].shape) for name, value in values.items()}
    yield from read(cache, values)
    for name, place in known.items() if edits else ():
        if place.put is not None:
            handle = hooked(model, place, _put(place, name))
            expected = model(ids).logits.numpy()
            handle.remove()
            found = edited(ours, tokens, name)
            share = float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))
            yield Difference(f"an edit at {name}", share)
