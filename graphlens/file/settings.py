"""The JSON files of settings beside a model (config.json, tokenizer_config.json, ...), which may be a stranger's."""

from __future__ import annotations

import json
from pathlib import Path

from graphlens.errors import ModelFileError
from graphlens.file.inside import inside, read_regular
from graphlens.file.manifest import Json

MAX_SETTINGS_BYTES = 16_000_000  # of a settings file; those with 100,000 added tokens have some 10


def read_settings(path: Path, called: str | None = None) -> dict[str, Json]:
    """What a file of settings holds.

    Args:
        path: The file.
        called: How an error calls it; None takes its path.

    Returns:
        Its JSON object; an empty one where there is no such file.

    Raises:
        ModelFileError: It holds no JSON object, is larger than settings are, no regular file, or a link that leaves its
            folder.
    """
    try:
        data = read_regular(inside(path.parent, path.name), MAX_SETTINGS_BYTES)
        found: Json = json.loads(data)
    except FileNotFoundError:
        return {}
    except ModelFileError:  # it says what the file is, and is a ValueError too
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{called or path} cannot be read ({error}). Put the original file back.") from error
    if not isinstance(found, dict):
        raise ModelFileError(f"{called or path} holds no JSON object. Put the original file back.")
    return found
