"""Which tokens end a text, as the settings of a model's folder name them; a chat model has several."""

from __future__ import annotations

from pathlib import Path

from graphlens.file.folder import CONFIG_FILE, GENERATION_CONFIG_FILE
from graphlens.file.settings import read_settings


def end_tokens(folder: Path) -> list[int]:
    """The ids that end a text by a folder's ``generation_config.json``, else by its ``config.json``.

    Args:
        folder: The model's folder.

    Returns:
        The ids in the file's order, each once; empty where neither file names one.

    Raises:
        ModelFileError: A file cannot be read.
    """
    for name in (GENERATION_CONFIG_FILE, CONFIG_FILE):
        given = read_settings(folder / name).get("eos_token_id")
        ids = [id for id in (given if isinstance(given, list) else [given]) if isinstance(id, int) and id >= 0]
        found = [id for id in dict.fromkeys(ids) if not isinstance(id, bool)]
        if found:
            return found
    return []
