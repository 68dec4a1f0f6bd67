"""What lies behind a URL such as s3://bucket/name: which file system that is, how it fails, and files of it in the cache."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import sys
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from graphlens.errors import ExportError, InputError, ModelFileError, RuntimeUnavailable
from graphlens.file.folder import cache_root, make_folder, user_path
from graphlens.file.leftovers import partial_of, remove_stale

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_CUT_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")
_CHUNK = 1 << 22
_MARGIN = 64_000_000  # bytes that are left free on the cache's disk
# What the packages behind fsspec raise that is no OSError: (module, class), looked up in those that are loaded.
_RAISED = (
    *(("botocore.exceptions", "BotoCoreError"), ("botocore.exceptions", "ClientError")),
    *(("aiohttp", "ClientError"), ("gcsfs.retry", "HttpError"), ("google.auth.exceptions", "GoogleAuthError")),
    *(("azure.core.exceptions", "AzureError"), ("httpx", "HTTPError"), ("httpx2", "HTTPError")),
    *(("ftplib", "Error"), ("paramiko", "SSHException")),
)
_SAID = ("ETag", "Content-MD5", "Digest", "Last-Modified")  # what a web server may say of a file's content


class Url(os.PathLike[str]):
    """A URL as a path of a list of paths, since pathlib would take its second slash away.

    Args:
        text: The URL.
    """

    def __init__(self, text: str) -> None:
        self._text = text

    def __fspath__(self) -> str:
        return self._text


def url_of(path: str | os.PathLike[str]) -> str | None:
    """The URL that a path is; None for a path of this machine, and for what is no path.

    >>> url_of("s3://bucket/acts")
    's3://bucket/acts'
    >>> url_of("acts") is None
    True
    """
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
    return text if isinstance(text, str) and _URL.match(text) and not text.startswith("file://") else None


def local_path(path: str | os.PathLike[str]) -> Path:
    """A path of this machine as a user gave it, file:// URLs too.

    Args:
        path: The path.

    Raises:
        InputError: It is no path.
    """
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else path
    if isinstance(path, Path) and (found := _CUT_URL.match(str(text))):
        raise InputError(f"{text}: pathlib has taken a slash of {found[1]}:// away. Pass the URL as text.")
    return user_path(text.removeprefix("file://") if isinstance(text, str) else text)


def filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL, and the path in it.

    Args:
        url: The URL. Addresses, keys and the like come from the file system's own settings (environment variables).

    Raises:
        InputError: There is no such file system, or the URL names no place in it.
        RuntimeUnavailable: The package for it is not installed.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise RuntimeUnavailable(f"{url}: URLs need fsspec: pip install 'graphlens-onnx[remote]'.") from error
    try:
        with failing(url):
            # Others write there too, so that no listing is remembered.
            system, path = url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise RuntimeUnavailable(f"{url}: {error}. For s3:// that is pip install 'graphlens-onnx[remote]'.") from error
    except ValueError as error:
        raise InputError(f"{url}: there is no such kind of URL ({error}).") from error
    except (TypeError, AttributeError) as error:  # a kind that is more than a URL: zip://, github://
        raise InputError(f"{url}: fsspec cannot open this by its URL alone ({error}).") from error
    except OSError as error:
        raise InputError(f"{url}: cannot be reached ({error.strerror or error}).") from error
    if not str(path).strip("/"):
        raise InputError(f"{url}: this names no place: a URL is like s3://bucket/name.")
    return system, str(path).rstrip("/")


class failing:  # noqa: N801  # used like a function
    """Has what a file system's package raises in the ``with`` block raised as an OSError.

    Args:
        url: What is read or written, for the message.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, NotImplementedError):
            raise OSError(errno.EOPNOTSUPP, "fsspec cannot do that with this kind of URL", self._url) from error
        # Looked up now: some packages are loaded by the call that fails.
        if isinstance(error, tuple(getattr(sys.modules[at], name) for at, name in _RAISED if at in sys.modules)):
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise OSError(errno.EIO, f"{said:.200}", self._url) from error


def fetched(url: str) -> Path:
    """A file behind a URL, in the cache folder. It is fetched again where it is another one by then, or its server cannot tell.

    Args:
        url: The URL of a file.

    Raises:
        InputError: There is no such file, or it cannot be read.
        ExportError: The cache's disk has no room for it.
        RuntimeUnavailable: See ``filesystem``.
    """
    system, path = filesystem(url)
    try:
        with failing(url):
            version = _version_of(system, path)
            mark = hashlib.sha256(f"{url} {version}".encode()).hexdigest()
            place = _cached(f"{mark}{PurePosixPath(path).suffix}")
            if version is None or not place.is_file():
                fetch(system, path, place)
    except OSError as error:
        raise InputError(f"{url}: cannot be read ({error.strerror or error}).") from error
    return place


def _version_of(system: AbstractFileSystem, path: str) -> str | None:
    """What changes with a file's content; None where its server says nothing of the kind."""
    if "http" not in system.protocol:
        return str(system.ukey(path))
    info = system.info(path)  # fsspec's own key takes what lies on the web for unchanging
    said = [f"{name} {info[name]}" for name in _SAID if info.get(name)]
    return " ".join([*said, str(info.get("size"))]) if said else None


def fetched_content(url: str, digest: str) -> Path:
    """A file behind a URL whose content is known, in the cache folder, checked when it is fetched.

    Args:
        url: The URL of a file.
        digest: The SHA-256 of its content, under which the cache keeps it.

    Raises:
        ModelFileError: It is missing, cannot be read, or holds other bytes.
        ExportError: The cache's disk has no room for it.
        RuntimeUnavailable: See ``filesystem``.
    """
    place = _cached(f"{digest}{PurePosixPath(url).suffix}")
    if place.is_file():
        with contextlib.suppress(OSError):
            os.utime(place)  # used now: others go first
        return place
    system, path = filesystem(url)
    try:
        with failing(url):
            found = fetch(system, path, place, digest)
    except OSError as error:
        raise ModelFileError(f"{url}: cannot be read ({error.strerror or error}).") from error
    if found != digest:
        raise ModelFileError(f"{url}: other bytes than were written. Resume the harvest: it is made again.")
    return place


def fetch(system: AbstractFileSystem, path: str, place: Path, wanted: str = "") -> str:
    """Reads a file of a file system into a file here, which is there whole or not at all.

    Args:
        system: The file system.
        path: The file in it.
        place: Where it is to lie.
        wanted: The SHA-256 that its content must have to take its place; "" for any.

    Returns:
        The SHA-256 that it has.

    Raises:
        OSError: It cannot be read, or not be written here.
        ExportError: The disk has no room for it.
    """
    size = int(system.info(path)["size"] or 0)
    if make_room(place.parent, size) < size + _MARGIN:
        raise ExportError(
            f"{place.parent}: {size / 1e9:,.2f} GB are to be fetched, and the disk of the cache has no room for them. Free some, "
            "or set GRAPHLENS_CACHE to another disk."
        )
    partial, digest = partial_of(place), hashlib.sha256()
    try:
        with system.open(path, "rb") as source, partial.open("xb") as target:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                target.write(chunk)
        if wanted in ("", digest.hexdigest()):
            os.replace(partial, place)
    finally:
        partial.unlink(missing_ok=True)
    return digest.hexdigest()


def scratch() -> Path:
    """The folder of the cache in which files of URLs lie, and those that are to become some are written."""
    folder = cache_root() / "remote"
    make_folder(folder)
    remove_stale(folder)
    return folder


def _cached(name: str) -> Path:
    """Where a fetched file lies."""
    return scratch() / name


def make_room(folder: Path, size: int) -> int:
    """Removes fetched files, those first that were not used for longest, until the disk has room for others.

    Args:
        folder: The folder that they lie in.
        size: Bytes that are wanted.

    Returns:
        The bytes that are free then: fewer than wanted, and some to spare, where there is nothing more to remove.
    """
    files = sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=_used)
    while (free := shutil.disk_usage(folder).free) < size + _MARGIN and files:
        with contextlib.suppress(OSError):  # where a file that is mapped cannot be removed
            files.pop(0).unlink()
    return free


def _used(path: Path) -> float:
    """When a file was fetched or last used."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
