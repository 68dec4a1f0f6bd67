"""What a thread has of its own that Python hooks depend on, carried to another thread and back.

Context variables (NumPy's error handling and graphlens's own hooks are such) and, where torch is loaded, its grad mode,
inference mode, autocast, default device, number of threads and CUDA device. torch keeps these for each thread.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import copy_context
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

Result = TypeVar("Result")
_AUTOCAST = ("cpu", "cuda", "mps", "xpu")  # torch keeps one autocast for each kind of device
_MISSING = object()
_NOTHING = nullcontext()


class TorchState(NamedTuple):
    """torch's settings in one thread.

    Attributes:
        grad: True if gradients are recorded.
        inference: True in ``torch.inference_mode()``.
        autocast: The kinds of device with autocast, and the dtype of each.
        cached: True if autocast keeps the weights that it cast.
        device: Where new tensors are made; None for the CPU.
        cuda: The current CUDA device.
        threads: How many threads an operator takes.
    """

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, object], ...]
    cached: bool
    device: object
    cuda: int
    threads: int

    @classmethod
    def now(cls, torch: ModuleType) -> TorchState:
        """The settings of this thread."""
        return teller(torch)()

    def put(self, torch: ModuleType, here: TorchState) -> None:
        """Makes these the settings of this thread, inference mode apart, which only a ``with`` block can set.

        Args:
            torch: The module.
            here: The settings that the thread has.
        """
        if self.grad != here.grad:
            torch.set_grad_enabled(self.grad)
        if self.autocast != here.autocast:
            for kind, _ in here.autocast:
                torch.set_autocast_enabled(kind, False)
            for kind, dtype in self.autocast:
                torch.set_autocast_enabled(kind, True)
                torch.set_autocast_dtype(kind, dtype)
            torch.clear_autocast_cache()
        if self.cached != here.cached:
            torch.set_autocast_cache_enabled(self.cached)
        if self.device != here.device:
            torch.set_default_device(self.device)
        if self.cuda != here.cuda:
            torch.cuda.set_device(self.cuda)
        if self.threads != here.threads:
            torch.set_num_threads(self.threads)


@functools.cache
def teller(torch: Any) -> Callable[[], TorchState]:
    """The function that tells the settings of a thread. It is called twice a run, with cold caches: every function of torch
    that it need not look up or call is a microsecond."""
    some, modes = told_at_once(torch)
    grad, inference, cached = torch.is_grad_enabled, torch.is_inference_mode_enabled, torch.is_autocast_cache_enabled
    threads, cpu = torch.get_num_threads, torch.device("cpu")
    has_cuda = torch.backends.cuda.is_built()

    def autocast() -> tuple[tuple[str, object], ...]:
        return tuple((kind, torch.get_autocast_dtype(kind)) for kind in _AUTOCAST if torch.is_autocast_enabled(kind))

    def device() -> object:
        device: object = torch.get_default_device()
        return None if device == cpu else device

    def now() -> TorchState:
        return TorchState(
            grad(),
            inference(),
            () if some is not None and not some() else autocast(),
            cached(),
            None if modes is not None and modes() == 0 else device(),  # a device that was set is a function mode
            torch.cuda.current_device() if has_cuda and torch.cuda.is_initialized() else 0,
            threads(),
        )

    return now


def told_at_once(torch: Any) -> tuple[Callable[[], bool] | None, Callable[[], int] | None]:
    """torch's functions that say, much sooner than those for users, if a thread has autocast and how many function modes it
    has; None where this torch lacks them."""
    try:
        autocast, modes = torch._C._is_any_autocast_enabled, torch._C._len_torch_function_stack
    except AttributeError:
        return None, None
    return None if torch.backends.mps.is_built() else autocast, modes  # the first leaves mps out


def loaded_torch() -> ModuleType | None:
    """torch, if it has been imported."""
    global _torch
    torch = sys.modules.get("torch")
    # An import of torch that is under way in another thread has put a half-made module there, and fails if it is used;
    # vmap is among the last names that it gets.
    if torch is not None and "vmap" in vars(torch):
        _torch = torch
    return _torch


_torch: ModuleType | None = None


class _Left(threading.local):
    """How work that was done here for other threads left a thread.

    Attributes:
        settings: torch's settings; None where they are not known.
    """

    settings: TorchState | None = None


_left = _Left()


class ThreadState:
    """The state of the thread that makes this object, for work that another thread does in its stead."""

    def __init__(self) -> None:
        self._before = copy_context()
        self._inside = self._before.copy()
        self._torch = _torch or loaded_torch()
        self._settings = self._left = None if self._torch is None else TorchState.now(self._torch)

    def run(self, work: Callable[[], Result]) -> Result:
        """Does the work in the thread that calls this, with the state of the one that made the object.

        Args:
            work: The function to call.
        """
        return self._inside.run(self._with_settings, work)

    def _with_settings(self, work: Callable[[], Result]) -> Result:
        torch, settings = self._torch, self._settings
        if torch is None or settings is None:
            return work()
        here = _left.settings or TorchState.now(torch)
        with torch.inference_mode() if settings.inference else _NOTHING:
            if settings != here:
                settings.put(torch, here)
            try:
                return work()
            finally:
                self._left = TorchState.now(torch)
                _left.settings = None if settings.inference else self._left  # the end of inference mode sets others too

    def take_back(self) -> None:
        """Sets, in the thread that made this object, the context variables and torch settings that the work changed."""
        for variable, value in self._inside.items():
            if self._before.get(variable, _MISSING) is not value:
                variable.set(value)
        torch, before, left = self._torch, self._settings, self._left
        if torch is not None and before is not None and left is not None and left != before:
            left.put(torch, before)
