"""Interventions as data: what to change at a hook point, as records that can be compared, printed, hashed and saved.

Four kinds, each at one hook point and there at a selection of its elements: ``Ablate`` and ``Patch`` put a value in
their place, ``Steer`` adds a vector, ``Scale`` multiplies. Several at one hook point apply in order.

>>> edit = Ablate("blocks.0.attn.hook_z", heads=[1, 3], positions=-1)
>>> edit
Ablate('blocks.0.attn.hook_z', value=0.0, heads=(1, 3), positions=-1)
>>> edit == Ablate("blocks.0.attn.hook_z", heads=(1, 3), positions=-1)
True
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from graphlens.errors import InputError

Array = npt.NDArray[Any]
# What heads, positions, dims and batch hold: None (all), an index, a slice, indices, or a boolean mask.
Selection = Any
_AXES = ("heads", "positions", "dims", "batch")
_SPANS = ("prompt", "generated")


@dataclass(frozen=True, eq=False, repr=False)
class Intervention:
    """The base of the four kinds: a hook point and a selection along its axes.

    ``heads`` selects along the head axis, ``positions`` along the position axis (queries, at scores and patterns),
    ``dims`` along the last axis (keys, at scores and patterns), ``batch`` along the batch. Each is None for all, an int
    (negative ones count from the end), a slice, a list of ints, or a boolean mask of the axis; ``positions`` may also be
    a mask [batch, pos], ``"prompt"`` or ``"generated"``. Positions count from the first token of the sequence, padding
    included, also when a KV cache holds the earlier ones.
    ``strict=False`` ignores what lies beyond the sequence; ``allow_nonfinite=True`` lets NaN and infinities in.
    """

    kind: ClassVar[str] = ""
    operand: ClassVar[str] = ""  # the field that holds the number or array

    hook: str

    if TYPE_CHECKING:  # each kind has these as fields, after its operand: declared here, they would come before it

        @property
        def heads(self) -> Selection: ...  # noqa: D102
        @property
        def positions(self) -> Selection: ...  # noqa: D102
        @property
        def dims(self) -> Selection: ...  # noqa: D102
        @property
        def batch(self) -> Selection: ...  # noqa: D102
        @property
        def strict(self) -> bool: ...  # noqa: D102
        @property
        def allow_nonfinite(self) -> bool: ...  # noqa: D102

    def __post_init__(self) -> None:
        if not isinstance(self.hook, str):
            raise InputError(f"hook must be a hook point's name, not {type(self.hook).__name__}.")
        self._set(self.operand, _number(getattr(self, self.operand), f"{type(self).__name__}.{self.operand}"))
        for axis in _AXES:
            self._set(axis, _selection(getattr(self, axis), axis))
        if not self.allow_nonfinite and not np.isfinite(self.array).all():
            raise InputError(
                f"{type(self).__name__} at {self.hook!r}: its {self.operand} holds NaN or infinities. "
                "Pass allow_nonfinite=True if they are meant."
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def array(self) -> Array:
        """What is put, added or multiplied, as an array; a steering vector with its coefficient."""
        return np.asarray(getattr(self, self.operand))

    def at(self, hook: str, strict: bool = True) -> Self:
        """The same intervention at another hook point; ``strict=False`` makes it ignore what lies beyond the sequence."""
        changes: dict[str, Any] = {"hook": hook, "strict": self.strict and strict}
        return replace(self, **changes)

    @property
    def selection(self) -> tuple[Any, ...]:
        """(heads, positions, dims, batch), hashable: equal for two interventions on the same elements."""
        return tuple(_hashable(getattr(self, axis)) for axis in _AXES)

    def _state(self) -> tuple[Any, ...]:
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return (self.kind, *((name, _hashable(value)) for name, value in values))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Intervention) and self._state() == other._state()

    def __hash__(self) -> int:
        return hash(self._state())

    def __repr__(self) -> str:
        parts = [repr(self.hook)]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if field.name == self.operand or value != field.default:
                shown = f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else repr(value)
                parts.append(f"{field.name}={shown}")
        return f"{type(self).__name__}({', '.join(parts)})"


@dataclass(frozen=True, eq=False, repr=False)
class Ablate(Intervention):
    """Puts ``value`` in place of the selected elements: 0 (zero ablation), a mean (mean ablation), or the activation of
    another prompt (resample ablation).

    ``value`` is a number, or an array that broadcasts to the activation, or else to the selected part of it.
    """

    kind: ClassVar[str] = "ablate"
    operand: ClassVar[str] = "value"

    value: Any = 0.0
    heads: Selection = None
    positions: Selection = None
    dims: Selection = None
    batch: Selection = None
    _: KW_ONLY
    strict: bool = True
    allow_nonfinite: bool = False


@dataclass(frozen=True, eq=False, repr=False)
class Patch(Intervention):
    """Puts ``value`` in place of the selected elements: an activation of another run, say (activation patching).

    ``value`` is as in Ablate. At an integer hook point (hook_tokens) this is the only kind there is.
    """

    kind: ClassVar[str] = "patch"
    operand: ClassVar[str] = "value"

    value: Any
    heads: Selection = None
    positions: Selection = None
    dims: Selection = None
    batch: Selection = None
    _: KW_ONLY
    strict: bool = True
    allow_nonfinite: bool = False


@dataclass(frozen=True, eq=False, repr=False)
class Steer(Intervention):
    """Adds ``coefficient * vector`` to the selected elements; ``vector`` broadcasts as Ablate's value does."""

    kind: ClassVar[str] = "steer"
    operand: ClassVar[str] = "vector"

    vector: Any
    coefficient: float = 1.0
    heads: Selection = None
    positions: Selection = None
    dims: Selection = None
    batch: Selection = None
    _: KW_ONLY
    strict: bool = True
    allow_nonfinite: bool = False

    def __post_init__(self) -> None:
        coefficient = _number(self.coefficient, "Steer.coefficient")
        if isinstance(coefficient, np.ndarray):
            raise InputError(f"Steer.coefficient must be one number, not an array {list(coefficient.shape)}.")
        self._set("coefficient", coefficient)
        super().__post_init__()

    @property
    def array(self) -> Array:
        """``coefficient * vector``."""
        vector = np.asarray(self.vector)
        kept = vector.dtype if vector.dtype.kind == "f" else np.float64
        return (vector * self.coefficient).astype(kept)


@dataclass(frozen=True, eq=False, repr=False)
class Scale(Intervention):
    """Multiplies the selected elements by ``factor``, a number or an array that broadcasts as Ablate's value does."""

    kind: ClassVar[str] = "scale"
    operand: ClassVar[str] = "factor"

    factor: Any
    heads: Selection = None
    positions: Selection = None
    dims: Selection = None
    batch: Selection = None
    _: KW_ONLY
    strict: bool = True
    allow_nonfinite: bool = False


KINDS: Mapping[str, type[Intervention]] = {kind.kind: kind for kind in (Ablate, Patch, Steer, Scale)}


def checked(interventions: Iterable[Intervention] | Intervention) -> tuple[Intervention, ...]:
    """The interventions as a tuple; one alone is taken for a list of it. Raises InputError for anything else."""
    found = (interventions,) if isinstance(interventions, Intervention) else tuple(interventions)
    for item in found:
        if not isinstance(item, Intervention):
            raise InputError(
                f"an intervention is Ablate, Patch, Steer or Scale, not {type(item).__name__}. Python functions go into "
                "fwd_hooks (run_with_hooks, hooks)."
            )
    return found


def _number(value: Any, what: str) -> Any:
    """A Python number, or a read-only array of its own. Tensors of torch are read through their own methods."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    try:
        array = np.array(value)
    except ValueError as error:
        raise InputError(f"{what} is ragged: it must be a number or an array.") from error
    if array.dtype.kind not in "biuf":
        raise InputError(f"{what} must be a number or an array of numbers, not {array.dtype}.")
    if array.ndim == 0:
        return array.item()
    array.flags.writeable = False
    return array


def _selection(value: Any, axis: str) -> Selection:
    """A selection in its plain form: None, "prompt", "generated", an int, a slice, a tuple of ints, of bools, or of
    tuples of bools. Raises InputError."""
    if value is None:
        return None
    if isinstance(value, str):
        if axis == "positions" and value in _SPANS:
            return value
        wanted = " or ".join(map(repr, _SPANS)) if axis == "positions" else "no text"
        raise InputError(f"{axis}={value!r}: {axis} takes {wanted}, an int, a slice, a list, or a boolean mask.")
    if isinstance(value, slice):
        return slice(*(None if part is None else int(part) for part in (value.start, value.stop, value.step)))
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    array = np.asarray(value if not isinstance(value, range) else list(value))
    if array.size == 0:
        raise InputError(f"{axis}={value!r} selects nothing.")
    if array.dtype.kind == "b" and (array.ndim == 1 or (array.ndim == 2 and axis == "positions")):
        found: Any = array.tolist()
        return tuple(found) if array.ndim == 1 else tuple(map(tuple, found))
    if array.dtype.kind in "iu" and array.ndim <= 1:
        return tuple(int(i) for i in array) if array.ndim else int(array)
    raise InputError(
        f"{axis}={value!r}: {axis} takes an int, a slice, a list of ints, or a boolean mask, not {array.dtype} of "
        f"{array.ndim} axes."
    )


def _hashable(value: Any) -> Any:
    if isinstance(value, slice):
        return ("slice", value.start, value.stop, value.step)
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, float) and value != value:
        return "nan"  # equal to itself, as in arrays
    return value


def hooks_of(interventions: Sequence[Intervention]) -> list[str]:
    """The hook names of the interventions, each once, in the order they first appear."""
    return list(dict.fromkeys(item.hook for item in interventions))
