"""Model folders on disk: what lies in one, where the cache is, and how a file or a folder is put in place whole."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from graphlens.errors import ExportError, ModelFileError

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


def model_path(path: str | os.PathLike[str]) -> Path:
    """The graph file of a model.

    Args:
        path: A hooked folder, or the graph file itself.

    Returns:
        The graph file.

    Raises:
        ModelFileError: There is no such file.
    """
    found = Path(path)
    if found.is_dir():
        found = found / MODEL_FILE
    if not found.is_file():
        raise ModelFileError(f"{found}: no such file. A hooked folder holds {MODEL_FILE}; make one: graphlens export.")
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
    """
    import shutil  # slow to load, and not needed to open a model

    for file in SETTINGS:
        if (source / file).is_file() and source.resolve() != target.resolve():
            shutil.copyfile(source / file, target / file)


def cache_root() -> Path:
    """The cache folder: ``GRAPHLENS_CACHE``, else graphlens's folder in the user's cache directory."""
    chosen = os.environ.get("GRAPHLENS_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "graphlens"


def partial_of(target: Path) -> Path:
    """Where to write what becomes a file or folder at the end: a new name in the same folder.

    Args:
        target: The file or folder.

    Returns:
        ``.{target}.{machine}-{process}-{random}.partial``, by which ``remove_stale`` sees who writes it.
    """
    # Cut: the target's own name may be as long as a name can be.
    name = os.fsencode(target.name)[:160].decode(errors="ignore")
    return target.with_name(f".{name}.{_machine()}-{os.getpid()}-{os.urandom(8).hex()}.partial")


def remove_stale(folder: Path) -> None:
    """Removes the partial files in a folder that a killed process of this machine left there.

    Those of running processes stay, and so do those of other machines, of which nothing is known here. One that cannot
    be removed stays too.

    Args:
        folder: The folder.
    """
    for path in folder.glob(f".*.{_machine()}-*-*.partial"):
        process = path.name.rsplit(".", 2)[1].split("-")[1]
        if path.is_file() and process.isdecimal() and not _is_running(int(process)):
            with contextlib.suppress(OSError):
                path.unlink()


def _machine() -> str:
    """A mark of this machine, under whose name its processes have their ids. A container counts as a machine."""
    import hashlib  # both are slow to load, and not needed to open a model
    import platform

    try:
        processes = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        processes = 0
    return hashlib.sha256(f"{platform.node()} {processes}".encode()).hexdigest()[:8]


def _is_running(process: int) -> bool:
    """False if no process of this machine has that id."""
    if sys.platform == "win32":
        return True  # there, os.kill ends the process that it is asked about
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def link_or_copy(source: Path, target: Path) -> bool:
    """Gives a file another entry in a folder: a hardlink, or a copy where the file system has none.

    Never a symlink: ONNX Runtime refuses one that leaves the folder.

    Args:
        source: The file. Symlinks are followed.
        target: The new entry. One that is there already is replaced.

    Returns:
        True if it was copied.

    Raises:
        OSError: It cannot be written, or there is no such file.
    """
    import shutil  # slow to load, and not needed to open a model

    blob = source.resolve(strict=True)
    partial = partial_of(target)
    try:
        try:
            os.link(blob, partial)
            copied = False
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
                raise
            shutil.copyfile(blob, partial)
            copied = True
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return copied


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
    mode = place.stat().st_mode if place.exists() else None
    write_whole(place, data)
    if mode is not None:
        place.chmod(mode)


def write_whole(target: Path, data: bytes) -> None:
    """Writes a file so that it is there whole or not at all, also if the computer stops in between.

    Args:
        target: The file. One that is there already is replaced at the end.
        data: Its content. It is written to a temporary file in the same folder first, which is removed on an error.

    Raises:
        OSError: If it cannot be written.
    """
    partial = partial_of(target)
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
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
def staged_folder(target: Path, finished: str = MODEL_FILE) -> Iterator[Path]:
    """A temporary folder beside ``target`` that becomes ``target`` at the end, whole, or vanishes on an error.

    ``target`` must be absent or empty, unless another process put the same thing there meanwhile: then theirs stays.

    Args:
        target: The folder to make.
        finished: The file that tells another process's finished folder from any other folder.
    """
    import shutil  # slow to load, and not needed to open a model

    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = partial_of(target)
        stage.mkdir()
    try:
        yield stage
        with writing(target):
            try:
                os.replace(stage, target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not (target / finished).is_file():
                    raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)


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
    target = Path(out).expanduser()
    refuse_occupied(target)
    with staged_folder(target) as stage, writing(target):
        yield stage
