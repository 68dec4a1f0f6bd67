"""What HookedTransformer has of torch's Module: modules by name, modes, and device and dtype, which it has from its opening on.

These functions are methods: ``EditMethods`` takes them in by their names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol, TypeVar

from graphlens.analysis.arrays import ArrayT
from graphlens.errors import InputError, RuntimeUnavailable
from graphlens.model.modules import modules_of

if TYPE_CHECKING:
    from graphlens.engine.engine import Engine
    from graphlens.file.manifest import ModelConfig
    from graphlens.model.runner import Runner


class _Modular(Protocol[ArrayT]):
    """A model, by what it is asked for its modules."""

    runner: Runner[ArrayT]


class _Runs(Protocol):
    engine: Engine

    @property
    def config(self) -> ModelConfig: ...


class _Opened(Protocol):
    """A model, by what it is asked for its device and dtype."""

    @property
    def runner(self) -> _Runs: ...


OpenedT = TypeVar("OpenedT", bound=_Opened)


def named_modules(self: _Modular[ArrayT], memo: object = None, prefix: str = "") -> Iterator[tuple[str, object]]:
    """The model, its parts and the hook points that there are now, with their names.

    Args:
        memo: Holds torch's place.
        prefix: What the names begin with.

    Yields:
        (name, module). ``blocks`` is a list.
    """
    return modules_of(self, self.runner, "", prefix)


def modules(self: _Modular[ArrayT]) -> Iterator[object]:
    """The modules of ``named_modules()``."""
    return (module for _, module in named_modules(self))


def named_children(self: _Modular[ArrayT]) -> Iterator[tuple[str, object]]:
    """The parts and hook points directly in the model, with their names."""
    return ((name, module) for name, module in named_modules(self) if name and "." not in name)


def children(self: _Modular[ArrayT]) -> Iterator[object]:
    """The modules of ``named_children()``."""
    return (module for _, module in named_children(self))


def mod_dict(self: _Modular[ArrayT]) -> dict[str, object]:
    """Every part and every hook point that there is now by its name, the model itself left out."""
    return {name: module for name, module in named_modules(self) if name}


def training(self: _Opened) -> bool:
    """False: there is no dropout, and a graphlens model does not train."""
    return False


def eval(self: OpenedT) -> OpenedT:
    """The model itself: there is no dropout to turn off."""
    return self


def train(self: OpenedT, mode: bool = True) -> OpenedT:
    """The model itself, which does not train.

    Args:
        mode: False, as ``eval`` has it.

    Raises:
        InputError: For True.
    """
    if mode:
        raise InputError("a graphlens model does not train: train the checkpoint, then export it again.")
    return self


def requires_grad_(self: OpenedT, requires_grad: bool = True) -> OpenedT:
    """The model itself, whose weights have no gradients.

    Args:
        requires_grad: False.

    Raises:
        InputError: For True.
    """
    if requires_grad:
        raise InputError("the weights of a graphlens model have no gradients.")
    return self


def zero_grad(self: _Opened, set_to_none: bool = True) -> None:
    """Does nothing: weights have no gradients.

    Args:
        set_to_none: Torch's; changes nothing.
    """


def to(self: OpenedT, device_or_dtype: object, print_details: bool = True) -> OpenedT:
    """The model itself, if it already is what is asked for: a session's device and dtype are fixed when it is opened.

    Args:
        device_or_dtype: "cpu", "cuda" or a torch.device; or a dtype, by its name, NumPy's or torch's.
        print_details: TransformerLens's; changes nothing.

    Raises:
        RuntimeUnavailable: For a GPU that the model does not run on.
        InputError: For another dtype or device.
    """
    asked, stated = _named(device_or_dtype), self.runner.engine.dtype
    if asked.startswith(("float", "bfloat", "int", "uint", "complex")):
        if asked != self.runner.config.dtype and not stated.startswith(asked):
            raise InputError(
                f"this model has {stated}, fixed when it is opened: open it with from_pretrained(..., dtype={asked!r})."
            )
        return self
    kind, first = asked.partition(":")[0], self.runner.engine.providers[0]
    if kind == "cpu" or (kind == "cuda" and first.startswith("CUDA")):
        return self
    if kind == "cuda":
        raise RuntimeUnavailable(
            f"this session runs on {first}, which is fixed when it is opened: open the model with "
            'from_pretrained(..., providers="cuda").'
        )
    raise InputError(f"graphlens does not run on {kind!r}; it has 'cpu' and 'cuda'.")


def cpu(self: OpenedT) -> OpenedT:
    """``to("cpu")``: the model itself."""
    return to(self, "cpu")


def cuda(self: OpenedT, device: object = None) -> OpenedT:
    """``to("cuda")``.

    Args:
        device: A GPU, by its number or name; None for "cuda".

    Raises:
        RuntimeUnavailable: If the model does not run on it.
    """
    return to(self, "cuda" if device is None else f"cuda:{device}" if isinstance(device, int) else device)


def mps(self: OpenedT) -> OpenedT:
    """``to("mps")``, which graphlens does not run on. Raises InputError."""
    return to(self, "mps")


def half(self: OpenedT) -> OpenedT:
    """``to("float16")``; see ``to``."""
    return to(self, "float16")


def float(self: OpenedT) -> OpenedT:
    """``to("float32")``; see ``to``."""
    return to(self, "float32")


def double(self: OpenedT) -> OpenedT:
    """``to("float64")``; see ``to``."""
    return to(self, "float64")


def bfloat16(self: OpenedT) -> OpenedT:
    """``to("bfloat16")``; see ``to``."""
    return to(self, "bfloat16")


def _named(asked: object) -> str:
    """A device or dtype that was asked for, by its name."""
    if isinstance(asked, type):  # NumPy's, and Python's float
        return {"float": "float64"}.get(asked.__name__, asked.__name__)
    text = str(asked).removeprefix("torch.")
    return {"half": "float16", "double": "float64"}.get(text, text)
