"""Where the models and the SAEs lie that ship with graphlens: in an installed package or in a clone."""

from __future__ import annotations

from pathlib import Path

from graphlens.errors import ExportError

MODELS = ("tiny-gpt2", "tiny-llama")
SAES = ("tiny-gpt2-saes",)
CARD = "README.md"


def embedded_folder(name: str, holds: str) -> Path:
    """The folder of a model or of SAEs that ships with graphlens.

    Args:
        name: One of MODELS or of SAES.
        holds: A file that lies in it.

    Returns:
        The folder.

    Raises:
        ExportError: The installation lacks it.
    """
    from importlib.resources import files

    package = Path(str(files("graphlens"))).resolve()
    for folder in (package / "models" / name, package.parent / "models" / name):
        if (folder / holds).is_file():
            return folder
    raise ExportError(
        f"{name!r}, which ships with graphlens, is missing from this installation; install graphlens again."
    )
