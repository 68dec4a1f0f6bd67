"""Harvests and corpora behind URLs: the bytes of a local folder, whole or not at all, in S3 (moto's server) and in memory."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import graphlens
from graphlens import Harvest, HookedTransformer, harvest
from graphlens.file import harvest_files, remote
from graphlens.file.corpora import documents
from tests.scale import s3
from tests.scale.harvests import KILLED, NAMES, harvested, rows
from tests.scale.harvests import content as files_of

pytest.importorskip("fsspec", reason="the extra remote is not installed")
Z = "blocks.1.attn.hook_z"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The harvest in a folder of this machine."""
    out = tmp_path_factory.mktemp("whole") / "h"
    harvested(out)
    return out


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    if s3.missing():
        pytest.skip(f"S3 is not tested: the package {s3.missing()} is missing")
    with s3.server() as url:
        yield url


@pytest.fixture(params=["s3", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A URL below which there is nothing, and a cache of its own."""
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path / "cache"))
    root = request.getfixturevalue("bucket") if request.param == "s3" else "memory://harvests"
    return f"{root}/{tmp_path.name}"


@pytest.fixture
def model() -> HookedTransformer:
    return HookedTransformer.from_pretrained_no_processing("tiny-gpt2")


def made(out: str, **options: Any) -> Harvest:
    """The harvest that tests kill, behind a URL."""
    model = HookedTransformer.from_pretrained_no_processing("tiny-gpt2")
    return harvest(model, rows(), NAMES, out, **{**KILLED, **options})


def test_it_has_the_bytes_of_a_local_one_and_reads_as_it(place: str, whole: Path, tmp_path: Path) -> None:
    found, local = made(f"{place}/h"), Harvest(whole)
    assert s3.content(f"{place}/h") == files_of(whole)
    assert found.path == f"{place}/h"
    assert found.verify() == []
    assert found.nbytes == local.nbytes
    assert np.array_equal(found[Z][:], local[Z][:])
    assert np.array_equal(found.tokens[[5, 90, 2]], local.tokens[[5, 90, 2]])
    assert all(np.array_equal(value, local.reduced[Z][name]) for name, value in found.reduced[Z].items())
    for one, two in zip(found.batches(64, Z, seed=3), local.batches(64, Z, seed=3), strict=True):
        assert np.array_equal(one[Z], two[Z])
    again = pickle.loads(pickle.dumps(found))
    assert np.array_equal(again[Z][10:40], local[Z][10:40])
    left = [path.name for path in (tmp_path / "cache" / "remote").iterdir() if path.name.startswith(".")]
    assert left == []  # nothing half-written in the cache


def test_what_is_there_is_not_written_over(place: str, model: HookedTransformer) -> None:
    made(f"{place}/h")
    with pytest.raises(graphlens.ExportError, match="resume=True"):
        made(f"{place}/h")
    s3.system_of(place)[0].pipe_file(f"{place}/other/mine.txt", b"mine")
    with pytest.raises(graphlens.ExportError, match="there are objects already"):
        made(f"{place}/other")
    assert s3.content(f"{place}/other").keys() == {"mine.txt"}
    with pytest.raises(graphlens.InputError, match="this harvest was begun otherwise"):
        made(f"{place}/h", resume=True, dtype="float32")


def test_stopped_and_resumed_it_has_the_same_bytes(
    place: str, whole: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, calls = harvest_files.ShardWriter.put, []

    def stopping(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 60:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(harvest_files.ShardWriter, "put", stopping)
    with pytest.raises(KeyboardInterrupt):
        made(f"{place}/h")
    monkeypatch.setattr(harvest_files.ShardWriter, "put", real)
    begun = s3.content(f"{place}/h")
    shards = [name for name in begun if name.endswith(".safetensors") and name.startswith("shard-")]
    assert 0 < len(shards) < len(Harvest(whole).plan.shards)
    with pytest.raises(graphlens.ModelFileError, match="not finished"):
        Harvest(f"{place}/h")
    shutil.rmtree(tmp_path / "cache")  # another machine goes on
    made(f"{place}/h", resume=True)
    assert s3.content(f"{place}/h") == files_of(whole)


def test_a_damaged_object_is_named_and_made_again(place: str, whole: Path) -> None:
    out = f"{place}/h"
    made(out)
    system, root = s3.system_of(out)
    name = harvest_files.shard_file(1)
    data = bytearray(system.cat_file(f"{root}/{name}"))
    data[-5] ^= 4
    system.pipe_file(f"{root}/{name}", bytes(data))
    found = Harvest(out)
    (said,) = found.verify()
    assert said == f"{name}: other bytes than were written"
    with pytest.raises(graphlens.ModelFileError, match=f"{name}: other bytes than were written"):
        found[Z][:]
    system.rm_file(f"{root}/{harvest_files.shard_file(2)}")
    assert len(found.verify()) == 2
    made(out, resume=True)
    assert s3.content(out) == files_of(whole)


def test_killed_in_s3_it_leaves_whole_objects(bucket: str, whole: Path, tmp_path: Path) -> None:
    root = f"{bucket}/{tmp_path.name}"
    count = s3.killed_at(-1, f"{root}/counted", tmp_path / "cache")
    assert s3.content(f"{root}/counted") == files_of(whole)
    system, _ = s3.system_of(root)
    for request in (count // 3, count - 2):
        out = f"{root}/at{request}"
        s3.killed_at(request, out, tmp_path / "cache")
        there = s3.content(out)
        assert there != files_of(whole)
        for name in there:
            if name.startswith("shard-") and name.endswith(".json"):
                said = json.loads(system.cat_file(f"{out}/{name}"))["sha256"]
                assert there[name.replace(".json", ".safetensors")] == said
        made(out, resume=True)
        assert s3.content(out) == files_of(whole)


# Corpora


def test_a_corpus_is_read_from_a_url(place: str, tmp_path: Path, model: HookedTransformer) -> None:
    texts = ["When John and Mary", "", "went to the store"]
    system, root = s3.system_of(place)
    system.pipe_file(f"{root}/corpus.txt", "\n".join(texts).encode())
    system.pipe_file(f"{root}/corpus.jsonl", "\n".join(json.dumps({"text": text}) for text in texts).encode())
    for name in ("corpus.txt", "corpus.jsonl"):
        assert list(documents(f"{place}/{name}")) == texts
    both = [remote.Url(f"{place}/corpus.txt"), remote.Url(f"{place}/corpus.jsonl")]
    assert list(documents(both)) == texts * 2
    found = harvest(model, f"{place}/corpus.txt", Z, tmp_path / "h", verbose=False)
    assert np.array_equal(found[Z][:], harvest(model, texts, Z, tmp_path / "i", verbose=False)[Z][:])
    system.pipe_file(f"{root}/corpus.txt", b"another one")
    assert list(documents(f"{place}/corpus.txt")) == ["another one"]  # not what the cache had


@pytest.mark.parametrize(("name", "said"), [("none.txt", "cannot be read"), ("folder", "end in .txt")])
def test_a_corpus_that_is_not_there(place: str, name: str, said: str) -> None:
    with pytest.raises(graphlens.InputError, match=said):
        list(documents(f"{place}/{name}"))


# Refused, and the cache


def test_a_bucket_that_is_not_there_is_an_error(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(graphlens.ExportError, match=r"s3://no-such-bucket/h/.*could not be written"):
        made("s3://no-such-bucket/h")
    with pytest.raises(graphlens.ModelFileError, match="is no harvest"):
        Harvest("s3://no-such-bucket/h")


def test_other_urls_and_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(graphlens.InputError, match="there is no such kind of URL"):
        Harvest("gopher-like://there/acts")
    with pytest.raises(graphlens.InputError, match="names no place"):
        Harvest("memory://")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(graphlens.RuntimeUnavailable, match=r"graphlens-onnx\[remote\]"):
        Harvest("s3://bucket/acts")


def test_what_a_package_raises_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoCredentials(Exception):
        pass

    named = dict.fromkeys(("BotoCoreError", "ClientError"), NoCredentials)
    monkeypatch.setitem(sys.modules, "botocore.exceptions", SimpleNamespace(**named))
    with pytest.raises(OSError, match="no credentials") as caught, remote.failing("s3://bucket/acts"):
        raise NoCredentials("no credentials\nand more")
    assert "and more" not in str(caught.value)


def test_the_cache_lets_go_of_what_was_not_used_for_longest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path / "cache"))
    found = made("memory://harvests/evicted")
    local, cache = Harvest(whole), tmp_path / "cache" / "remote"
    shards = [file.stat().st_size for file in whole.glob("shard-*")]
    most = 2 * max(shards) + 1000
    assert sum(shards) > most

    def usage(path: Path) -> SimpleNamespace:
        used = sum(file.stat().st_size for file in cache.iterdir())
        return SimpleNamespace(free=64_000_000 + most - used)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert np.array_equal(found[Z][:], local[Z][:])
    assert sum(file.stat().st_size for file in cache.iterdir()) <= most
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(graphlens.ExportError, match="the disk of the cache has no room"):
        Harvest("memory://harvests/evicted")[Z][:]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64_000_000 + min(shards) // 2))
    with pytest.raises(graphlens.ExportError, match="is written to the cache's disk before"):
        made("memory://harvests/no-room")


def test_a_file_url_is_a_path(tmp_path: Path, whole: Path) -> None:
    made(f"file://{tmp_path}/h")
    assert files_of(tmp_path / "h") == files_of(whole)
    assert Harvest(f"file://{tmp_path}/h").path == tmp_path / "h"
    with pytest.raises(graphlens.InputError, match="pathlib has taken a slash of s3:// away"):
        Harvest(Path("s3://bucket/acts"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_it_is_read_after_a_fork(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path / "cache"))
    found = made(f"{bucket}/{tmp_path.name}")
    child = os.fork()
    if not child:
        code = 1
        with contextlib.suppress(BaseException):  # nothing of pytest's may go on in the child
            code = 0 if found.verify() == [] and len(found.reduced) == 3 and len(found.tokens[:]) else 2
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
