"""A model and its parts as a tree of modules, in the manner of ``torch.nn.Module``: names, children, parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Generic

from graphlens.analysis.arrays import ArrayT
from graphlens.errors import InputAttributeError
from graphlens.file.names import split_name

if TYPE_CHECKING:
    from graphlens.model.runner import Runner


def names_below(runner: Runner[ArrayT], prefix: str = "") -> list[str]:
    """The names of the modules below a part: parts and hook points that there are now, each after the one it lies in.

    Args:
        runner: Runs the model.
        prefix: The part's name; "" for the whole model.

    Returns:
        Names without the prefix, in firing order as far as there is one.
    """
    start = f"{prefix}." if prefix else ""
    parts = [name.rpartition(".")[0] for name in runner.weights.names()]
    embeddings = [name for name in parts if split_name(name)[0] is None and "embed" in name and name != "unembed"]
    places = [*embeddings, *runner.names(), *parts]
    tree: dict[str, list[str]] = {"": []}
    for place in places:
        if not place.startswith(start):
            continue
        above = ""
        for part in place[len(start) :].split("."):
            name = f"{above}.{part}" if above else part
            if name not in tree:
                tree[name] = []
                tree[above].append(name)
            above = name
    found: list[str] = []
    waiting = list(reversed(tree[""]))
    while waiting:
        found.append(waiting.pop())
        waiting += reversed(tree[found[-1]])
    return found


def below(root: object, name: str) -> object:
    """The part or hook point that a name leads to.

    Args:
        root: A model or a part of one.
        name: A name from ``names_below``: attributes, and the numbers of blocks, joined by dots.
    """
    for part in name.split("."):
        root = root[int(part)] if isinstance(root, list) else getattr(root, part)
    return root


def modules_of(root: object, runner: Runner[ArrayT], own: str, prefix: str = "") -> Iterator[tuple[str, object]]:
    """A module and all modules below it, with their names.

    Args:
        root: A model or a part of one.
        runner: Runs the model.
        own: The part's name; "" for the whole model.
        prefix: What the names begin with.

    Yields:
        (name, module).
    """
    yield prefix, root
    for name in names_below(runner, own):
        yield (f"{prefix}.{name}" if prefix else name), below(root, name)


class Module(Generic[ArrayT]):
    """What a part of a model has of a torch module."""

    _runner: Runner[ArrayT]
    _prefix: str

    def named_modules(self, memo: object = None, prefix: str = "") -> Iterator[tuple[str, object]]:
        """This part, its parts and its hook points, with their names.

        Args:
            memo: Holds torch's place.
            prefix: What the names begin with.

        Yields:
            (name, module).
        """
        return modules_of(self, self._runner, self._prefix, prefix)

    def modules(self) -> Iterator[object]:
        """The modules of ``named_modules()``."""
        return (module for _, module in self.named_modules())

    def named_children(self) -> Iterator[tuple[str, object]]:
        """The parts and hook points directly below, with their names."""
        return ((name, module) for name, module in self.named_modules() if name and "." not in name)

    def children(self) -> Iterator[object]:
        """The modules of ``named_children()``."""
        return (module for _, module in self.named_children())

    def named_parameters(self) -> Iterator[tuple[str, ArrayT]]:
        """Every weight of this part with its name in it; see HookedTransformer.named_parameters."""
        start = f"{self._prefix}."
        for name in self._runner.weights.names():
            if name.startswith(start):
                yield name[len(start) :], self._runner.weight(name)

    def parameters(self) -> Iterator[ArrayT]:
        """The arrays of ``named_parameters()``."""
        return (array for _, array in self.named_parameters())

    def state_dict(self) -> dict[str, ArrayT]:
        """Every weight of this part by its name in it."""
        return dict(self.named_parameters())


def refuse_assignments(*kinds: type[Module[Any]]) -> None:
    """Makes assignments to parts of a model errors that say what to do, in place of what frozen dataclasses say.

    Args:
        kinds: The dataclasses, each of which would have a sentence of its own.
    """
    for kind in kinds:
        kind.__setattr__ = _refuse  # type: ignore[method-assign, assignment]


def _refuse(part: Module[Any], name: str, value: object) -> None:
    """Raises InputAttributeError: what is assigned to a part would not change what the model computes."""
    full = f"{part._prefix}.{name}"
    if full in part._runner.weights:
        raise InputAttributeError(
            f"{full} = ...: the model computes from its own file. model.set_weights({{{full!r}: new}}) sets a weight."
        )
    raise InputAttributeError(
        f"{full} = ...: parts of a model cannot be replaced or given attributes. Weights are set with model.set_weights, "
        "activations with hooks."
    )
