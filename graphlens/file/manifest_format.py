"""The format of a manifest: its number, and what is refused before anything else of it is read."""

from __future__ import annotations

import json
from typing import Any

from graphlens.errors import ModelFileError

FORMAT_VERSION = 5


def ensure_known_format(text: str, where: str) -> None:
    """Refuses a manifest of a newer format, in which everything else may be otherwise.

    Args:
        text: The manifest as it is stored.
        where: The file's name, for error messages.

    Raises:
        ModelFileError: Its format is a newer one, or it cannot be read.
    """
    known_format(text, where)


def known_format(text: str, where: str) -> tuple[dict[str, Any], int]:
    """What a manifest's JSON holds, and its format.

    Args:
        text: The manifest as it is stored.
        where: The file's name, for error messages.

    Raises:
        ModelFileError: It is of a newer format, or cannot be read.
    """
    try:
        data = json.loads(text)
        version = data["format_version"]
        if type(version) is not int or version < 1:
            raise TypeError(f"format_version is {version!r}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise malformed(where, error) from error
    if version > FORMAT_VERSION:
        writer = writers.get("graphlens") if isinstance(writers := data.get("exporter"), dict) else None
        by, to = (f", written by graphlens {writer}", f" to {writer} or later") if isinstance(writer, str) else ("", "")
        raise ModelFileError(
            f"{where}: the manifest has format {version}{by}, and this graphlens reads up to {FORMAT_VERSION}. Update "
            f"graphlens{to}, or export the model again with this version."
        )
    return data, version


def malformed(where: str, error: Exception) -> ModelFileError:
    """The error for a manifest that cannot be read.

    Args:
        where: The file's name.
        error: Why.
    """
    return ModelFileError(f"{where}: the graphlens manifest is malformed ({error}). Export the model again.")
