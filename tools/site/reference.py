"""The reference pages: one for each public door, made of the names that it hands on, and one for the command line."""

from __future__ import annotations

import ast
import importlib
import re
from typing import Any

from tools.site.staging import ROOT, Stage

# Page -> the door whose names it documents, and what stands above them. A name that several doors hand on is on the first
# of these pages that has it.
DOORS = {
    "graphlens": "What `from graphlens import ...` gives. The two large classes have pages of their own.",
    "patching": "Activation patching, sweeps, path patching. [How to](../patching.md).",
    "metrics": "What a sweep or a gradient measures of the logits.",
    "attribution": "Attribution patching, edges, circuits, attribution graphs. [How to](../attribution.md).",
    "interventions": "Edits as data, and the files that hold them. [How to](../interventions.md).",
    "deploy": "Files for those who run a model without graphlens. [How to](../drivable.md).",
    "surgery": "From hooked graph to hooked graph, on onnx-ir. Nothing here runs a model.",
    "views": "What a run looks like: views for notebooks and pages. [How to](../pages.md).",
    "utils": "Helpers of TransformerLens that take arrays.",
    "torch": "The same classes with tensors in and out; here are the names that the other pages lack.",
    "transformer_lens4": "TransformerLens 4's model, and graphlens behind its RemoteBridge. [How to](../transformerlens4.md).",
}
LARGE = {"HookedTransformer": "The model", "ActivationCache": "The cache"}


def names_of(door: str) -> list[str]:
    """The names in a door's ``__all__``, in its order; if it has none, those that it imports for type checkers."""
    package = ROOT / "graphlens"
    places = (
        [package / "__init__.py"] if door == "graphlens" else [package / f"{door}.py", package / door / "__init__.py"]
    )
    path = next(path for path in places if path.exists())
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for node in body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return list(ast.literal_eval(node.value))
    checked = [
        item
        for node in body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for item in node.body
    ]
    names = [name.name for node in checked if isinstance(node, ast.ImportFrom) for name in node.names if name.asname]
    if names:
        return names
    raise ValueError(f"{path.relative_to(ROOT)} has no __all__.")


def add_reference(stage: Stage) -> None:
    """Takes up the reference pages."""
    seen: set[str] = set()
    for name, heading in LARGE.items():
        seen.add(name)
        stage.add(f"api/{heading.split()[-1]}.md", f"# {name}\n\n::: graphlens.{name}\n")
    for door, about in DOORS.items():
        module = door if door == "graphlens" else f"graphlens.{door}"
        names = names_of(door)
        fresh = [name for name in names if name not in seen]
        seen.update(names)
        elsewhere = [name for name in names if name not in fresh]
        text = f"# {module}\n\n{_existing(about, stage)}\n\n"
        constants = [name for name in fresh if name.isupper()]
        if constants:
            text += "| constant | value |\n|---|---|\n"
            home = importlib.import_module(module)
            text += "".join(f"| `{name}` | `{_short(getattr(home, name))}` |\n" for name in constants) + "\n"
            fresh = [name for name in fresh if name not in constants]
        if elsewhere:
            text += f"On pages above: {', '.join(f'`{name}`' for name in elsewhere)}.\n\n"
        stage.add(f"api/{door}.md", text + "".join(f"::: {module}.{name}\n\n" for name in fresh))
    stage.add("api/commands.md", commands_page())


def fenced_examples(text: str) -> str:
    """A docstring whose examples (``>>>`` and what follows, up to an empty line) are blocks of code."""
    lines, out = text.splitlines(), []
    inside = ""
    for line in [*lines, ""]:
        begins = line.lstrip().startswith(">>> ")
        if begins and not inside:
            inside = line[: len(line) - len(line.lstrip())] or "\n"
            out += [f"{inside.strip(chr(10))}```pycon"]
        if inside and not line.strip():
            out += [f"{inside.strip(chr(10))}```"]
            inside = ""
        out.append(line)
    return "\n".join(out[:-1])


def _short(value: object) -> str:
    """A constant as the table shows it."""
    if isinstance(value, dict):
        return f"keys {', '.join(map(repr, value))}"
    return repr(value).replace("|", "\\|")


def _existing(text: str, stage: Stage) -> str:
    """A text without the links whose pages are not there."""
    return re.sub(r" \[How to\]\(\.\./([\w-]+\.md)\)\.", lambda found: found[0] * (found[1] in stage.pages), text)


def commands_page() -> str:
    """Every command of ``graphlens``, with its arguments and options, as its help has them."""
    from typer.main import get_command

    from graphlens.cli.app import app

    group: Any = get_command(app)
    lines = ["# The command line", "", "`graphlens COMMAND --help` says the same in a terminal.", ""]
    for name, command in group.commands.items():
        about, _, example = (_plain(command.help or "")).partition("Example:")
        lines += [f"## graphlens {name}", "", " ".join(about.split()), ""]
        lines += ["```console", *(f"$ {line.strip()}" for line in example.strip().splitlines()), "```", ""] * bool(
            example
        )
        rows = [_row(parameter) for parameter in command.params if not getattr(parameter, "hidden", False)]
        rows = [row for row in rows if row]
        if rows:
            lines += ["| argument or option | what it does |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        shown = f"`{parameter.metavar or (parameter.name or '').upper()}`"
    else:
        shown = ", ".join(f"`{option}`" for option in (*parameter.opts, *parameter.secondary_opts))
    about = " ".join(_plain(getattr(parameter, "help", None) or "").split()).replace("|", "\\|").replace("<", "&lt;")
    return f"| {shown} | {about} |" if "--help" not in parameter.opts else ""


def _plain(text: str) -> str:
    """A help text without rich's markup."""
    return re.sub(r"\[/?(?:bold|dim|italic|cyan|green|yellow|red)?\]", "", text)
