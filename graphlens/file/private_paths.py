"""Which texts in a model's settings are paths on the machine that wrote them: nothing of these goes to others."""

from __future__ import annotations

import json
import re
from pathlib import Path

# Absolute, from a home, from where one stands, with a drive or backslashes, or of more parts than "owner/name" has.
_PATH = re.compile(r"[/\\~]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|file:|[^/\\]*\\|[^/]+/[^/]+/")
_KEY = re.compile(r"(?:path|file|dir|folder)$")  # "_name_or_path", "tokenizer_file": a token's text may begin with "/"


def is_private_path(text: str) -> bool:
    """True of a path on somebody's machine, False of a name on the hub.

    >>> [is_private_path(text) for text in ("/home/ann/gpt2", "runs/old/gpt2", "openai-community/gpt2", "gpt2")]
    [True, True, False, False]

    Args:
        text: What a settings file has as the name of a model, or as a file.
    """
    return _PATH.match(text) is not None


def public_name(text: str) -> str:
    """A model's name as it may be told: of a path on a machine its last part, any other name as it is.

    >>> public_name("C:\\\\runs\\\\small-llama"), public_name("openai-community/gpt2")
    ('small-llama', 'openai-community/gpt2')

    Args:
        text: The name.
    """
    if not is_private_path(text):
        return text
    return next((part for part in reversed(re.split(r"[/\\]", text)) if part.strip(".~ ")), "model")


def remove_private_paths(file: Path) -> None:
    """Takes the entries out of a JSON file that are paths on the machine that wrote it. A file without stays to the byte.

    Args:
        file: The file: config.json, say. What is no JSON stays as it is.

    Raises:
        OSError: It cannot be read or written.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return
    public = _without(data)
    if public != data:
        file.write_text(json.dumps(public, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _without(data: object) -> object:
    """JSON without such entries, at any depth."""
    if isinstance(data, list):
        return [_without(item) for item in data]
    if not isinstance(data, dict):
        return data
    return {
        key: _without(value)
        for key, value in data.items()
        if not (isinstance(value, str) and _KEY.search(key) and is_private_path(value))
    }
