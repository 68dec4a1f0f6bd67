"""What a thread has of its own that Python hooks depend on, carried to another thread and back.

Context variables (NumPy's error handling and graphlens's own hooks are such) and, where torch is loaded, its grad mode,
inference mode, autocast, default device, number of threads and CUDA device. torch keeps these for each thread.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import copy_context
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

Result = TypeVar("Result")
_AUTOCAST = ("cpu", "cuda", "mps", "xpu")  # torch keeps one autocast for each kind of device
_MISSING = object()


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
    def of_new_threads(cls, torch: ModuleType) -> TorchState:
        """The settings that a thread begins with, and as many threads as this one has: setting that sets it for new ones."""
        return cls(True, False, (), True, None, 0, torch.get_num_threads())

    @classmethod
    def now(cls, torch: ModuleType) -> TorchState:
        """The settings of this thread."""
        return cls._make(map(operator.call, tellers(torch)))

    def put(self, torch: ModuleType) -> None:
        """Makes these the settings of this thread, inference mode apart, which only a ``with`` block can set."""
        here = TorchState.now(torch)
        if self.grad != here.grad:
            torch.set_grad_enabled(self.grad)
        if self.autocast != here.autocast:
            for kind, _ in here.autocast:
                torch.set_autocast_enabled(kind, False)
            for kind, dtype in self.autocast:
                torch.set_autocast_enabled(kind, True)
                torch.set_autocast_dtype(kind, dtype)
            torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(self.cached)
        if self.device != here.device:
            torch.set_default_device(self.device)
        if self.cuda != here.cuda:
            torch.cuda.set_device(self.cuda)
        if self.threads != here.threads:
            torch.set_num_threads(self.threads)


@functools.cache
def tellers(torch: Any) -> tuple[Callable[[], Any], ...]:
    """The functions that tell the settings of a thread, in the order of ``TorchState``. To look them up costs as much as to
    call them."""
    some, modes = told_at_once(torch)

    def autocast() -> tuple[tuple[str, object], ...]:
        if some is not None and not some():
            return ()
        return tuple((kind, torch.get_autocast_dtype(kind)) for kind in _AUTOCAST if torch.is_autocast_enabled(kind))

    def device() -> object:
        if modes is not None and modes() == 0:  # a device that was set is a function mode
            return None
        device: object = torch.get_default_device()
        return None if device == cpu else device

    def cuda() -> int:
        return torch.cuda.current_device() if initialized() else 0

    cpu, initialized = torch.device("cpu"), torch.cuda.is_initialized
    grad, inference, cached = torch.is_grad_enabled, torch.is_inference_mode_enabled, torch.is_autocast_cache_enabled
    return grad, inference, autocast, cached, device, cuda, torch.get_num_threads


def told_at_once(torch: Any) -> tuple[Callable[[], bool] | None, Callable[[], int] | None]:
    """torch's functions that say, much sooner than those for users, if a thread has autocast and how many function modes it
    has; None where this torch lacks them."""
    try:
        autocast, modes = torch._C._is_any_autocast_enabled, torch._C._len_torch_function_stack
    except AttributeError:
        return None, None
    return None if torch.backends.mps.is_built() else autocast, modes  # the first leaves mps out


class ThreadState:
    """The state of the thread that makes this object, for work that another thread does in its stead."""

    def __init__(self) -> None:
        self._before = copy_context()
        self._inside = self._before.copy()
        torch = sys.modules.get("torch")
        # An import of torch that is under way in another thread has put a half-made module there, and fails if it is used;
        # vmap is among the last names that it gets.
        self._torch = torch if torch is not None and "vmap" in vars(torch) else None
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
        usual = TorchState.of_new_threads(torch)
        with torch.inference_mode() if settings.inference else nullcontext():
            if settings != usual:
                settings.put(torch)
            try:
                return work()
            finally:
                self._left = TorchState.now(torch)
                if self._left != usual:
                    TorchState.of_new_threads(torch).put(torch)

    def take_back(self) -> None:
        """Sets, in the thread that made this object, the context variables and torch settings that the work changed."""
        for variable, value in self._inside.items():
            if self._before.get(variable, _MISSING) is not value:
                variable.set(value)
        if self._torch is not None and self._left is not None and self._left != self._settings:
            self._left.put(self._torch)
