"""What type checkers and editors see: a user's script under mypy --strict, and the types that have to be inferred."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import graphlens

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
REVEALED = re.compile(r'^(?P<file>[^:]+):(?P<line>\d+): note: Revealed type is ["\'](?P<type>.*)["\']$')


def checked(script: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """mypy --strict of a script, as a user has it who has no configuration of his own."""
    # Silent about the package itself, as mypy is of what a user has installed.
    options = ["--strict", f"--config-file={HERE / 'user.ini'}", "--follow-imports=silent", f"--cache-dir={folder}"]
    command = [sys.executable, "-m", "mypy", *options, str(script)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=900)


def plain(revealed: str) -> str:
    """A revealed type as a reader says it: without modules, and NumPy's arrays without what is in them."""
    text = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", revealed)
    text = re.sub(r"ndarray\[(?:[^\[\]]|\[(?:[^\[\]]|\[[^\[\]]*\])*\])*\]", "ndarray", text)
    return text.replace("builtins.", "")


@pytest.mark.parametrize("name", ["user_script.py", "torch_script.py"])
def test_a_users_script_has_the_types_it_says(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    script = HERE / name
    done = checked(script, tmp_path_factory.getbasetemp() / "mypy")
    lines = done.stdout.splitlines()
    assert [line for line in lines if ": error:" in line] == [], done.stdout + done.stderr
    found = {int(m["line"]): plain(m["type"]) for m in map(REVEALED.match, lines) if m and m["file"].endswith(name)}
    wanted = {
        number: line.rpartition("# is ")[2]
        for number, line in enumerate(script.read_text(encoding="utf-8").splitlines(), 1)
        if "reveal_type(" in line
    }
    assert wanted
    assert found == wanted


def test_every_exported_name_is_known_to_type_checkers() -> None:
    source = Path(str(graphlens.__file__)).read_text(encoding="utf-8")
    block = source[source.index("if TYPE_CHECKING:") : source.index("# Loaded on first use")]
    assert [name for name in graphlens.__all__ if not re.search(rf"\b{name}\b", block)] == []
