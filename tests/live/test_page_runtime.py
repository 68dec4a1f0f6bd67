"""The npm packages of a live page: fetched once, kept, and nothing with another digest is used."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from graphlens.errors import ExportError
from graphlens.pipelines.page_runtime import PACKAGES, Package, runtime_files

FILES = {"dist/it.mjs": b"export const it = 1;\n", "LICENSE": b"Do what you like.\n"}


def archive(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, data in {**files, "other.js": b"not asked for"}.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return packed.getvalue()


def package(data: bytes, files: dict[str, bytes] = FILES) -> Package:
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    integrity = base64.b64encode(hashlib.sha512(data).digest()).decode()
    return Package("@some/thing", "1.2.3", integrity, len(data), digests, "LICENSE")


class Registry:
    """What stands in for npm's registry, on this machine."""

    def __init__(self, answer: bytes, status: int = 200) -> None:
        self.asked: list[str] = []
        registry = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                registry.asked.append(self.path)
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: object) -> None:
                """Says nothing."""

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def registry(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    answer, status = getattr(request, "param", (archive(FILES), 200))
    found = Registry(answer, status)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "npm_config_registry"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", f"{found.url}/")
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path / "cache"))
    yield found
    found.close()


def test_a_package_is_fetched_once_and_kept(registry: Registry) -> None:
    wanted, said = package(archive(FILES)), list[str]()
    expected = {("@some/thing", name): data for name, data in FILES.items()}
    assert runtime_files(announce=said.append, packages=(wanted,)) == expected
    assert runtime_files(announce=said.append, packages=(wanted,)) == expected
    assert registry.asked == ["/@some/thing/-/thing-1.2.3.tgz"]
    assert len(said) == 1
    assert "@some/thing@1.2.3" in said[0]


def test_a_damaged_file_in_the_cache_is_fetched_again(registry: Registry, tmp_path: Path) -> None:
    wanted = package(archive(FILES))
    runtime_files(announce=lambda _: None, packages=(wanted,))
    (kept,) = (tmp_path / "cache").rglob("it.mjs")
    kept.write_bytes(b"alert(1)")
    found = runtime_files(announce=lambda _: None, packages=(wanted,))
    assert found["@some/thing", "dist/it.mjs"] == FILES["dist/it.mjs"] == kept.read_bytes()
    assert len(registry.asked) == 2


def test_an_archive_with_another_digest_is_refused(registry: Registry, tmp_path: Path) -> None:
    other = package(archive({**FILES, "dist/it.mjs": b"alert(1)"}))
    with pytest.raises(
        ExportError, match=r"not @some/thing@1\.2\.3 as graphlens knows it, since its SHA-512 is another"
    ):
        runtime_files(announce=lambda _: None, packages=(other,))
    assert not list((tmp_path / "cache").rglob("*.mjs"))


@pytest.mark.parametrize("registry", [(b"not here", 404)], indirect=True)
def test_a_registry_without_it_says_what_to_do(registry: Registry) -> None:
    with pytest.raises(ExportError, match=r"could not be fetched from http://127.*Not Found.*npm install .*--runtime"):
        runtime_files(announce=lambda _: None, packages=(package(b""),))


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/", "no address", "ftp://127.0.0.1:9/"])
def test_without_a_network_it_says_what_to_do(url: str, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", url)
    with pytest.raises(ExportError, match=r"^@some/thing@1\.2\.3 could not be fetched.*npm install .*--runtime"):
        runtime_files(announce=lambda _: None, packages=(package(b""),))


def test_packages_that_npm_installed_are_taken_if_they_are_the_right_ones(tmp_path: Path) -> None:
    wanted = package(archive(FILES))
    for name, data in FILES.items():
        file = tmp_path / "@some/thing" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    assert runtime_files(tmp_path, packages=(wanted,))["@some/thing", "LICENSE"] == FILES["LICENSE"]
    (tmp_path / "@some/thing/LICENSE").write_bytes(b"")
    with pytest.raises(ExportError, match=r"LICENSE: this is not @some/thing@1\.2\.3.*SHA-256"):
        runtime_files(tmp_path, packages=(wanted,))
    with pytest.raises(ExportError, match=r"cannot be read.*--runtime takes the folder node_modules.*onnxruntime-web@"):
        runtime_files(tmp_path / "nowhere", packages=(wanted,))


def test_the_pinned_versions_are_those_that_the_javascript_tests_install() -> None:
    lock = json.loads((Path(__file__).parents[1] / "js" / "package-lock.json").read_text())["packages"]
    for wanted in PACKAGES:
        locked = lock[f"node_modules/{wanted.name}"]
        assert (locked["version"], locked["integrity"]) == (wanted.version, f"sha512-{wanted.integrity}")
