"""Where a model comes from: a name on the Hugging Face hub, TransformerLens's alias for one, or a local folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from graphlens.errors import ExportError
from graphlens.views.progress import spinner

# TransformerLens's names -> hub names.
ALIASES = {
    "gpt2-small": "gpt2",
    "distillgpt2": "distilgpt2",
    "distill-gpt2": "distilgpt2",
    "distil-gpt2": "distilgpt2",
    "gpt2-xs": "distilgpt2",
}
EMBEDDED = "tiny-gpt2"
_PATTERNS = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
]


@dataclass(frozen=True)
class Source:
    """A resolved model: its name, the local folder with its files, and the hub revision (a commit) if it has one."""

    name: str
    folder: Path
    revision: str | None = None


def embedded_model() -> Path:
    """The folder of the model that ships with graphlens, in an installed package or in a clone."""
    from importlib.resources import files

    package = Path(str(files("graphlens")))
    for folder in (package / "models" / EMBEDDED, package.parent / "models" / EMBEDDED):
        if (folder / "config.json").is_file():
            return folder
    raise ExportError(f"the embedded model {EMBEDDED!r} is missing from this installation; install graphlens again.")


def resolve(
    name: str | os.PathLike[str],
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Source:
    """Finds a model's files, downloading them if needed.

    A local folder wins over a hub name of the same spelling. Raises ExportError, saying what to do, for a name that is
    neither, a repository that needs a login, or a hub that cannot be reached while nothing is cached.
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
    repo = ALIASES.get(text, text)
    from huggingface_hub import errors, snapshot_download

    # huggingface_hub's own exceptions, most specific first: several derive from each other.
    try:
        with spinner(f"Fetching {repo} from the Hugging Face hub"):
            path = snapshot_download(
                repo,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else os.fspath(cache_dir),
                allow_patterns=_PATTERNS,
            )
    except errors.GatedRepoError as error:
        raise ExportError(
            f"{repo}: this repository is gated. Accept its terms on the hub, then log in (hf auth login) or pass token=."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ExportError(f"{repo}: the hub has no revision {revision!r} of it.") from error
    except errors.RepositoryNotFoundError as error:
        raise ExportError(
            f"{text!r} is neither a local folder nor a model on the Hugging Face hub (or it is private: log in, or pass "
            "token=)."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError) as error:
        raise ExportError(
            f"{repo}: the hub cannot be reached and the model is not in the local hub cache. Connect once, or pass a "
            "local checkpoint folder."
        ) from error
    except errors.HFValidationError as error:
        raise ExportError(f"{text!r} is neither a local folder nor a valid hub name ({error}).") from error
    except errors.HfHubHTTPError as error:
        raise ExportError(f"{repo}: the hub answered with an error ({error}). Try again later.") from error
    except OSError as error:
        raise ExportError(f"{repo}: could not be fetched from the hub ({error.strerror or error}).") from error
    found = Path(path)
    return Source(text, found, revision=found.name if found.parent.name == "snapshots" else revision)
