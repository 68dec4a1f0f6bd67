"""Where a model comes from: a name on the Hugging Face hub, TransformerLens's alias for one, or a local folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from graphlens.errors import ExportError
from graphlens.export.checkpoint import SHARD_INDEX
from graphlens.export.families import aliases
from graphlens.file.folder import CONFIG_FILE, SETTINGS
from graphlens.views.progress import spinner

EMBEDDED = "tiny-gpt2"
# The files of a repository that are fetched.
_PATTERNS = [*SETTINGS, "model*.safetensors", SHARD_INDEX]


@dataclass(frozen=True)
class Source:
    """Where a model's files are.

    Attributes:
        name: The model's name.
        folder: The local folder with its files.
        revision: The hub's commit, for a model from the hub.
    """

    name: str
    folder: Path
    revision: str | None = None


def embedded_model() -> Path:
    """The folder of the model that ships with graphlens, in an installed package or in a clone.

    Raises:
        ExportError: The installation lacks it.
    """
    from importlib.resources import files

    package = Path(str(files("graphlens"))).resolve()
    for folder in (package / "models" / EMBEDDED, package.parent / "models" / EMBEDDED):
        if (folder / CONFIG_FILE).is_file():
            return folder
    raise ExportError(f"the embedded model {EMBEDDED!r} is missing from this installation; install graphlens again.")


def resolve(
    name: str | os.PathLike[str],
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Source:
    """Finds a model's files, downloading them if needed.

    Args:
        name: A local folder, a name on the Hugging Face hub, TransformerLens's alias of one, or ``tiny-gpt2`` for the
            embedded model. A local folder wins over a hub name of the same spelling.
        revision: The hub's branch, tag or commit.
        token: The hub's access token, or True for the one of the last login.
        cache_dir: The hub's cache folder.

    Raises:
        ExportError: The name is none of these, the repository needs a login, or the hub cannot be reached while nothing
            is cached. The message says what to do.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Source(folder.resolve().name, folder)
    text = os.fspath(name)
    if text == EMBEDDED:
        return Source(EMBEDDED, embedded_model())
    if folder.exists():
        raise ExportError(f"{text}: a file, where a checkpoint folder or a hub name is needed.")
    if text.count("/") > 1 or text.startswith((".", "/", "~")):
        raise ExportError(f"{text}: no such folder.")
    found = _fetched(text, revision, token, cache_dir)
    return Source(text, found, revision=found.name if found.parent.name == "snapshots" else revision)


def _fetched(
    name: str, revision: str | None, token: str | bool | None, cache_dir: str | os.PathLike[str] | None
) -> Path:
    """The local folder of a repository on the hub, downloaded unless it is cached."""
    from huggingface_hub import errors, snapshot_download

    repo = aliases().get(name, name)
    try:
        with spinner(f"Fetching {repo} from the Hugging Face hub"):
            path = snapshot_download(
                repo,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else os.fspath(cache_dir),
                allow_patterns=_PATTERNS,
            )
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise ExportError(_refusal(error, name, repo, revision)) from error
    return Path(path)


def _refusal(error: Exception, name: str, repo: str, revision: str | None) -> str:
    """What an error of huggingface_hub means and what to do."""
    from huggingface_hub import errors

    # Most specific first: several of these classes derive from each other.
    match error:
        case errors.GatedRepoError():
            return (
                f"{repo}: this repository is gated. Accept its terms on the hub, then log in (hf auth login) or pass "
                "token=."
            )
        case errors.RevisionNotFoundError():
            return f"{repo}: the hub has no revision {revision!r} of it."
        case errors.RepositoryNotFoundError():
            return (
                f"{name!r} is neither a local folder nor a model on the Hugging Face hub (or it is private: log in, or "
                "pass token=)."
            )
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled() | ConnectionError():
            return (
                f"{repo}: the hub cannot be reached and the model is not in the local hub cache. Connect once, or pass a "
                "local checkpoint folder."
            )
        case errors.HFValidationError():
            return f"{name!r} is neither a local folder nor a valid hub name ({error})."
        case errors.HfHubHTTPError():
            return f"{repo}: the hub answered with an error ({error}). Try again later."
        case OSError():
            return f"{repo}: could not be fetched from the hub ({error.strerror or error})."
    return f"{repo}: could not be fetched from the hub ({error})."
