"""Writes docs/transformerlens.md's table of TransformerLens 3.9's public API: what is the same, what differs, what is absent.

    python -m tools.transformerlens_api            # or --check, to be told that the page is stale

It walks TransformerLens's modules and looks at the live objects of both libraries: names, arguments, their order and defaults.
What it cannot see (another number, another error) and why something is absent stands in graphlens/lens/reasons.toml.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tools.generated import with_part, write_or_check

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "transformerlens.md"
SAME, DIFFERENT, ABSENT = "same", "different", "absent"


@dataclass(frozen=True)
class Row:
    """One public name of TransformerLens's.

    Attributes:
        name: Its path below ``transformer_lens``.
        status: "same", "different" or "absent".
        note: How it differs or why it is absent.
    """

    name: str
    status: str
    note: str = ""


@dataclass
class Module:
    """A module of TransformerLens's and the rows of its names."""

    name: str
    rows: list[Row] = field(default_factory=list)


# What TransformerLens has


def sources() -> Path:
    """The folder of the installed TransformerLens."""
    found = importlib.util.find_spec("transformer_lens")
    if found is None or found.origin is None:
        raise SystemExit("TransformerLens 3.9 is not installed here: pip install transformer-lens==3.9.0")
    return Path(found.origin).parent


def trees() -> dict[str, tuple[ast.Module, bool]]:
    """Every module of TransformerLens's by its path below the package -> its syntax tree, and whether it is a package."""
    folder = sources()
    found = {}
    for path in sorted(folder.rglob("*.py"), key=lambda each: each.as_posix().lower()):
        parts = path.relative_to(folder).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        is_package = parts[-1] == "__init__"
        if not name.startswith("remote_module_loading") and (defined(tree) or (is_package and handed_on(tree))):
            found[name] = tree, is_package
    return found


def statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements of a module, those of its ``if`` and ``try`` included."""
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop(0)
        yield node
        for inner in ("body", "orelse", "handlers") if isinstance(node, (ast.If, ast.Try)) else ():
            waiting = [*getattr(node, inner, []), *waiting]


def defined(tree: ast.Module) -> list[str]:
    """The public names that a module defines: functions, classes and what is assigned, but for type variables and loggers."""
    names: dict[str, None] = {}
    for node in statements(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names[node.name] = None
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            made = ast.unparse(node.value) if node.value is not None else ""
            if made.startswith(("TypeVar(", "logging.", "__all__")):
                continue
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id: None for target in targets if isinstance(target, ast.Name)}
    return [name for name in names if not name.startswith("_")]


def handed_on(tree: ast.Module) -> list[str]:
    """The public names that a package's ``__init__`` imports from its own modules."""
    names: dict[str, None] = {}
    for node in statements(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("transformer_lens")):
            names |= {alias.asname or alias.name: None for alias in node.names}
    return [name for name in names if not name.startswith("_")]


def members(kind: type, library: str = "transformer_lens") -> dict[str, Any]:
    """The public members that a library's own code gives a class: methods, properties, and what is set on self."""
    found: dict[str, Any] = {}
    for owner in reversed(kind.__mro__):
        if owner.__module__.partition(".")[0] != library:
            continue
        found |= {name: value for name, value in vars(owner).items() if not name.startswith("_")}
        found |= dict.fromkeys(getattr(owner, "__annotations__", {}))
        with_source = inspect.getsource(owner)
        for node in ast.walk(ast.parse(inspect.cleandoc("\n" + with_source))):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                    found.setdefault(target.attr, None)
    return {name: value for name, value in found.items() if not name.startswith("_")}


# Beside graphlens


@functools.cache
def examples() -> Mapping[str, Any]:
    """An object of each class of ours that has attributes of its own: those are not seen on the class."""
    import torch

    from graphlens import transformer_lens as ours

    model = ours.HookedTransformer.from_pretrained_no_processing("tiny-gpt2")
    cache = model.run_with_cache(torch.tensor([[0, 5, 6]]))[1]
    found = {
        "HookedTransformer": model,
        "ActivationCache": cache,
        "FactoredMatrix": ours.FactoredMatrix(torch.ones(2, 3), torch.ones(3, 2)),
        "TransformerLensKeyValueCache": ours.TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 1),
        "HookedTransformerConfig": model.cfg,
        "Slice": ours.utils.Slice(),
        "SVDInterpreter": ours.SVDInterpreter(model),
        "IOIDataset": ours.evals.IOIDataset(model.tokenizer, num_samples=1),
        "LocallyOverridenDefaults": ours.utils.LocallyOverridenDefaults(model),
    }
    if hasattr(ours, "hook_points"):
        found["HookPoint"] = ours.hook_points.HookPoint()
    return found


def has(kind: Any, name: str, member: str) -> bool:
    """True if a class of ours has a member, or an object of it."""
    example = examples().get(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if hasattr(kind, member) or (example is not None and hasattr(example, member)):
            return True
    return inspect.isclass(kind) and member in members(kind, "graphlens")


def member_of(kind: Any, name: str, member: str) -> Any:
    """A member of a class of ours, looked up on an object of it where the class has none."""
    found = getattr(kind, member, None)
    return found if found is not None else getattr(examples().get(name), member, None)


def signature(of: Any, bound: bool) -> dict[str, inspect.Parameter] | None:
    """The parameters of a function, without self; None of what has none that can be read."""
    try:
        found = list(inspect.signature(of).parameters.values())
    except (TypeError, ValueError):
        return None
    if bound and found and found[0].name in ("self", "cls"):
        found = found[1:]
    return {parameter.name: parameter for parameter in found}


def shown(default: Any) -> str:
    """A default as it is written."""
    if default is inspect.Parameter.empty:
        return "required"
    return f"`{default!r}`" if isinstance(default, (int, float, str, type(None), tuple, list)) else f"`{default}`"


def arguments(
    theirs: Mapping[str, inspect.Parameter], ours: Mapping[str, inspect.Parameter], note: Callable[[str], str | None]
) -> list[str]:
    """How the arguments of two functions differ for a script that calls theirs, a phrase each.

    Args:
        theirs: The parameters of TransformerLens's.
        ours: Those of ours.
        note: What the file of reasons says of an argument.
    """
    kinds = inspect.Parameter
    by_place = (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    rest = {parameter.kind: name for name, parameter in ours.items()}
    starred = kinds.VAR_POSITIONAL in rest
    places = [name for name, parameter in ours.items() if parameter.kind in by_place]
    phrases = []
    for place, (name, parameter) in enumerate(theirs.items()):
        said = note(name)
        if parameter.kind in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD):
            if parameter.kind not in rest and said is None:
                phrases.append(f"takes no `{'*' if parameter.kind is kinds.VAR_POSITIONAL else '**'}{name}`")
        elif name in ours and ours[name].kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD):
            mine = ours[name]
            if said is None and parameter.kind in by_place and mine.kind in by_place and places.index(name) != place:
                phrases.append(f"`{name}` stands in another place: pass it by name")
            elif said is None and parameter.kind in by_place and mine.kind not in by_place and not starred:
                phrases.append(f"`{name}` is passed by name")
            if (
                said is None
                and parameter.default is not kinds.empty
                and not same_value(parameter.default, mine.default)
            ):
                phrases.append(f"`{name}` is {shown(mine.default)} unless told, not {shown(parameter.default)}")
        elif said is None and kinds.VAR_KEYWORD not in rest:
            phrases.append(f"takes no `{name}`")
        if said is not None:
            phrases.append(f"`{name}`: {said}")
    extra = [
        name
        for name, parameter in ours.items()
        if name not in theirs and parameter.default is kinds.empty and parameter.kind in by_place
    ]
    renamed = [name for name in extra if places.index(name) >= len(theirs) or not _stands_for(name, theirs, ours)]
    return phrases + [f"needs `{name}`" for name in renamed]


def _stands_for(name: str, theirs: Mapping[str, inspect.Parameter], ours: Mapping[str, inspect.Parameter]) -> bool:
    """True if a parameter of ours is theirs in the same place, under another name."""
    return list(theirs)[list(ours).index(name)] not in ours


def same_value(one: Any, other: Any) -> bool:
    """True for equal defaults; functions and types count as equal by name."""
    if one is other:
        return True
    if type(one) is type(other) or isinstance(one, (int, float)):
        try:
            return bool(one == other)
        except (TypeError, ValueError):
            return False
    return str(one) == str(other) or all(value is None or value in ((), [], {}) for value in (one, other))


class Reasons:
    """The file of reasons: which of them were used, and what they say."""

    def __init__(self) -> None:
        from graphlens.lens.absent import reasons

        self.absent, self.different = reasons()

    def why_absent(self, name: str) -> str | None:
        """Why a name is absent."""
        from graphlens.lens.absent import reason_for

        return reason_for(name)

    def how(self, name: str) -> str | None:
        """How a name differs, where that cannot be seen."""
        exact = self.different.get(name)
        return exact or next((how for pattern, how in self.different.items() if fnmatchcase(name, pattern)), None)


def compared(name: str, theirs: Any, ours: Any, reasons: Reasons, bound: bool = False) -> Row:
    """The row of a function, a method or a value that both have."""
    phrases = []
    if callable(theirs) and not (inspect.isclass(theirs) and not inspect.isclass(ours)):
        mine, others = signature(ours, bound), signature(theirs, bound)
        if mine is not None and others is not None:
            phrases = arguments(others, mine, lambda argument: reasons.how(f"{name}({argument})"))
    elif bound and callable(ours) and not callable(theirs) and not isinstance(theirs, type(None)):
        phrases = ["is a method"] if isinstance(theirs, (property, functools.cached_property)) else []
    said = reasons.how(name)
    if said is not None:
        phrases.insert(0, said)
    return Row(name, DIFFERENT if phrases else SAME, "; ".join(phrases))


def rows_of_class(name: str, theirs: type, ours: Any, reasons: Reasons) -> Iterator[Row]:
    """The rows of a class that both have, and of its members."""
    yield compared(name, theirs, ours, reasons)
    short = name.rpartition(".")[2]
    for member, value in sorted(members(theirs).items()):
        full = f"{name}.{member}"
        if not has(ours, short, member):
            why = reasons.why_absent(full)
            yield Row(full, ABSENT, why or "")
            continue
        unwrapped = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
        mine = member_of(ours, short, member)
        bound = not isinstance(value, staticmethod)
        yield compared(full, unwrapped, mine, reasons, bound)


def modules() -> list[Module]:
    """Every module of TransformerLens's with its rows."""
    from graphlens import transformer_lens as package
    from graphlens.lens.absent import LAYOUT
    from graphlens.lens.installing import every_module

    here = {module.__name__.removeprefix(LAYOUT).removeprefix("."): module for module in every_module(package)}
    reasons = Reasons()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("transformer_lens")
    every, found = trees(), dict[str, Module]()
    for name, (tree, is_package) in every.items():
        parts = name.split(".")
        steps = [".".join(parts[: size + 1]) for size in range(len(parts))]
        gone = next((step for step in steps if step not in here), None)
        if gone is not None:  # one row for all that is in it
            many = sum(len(defined(t)) for other, (t, _) in every.items() if f"{other}.".startswith(f"{gone}."))
            what = f" ({many} names)" if many > 1 else ""
            found[gone] = Module(gone, [Row(f"{gone}{what}", ABSENT, reasons.why_absent(gone) or "")])
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = importlib.import_module(f"transformer_lens{'.' if name else ''}{name}")
        names = [*defined(tree), *(handed_on(tree) if is_package else getattr(theirs, "__all__", ()))]
        rows = rows_of_module(name, list(dict.fromkeys(names)), theirs, here[name], reasons)
        found[name] = Module(name, list(rows))
    return list(found.values())


def rows_of_module(name: str, names: list[str], theirs: Any, ours: Any, reasons: Reasons) -> Iterator[Row]:
    """The rows of the public names of a module that both have."""
    for each in names:
        full = f"{name}.{each}" if name else each
        if not hasattr(theirs, each) or inspect.ismodule(getattr(theirs, each)):  # a module has rows of its own
            continue
        try:
            mine = getattr(ours, each)
        except (AttributeError, ImportError):
            yield Row(full, ABSENT, reasons.why_absent(full) or "")
            continue
        value = getattr(theirs, each)
        if getattr(value, "__module__", theirs.__name__) != theirs.__name__:  # told where it is defined
            said = reasons.how(full)
            yield Row(full, DIFFERENT if said else SAME, said or "")
        elif inspect.isclass(value) and inspect.isclass(mine):
            yield from rows_of_class(full, value, mine, reasons)
        else:
            yield compared(full, value, mine, reasons)


# As text


def path_of(module: str) -> str:
    """How a module is imported."""
    return f"transformer_lens.{module}".removesuffix(".")


def cells(row: Row, name: str) -> str:
    """A row of a Markdown table."""
    return f"| `{name}` | {row.status} | {row.note.replace('|', chr(92) + '|')} |"


def section(module: Module) -> list[str]:
    """A module that both have as lines of Markdown: what is the same in a line for each class, the rest in a table."""
    prefix = f"{module.name}." if module.name else ""
    own: list[str] = []
    of_class: dict[str, list[str]] = {}
    for row in (row for row in module.rows if row.status == SAME):
        first, _, member = row.name.removeprefix(prefix).partition(".")
        (of_class.setdefault(first, []) if member else own).append(f"`{member or first}`")
    lines = ["", f"### `{path_of(module.name)}`"]
    if own:
        lines += ["", f"The same: {', '.join(own)}."]
    lines += [
        line for name, members in of_class.items() for line in ("", f"Of `{name}`, the same: {', '.join(members)}.")
    ]
    others = [row for row in module.rows if row.status != SAME]
    if others:
        lines += ["", "| name | | how it differs, or why it is absent |", "|---|---|---|"]
        lines += [cells(row, row.name.removeprefix(prefix)) for row in others]
    return lines


def table(found: list[Module]) -> list[str]:
    """All modules as lines of Markdown, those that are absent last."""
    rows = [row for module in found for row in module.rows]
    counts = {status: sum(row.status == status for row in rows) for status in (SAME, DIFFERENT, ABSENT)}
    there = [module for module in found if [row.name.partition(" (")[0] for row in module.rows] != [module.name]]
    return [
        f"{counts[SAME]} names are the same, {counts[DIFFERENT]} differ, {counts[ABSENT]} are absent; a module that is absent "
        "counts once.",
        *(line for module in there for line in section(module)),
        "",
        "### Modules that are absent",
        "",
        "| module | | why it is absent |",
        "|---|---|---|",
        *(cells(row, path_of(row.name)) for module in found if module not in there for row in module.rows),
    ]


def page() -> str:
    """docs/transformerlens.md with the table as it has to be."""
    return with_part(PAGE, "tools/transformerlens_api.py", table(modules()))


def main(arguments: list[str] | None = None) -> int:
    """Writes the page, or with ``--check`` compares it. Returns the exit code: 1 for a stale page."""
    return write_or_check(PAGE, page, "python -m tools.transformerlens_api", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
