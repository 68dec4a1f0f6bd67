"""Blocks, attention and MLPs that are called by themselves: each call is a run of that part of the graph alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol

import numpy as np

from graphlens.analysis.arrays import Array, ArrayInput, ArrayT, UserArray, as_array
from graphlens.edits.gate import Window
from graphlens.edits.spliced_sae import SplicedSae
from graphlens.engine.plan import Plan
from graphlens.errors import InputError, InputTypeError
from graphlens.file.io_names import (
    ATTENTION,
    ATTENTION_MASK,
    KEY_AND_VALUE,
    MLP,
    PART_INPUTS,
    POSITION_IDS,
    RESIDUAL_IN,
    WHOLE_BLOCK,
    past_input,
    present_output,
)
from graphlens.file.names import block_name, in_block
from graphlens.model.limits import longest
from graphlens.runtime.types import DeviceValue, Feed

if TYPE_CHECKING:
    from graphlens.model.runner import Runner

# The flags that change what a part computes or which hook points it has.
_FLAGS = {
    ATTENTION: ("use_attn_in", "use_attn_result", "use_split_qkv_input"),
    MLP: (),
    WHOLE_BLOCK: ("use_attn_in", "use_attn_result", "use_hook_mlp_in", "use_split_qkv_input"),
}
_PER_HEAD = ("use_attn_in", "use_split_qkv_input")


class Entry(Protocol):
    """A block's part of a KV cache: ``cache.entries[layer]``, keys and values [batch, pos, heads, d_head]."""

    @property
    def past_keys(self) -> object:
        """The keys so far."""

    @property
    def past_values(self) -> object:
        """The values so far."""

    def append(self, new_keys: object, new_values: object, /) -> object:
        """Takes in the keys and values of new positions."""


def call_block(
    runner: Runner[ArrayT], layer: int, resid_pre: object, entry: Entry | None, attention_mask: object
) -> ArrayT:
    """The residual stream after a block, from the one before it; the block's hooks and interventions are called.

    Args:
        runner: Runs the model.
        layer: The block.
        resid_pre: [b, p, d_model].
        entry: The block's earlier keys and values, extended; None for none.
        attention_mask: int [b, p], with an entry [b, past + p], 1 at real tokens; None for ones.

    Returns:
        [b, p, d_model].

    Raises:
        InputError: For inputs that do not fit.
    """
    call = _Call(runner, layer, WHOLE_BLOCK)
    residual = call.array(resid_pre, "resid_pre", (3,))
    return call.run({RESIDUAL_IN: residual}, residual, [resid_pre], entry, attention_mask)


def call_attention(
    runner: Runner[ArrayT], layer: int, given: Sequence[object], entry: Entry | None, attention_mask: object
) -> ArrayT:
    """What a block's attention gives, before any norm of it; its hooks and interventions are called.

    Args:
        runner: Runs the model.
        layer: The block.
        given: What queries, keys and values are computed from, after the block's norm: each [b, p, d_model], or [b, p, heads,
            d_model] while every head has an input of its own.
        entry: See ``call_block``.
        attention_mask: See there.

    Returns:
        [b, p, d_model].

    Raises:
        InputError: For inputs that do not fit.
    """
    call = _Call(runner, layer, ATTENTION)
    config, names = runner.config, PART_INPUTS[ATTENTION]
    per_head = bool(set(call.flags) & set(_PER_HEAD))
    feeds = {}
    for name, value, heads in zip(names, given, (config.n_heads, *[config.n_key_value_heads] * 2), strict=True):
        array = call.array(value, name, (4,) if per_head else (3,), heads)
        feeds[name] = array
    sizes = {name: array.shape[:2] for name, array in feeds.items()}
    if len(set(sizes.values())) > 1:
        raise InputError(
            f"{block_name(layer)}.attn takes queries, keys and values of the same tokens, not "
            f"{', '.join(f'{name} {list(size)}' for name, size in sizes.items())}. Earlier keys go into past_kv_cache_entry."
        )
    first = feeds[names[0]]
    return call.run(feeds, first[:, :, 0] if per_head else first, given, entry, attention_mask)


def call_mlp(runner: Runner[ArrayT], layer: int, x: object) -> ArrayT:
    """What a block's MLP gives, before any norm of it; its hooks and interventions are called.

    Args:
        runner: Runs the model.
        layer: The block.
        x: What its matrices read, after the block's norm: [b, p, d_model], or [..., d_model] where nothing is hooked there.

    Returns:
        The same shape.

    Raises:
        InputError: For inputs that do not fit.
    """
    call = _Call(runner, layer, MLP)
    (name,) = PART_INPUTS[MLP]
    array = call.array(x, "x", ())
    rows = array if array.ndim == 3 else array.reshape(1, -1, array.shape[-1])
    if array.ndim != 3 and call.is_edited:
        raise InputError(
            f"{block_name(layer)}.mlp was given {list(array.shape)}: its hooks and interventions are of [batch, pos, ...]: give "
            f"[batch, pos, {array.shape[-1]}]."
        )
    return call.run({name: rows}, rows, [x], shape=array.shape)


def call_hook_point(runner: Runner[ArrayT], name: str, x: object) -> object:
    """An activation after the hooks that are active at a hook point; see ``HookPoint.__call__``.

    Args:
        runner: Runs the model.
        name: The hook point's own name.
        x: The activation. Hooks that edit in place edit it itself.

    Raises:
        InputError: While an intervention is active there, and for what is no array.
    """
    part, _, tail = name.rpartition(".")
    hooked = Hooked(runner, part, (tail,))
    if not hooked.has_hooks:
        return x
    try:
        array = runner.border.from_user(x)
    except TypeError as error:
        raise InputTypeError(f"{name!r} is called with an array, not with {type(x).__name__}.") from error
    return hooked.result(hooked(tail, array, array, copied=not array.flags.writeable), x)


def of_additive(additive: ArrayInput | UserArray, part: str) -> Array:
    """The attention mask int64 [b, k], 1 at real tokens, that TransformerLens's additive one says.

    Args:
        additive: [b, 1, 1, k]: 0 at real tokens, and at padding a number so low that nothing is left of a score.
        part: What was called with it.

    Raises:
        InputError: For another shape, and for other numbers.
    """
    array = as_array(additive)
    fits = array.ndim == 4 and array.shape[1:3] == (1, 1)
    if not fits or not ((array == 0) | (array <= -1e4)).all():
        raise InputError(
            f"additive_attention_mask of {part} must be [batch, 1, 1, pos] with 0 at real tokens and -inf at padding."
        )
    real: Array = (array[:, 0, 0] == 0).astype(np.int64)
    return real


@dataclass(frozen=True)
class _Call(Generic[ArrayT]):
    """A call of a part of a block: "attn", "mlp", or "block" for all of it."""

    runner: Runner[ArrayT]
    layer: int
    part: str

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags that are set and concern the part, sorted."""
        return tuple(flag for flag in self.runner.flags.names if flag in _FLAGS[self.part])

    @property
    def saes(self) -> tuple[SplicedSae, ...]:
        """The SAEs that stand inside the part."""
        inside = block_name(self.layer) if self.part == WHOLE_BLOCK else in_block(self.layer, self.part)
        return tuple(one for one in self.runner.flags.saes.now if one.writes.startswith(f"{inside}."))

    @property
    def name(self) -> str:
        """The part's TransformerLens name."""
        return block_name(self.layer) if self.part == WHOLE_BLOCK else in_block(self.layer, self.part)

    @property
    def is_edited(self) -> bool:
        """True if a hook or an intervention is active in the part."""
        start = f"{self.name}."
        active = [
            *(hook.name for hook in self.runner.hooks.active()),
            *(item.hook for item in self.runner.edits.items),
        ]
        return any(name.startswith(start) for name in active)

    def array(self, value: object, what: str, axes: tuple[int, ...], heads: int = 0) -> Array:
        """The array of an input, checked; ``axes`` are how many it may have, () for any number of them from 1 on."""
        config = self.runner.config
        wanted = {3: f"[batch, pos, {config.d_model}]", 4: f"[batch, pos, {heads}, {config.d_model}]"}
        shown = " or ".join(wanted[number] for number in axes) or f"[..., {config.d_model}]"
        try:
            array = self.runner.border.from_user(value)
        except TypeError as error:
            raise InputTypeError(f"{what} of {self.name} is an array {shown}, not {type(value).__name__}.") from error
        fits = array.ndim > 0 and array.shape[-1] == config.d_model and 0 not in array.shape
        if not fits or (axes and array.ndim not in axes) or (array.ndim == 4 and axes and array.shape[2] != heads):
            raise InputError(f"{what} of {self.name} has shape {list(array.shape)}; it must be {shown}.")
        if str(array.dtype) != config.dtype:
            raise InputError(
                f"{what} of {self.name} is {array.dtype}; this model computes in {config.dtype}. Cast it first."
            )
        return array

    def run(
        self,
        feeds: dict[str, Array],
        sizes: Array,
        given: Sequence[object],
        entry: Entry | None = None,
        attention_mask: object = None,
        shape: tuple[int, ...] | None = None,
    ) -> ArrayT:
        """Runs the part.

        Args:
            feeds: What its matrices or the block read.
            sizes: An array [b, p, d_model], of which the graph reads the sizes alone.
            given: What the user gave, for a result that says why it carries no gradient.
            entry: Keys and values so far.
            attention_mask: Which tokens are real.
            shape: What the result is shaped like; None for [b, p, d_model].
        """
        if self.runner.config.positional_embedding_type == "shortformer" and self.part != MLP:
            raise InputError(
                f"{self.name} is not called by itself in a model that adds its position embeddings to queries and keys: run the "
                "model with start_at_layer and stop_at_layer."
            )
        from graphlens.model.request import Request, checked_mask  # here, to keep the chain of imports short

        runner, (batch, new) = self.runner, sizes.shape[:2]
        held = None if entry is None else _Held(runner, self.layer, entry, batch, new)
        past = 0 if held is None else held.past
        if self.part != MLP and past + new > runner.config.n_ctx:
            raise InputError(f"{past + new} positions, and {longest(runner.config)}.")
        mask = None if attention_mask is None else checked_mask(attention_mask, (batch, past + new), held)
        fed: dict[str, Feed] = {**feeds, RESIDUAL_IN: sizes}
        window = Window.whole(batch, new)
        if held is not None:
            whole = np.ones((batch, past + new), np.int64) if mask is None else mask
            fed |= {ATTENTION_MASK: whole, POSITION_IDS: np.maximum(whole.cumsum(-1) - 1, 0)[:, past:], **held.feeds}
            window = Window(batch, past, new, past + new, past or new)
        elif mask is not None:
            fed[ATTENTION_MASK] = mask
        plan = Plan(self.flags, self.saes, self.layer, self.layer + 1, past=held is not None, part=self.part)
        request = Request(plan, fed, None, mask, mask, held, "", (batch, new), window, bare=True, alone=True)
        ran = runner.run(request)
        output = ran.logits if shape is None else ran.logits.reshape(shape)
        return runner.border.computed(output, given, self.name, ran.learned)


class _Held(Generic[ArrayT]):
    """What a run reads of a block's entry in a KV cache, and adds to it."""

    def __init__(self, runner: Runner[ArrayT], layer: int, entry: Entry, batch: int, new: int) -> None:
        self._runner, self._layer, self._entry, self._new = runner, layer, entry, new
        config = runner.config
        self.feeds: dict[str, Array] = {}
        for part, name in zip(KEY_AND_VALUE, ("past_keys", "past_values"), strict=True):
            try:
                array = runner.border.from_user(getattr(entry, name))
            except (AttributeError, TypeError) as error:
                raise InputTypeError(
                    f"past_kv_cache_entry is a {type(entry).__name__}: it must be cache.entries[{layer}] of a cache, with keys "
                    "and values in past_keys and past_values."
                ) from error
            wanted = (batch, config.n_key_value_heads, config.d_head)
            if array.ndim != 4 or (array.shape[0], *array.shape[2:]) != wanted:
                raise InputError(
                    f"{name} of past_kv_cache_entry has shape {list(array.shape)}; this call needs [{batch}, past, "
                    f"{wanted[1]}, {wanted[2]}]."
                )
            self.feeds[past_input(layer, part)] = np.ascontiguousarray(array.transpose(0, 2, 1, 3)).astype(
                config.dtype, copy=False
            )
        self.past = int(array.shape[1])

    def extend(self, present: dict[str, DeviceValue], mask: Array, owner: str = "") -> None:
        """Hands the keys and values of the run's own positions to the entry."""
        border = self._runner.border
        new = [
            np.ascontiguousarray(
                present[present_output(self._layer, part)].numpy()[:, :, -self._new :].transpose(0, 2, 1, 3)
            )
            for part in KEY_AND_VALUE
        ]
        keys, values = (border.to_user(array) for array in new)
        self._entry.append(keys, values)


class Hooked(Generic[ArrayT]):
    """The hooks of a part that is computed outside a graph: a norm, the unembedding.

    Args:
        runner: Runs the model.
        part: The part's name.
        tails: Its hook points, without the part.

    Raises:
        InputError: While an intervention is active at one of them.
    """

    def __init__(self, runner: Runner[ArrayT], part: str, tails: tuple[str, ...]) -> None:
        self._runner, self._part = runner, part
        self._learned: list[str] = []
        self._names = {tail: f"{part}.{tail}" if part else tail for tail in tails}
        names = set(self._names.values())
        for item in runner.edits.items:
            if item.hook in names:
                raise InputError(
                    f"the intervention at {item.hook!r} is not carried out where {part or item.hook} is called by itself: these "
                    "belong to runs of the graph. Use a Python hook, or call it outside the block."
                )
        self._calls = runner.hooks.callbacks(runner.border, names, elsewhere=True, learned=self._learned)

    @property
    def has_hooks(self) -> bool:
        """True if a hook is active at one of its hook points."""
        return bool(self._calls)

    def __call__(self, tail: str, value: Array, given: Array, copied: bool = True) -> Array:
        """A value after the hooks at one of its hook points.

        Args:
            tail: The hook point, without the part.
            value: The value.
            given: What the part was called with, whose dtype hooks see.
            copied: Whether hooks see a copy.
        """
        call = self._calls.get(self._names[tail])
        return value if call is None else call(np.array(value, given.dtype) if copied else value)

    def result(self, value: Array, given: object) -> ArrayT:
        """What the part gives, as the user gets it.

        Args:
            value: The numbers.
            given: What the part was called with.
        """
        return self._runner.border.computed(value, (given,), self._part, self._learned)
