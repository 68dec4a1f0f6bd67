"""The programs that a live page runs on: which npm packages they are, by digest, and how they are fetched and kept."""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from graphlens.errors import ExportError
from graphlens.file.copies import Announce
from graphlens.file.folder import cache_root, user_path, write_whole, writing
from graphlens.views.progress import note, spinner

_REGISTRY = "https://registry.npmjs.org"
_REGISTRY_NAMED = ("npm_config_registry", "NPM_CONFIG_REGISTRY")  # variables in which npm is told of another
_SECONDS = 60  # without a byte from the registry


@dataclass(frozen=True)
class Package:
    """An npm package of one version.

    Attributes:
        name: Its name on npm.
        version: Its version.
        integrity: The SHA-512 of its archive in base64, as npm's lock files have it.
        size: The bytes of its archive.
        files: The files that a page needs: path in the package -> SHA-256.
        licence: The path of its licence, "" where the package has no such file.
    """

    name: str
    version: str
    integrity: str
    size: int
    files: Mapping[str, str]
    licence: str = ""

    @property
    def spec(self) -> str:
        """As ``npm install`` takes it: "onnxruntime-web@1.30.0"."""
        return f"{self.name}@{self.version}"

    @property
    def url(self) -> str:
        """Where its archive lies, in the registry that npm's settings in the environment name or in npm's own."""
        registry = next((os.environ[name] for name in _REGISTRY_NAMED if os.environ.get(name)), _REGISTRY)
        return f"{registry.rstrip('/')}/{self.name}/-/{self.name.rpartition('/')[2]}-{self.version}.tgz"


RUNTIME = Package(
    "onnxruntime-web",
    "1.30.0",
    "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
    33_106_585,
    {
        "dist/ort.wasm.bundle.min.mjs": "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
        "dist/ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    },
)
TOKENIZERS = Package(
    "@huggingface/tokenizers",
    "0.2.0",
    "LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
    87_011,
    {
        "dist/tokenizers.min.mjs": "258e46332101335ce8d95aed7745b19ac3b46d37f3e159a89cf894c2ea9b1d3a",
        "LICENSE": "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
    },
    licence="LICENSE",
)
PACKAGES = (RUNTIME, TOKENIZERS)


def runtime_files(
    installed: str | os.PathLike[str] | None = None, announce: Announce = note, packages: tuple[Package, ...] = PACKAGES
) -> dict[tuple[str, str], bytes]:
    """The files of npm packages that a page needs, each with the digest that is written down here.

    Args:
        installed: The folder ``node_modules`` in which npm installed the packages. None takes them from graphlens's cache,
            and fetches what is missing there from npm's registry, once.
        announce: Called with a line of text for people before something is fetched.
        packages: The packages.

    Returns:
        (package name, path in the package) -> the file's content.

    Raises:
        ExportError: A package is missing and cannot be fetched, or what was found is another one.
    """
    found: dict[tuple[str, str], bytes] = {}
    for package in packages:
        contents = _kept(package) if installed is None else _installed(package, user_path(installed))
        if contents is None:
            contents = _fetched(package, announce)
            _keep(package, contents)
        found |= {(package.name, path): data for path, data in contents.items()}
    return found


def _folder(package: Package) -> Path:
    """The folder of a package in the cache."""
    return cache_root() / "npm" / f"{package.name.replace('/', '+')}-{package.version}"


def _kept(package: Package) -> dict[str, bytes] | None:
    """The files of a package from the cache; None unless all are there as they should be."""
    found = {}
    for path, digest in package.files.items():
        try:
            data = (_folder(package) / Path(path).name).read_bytes()
        except OSError:
            return None
        if hashlib.sha256(data).hexdigest() != digest:
            return None  # cut short, or changed: it is fetched again
        found[path] = data
    return found


def _keep(package: Package, contents: Mapping[str, bytes]) -> None:
    """Puts the files of a package into the cache."""
    folder = _folder(package)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path, data in contents.items():
            write_whole(folder / Path(path).name, data)


def _installed(package: Package, folder: Path) -> dict[str, bytes]:
    """The files of a package that npm installed."""
    found = {}
    for path, digest in package.files.items():
        file = folder / package.name / path
        try:
            data = file.read_bytes()
        except OSError as error:
            raise ExportError(
                f"{file}: cannot be read ({error.strerror}). --runtime takes the folder node_modules that "
                f"npm install {' '.join(each.spec for each in PACKAGES)} makes."
            ) from error
        _ensure(hashlib.sha256(data).hexdigest() == digest, file, package, "SHA-256")
        found[path] = data
    return found


def _fetched(package: Package, announce: Announce) -> dict[str, bytes]:
    """The files of a package from npm's registry."""
    announce(f"Fetching {package.spec} from npm ({package.size / 1e6:.1f} MB), once")
    with spinner(f"Fetching {package.spec}"):
        archive = _downloaded(package)
    digest = base64.b64encode(hashlib.sha512(archive).digest()).decode("ascii")
    _ensure(digest == package.integrity, package.url, package, "SHA-512")
    found = {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as packed:
        for path, known in package.files.items():
            member = packed.extractfile(f"package/{path}")
            data = b"" if member is None else member.read()
            _ensure(hashlib.sha256(data).hexdigest() == known, f"{package.url}, {path}", package, "SHA-256")
            found[path] = data
    return found


def _downloaded(package: Package) -> bytes:
    """The archive of a package."""
    import urllib.request  # slow to load, and rarely needed

    try:
        with urllib.request.urlopen(package.url, timeout=_SECONDS) as answer:
            data: bytes = answer.read(2 * package.size)
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a registry that is no URL
        raise ExportError(
            f"{package.spec} could not be fetched from {package.url} ({getattr(error, 'reason', None) or error}). Where npm "
            f"works, run npm install {' '.join(each.spec for each in PACKAGES)}, and name its folder node_modules with "
            "--runtime."
        ) from error
    return data


def _ensure(right: bool, where: Path | str, package: Package, kind: str) -> None:
    """Raises ExportError for a file that has another digest than the one written down here."""
    if not right:
        raise ExportError(
            f"{where}: this is not {package.spec} as graphlens knows it, since its {kind} is another. Nothing of it was used; "
            f"install {package.spec} again, or let graphlens fetch it (without --runtime)."
        )
