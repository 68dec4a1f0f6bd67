"""Weights as tensors that refuse to be written into: what of torch writes, and what it is told."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, SupportsIndex, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from graphlens.analysis.arrays import Array
from graphlens.errors import InputError

Function: TypeAlias = Any  # one of torch's: a function, a method, the getter or setter of a property
_READ_ALONE = {"clone", "cpu", "detach", "numpy"}  # a guard makes torch load its compiler, which takes seconds
_WRITE_NOTHING = {"detach_", "rename_"}  # though their names end as those that write do


class Weight(torch.Tensor):
    """A weight of a model: a tensor that can be computed with and not be written into.

    The model computes from its own file, so that writing into a tensor would change nothing. What shares the weight's
    memory (``.data``, ``detach()``, a view, a view of a view) is a Weight too. What is computed of one is a plain tensor,
    and so is a copy: ``clone()``, ``copy.deepcopy``, what comes back of a pickle. ``numpy()`` is read-only.
    """

    called: str | None = None

    @classmethod
    def of(cls, array: Array, called: str | None = None) -> Weight:
        """A weight over an array's memory.

        Args:
            array: The weight. Memory that can only be read is copied: torch has no read-only tensors.
            called: What the user calls it.
        """
        array = array.view()
        try:
            array.flags.writeable = True  # files are mapped copy-on-write, so that nothing can reach them
        except ValueError:
            array = array.copy()
        return _as_weight(torch.from_numpy(array), called)

    @classmethod
    def __torch_function__(
        cls,
        func: Function,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Runs one of torch's functions on weights; nothing of it writes into them."""
        options, name = kwargs or {}, getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            weights = [value for value in _tensors((*args, *options.values())) if isinstance(value, Weight)]
            if name == "__get__":
                if getattr(func.__self__, "__name__", "") == "is_leaf":  # what an optimiser asks of each parameter
                    _refuse_to_train(sys._getframe(1))
                return _guarded(func(*args, **options), weights)
            target, *others = [*args, *options.values()] or [None]
            if isinstance(target, Weight):
                _refuse_unseen(func, name, target, others)
            if name in _READ_ALONE:
                return _guarded(func(*args, **options), weights)
            with _Guard(weights, name):
                return _guarded(func(*args, **options), weights)

    # Those that do not come by __torch_function__

    def as_subclass(self, cls: type[torch.Tensor]) -> torch.Tensor:
        """A copy of another class: the memory itself could be written into by it."""
        return self.clone().as_subclass(cls)

    def set_(self, *args: object, **options: object) -> None:
        """Refused: a weight lies where it lies. Raises InputError."""
        raise _refusal("set_", self)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.unbind(0))

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        return np.array(self.numpy(), dtype, copy=copy)

    def __format__(self, format_spec: str) -> str:
        return str(self.clone().__format__(format_spec))

    def __deepcopy__(self, memo: dict[int, object]) -> torch.Tensor:
        copied: torch.Tensor = self.clone()
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        parts: tuple[object, ...] = self.clone().__reduce_ex__(protocol)
        return parts

    def __dlpack__(self, *args: object, **options: object) -> object:
        return self.clone().__dlpack__(*args, **options)


class _Guard(TorchDispatchMode):
    """Refuses, inside the block, every operator of torch whose schema says that it writes into memory of a weight.

    Functions written in Python (``torch.nn.init``, ``dropout(inplace=True)``, ``embedding(max_norm=1)``) come apart into
    operators here, and ``out=`` and lists of tensors are arguments like all others.
    """

    def __init__(self, weights: Iterable[Weight], name: str) -> None:
        super().__init__()
        self._memory, self._name = {_memory(weight): weight for weight in weights}, name

    def __torch_dispatch__(
        self,
        func: Function,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        options = kwargs or {}
        if func._schema.is_mutable:
            for place, argument in enumerate(func._schema.arguments):
                if argument.is_write:
                    written = args[place] if place < len(args) else options.get(argument.name)
                    for tensor in _tensors((written,)):
                        if (weight := self._memory.get(_memory(tensor))) is not None:
                            raise _refusal(self._name, weight)
        return func(*args, **options)


def _refuse_to_train(caller: FrameType) -> None:
    """Refuses an optimiser over weights: without gradients it would do nothing, and say nothing."""
    if caller.f_globals.get("__name__") == "torch.optim.optimizer":
        raise InputError(
            "an optimiser over the parameters of a graphlens model: the model does not train, and its parameters have no "
            "gradients. Train it in TransformerLens or torch, then take the result over with "
            "model.load_state_dict(trained.state_dict())."
        )


def _refuse_unseen(func: Function, name: str, weight: Weight, others: Sequence[object]) -> None:
    """Refuses what writes into a weight, or is to make it a leaf with a gradient, without an operator that says so."""
    asked = getattr(getattr(func, "__self__", None), "__name__", "") if name == "__set__" else name
    if asked in ("requires_grad", "requires_grad_") and others and not others[0]:
        return
    if name in ("__set__", "__delete__") or (
        name.endswith("_") and not name.endswith("__") and name not in _WRITE_NOTHING
    ):
        raise _refusal(f"setting {asked}" if name == "__set__" else name, weight)


def _refusal(what: str, weight: Weight) -> InputError:
    called = weight.called or "blocks.0.attn.W_O"
    which = f"the weight {weight.called!r}" if weight.called else "a weight"
    return InputError(
        f"{what or 'this'} on {which}: the model computes from its own file, so writing into this tensor would change "
        f"nothing. To change the model call model.set_weights({{{called!r}: new}}); for a tensor of your own, clone() this one."
    )


def _tensors(values: Iterable[object]) -> Iterator[torch.Tensor]:
    """The tensors among arguments, those in lists, tuples and dictionaries too."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def _memory(tensor: torch.Tensor) -> int | None:
    """Where a tensor's memory begins, the same for all its views; None for a tensor that has none of its own."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except RuntimeError:  # sparse tensors, those inside vmap
        return None


def _as_weight(tensor: torch.Tensor, called: str | None) -> Weight:
    weight: Weight = tensor.as_subclass(Weight)
    weight.called = called
    return weight


def _guarded(result: object, weights: Sequence[Weight]) -> object:
    """What a function gave, with all that shares memory with weights protected as they are."""
    if isinstance(result, torch.Tensor):
        if weights and not isinstance(result, Weight) and (memory := _memory(result)) is not None:
            for weight in weights:
                if _memory(weight) == memory:
                    return _as_weight(result, weight.called)
    elif type(result) is list:
        return [_guarded(value, weights) for value in result]
    elif type(result) is tuple:
        return tuple(_guarded(value, weights) for value in result)
    elif isinstance(result, np.ndarray) and not result.flags.owndata:
        result.flags.writeable = False
    return result
