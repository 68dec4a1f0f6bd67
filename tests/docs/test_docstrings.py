"""Docstrings of what users call are whole: every argument, what comes back, and what is raised."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from types import FunctionType

import pytest

from tools.site import reference

# What a docstring says instead of naming arguments that another one has.
ELSEWHERE = "as for all arguments that are not here"
NOTHING = ("None", "Self", "NoReturn", inspect.Parameter.empty)


def functions() -> Iterator[tuple[str, FunctionType]]:
    """Every public function, and every public method of a public class, each once."""
    seen = set()
    for door in reference.DOORS:
        module = importlib.import_module(door if door == "graphlens" else f"graphlens.{door}")
        for name in reference.names_of(door):
            item = getattr(module, name)
            members = [(name, item)]
            if inspect.isclass(item):
                members = [
                    (f"{name}.{part}", inspect.getattr_static(item, part))
                    for part in dir(item)
                    if not part.startswith("_")
                ]
            for label, each in members:
                found = inspect.unwrap(each.__func__ if isinstance(each, (classmethod, staticmethod)) else each)
                if not inspect.isfunction(found) or not found.__module__.startswith("graphlens"):
                    continue
                key = (found.__code__, found.__name__)  # some are made by one function, a docstring each
                if key not in seen:
                    seen.add(key)
                    yield f"{door}: {label}", found


FUNCTIONS = dict(functions())


def section(text: str, title: str) -> str:
    """A section of a docstring, "" where there is none."""
    found = re.search(rf"^{title}:\n(.*?)(?=^\S|\Z)", text, re.M | re.S)
    return found[1] if found else ""


def faults_of(function: Callable[..., object], is_method: bool) -> list[str]:
    """What a docstring leaves out, and what it names that is not there."""
    text = inspect.getdoc(function) or ""
    signature = inspect.signature(function)
    names = [name for name in signature.parameters if name not in ("self", "cls")]
    told = re.findall(r"^    (\*{0,2}\w+): ", section(text, "Args"), re.M)
    found = [] if text else ["no docstring"]
    if ELSEWHERE not in text:
        found += [f"{name} is not told" for name in names if name not in [each.lstrip("*") for each in told]]
    takes_more = any(each.kind is each.VAR_KEYWORD for each in signature.parameters.values())
    found += [f"there is no {name}" for name in told if name.lstrip("*") not in names and not takes_more]
    gives = signature.return_annotation not in NOTHING
    # A method's first line may say it: "The token ids of a text."
    if gives and not is_method and not section(text, "Returns") and not section(text, "Yields"):
        found.append("what comes back is not told")
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    if any(isinstance(node, ast.Raise) and node.exc for node in ast.walk(tree)) and "aises" not in text:
        found.append("what it raises is not told")
    return found


@pytest.mark.parametrize("label", FUNCTIONS)
def test_a_docstring_is_whole(label: str) -> None:
    assert faults_of(FUNCTIONS[label], is_method="." in label) == []


def test_there_are_docstrings_to_look_at() -> None:
    assert len(FUNCTIONS) > 350
    assert {"graphlens: adopt", "graphlens: HookedTransformer.generate", "graphlens: sweep"} <= FUNCTIONS.keys()


def lacking(a: int, b: int = 0) -> int:
    """The sum.

    Args:
        a: One number.
        c: Another.
    """
    if a < b:
        raise ValueError(a)
    return a + b


def test_what_a_docstring_lacks_is_found() -> None:
    assert faults_of(lacking, is_method=False) == [
        "b is not told",
        "there is no c",
        "what comes back is not told",
        "what it raises is not told",
    ]
