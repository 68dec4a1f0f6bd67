"""Which layer and which hook point the names of folders and repositories tell, where an SAE's own files do not."""

from __future__ import annotations

import re
from pathlib import Path

from graphlens.errors import InputError

_REPOSITORY = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)")


def repository_in(folder: Path) -> str:
    """The name of the hub's repository that a folder lies in, as far as its path tells: that of a folder on the way too.

    Args:
        folder: The folder.

    Returns:
        The path's folders, the hub's cache's own names undone, joined by "/".
    """
    parts = folder.absolute().parts
    for at, part in enumerate(parts):
        if found := _REPOSITORY.fullmatch(part):
            return "/".join((found["owner"], found["name"], *parts[at + 3 :]))  # after snapshots and the commit
    return "/".join(parts)


def layer_in(folder: Path, pattern: str = r"layer_(\d+)") -> int | None:
    """The layer that a folder's path names last; None where none does.

    Args:
        folder: The folder.
        pattern: A regular expression whose first group is the layer's number.
    """
    found = [match for part in folder.absolute().parts if (match := re.fullmatch(rf".*?{pattern}.*", part))]
    return int(found[-1][1]) if found else None


def unknown_hook(folder: Path, why: str) -> InputError:
    """The error for an SAE of which nothing tells what it reads.

    Args:
        folder: Its folder.
        why: What was looked at.
    """
    return InputError(
        f"it does not say which hook point the SAE reads, nor does {why} ({folder.name}). Pass hook=, like "
        "'blocks.2.hook_resid_post'."
    )
