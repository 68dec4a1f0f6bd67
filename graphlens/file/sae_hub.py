"""Where an SAE of a release lies: a repository on the Hugging Face hub, or what ships with graphlens, and a folder in it."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from graphlens.errors import InputError, ModelFileError, is_one_of
from graphlens.file.embedded import CARD, SAES, embedded_folder
from graphlens.file.folder import user_path
from graphlens.file.sae_layouts import layouts, refusal

_MOST = 8  # folders that an error names


def fetched(
    release: str,
    sae_id: str,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """The local folder of an SAE on the hub, downloaded unless it is in the hub's cache; or of one that ships with graphlens.

    Args:
        release: The repository, "owner/name"; or a name of ``embedded.SAES``.
        sae_id: The SAE's folder in it; "." for the repository itself.
        revision: A branch, tag or commit.
        token: The hub's access token, or True for the one of the last login.
        cache_dir: The hub's cache folder.

    Raises:
        InputError: ``release`` is no repository's name, or ``sae_id`` no folder's.
        ModelFileError: There is no such repository or no SAE there, or the hub cannot be reached and nothing is cached.
    """
    if is_one_of(release, SAES):
        return _embedded(release, sae_id)
    from huggingface_hub import errors, snapshot_download

    folder = _checked(release, sae_id)
    kept = None if cache_dir is None else str(user_path(cache_dir))
    try:
        root = snapshot_download(
            release, revision=revision, token=token, cache_dir=kept, allow_patterns=_patterns(folder)
        )
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise ModelFileError(_why(error, release, revision)) from error
    found = Path(root, *folder.parts)
    if not found.is_dir() or not any(found.iterdir()):
        raise ModelFileError(f"{release}: {_not_there(release, folder, revision, token)}")
    return found


def _embedded(release: str, sae_id: str) -> Path:
    """The folder of an SAE that ships with graphlens."""
    root = embedded_folder(release, CARD)
    there = sorted(path.name for path in root.iterdir() if path.is_dir())
    if not is_one_of(sae_id, there):
        raise ModelFileError(
            f"{release}: it has no folder {sae_id!r:.80}. Folders with an SAE: {', '.join(map(repr, there))}."
        )
    return root / sae_id


def _checked(release: str, sae_id: str) -> PurePosixPath:
    """The folder in the repository, once both may be what they say."""
    if not isinstance(release, str) or release.count("/") != 1:
        raise InputError(
            f"release={release!r:.80}: a repository on the hub is wanted, like 'owner/name', and sae_id= is the folder in it. "
            "SAELens's own names of releases are a table of SAELens's: there, "
            "sae_lens.loading.pretrained_saes_directory.get_repo_id_and_folder_name(release, sae_id) tells both."
        )
    if not isinstance(sae_id, str) or sae_id.startswith("/") or ".." in PurePosixPath(sae_id).parts or "\\" in sae_id:
        raise InputError(
            f"sae_id={sae_id!r:.80}: the SAE's folder in the repository is wanted, '.' for the repository itself."
        )
    if any(character in sae_id for character in "*?["):
        raise InputError(f"sae_id={sae_id!r:.80}: one folder is wanted, not a pattern.")
    return PurePosixPath(sae_id)


def _patterns(folder: PurePosixPath) -> list[str]:
    """The files that are fetched: those that a layout may have."""
    names = {name for layout in layouts() if layout.fetched for name in (*layout.files, *layout.beside)}
    places = {folder.parent / name[3:] if name.startswith("../") else folder / name for name in names}
    return sorted(map(str, places))


def _not_there(release: str, folder: PurePosixPath, revision: str | None, token: str | bool | None) -> str:
    """Why nothing was fetched, by what the repository holds."""
    from huggingface_hub import HfApi, errors

    try:
        there = HfApi(token=token).list_repo_files(release, revision=revision)
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError):
        return f"nothing of an SAE in {str(folder)!r} is in the local hub cache, and the hub cannot be reached."
    inside = [name for name in there if PurePosixPath(name).is_relative_to(folder)]
    if inside:
        return f"{str(folder)!r}: {refusal(str(PurePosixPath(name).relative_to(folder)) for name in inside)}"
    marks = {name for layout in layouts() if layout.fetched for name in layout.files if name != "config.json"}
    folders = sorted({str(PurePosixPath(name).parent) for name in there if PurePosixPath(name).name in marks})
    shown = ", ".join(map(repr, folders[:_MOST])) + (
        f" and {len(folders) - _MOST} more" if len(folders) > _MOST else ""
    )
    return f"it has no folder {str(folder)!r}. " + (
        f"Folders with an SAE: {shown}." if folders else "No folder in it holds an SAE."
    )


def _why(error: Exception, release: str, revision: str | None) -> str:
    """What an error of huggingface_hub means and what to do."""
    from huggingface_hub import errors

    match error:  # most specific first: several of these classes derive from each other
        case errors.GatedRepoError():
            return f"{release}: it is gated. Accept its terms on the hub, then log in (hf auth login) or pass token=."
        case errors.RevisionNotFoundError():
            return f"{release}: the hub has no revision {revision!r} of it."
        case errors.RepositoryNotFoundError():
            return f"{release}: there is no such repository on the hub (or it is private: log in, or pass token=)."
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled() | ConnectionError():
            return f"{release}: the hub cannot be reached and the SAE is not in the local hub cache. Connect once."
        case errors.HFValidationError():
            return f"{release!r} is no valid name on the hub ({error})."
        case OSError() if error.strerror:
            return f"{release}: could not be fetched from the hub ({error.strerror})."
    return f"{release}: the hub answered with an error ({error}). Try again later."
