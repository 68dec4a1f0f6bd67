"""What transformers' own modules compute at every hook point, read and edited by torch hooks: the oracle of foreign files.

What lies inside attention (scores, pattern, queries and keys after rotation) is read and edited in an attention function that
is registered with transformers; everything else where a module takes or gives it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from tests.adopt.adopt_cases import PAST, cases_of, inputs_of, past_of
from tests.adopt.as_tools_do import NONE, Change
from tests.adopt.checkpoints import CHECKPOINTS, family_of, load
from tests.families.layout import spec_of
from tests.families.torch_hooks import Place, hooked, places

Edit = Callable[[str, np.ndarray], np.ndarray]


class _Attention:
    """The attention function: hands every value inside to a function that may give another."""

    def __init__(self) -> None:
        self.use: Callable[[str, Tensor], Tensor] = lambda _name, value: value
        self.turned = False
        self.causal = True

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        block = f"blocks.{module.layer_idx}.attn."

        def at(name: str, tensor: Tensor) -> Tensor:
            return self.use(block + name, tensor)

        turned = "rot_" if self.turned else ""
        new = query.shape[2]  # keys and values of earlier tokens stand before
        query = at(f"hook_{turned}q", query.transpose(1, 2)).transpose(1, 2)
        own_key = at(f"hook_{turned}k", key[:, :, -new:].transpose(1, 2)).transpose(1, 2)
        own_value = at("hook_v", value[:, :, -new:].transpose(1, 2)).transpose(1, 2)
        key = torch.cat([key[:, :, :-new], own_key], 2)
        value = torch.cat([value[:, :, :-new], own_value], 2)
        groups = query.shape[1] // key.shape[1]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if attention_mask is not None:
            masked = attention_mask if attention_mask.dtype == torch.bool else attention_mask >= -1.0
            scores = scores.masked_fill(~masked[:, :, :, : key.shape[2]], -torch.inf)
        elif self.causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(key.shape[2] - new)
            scores = scores.masked_fill(~seen, -torch.inf)
        scores = at("hook_attn_scores", scores)
        # A row with nothing to see is a query of padding; its pattern says nothing and must not be nan.
        pattern = at("hook_pattern", torch.nan_to_num(scores.softmax(-1)))
        z = at("hook_z", (pattern @ value.repeat_interleave(groups, 1)).transpose(1, 2))
        return z.contiguous(), pattern


_INSIDE = ("hook_attn_scores", "hook_pattern", "hook_z", "hook_v")


def places_of(name: str, model: Any) -> dict[str, Place]:
    """Hook name -> where a module takes or gives it, of a family's model."""
    if CHECKPOINTS[name].kind == "vision":
        return dict(_vision(model))
    spec = spec_of(model)
    found = places(spec)
    if family_of(name) == "gpt2":
        found |= {"hook_embed": _of("transformer.wte"), "hook_pos_embed": _of("transformer.wpe")}
    if family_of(name) == "bert":
        found = dict(_encoder(model))
    # These are read inside the attention function.
    inside = {f"blocks.{layer}.attn.{hook}" for layer in range(spec.n_layers) for hook in _INSIDE}
    if spec.attention.rotary is None:
        inside |= {f"blocks.{layer}.attn.hook_{letter}" for layer in range(spec.n_layers) for letter in "qk"}
    return {hook: place for hook, place in found.items() if hook not in inside}


def _of(module: str, into: bool = False) -> Place:
    """All of a module's output or input."""
    return Place(module, into, lambda _m, x, y: x if into else y, lambda _m, _x, _y, value: value)


def _norm(hook: str, path: str, model: Any) -> Iterator[tuple[str, Place]]:
    """The two hook points of a LayerNorm module."""
    eps = model.get_submodule(path).eps

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        centred = x - x.mean(-1, keepdim=True)
        return centred, (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    def put_scale(module: Any, x: Tensor, _y: Tensor, value: Tensor) -> Tensor:
        return parts(x)[0] / value * module.weight + module.bias

    def put_normalized(module: Any, _x: Tensor, _y: Tensor, value: Tensor) -> Tensor:
        return value * module.weight + module.bias

    yield f"{hook}.hook_scale", Place(path, False, lambda _m, x, _y: parts(x)[1], put_scale)
    yield f"{hook}.hook_normalized", Place(path, False, lambda _m, x, _y: parts(x)[0] / parts(x)[1], put_normalized)


def _encoder(model: Any) -> Iterator[tuple[str, Place]]:
    """The places of BERT: norms after each sublayer, read by the next."""
    at = "bert.embeddings."
    yield "embed.hook_embed", _of(at + "word_embeddings")
    yield "embed.hook_pos_embed", _of(at + "position_embeddings")
    yield "embed.hook_token_type_embed", _of(at + "token_type_embeddings")
    yield from _norm("embed.ln", at + "LayerNorm", model)
    yield "hook_full_embed", _of(at + "LayerNorm")
    for layer in range(len(model.bert.encoder.layer)):
        ours, theirs = f"blocks.{layer}.", f"bert.encoder.layer.{layer}."
        norms = {"ln1": theirs + "attention.output.LayerNorm", "ln2": theirs + "output.LayerNorm"}
        yield ours + "hook_resid_pre", _of(theirs[:-1], into=True)
        yield ours + "hook_attn_out", _of(theirs + "attention.output.dense")
        yield ours + "hook_resid_mid", _of(norms["ln1"], into=True)
        yield from _norm(ours + "ln1", norms["ln1"], model)
        yield ours + "mlp.hook_pre", _of(theirs + "intermediate.dense")
        yield ours + "mlp.hook_post", _of(theirs + "output.dense", into=True)
        yield ours + "hook_mlp_out", _of(theirs + "output.dense")
        yield ours + "hook_resid_post", _of(norms["ln2"], into=True)
        yield from _norm(ours + "ln2", norms["ln2"], model)
        yield ours + "hook_normalized_resid_post", _of(norms["ln2"])
    yield from _norm("mlm_head.ln", "cls.predictions.transform.LayerNorm", model)
    yield "unembed.hook_in", _of("cls.predictions.decoder", into=True)
    yield "unembed.hook_out", _of("cls.predictions.decoder")


def _vision(model: Any) -> Iterator[tuple[str, Place]]:
    """The places of a vision model: pre-norm blocks after patches and a class token."""
    positions = model.vit.embeddings.position_embeddings  # [1, p, d_model], added to the class token and the patches
    path = "vit.embeddings"
    yield "hook_embed", Place(path, False, lambda _m, _x, y: y - positions, lambda _m, _x, _y, value: value + positions)
    yield (
        "hook_pos_embed",
        Place(path, False, lambda _m, _x, y: positions.expand_as(y), lambda _m, _x, y, value: y - positions + value),
    )
    for layer in range(len(model.vit.layers)):
        ours, theirs = f"blocks.{layer}.", f"vit.layers.{layer}"
        yield ours + "hook_resid_pre", _of(theirs, into=True)
        yield from _norm(ours + "ln1", f"{theirs}.layernorm_before", model)
        yield ours + "hook_attn_out", _of(f"{theirs}.attention.o_proj")
        middle = _of(f"{theirs}.layernorm_after", into=True)
        yield ours + "hook_resid_mid", Place(middle.module, True, middle.get, None)
        yield from _norm(ours + "ln2", f"{theirs}.layernorm_after", model)
        yield ours + "mlp.hook_pre", _of(f"{theirs}.mlp.fc1")
        yield ours + "mlp.hook_post", _of(f"{theirs}.mlp.fc2", into=True)
        yield ours + "hook_mlp_out", _of(f"{theirs}.mlp.fc2")
        yield ours + "hook_resid_post", _of(theirs)
    yield from _norm("ln_final", "vit.layernorm", model)
    yield "head.hook_in", _of("classifier", into=True)
    yield "head.hook_out", _of("classifier")


class Oracle:
    """transformers' model of a checkpoint made by ``checkpoints``, with torch hooks at every hook point.

    Args:
        name: The checkpoint's name.
        checkpoint: Its folder.
        change: What a tool computes otherwise.
    """

    def __init__(self, name: str, checkpoint: Path, change: Change = NONE) -> None:
        self.name = name
        self.kind = CHECKPOINTS[name].kind
        self._attention = _Attention()
        registered = f"adopt-reference-{id(self)}"  # of its own: what is registered belongs to the whole process
        AttentionInterface.register(registered, self._attention)
        AttentionMaskInterface.register(registered, eager_mask)
        self.model = load(checkpoint, registered, **change.config)
        if change.embed_scale is not None:
            self.model.get_input_embeddings().embed_scale.fill_(change.embed_scale)
        for layer, module in enumerate(m for m in self.model.modules() if type(m).__name__.endswith("Attention")):
            if not hasattr(module, "layer_idx"):
                module.layer_idx = layer
        for layer, module in enumerate(m for m in self.model.modules() if type(m).__name__.endswith("SelfAttention")):
            module.layer_idx = layer
        self.places = places_of(name, self.model)
        self.turned = self.kind == "decoder" and family_of(name) != "gpt2"

    def run(self, case: str) -> dict[str, np.ndarray]:
        """Every activation of a case, its outputs under ``out.``, and its inputs under ``in.``."""
        values: dict[str, np.ndarray] = {}
        given, extra = self._inputs(case)

        def keep(hook: str, value: Tensor) -> None:
            values[hook] = value.detach().numpy().copy()

        logits, present = self._call(given, extra, keep)
        outputs = {"out.logits": logits} | {f"out.present.{key[16:]}": array for key, array in present.items()}
        return values | outputs | {f"in.{key}": value for key, value in given.items()}

    def edited(self, case: str, hook: str, edit: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """The logits of a case when an edit takes an activation's place.

        Raises:
            KeyError: The place cannot be edited there (``editable`` says which can).
        """
        given, extra = self._inputs(case)

        def change(name: str, value: Tensor) -> Tensor | None:
            return torch.from_numpy(np.ascontiguousarray(edit(value.detach().numpy()))) if name == hook else None

        return self._call(given, extra, change)[0]

    def editable(self) -> tuple[str, ...]:
        """The hook points that an edit can be put in."""
        inside = [hook for hook in self.run("plain") if hook.startswith("blocks.") and hook not in self.places]
        return (*(hook for hook, place in self.places.items() if place.put is not None), *inside)

    def _inputs(self, case: str) -> tuple[dict[str, np.ndarray], Any]:
        """The inputs of a case, and the cache of what ran before them."""
        given = inputs_of(self.name, case)
        if case not in PAST:
            return given, None
        from transformers import DynamicCache

        cache = DynamicCache()
        before = {key: torch.from_numpy(value[:, : PAST[case]]) for key, value in given.items()}
        with self._attending(lambda _name, value: value), torch.no_grad():
            self.model(**before, past_key_values=cache, use_cache=True)
        kept = [(layer.keys.numpy().copy(), layer.values.numpy().copy()) for layer in cache.layers]
        now = {key: value if key == "attention_mask" else value[:, PAST[case] :] for key, value in given.items()}
        return now | past_of(kept), cache

    def _call(
        self, given: Mapping[str, np.ndarray], cache: Any, use: Callable[[str, Tensor], Tensor | None]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The logits, and the keys and values of all tokens for a decoder."""
        options = {key: torch.from_numpy(value) for key, value in given.items() if not key.startswith("past")}
        if self.kind == "decoder":
            from transformers import DynamicCache

            cache = DynamicCache() if cache is None else cache
            options |= {"past_key_values": cache, "use_cache": True}

        def inside(name: str, value: Tensor) -> Tensor:
            changed = use(name, value)
            return value if changed is None else changed

        batch = len(next(iter(given.values())))
        handles = [
            hooked(self.model, place, self._user(hook, place, use, batch)) for hook, place in self.places.items()
        ]
        try:
            with self._attending(inside), torch.no_grad():
                logits = self.model(**options).logits.numpy()
        finally:
            for handle in handles:
                handle.remove()
        if self.kind != "decoder":
            return logits, {}
        return logits, past_of([(layer.keys.numpy(), layer.values.numpy()) for layer in cache.layers])

    @staticmethod
    def _user(
        hook: str, place: Place, use: Callable[[str, Tensor], Tensor | None], batch: int
    ) -> Callable[..., Tensor | None]:
        """What a torch hook does at a place: read, and where ``use`` gives another value, put it there."""

        def called(module: Any, x: Tensor, y: Tensor) -> Tensor | None:
            value = place.get(module, x, y)
            if hook == "embed.hook_pos_embed":  # BERT adds one row of positions to every sequence of a batch
                value = value.expand(batch, *value.shape[1:])
            changed = use(hook, value)
            if changed is None:
                return None
            if place.put is None:
                raise KeyError(hook)
            return place.put(module, x, y, changed)

        return called

    @contextlib.contextmanager
    def _attending(self, use: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
        """Inside the block, attention hands its values to ``use``."""
        inside = self._attention
        before = (inside.use, inside.turned, inside.causal)
        inside.use, inside.turned, inside.causal = use, self.turned, self.kind == "decoder"
        try:
            yield
        finally:
            inside.use, inside.turned, inside.causal = before


def save(name: str, checkpoint: Path, folder: Path) -> None:
    """Writes a family's cases as ``<name>.<case>.npz``, and "plain" as ``<name>.npz`` besides."""
    folder.mkdir(parents=True, exist_ok=True)
    oracle = Oracle(name, checkpoint)
    for case in cases_of(name):
        values = oracle.run(case)
        np.savez(folder / f"{name}.{case}.npz", **values)
        if case == "plain":
            np.savez(folder / f"{name}.npz", **values)
