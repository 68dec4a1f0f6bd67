"""Where a model comes from: a name on the Hugging Face hub, TransformerLens's alias for one, or a local folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from graphlens.errors import ExportError, InputError, ModelFileError, is_one_of, warn
from graphlens.export.checkpoint import ADAPTER_CONFIG, SHARD_INDEX, WEIGHTS_FILE, family_of, hf_config_of
from graphlens.export.families import hub_name, nearest_names
from graphlens.export.families.transformer_lens import is_old_format, settings_of
from graphlens.file.embedded import MODELS, embedded_folder
from graphlens.file.folder import CONFIG_FILE, MODEL_FILE, SETTINGS, TOKENIZER_FILES, user_path
from graphlens.file.inside import read_regular
from graphlens.file.manifest import Manifest
from graphlens.pipelines.adapters import installed, is_adapter, merged
from graphlens.pipelines.from_config import read_config
from graphlens.pipelines.lens_checkpoint import PTH_ENDING, converted, pth_of, settings_in
from graphlens.views.progress import spinner

EMBEDDED = MODELS
# The files of a checkpoint that are fetched.
_CHECKPOINT = [*SETTINGS, "model*.safetensors", SHARD_INDEX]
# Bytes of a model.onnx that is looked into: a hooked one holds no weights. GPT-2 small's has 2 MB.
LARGEST_GRAPH = 1 << 27


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

    @property
    def model_name(self) -> str:
        """What ``cfg.model_name`` says: of a model from the hub the last part of its repository's name, as in TransformerLens."""
        return self.name if self.revision is None else hub_name(self.name).rpartition("/")[2]


def embedded_model(name: str = EMBEDDED[0]) -> Path:
    """The folder of a model that ships with graphlens, in an installed package or in a clone.

    Args:
        name: "tiny-gpt2" or "tiny-llama".

    Returns:
        The folder, with model.onnx and the checkpoint that it was exported from.

    Raises:
        InputError: There is no such embedded model.
        ExportError: The installation lacks it.
    """
    if not is_one_of(name, EMBEDDED):
        raise InputError(f"{name!r:.60}: there is no such embedded model. There are {' and '.join(EMBEDDED)}.")
    return embedded_folder(name, CONFIG_FILE)


def resolve(
    name: str | os.PathLike[str],
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Source:
    """Finds a model's files, downloading them if needed.

    Args:
        name: A local folder, a name on the Hugging Face hub, TransformerLens's alias of one, or ``tiny-gpt2`` or
            ``tiny-llama`` for an embedded model. A local folder wins over a hub name of the same spelling.
        revision: The hub's branch, tag or commit.
        token: The hub's access token, or True for the one of the last login.
        cache_dir: The hub's cache folder.

    Raises:
        ExportError: The name is none of these, the repository needs a login, or the hub cannot be reached while nothing
            is cached. The message says what to do.
    """
    folder = user_path(name)
    if folder.is_dir():
        own = folder.resolve().name
        return Source(own, merged(folder) if is_adapter(folder) else _readable(folder, own, token, cache_dir))
    text = os.fspath(name)
    if text in EMBEDDED:
        return Source(text, embedded_model(text))
    if folder.exists():
        raise ExportError(f"{text}: a file, where a checkpoint folder or a hub name is needed.")
    if text.count("/") > 1 or text.startswith((".", "/", "~")):
        raise ExportError(f"{text}: no such folder.")
    found = _fetched(text, revision, token, cache_dir)
    commit = found.name if found.parent.name == "snapshots" else revision
    return Source(text, _readable(found, hub_name(text), token, cache_dir), revision=commit)


def _readable(folder: Path, name: str, token: str | bool | None, cache_dir: str | os.PathLike[str] | None) -> Path:
    """A checkpoint folder, or where it has a ``.pth`` file in TransformerLens's format, what is made of it in the cache."""
    if pth_of(folder) is None:
        return folder

    def tokenizer(asked: str) -> Path | None:
        from huggingface_hub import errors

        kept = None if cache_dir is None else str(user_path(cache_dir))
        try:
            found = _Repository(asked, None, token, kept).files(TOKENIZER_FILES)
        except (errors.HfHubHTTPError, errors.HFValidationError, OSError):
            return None
        return found if any((found / file).is_file() for file in TOKENIZER_FILES) else None

    return converted(folder, name, tokenizer)


def tokenizer_folder(name: str | os.PathLike[str]) -> Path:
    """The folder with the files of a model's tokenizer, and no more of the model: downloaded if needed.

    Args:
        name: A local folder, a name on the hub or TransformerLens's alias of one, or an embedded model's.

    Raises:
        ExportError: There is no such model, or the hub cannot be reached while nothing is cached.
    """
    from huggingface_hub import errors

    text, folder = os.fspath(name), user_path(name)
    if folder.is_dir():
        return folder
    if text in EMBEDDED:
        return embedded_model(text)
    repo = hub_name(text)
    try:
        return _Repository(repo, None, None, None).files(TOKENIZER_FILES)
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise ExportError(_refusal(error, text, repo, None)) from error


def config_folder(name: str, fetch: Callable[[], str]) -> Path:
    """The folder of a model's ``config.json``, and no more of the model.

    Args:
        name: A name on the hub or TransformerLens's alias of one.
        fetch: Gives the path of the file in the hub's cache.

    Raises:
        ExportError: There is no such model, or the hub cannot be reached while nothing is cached.
    """
    from huggingface_hub import errors

    try:
        return Path(fetch()).parent
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise ExportError(_refusal(error, name, hub_name(name), None)) from error


def manifest_of(graph: Path) -> Manifest | None:
    """The manifest of a ``model.onnx`` that lies where a checkpoint does, its weights not checked; None without one.

    Args:
        graph: The file.

    Raises:
        ModelFileError: It is one of ours that is damaged, or of a newer format. The checkpoint is not taken in its stead:
            the file may hold another model than that.
    """
    from graphlens import surgery
    from graphlens.surgery.files import stored_manifest
    from graphlens.surgery.seal import is_sealed

    try:
        return stored_manifest(graph)
    except ModelFileError as error:
        if not surgery.names_graphlens(graph):
            return None
        # What bake and strip write is sealed and has no manifest; without a seal its manifest's key is damaged.
        if not (isinstance(error, surgery.NotHooked) and is_sealed(read_regular(graph), str(graph))):
            raise ModelFileError(f"{error} To export the checkpoint beside it instead, remove {graph.name}.") from error
    warn(
        f"{graph} was written for other runtimes (by bake or strip, say) and has no hook points: it is not used. The checkpoint "
        "beside it is, without the edits that the file may hold."
    )
    return None


@dataclass(frozen=True)
class _Repository:
    """A repository on the hub, whose files are fetched into the hub's cache unless they are there.

    Attributes:
        name: Its name on the hub.
        revision: A branch, tag or commit.
        token: The hub's access token.
        cache_dir: The hub's cache folder.
    """

    name: str
    revision: str | None
    token: str | bool | None
    cache_dir: str | None

    def file(self, name: str) -> Path | None:
        """A file of the repository, None where it has none of that name.

        It is asked for as a snapshot of that one file. Where the hub cannot be reached, that falls back to the cache at
        once; the call for single files would try several times first.
        """
        found = self.files([name]) / name
        return found if found.exists() else None

    def files(self, patterns: Sequence[str]) -> Path:
        """The local folder with the files of the repository that shell patterns match."""
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                self.name,
                revision=self.revision,
                token=self.token,
                cache_dir=self.cache_dir,
                allow_patterns=list(patterns),
            )
        )

    def at_commit_of(self, file: Path | None) -> _Repository:
        """The repository at the very commit that a file was fetched of, whatever is pushed meanwhile."""
        commit = None if file is None or file.parent.parent.name != "snapshots" else file.parent.name
        return self if commit is None else replace(self, revision=commit)

    def manifest(self) -> Manifest | None:
        """The manifest of its ``model.onnx``, None where it has no hooked one. No weight is fetched."""
        graph = self._graph()
        return None if graph is None else manifest_of(graph)

    def _graph(self) -> Path | None:
        """The repository's ``model.onnx``, where it is small enough to be a hooked one."""
        from huggingface_hub import HfApi, errors, try_to_load_from_cache

        cached = try_to_load_from_cache(self.name, MODEL_FILE, cache_dir=self.cache_dir, revision=self.revision)
        if isinstance(cached, str):
            return Path(cached)
        # Without a connection the library beneath the hub's raises its own errors, of which the hub's is one.
        trouble = tuple(kind for kind in errors.HfHubHTTPError.__mro__ if issubclass(kind, Exception))[:-1]
        try:
            found = HfApi(token=self.token).get_paths_info(self.name, [MODEL_FILE], revision=self.revision)
        except trouble:
            return None
        sizes = [getattr(each, "size", None) for each in found]
        return self.file(MODEL_FILE) if sizes and (sizes[0] or 0) <= LARGEST_GRAPH else None


def _fetched(
    name: str, revision: str | None, token: str | bool | None, cache_dir: str | os.PathLike[str] | None
) -> Path:
    """The local folder of a repository on the hub, downloaded unless it is cached: a hooked model as it is, else a
    checkpoint. Whether it can be exported is known before any weight is fetched."""
    from huggingface_hub import errors

    repo = hub_name(name)
    repository = _Repository(repo, revision, token, None if cache_dir is None else str(user_path(cache_dir)))
    try:
        with spinner(f"Fetching {repo} from the Hugging Face hub"):
            config = repository.file(CONFIG_FILE)
            repository = repository.at_commit_of(config)
            manifest = repository.manifest()
            if manifest is not None:
                return repository.files([*SETTINGS, MODEL_FILE, *manifest.files])
            if config is None:
                if repository.file(ADAPTER_CONFIG) is not None:
                    raise ExportError(_adapter_on_the_hub(repo))
                raise ExportError(
                    f"{repo}: this repository has no {CONFIG_FILE}, so it is no model of transformers, and no hooked "
                    f"{MODEL_FILE}."
                )
            _ensure_exportable(config.parent, repo)
            old = is_old_format(settings_in(config.parent))
            folder = repository.files([*SETTINGS, f"*{PTH_ENDING}"] if old else _CHECKPOINT)
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise ExportError(_refusal(error, name, repo, revision)) from error
    if not any((folder / file).exists() for file in (WEIGHTS_FILE, SHARD_INDEX)) and pth_of(folder) is None:
        raise ExportError(
            f"{repo}: this repository has no {WEIGHTS_FILE} (nor {SHARD_INDEX}), and graphlens reads no other weights. "
            f"Convert them once with: AutoModelForCausalLM.from_pretrained({repo!r}).save_pretrained(folder), and pass that "
            "folder."
        )
    return folder


def _ensure_exportable(folder: Path, repo: str) -> None:
    """Refuses a checkpoint of which only ``config.json`` is there yet, by all that this says.

    What transformers makes of the file is looked at where the weights are not there yet: that takes seconds, and an export
    looks again. Where transformers is not installed nothing can be exported, but what was exported before can be opened.
    """
    try:
        family = family_of(folder, repo)
    except ExportError as error:
        near = nearest_names(repo)
        raise ExportError(f"{error}{_nearest(near)}" if near and repo not in near else str(error)) from error
    fetched = any((folder / file).exists() for file in (WEIGHTS_FILE, SHARD_INDEX))
    if family.own:
        read_config(settings_of(settings_in(folder)), repo)
    elif not fetched and installed("transformers"):
        family.spec_of(hf_config_of(folder, repo), repo)


def _nearest(names: Sequence[str]) -> str:
    """Names that may have been meant, as a sentence after another."""
    return f" Nearest names that graphlens knows: {', '.join(map(repr, names))}." if names else ""


def _unlike(name: str) -> list[str]:
    """The nearest known names of one that is not known itself."""
    near = nearest_names(name)
    return [] if name in near else near


def _adapter_on_the_hub(repo: str) -> str:
    """What to do with an adapter that is not in a local folder."""
    return (
        f"{repo}: this repository holds a PEFT adapter, which is no model by itself. Download it (hf download {repo} --local-dir "
        "folder) and pass the folder: it is merged into its base model where peft is installed. Or merge it once with: "
        f"AutoPeftModelForCausalLM.from_pretrained({repo!r}).merge_and_unload().save_pretrained(folder)."
    )


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
                f"pass token=).{_nearest(_unlike(name))}"
            )
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled() | ConnectionError():
            return (
                f"{repo}: the hub cannot be reached and the model is not in the local hub cache. Connect once, or pass a "
                f"local checkpoint folder.{_nearest(_unlike(name))}"
            )
        case errors.HFValidationError():
            return f"{name!r} is neither a local folder nor a valid hub name ({error}).{_nearest(_unlike(name))}"
        case errors.HfHubHTTPError():
            return f"{repo}: the hub answered with an error ({error}). Try again later."
        case OSError():
            return f"{repo}: could not be fetched from the hub ({error.strerror or error})."
    return f"{repo}: could not be fetched from the hub ({error})."
