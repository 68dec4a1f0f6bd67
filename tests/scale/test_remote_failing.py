"""URLs that fail: what could not be asked for is not taken for missing, what lies on the web may change, errors are ours."""

from __future__ import annotations

import functools
import os
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import graphlens
from graphlens import Harvest
from graphlens.file import harvest_files
from graphlens.file.corpora import documents
from graphlens.file.harvest_folder import HarvestFolder, RemoteFolder, folder_of
from tests.scale import s3
from tests.scale.harvests import harvested

pytest.importorskip("fsspec", reason="the extra remote is not installed")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=["folder", "memory"])
def finished(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A finished harvest."""
    out = str(tmp_path / "h") if request.param == "folder" else f"memory://failing/{tmp_path.name}"
    harvested(out)
    return out


def _refusing(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    """Has reading one file of a harvest fail, as where a server or a disk does not answer."""
    for kind in (HarvestFolder, RemoteFolder):
        real = kind.read

        def read(self: Any, name: str, real: Any = real) -> bytes:
            if name == wanted:
                raise PermissionError(13, "not now")
            return bytes(real(self, name))

        monkeypatch.setattr(kind, "read", read)


@pytest.mark.parametrize("name", [harvest_files.FINISHED, harvest_files.REDUCED])
def test_what_cannot_be_read_now_is_not_made_again(finished: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _refusing(monkeypatch, name)
    with pytest.raises(graphlens.ModelFileError, match=f"{name}: cannot be read \\(not now\\)"):
        harvested(finished, resume=True)
    with pytest.raises(graphlens.ModelFileError, match=f"{name}: cannot be read \\(not now\\)"):
        Harvest(finished).reduced  # noqa: B018


def test_a_server_that_does_not_answer_is_not_an_object_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"memory://failing/{tmp_path.name}"
    found = harvested(out)
    system, _ = s3.system_of(out)

    def fails(self: object, path: str, **options: Any) -> dict[str, Any]:
        raise PermissionError(13, "not now", path)

    monkeypatch.setattr(type(system), "info", fails)
    for work in (found.verify, lambda: harvested(out, resume=True)):
        with pytest.raises(graphlens.InputError, match="cannot be looked for"):
            work()


def test_a_shard_on_a_bad_place_of_the_disk_is_named_and_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = harvested(tmp_path / "h")
    real, bad = HarvestFolder.digest, harvest_files.shard_file(1)

    def digest(self: HarvestFolder, name: str) -> str:
        if name == bad:
            raise OSError(5, "Input/output error")
        return real(self, name)

    monkeypatch.setattr(HarvestFolder, "digest", digest)
    assert found.verify() == [f"{bad}: cannot be read (Input/output error)"]
    before = (tmp_path / "h" / bad).stat().st_ino
    harvested(tmp_path / "h", resume=True)
    assert (tmp_path / "h" / bad).stat().st_ino != before


# The web


class _Web(SimpleHTTPRequestHandler):
    """Files of a folder; without the head that says when one was changed where ``said`` is False."""

    said = True

    def send_header(self, keyword: str, value: str) -> None:
        if self.said or keyword != "Last-Modified":
            super().send_header(keyword, value)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture(params=[True, False], ids=["with a date", "without"])
def web(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """(the URL of a server, the folder that it serves)."""
    pytest.importorskip("aiohttp")
    (tmp_path / "web").mkdir()
    kind = type("Web", (_Web,), {"said": request.param})
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(kind, directory=str(tmp_path / "web")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", tmp_path / "web"
    server.shutdown()
    server.server_close()


def test_a_corpus_on_the_web_that_has_changed_is_fetched_again(web: tuple[str, Path]) -> None:
    url, folder = web
    for time, text in enumerate(("the first", "another")):
        (folder / "corpus.txt").write_text(text)
        os.utime(folder / "corpus.txt", (time * 100 + 10**9,) * 2)
        assert list(documents(f"{url}/corpus.txt")) == [text]
        assert list(documents(f"{url}/corpus.txt")) == [text]


def test_a_harvest_on_the_web_is_read_and_not_written(web: tuple[str, Path]) -> None:
    url, folder = web
    local = harvested(folder / "h")
    found = Harvest(f"{url}/h")
    assert (found.tokens[:] == local.tokens[:]).all()
    with pytest.raises(graphlens.ExportError, match="could not be written"):
        harvested(f"{url}/other")


@pytest.mark.parametrize(
    "url", ["ftp://127.0.0.1:1/c.txt", "github://a/c.txt", "zip://c.txt", "dir://x/c.txt", "http://127.0.0.1:1/c.txt"]
)
def test_a_url_that_leads_nowhere_is_an_error_of_ours(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for work in (lambda: list(documents(url)), lambda: folder_of(url).names()):
        with pytest.raises((graphlens.InputError, graphlens.RuntimeUnavailable)):
            work()


# The cache


def test_fetched_files_make_room_for_a_shard_that_is_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, cache = f"memory://failing/{tmp_path.name}", tmp_path / "cache" / "remote"
    harvested(out).tokens[:]
    fetched = sum(file.stat().st_size for file in cache.iterdir())
    most = 64_000_000 + fetched  # the disk has room for nothing more

    def usage(path: Path) -> SimpleNamespace:
        return SimpleNamespace(free=most - sum(file.stat().st_size for file in cache.iterdir()))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    harvested(f"{out}-2")
    assert s3.content(f"{out}-2") == s3.content(out)
