"""Model folders on disk: what lies in one, where the cache is, and how a file or a folder is put in place whole."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from graphlens.errors import ExportError, InputError, ModelFileError
from graphlens.file.inside import inside, root_of
from graphlens.file.leftovers import partial_of, provisional, remove, remove_stale

MODEL_FILE = "model.onnx"
CONFIG_FILE, GENERATION_CONFIG_FILE = "config.json", "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
SETTINGS = (CONFIG_FILE, GENERATION_CONFIG_FILE, *TOKENIZER_FILES)


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path as a user gave it, ``~`` being the user's own folder.

    Args:
        path: The path. There need be nothing there.

    Raises:
        InputError: It is no path, or one that no file or folder can have here.
    """
    try:
        text = os.fspath(path)
    except TypeError as error:
        raise InputError(f"a path is text or a pathlib.Path, not {type(path).__name__}.") from error
    if not isinstance(text, str):
        raise InputError(f"a path is text, not bytes: pass os.fsdecode({text!r:.60}).")
    if not text or "\0" in text:
        raise InputError(f"{text!r:.60}: {'the path is empty' if not text else 'no path holds a null character'}.")
    try:
        found = Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(f"{text}: there is no such user's folder ({error}). Write the path in full.") from error
    try:
        found.stat()
    except (FileNotFoundError, NotADirectoryError):
        return found
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{text!a:.200}: no file or folder can be looked for there ({said}).") from error
    return found


def make_folder(folder: Path) -> None:
    """Makes a folder to write results into, and those that it lies in.

    Args:
        folder: The folder. One that is there stays as it is.

    Raises:
        InputError: It is a file, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise InputError(f"{folder}: this is a file, and a folder is wanted. Name another one.") from error
    except OSError as error:
        raise InputError(f"{folder}: this folder cannot be made ({error.strerror}). Name another one.") from error


def model_path(path: str | os.PathLike[str]) -> Path:
    """The graph file of a model.

    Args:
        path: A hooked folder, or the graph file itself.

    Returns:
        The graph file.

    Raises:
        ModelFileError: There is no such file, or it lies where ONNX Runtime cannot open one.
        InputError: ``path`` can be none.
    """
    found = user_path(path)
    if found.is_dir():
        found = found / MODEL_FILE
    elif found.is_symlink() and found.name != MODEL_FILE and root_of(found.parent) == found.parent.resolve():
        found = found.resolve()  # a name that the user gave it: the weights lie beside the file itself
    if not found.is_file():
        raise ModelFileError(f"{found}: no such file. A hooked folder holds {MODEL_FILE}; make one: graphlens export.")
    try:
        os.path.abspath(found).encode()
    except UnicodeEncodeError as error:
        raise ModelFileError(
            f"{os.path.abspath(found)!a}: the name of a folder on this path is not UTF-8, and ONNX Runtime opens no file "
            "there. Rename the folder, or move the model."
        ) from error
    return found


def converted_weights(dtype: str) -> str:
    """The name of the file of weights that were converted to a dtype.

    >>> converted_weights("bfloat16")
    'weights.bfloat16.safetensors'
    """
    return f"weights.{dtype}.safetensors"


def copy_settings(source: Path, target: Path) -> None:
    """Copies the settings and tokenizer files of a model, as far as there are any.

    Args:
        source: The folder that they lie in.
        target: The folder that gets them. Where it is the same folder nothing happens.

    Raises:
        ModelFileError: One is a link that leaves the folder, and so another's file.
    """
    import shutil  # slow to load, and not needed to open a model

    for file in SETTINGS:
        if (source / file).is_file() and source.resolve() != target.resolve():
            shutil.copyfile(inside(source, file), target / file)


def cache_root() -> Path:
    """The cache folder: ``GRAPHLENS_CACHE``, else graphlens's folder in the user's cache directory."""
    chosen = os.environ.get("GRAPHLENS_CACHE")
    if chosen:
        return user_path(chosen)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or user_path("~/AppData/Local"))
    elif sys.platform == "darwin":
        base = user_path("~/Library/Caches")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or user_path("~/.cache"))
    return base / "graphlens"


def write_through(target: Path, data: bytes) -> None:
    """``write_whole`` for a file that is the user's own: through links, and with the permissions that it has.

    Args:
        target: The file. What is no ordinary file (a pipe, a device), or lies in a folder that cannot be written, is
            written in place.
        data: Its content.

    Raises:
        OSError: If it cannot be written.
    """
    place = Path(os.path.realpath(target))
    ordinary = place.is_file() or not place.exists()
    if not (ordinary and os.access(place.parent, os.W_OK)):
        target.write_bytes(data)
        return
    write_whole(place, data, place.stat().st_mode if place.exists() else None)


def write_whole(target: Path, data: bytes, mode: int | None = None) -> None:
    """Writes a file so that it is there whole or not at all, also if the computer stops in between.

    Args:
        target: The file. One that is there already is replaced at the end.
        data: Its content. It is written to a temporary file in the same folder first, which is removed on an error.
        mode: Its permissions; None takes those of any new file.

    Raises:
        OSError: If it cannot be written.
    """
    partial = partial_of(target)
    try:
        with partial.open("xb") as file:
            if mode is not None:
                partial.chmod(mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
        to_disk(target.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new file to write, with the same ending, which becomes another at the end, whole, or vanishes on an error.

    Args:
        target: The other file. Links are followed, and its permissions stay. What is no ordinary file, or is one that can
            be written in a folder that cannot, is written itself.
    """
    place = Path(os.path.realpath(target))
    if place.exists() and not (place.is_file() and (os.access(place.parent, os.W_OK) or not os.access(place, os.W_OK))):
        yield target
        return
    remove_stale(place.parent)
    made = provisional(place.with_name(f".{place.name}"))  # hidden: nobody takes it for a picture
    made.touch()  # raises here where that may not be, in words of the system and not of who writes it
    try:
        yield made
        if place.exists():
            made.chmod(place.stat().st_mode)
        to_disk(made)
        os.replace(made, place)
        to_disk(place.parent)
    finally:
        made.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Makes sure that a file's content, or the names in a folder, outlast a stop of the computer."""
    if sys.platform == "win32":
        return  # there, only what is open for writing can be asked for
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        return  # one may write into a folder that one may not read
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # a file system that has no such thing
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing(target: Path | str) -> Iterator[None]:
    """Turns a failure to write, inside the ``with`` block, into an error that says what to do.

    Args:
        target: What is written, for the error.

    Raises:
        ExportError: The block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "The disk is full: free some space, or choose another folder.",
            errno.EDQUOT: "Your disk quota is used up: free some space, or choose another folder.",
            errno.EACCES: "You may not write there: choose another folder.",
            errno.EPERM: "You may not write there: choose another folder.",
            errno.EROFS: "That file system is read-only: choose another folder.",
        }.get(error.errno or 0, "Choose another folder, or mend this one.")
        raise ExportError(f"{target}: could not be written ({error.strerror or error}). {advice}") from error


@contextlib.contextmanager
def working_folder(folder: Path, name: str = "work") -> Iterator[Path]:
    """A temporary folder inside another, which is gone when the ``with`` block ends.

    What killed processes left beside it is removed first.

    Args:
        folder: The other folder.
        name: What the temporary one is for, as a part of its name.
    """
    remove_stale(folder)
    made = partial_of(folder / name)
    made.mkdir()
    try:
        yield made
    finally:
        remove(made)


@contextlib.contextmanager
def staged_folder(target: Path, finished: str = MODEL_FILE, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``target`` that becomes ``target`` at the end, whole, or vanishes on an error.

    ``target`` must be absent or empty, unless another process put the same thing there meanwhile: then theirs stays.
    What killed processes left beside it is removed first.

    Args:
        target: The folder to make.
        finished: The file that tells another process's finished folder from any other folder.
        replace: True puts it in the place of a folder that is there, which is then removed.
    """
    with contextlib.ExitStack() as work:
        with writing(target):
            place = Path(os.path.realpath(target))
            place.parent.mkdir(parents=True, exist_ok=True)
            stage = work.enter_context(working_folder(place.parent, place.name))
        yield stage
        with writing(target):
            for item in (*stage.rglob("*"), stage):
                to_disk(item)
            try:
                if replace and place.exists():
                    _exchange(stage, place)  # the old one is removed at the end
                else:
                    os.replace(stage, place)
            except OSError as error:
                if replace or error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not (place / finished).is_file():
                    raise
            to_disk(place.parent)


def _exchange(new: Path, old: Path) -> None:
    """Gives a folder the place of another, whose content then has the first one's name.

    In one step where the system has one. Elsewhere there is a moment in which neither is in place.
    """
    if sys.platform == "linux":
        import ctypes  # slow to load, and not needed to open a model

        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # not in every C library
        if rename is not None and rename(here, os.fsencode(new), here, os.fsencode(old), exchange) == 0:
            return
    aside = partial_of(old)
    os.replace(old, aside)
    try:
        os.replace(new, old)
    except BaseException:
        os.replace(aside, old)
        raise
    os.replace(aside, new)


def refuse_occupied(target: Path) -> None:
    """Makes sure that a folder can be written without harm.

    Args:
        target: The folder.

    Raises:
        ExportError: It is there, and is not empty or no folder.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{target}: exists and is not empty. Choose another folder.")


@contextlib.contextmanager
def new_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder to write into, which becomes ``out`` at the end, whole, or vanishes on an error.

    Args:
        out: The folder to make: absent, or empty. ``~`` is the user's own folder.

    Yields:
        The temporary folder.

    Raises:
        ExportError: If ``out`` is not empty, or cannot be written.
    """
    target = user_path(out)
    refuse_occupied(target)
    with staged_folder(target) as stage, writing(target):
        yield stage
