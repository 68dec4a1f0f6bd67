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

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from types import MappingProxyType
from typing import ClassVar, Self, cast

import numpy as np
import numpy.typing as npt

from graphlens.edits.parts import PARTS, PartName
from graphlens.edits.record import Array, Record, hashable
from graphlens.edits.selection import FIELDS, Chosen, SelectionField, Tensor, of_tensor, plain
from graphlens.edits.selection import Selection as Selection
from graphlens.errors import InputError, checked_number

_registered: dict[str, type[Intervention]] = {}
# Every kind of intervention by the name that it has in files.
KINDS: Mapping[str, type[Intervention]] = MappingProxyType(_registered)


@dataclass(frozen=True, eq=False, repr=False)
class AtHook(Record):
    """What an intervention begins with: the name of its hook point."""

    hook: str


@dataclass(frozen=True, eq=False, repr=False)
class Intervention(AtHook):
    """The base of the kinds: a change of the selected elements of the activation at one hook point.

    Positions count from the first token of the sequence, padding included, also when a KV cache holds the earlier ones.

    An operand has the axes of the selected part, matched from the last one: a list, a slice or a mask of an axis keeps it,
    an integer takes it away. With ``positions=-1`` of [batch, pos, d_model] it is [batch, d_model], [d_model] or a number.
    To take a position out of a longer array, index it. A mask [batch, pos] keeps both axes, whole.

    A kind of one's own is a subclass that names its ``kind``, ``operand`` and ``part``, and has the operand as a field;
    it then works in runs, files and baked graphs. Dataclasses put the fields of bases first, the last base's before the
    others': an operand that is to come before ``heads`` is declared in a base of its own, named after ``Intervention``.

    Attributes:
        hook: The hook point's name.
        heads: The selection along the head axis. Like the next three None for all, an int (negative ones count from the
            end), a slice, a list of ints, or a boolean mask of the axis.
        positions: The selection along the position axis (queries, at scores and patterns). Also a boolean mask
            [batch, pos], "prompt" or "generated".
        dims: The selection along the last axis (keys, at scores and patterns).
        batch: The selection along the batch.
        strict: False ignores what lies beyond the sequence, which is an error otherwise.
        allow_nonfinite: True lets NaN and infinities into the operand.
        kind: The name of the kind in files. A class that gives one is registered in ``KINDS``.
        operand: The name of the field that holds the number or array.
        part: The part of a gate that the kind is: "scale" (multiply), "add", or "patch" (replace).
        is_activation: True if the operand is another run's activation. Such a kind alone may change a hook point of
            integers, and a second one of the same elements is warned of.
    """

    _unnamed: ClassVar[tuple[str, ...]] = ("hook",)
    kind: ClassVar[str] = ""
    operand: ClassVar[str] = ""
    part: ClassVar[PartName]
    is_activation: ClassVar[bool] = False

    heads: Selection = None
    positions: Selection = None
    dims: Selection = None
    batch: Selection = None
    _: KW_ONLY
    strict: bool = True
    allow_nonfinite: bool = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "kind" in cls.__dict__:
            _register(cls)

    def __post_init__(self) -> None:
        if not isinstance(self.hook, str):
            raise InputError(f"hook must be a hook point's name, not {type(self.hook).__name__}.")
        for name, flag in (("strict", self.strict), ("allow_nonfinite", self.allow_nonfinite)):
            if flag is not True and flag is not False:  # a sweep makes thousands of interventions
                self._set(name, checked_number(flag, f"{type(self).__name__}.{name}", bool))
        self._set(self.operand, number(getattr(self, self.operand), f"{type(self).__name__}.{self.operand}"))
        for field in FIELDS:
            selection = getattr(self, field)
            if selection is not None:
                self._set(field, plain(selection, field))
        if not self.allow_nonfinite and not np.isfinite(self.array).all():
            raise InputError(
                f"{self.label}: its {self.operand} holds NaN or infinities. Pass allow_nonfinite=True if they are meant."
            )

    def as_key(self) -> tuple[Hashable, ...]:
        """All that the intervention holds, in plain hashable values: (kind, a pair of name and value for each field).

        Returns:
            A tuple that is equal for equal interventions and different for different ones. Saved sweeps hold a digest
            of it, so its form stays as it is.
        """
        return (self.kind, *((name, hashable(value)) for name, value in self._state().items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Intervention) and self.as_key() == other.as_key()

    def __hash__(self) -> int:
        return hash(self.as_key())

    def _is_shown(self, name: str, value: object, default: object) -> bool:
        """True if the repr shows the field ``name``: the operand also where it is at its default."""
        return name == self.operand or super()._is_shown(name, value, default)

    @property
    def array(self) -> Array:
        """What is put, added or multiplied, as an array: for ``Steer`` the vector times its coefficient."""
        return np.asarray(getattr(self, self.operand))

    @property
    def label(self) -> str:
        """How an error names the intervention: "Ablate at 'blocks.0.attn.hook_z'"."""
        return f"{type(self).__name__} at {self.hook!r}"

    @property
    def selection(self) -> tuple[Hashable, ...]:
        """(heads, positions, dims, batch), hashable: equal for two interventions on the same elements."""
        return tuple(hashable(getattr(self, field)) for field in FIELDS)

    def chosen(self, field: SelectionField | None) -> Chosen:
        """What a field selects, in its plain form.

        Args:
            field: "heads", "positions", "dims" or "batch"; None for an axis that no field selects from.

        Returns:
            An int, a slice, a list of ints, a boolean mask, of positions also "prompt" or "generated"; None for all.
        """
        return None if field is None else cast("Chosen", getattr(self, field))

    def at(self, hook: str, strict: bool = True) -> Self:
        """The same intervention at another hook point.

        Args:
            hook: The other hook point's name.
            strict: False makes it ignore what lies beyond the sequence.
        """
        return replace(self, hook=hook, strict=self.strict and strict)


def _register(kind: type[Intervention]) -> None:
    known = KINDS.get(kind.kind)
    # A class that is defined again, in a notebook's cell say, takes its own place.
    again = known is not None and (known.__module__, known.__qualname__) == (kind.__module__, kind.__qualname__)
    if known is not None and not again:
        raise InputError(
            f"there is a kind of intervention called {kind.kind!r} already: {KINDS[kind.kind].__name__}. Choose another "
            "name, or call graphlens.interventions.unregister on that one."
        )
    if getattr(kind, "part", None) not in PARTS or not kind.kind or not kind.operand:
        raise InputError(
            f"{kind.__name__}: a kind of intervention names its kind, its operand, and as its part one of "
            f"{', '.join(PARTS)}."
        )
    _registered[kind.kind] = kind


def unregister(kind: type[Intervention]) -> None:
    """Forgets a kind of one's own, so that its name can be given again: in a notebook's cell that runs twice, say.

    Args:
        kind: The class. One that is not registered is left alone.
    """
    if KINDS.get(kind.kind) is kind:
        del _registered[kind.kind]


@dataclass(frozen=True, eq=False, repr=False)
class Value(AtHook):
    """The operand of ``Ablate`` and ``Patch``."""

    value: npt.ArrayLike


@dataclass(frozen=True, eq=False, repr=False)
class Vector(AtHook):
    """The operand of ``Steer``."""

    vector: npt.ArrayLike
    coefficient: float = 1.0


@dataclass(frozen=True, eq=False, repr=False)
class Factor(AtHook):
    """The operand of ``Scale``."""

    factor: npt.ArrayLike


@dataclass(frozen=True, eq=False, repr=False)
class Ablate(Intervention, Value):
    """Puts ``value`` in place of the selected elements: 0 (zero ablation), a mean (mean ablation), or the activation of
    another prompt (resample ablation).

    The other fields are those of ``Intervention``.

    Attributes:
        value: A number, or an array that broadcasts to the selected part, as in NumPy's ``x[selection] = value``.

    Raises:
        InputError: If a field holds what it does not take.
    """

    kind: ClassVar[str] = "ablate"
    operand: ClassVar[str] = "value"
    part: ClassVar[PartName] = "patch"

    value: npt.ArrayLike = 0.0


@dataclass(frozen=True, eq=False, repr=False)
class Patch(Intervention, Value):
    """Puts ``value`` in place of the selected elements: an activation of another run, say (activation patching).

    At an integer hook point (hook_tokens) this is the only kind there is. The other fields are those of
    ``Intervention``.

    Attributes:
        value: A number, or an array that broadcasts to the selected part, as in NumPy's ``x[selection] = value``.

    Raises:
        InputError: If a field holds what it does not take.
    """

    kind: ClassVar[str] = "patch"
    operand: ClassVar[str] = "value"
    part: ClassVar[PartName] = "patch"
    is_activation: ClassVar[bool] = True


@dataclass(frozen=True, eq=False, repr=False)
class Steer(Intervention, Vector):
    """Adds ``coefficient * vector`` to the selected elements.

    The other fields are those of ``Intervention``.

    Attributes:
        vector: A number, or an array that broadcasts to the selected part, as in NumPy's ``x[selection] = vector``.
        coefficient: A number.

    Raises:
        InputError: If a field holds what it does not take.
    """

    kind: ClassVar[str] = "steer"
    operand: ClassVar[str] = "vector"
    part: ClassVar[PartName] = "add"

    def __post_init__(self) -> None:
        coefficient = number(self.coefficient, "Steer.coefficient")
        if isinstance(coefficient, np.ndarray):
            raise InputError(f"Steer.coefficient must be one number, not an array {list(coefficient.shape)}.")
        self._set("coefficient", coefficient)
        super().__post_init__()

    @property
    def array(self) -> Array:
        """``coefficient * vector``, in the vector's dtype if that is floating point, else float64."""
        vector = np.asarray(self.vector)
        kept = vector.dtype if vector.dtype.kind == "f" else np.float64
        return (vector * self.coefficient).astype(kept)


@dataclass(frozen=True, eq=False, repr=False)
class Scale(Intervention, Factor):
    """Multiplies the selected elements by ``factor``.

    The other fields are those of ``Intervention``.

    Attributes:
        factor: A number, or an array that broadcasts to the selected part, as in NumPy's ``x[selection] = factor``.

    Raises:
        InputError: If a field holds what it does not take.
    """

    kind: ClassVar[str] = "scale"
    operand: ClassVar[str] = "factor"
    part: ClassVar[PartName] = "scale"


def names_of(kinds: Iterable[type[Intervention]]) -> str:
    """The names of kinds as a sentence has them: "Ablate, Patch or Scale"."""
    *most, last = (kind.__name__ for kind in kinds)
    return f"{', '.join(most)} or {last}" if most else last


def checked(interventions: Iterable[Intervention] | Intervention) -> tuple[Intervention, ...]:
    """What a user gave as interventions, as a tuple.

    Args:
        interventions: A list of interventions, or one alone.

    Returns:
        The interventions in the same order.

    Raises:
        InputError: If one of them is something else.
    """
    found = (interventions,) if isinstance(interventions, Intervention) else interventions
    found = tuple(found) if isinstance(found, Iterable) else (found,)
    for item in found:
        if not isinstance(item, Intervention):
            raise InputError(
                f"an intervention is {names_of(KINDS.values())}, not {type(item).__name__}. Python functions go into "
                "fwd_hooks (run_with_hooks, hooks)."
            )
    return found


def number(value: npt.ArrayLike, what: str) -> float | Array:
    """A number or an array of numbers as a record keeps it.

    Args:
        value: A number, an array, a list, or a tensor of torch on any device.
        what: How an error calls it.

    Returns:
        A Python number, or a read-only copy of the array.

    Raises:
        InputError: If it holds no numbers, or is ragged.
    """
    if hasattr(value, "detach"):
        value = of_tensor(cast("Tensor", value), what)
    try:
        array = np.array(value)
    except (ValueError, TypeError) as error:  # TypeError: of an object whose __array__ gives none
        raise InputError(f"{what} is ragged, or no array: it must be a number or an array ({error}).") from error
    if array.dtype.kind not in "biuf":
        raise InputError(f"{what} must be a number or an array of numbers, not {array.dtype}.")
    if not array.size:
        raise InputError(f"{what} is an empty array, of shape {list(array.shape)}: it must hold a number at least.")
    if array.ndim == 0:
        return cast("float", array.item())
    array.flags.writeable = False
    return array


def hooks_of(interventions: Sequence[Intervention]) -> list[str]:
    """The hook points that interventions are at.

    Args:
        interventions: A list of interventions.

    Returns:
        Their hook names as they were given, each once, in the order in which they first appear.
    """
    return list(dict.fromkeys(item.hook for item in interventions))
