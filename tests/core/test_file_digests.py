"""What a file is known by: every byte of it counts, and what is remembered of it is never that of another content."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from graphlens import Ablate, HookedTransformer, surgery
from graphlens.engine import opened_files
from graphlens.errors import ModelFileError
from graphlens.file import digests
from graphlens.file.digests import Mark, digest_of, fresh_digest
from graphlens.surgery.seal import KEY, is_sealed, sealed_bytes
from tests.damage import MODEL, WEIGHTS, refused, rewrite

RNG = np.random.default_rng(0)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is large enough to be remembered, untouched for so long that it is, and a cache of its own."""
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "settled", lambda mark: True)
    path = tmp_path / "large"
    path.write_bytes(RNG.bytes(300_001))
    return path


def reads_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often asking for a digest, which must be right, reads the file."""
    reads = list[Path]()
    with monkeypatch.context() as context:
        context.setattr(digests, "open_regular", lambda path: (reads.append(path), path.open("rb"))[1])
        assert digest_of(path) == sha256(path)
    return len(reads)


def test_a_digest_is_taken_once_and_again_only_when_the_file_was_touched(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [reads_of(large, monkeypatch) for _ in range(3)] == [1, 0, 0]
    digests.TAKEN.clear()  # as in another process
    assert reads_of(large, monkeypatch) == 0
    os.link(large, large.with_name("link"))  # which moves its ctime alone
    assert [reads_of(large, monkeypatch) for _ in range(2)] == [1, 0]
    shutil.rmtree(large.with_name("cache"))
    digests.TAKEN.clear()
    assert reads_of(large, monkeypatch) == 1


def test_a_record_is_the_files_under_any_name_and_old_ones_go(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reads_of(large, monkeypatch) == 1
    folder = large.with_name("moved")
    folder.mkdir()
    before = digests.Mark.of(large)
    os.rename(large, folder / "renamed")
    if digests.Mark.of(folder / "renamed") == before:  # some file systems touch what is renamed
        assert reads_of(folder / "renamed", monkeypatch) == 0
    monkeypatch.setattr(digests, "MOST", 6)
    for number in range(20):
        path = folder / str(number)
        path.write_bytes(RNG.bytes(300_001))
        digest_of(path)
        assert len(list((large.with_name("cache") / "digests").iterdir())) <= 6


@pytest.mark.parametrize("spoilt", [b"", b"{", b"[]", b'{"mark": {}, "sha256": "0"}', b"\xff"])
def test_a_spoilt_record_is_no_record(spoilt: bytes, large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest_of(large)
    (record,) = (large.with_name("cache") / "digests").iterdir()
    assert json.loads(record.read_bytes())["sha256"] == sha256(large)
    record.write_bytes(spoilt)
    digests.TAKEN.clear()
    assert reads_of(large, monkeypatch) == 1


def test_a_byte_changed_behind_the_same_times_is_seen(large: Path) -> None:
    digest_of(large)
    before = large.stat()
    with large.open("r+b") as file:
        file.seek(150_000)
        file.write(b"\0" if file.read(1) != b"\0" else b"\1")
        file.flush()
    os.utime(large, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digest_of(large) == sha256(large)


def test_two_contents_in_one_instant_are_two(tmp_path: Path) -> None:
    """A file system's clock ticks: what was written within a tick of the digest is not remembered."""
    path = tmp_path / "file"
    for byte in range(40):
        path.write_bytes(bytes([byte]) * 300_001)
        assert digest_of(path) == sha256(path)


@pytest.mark.parametrize(
    ("age", "settled"),
    [
        (0, False),
        (10_000_001, False),
        (70_000_001, True),  # no clock of a file system that counts fractions of a second ticks so slowly
        (10**9, None),
    ],
)
def test_a_file_is_settled_once_its_clock_must_have_ticked(
    age: int, settled: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = 1_000_000_000 * 10**9 + (0 if settled is None else 1)  # whole seconds: perhaps it counts nothing else
    monkeypatch.setattr(time, "time_ns", lambda: changed + age)
    mark = Mark(size=1, mtime_ns=changed, ctime_ns=changed, inode=1, device=1)
    assert digests.settled(mark) is bool(settled)
    monkeypatch.setattr(time, "time_ns", lambda: changed + age + 2 * 10**9)
    assert digests.settled(mark)


def test_a_cache_that_cannot_be_written_is_done_without(large: Path) -> None:
    large.with_name("cache").write_text("not a folder")
    for _ in range(2):
        digests.TAKEN.clear()
        assert digest_of(large) == sha256(large)


def test_what_is_no_file_keeps_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        for digest in (digest_of, fresh_digest):
            with pytest.raises(ModelFileError, match="not a regular file"):
                digest(path)


# The seal


def test_every_flipped_bit_of_a_graph_file_is_refused(tiny_copy: Path) -> None:
    path = tiny_copy / MODEL
    data = np.frombuffer(path.read_bytes(), np.uint8)
    seal = path.read_bytes().index(KEY.encode())
    places = [*RNG.integers(0, len(data), 400), *range(seal - 2, seal + len(KEY) + 2 + 71)]
    for place in places:
        damaged = data.copy()
        damaged[place] ^= np.uint8(1 << RNG.integers(8))
        path.write_bytes(damaged.tobytes())
        with pytest.raises(ModelFileError):
            surgery.load(path)
    path.write_bytes(data.tobytes())
    surgery.load(path)


def test_what_another_program_wrote_is_refused_until_it_is_sealed(tiny_copy: Path, tokens: np.ndarray) -> None:
    expected = HookedTransformer.from_onnx(tiny_copy, "cpu")(tokens)
    proto = onnx.load(tiny_copy / MODEL, load_external_data=False)
    proto.doc_string = "edited"
    stale = proto.SerializeToString()
    (tiny_copy / MODEL).write_bytes(stale)
    refused(tiny_copy, "differs from its seal", "graphlens seal", of=MODEL)
    for index, entry in enumerate(proto.metadata_props):
        if entry.key == KEY:
            del proto.metadata_props[index]
    (tiny_copy / MODEL).write_bytes(proto.SerializeToString())
    refused(tiny_copy, "has no seal", "graphlens seal", of=MODEL)
    for unsealed in (proto.SerializeToString(), stale):
        (tiny_copy / MODEL).write_bytes(unsealed)
        surgery.seal(tiny_copy)
        np.testing.assert_array_equal(HookedTransformer.from_onnx(tiny_copy, "cpu")(tokens), expected)
        assert onnx.load(tiny_copy / MODEL, load_external_data=False).doc_string == "edited"


def test_what_looks_like_a_seal_in_the_weights_stays_as_it_is() -> None:
    """Other bytes of the file are the graph's own: a seal written over them would change it."""
    digits = b"0" * 64
    fake = KEY.encode() + b"\x12\x47sha256:" + digits  # as protobuf stores an entry of the metadata
    graph = onnx.helper.make_graph([], "g", [], [])
    graph.initializer.append(
        onnx.TensorProto(name="w", dims=[len(fake)], data_type=onnx.TensorProto.UINT8, raw_data=fake)
    )
    data = sealed_bytes(onnx.helper.make_model(graph))
    assert data.count(fake) == 1
    assert is_sealed(data, "x")
    read = onnx.load_from_string(data)
    assert read.graph.initializer[0].raw_data == fake
    assert sealed_bytes(read) == data
    with pytest.raises(ModelFileError, match="differs from its seal"):
        is_sealed(data.replace(fake, fake[:-1] + b"1"), "x")


def test_nothing_that_fails_a_check_is_sealed(tiny_copy: Path) -> None:
    data = bytearray((tiny_copy / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (tiny_copy / WEIGHTS).write_bytes(data)
    before = (tiny_copy / MODEL).read_bytes()
    with pytest.raises(ModelFileError, match="SHA-256"):
        surgery.seal(tiny_copy)
    assert (tiny_copy / MODEL).read_bytes() == before


def test_sealing_changes_nothing_that_is_sealed(tiny_copy: Path) -> None:
    before = (tiny_copy / MODEL).read_bytes()
    surgery.seal(tiny_copy)
    assert (tiny_copy / MODEL).read_bytes() == before


# Where weights lie


def external(proto: onnx.ModelProto, name: str) -> dict[str, onnx.StringStringEntryProto]:
    (found,) = (item for item in proto.graph.initializer if item.name == name)
    return {entry.key: entry for entry in found.external_data}


@pytest.mark.parametrize("shift", [64, -64, 4, 1])
def test_a_shifted_weight_is_refused(shift: int, tiny_copy: Path) -> None:
    def apply(proto: onnx.ModelProto) -> None:
        offset = external(proto, "transformer.h.1.mlp.c_fc.weight")["offset"]
        offset.value = str(int(offset.value) + shift)

    refused(rewrite(tiny_copy, apply), "'transformer.h.1.mlp.c_fc.weight'", "no tensor", of=WEIGHTS)


def test_exchanged_sizes_and_dtypes_are_refused(tiny_copy: Path) -> None:
    def transposed(proto: onnx.ModelProto) -> None:
        (found,) = (item for item in proto.graph.initializer if item.name == "transformer.h.1.mlp.c_fc.weight")
        found.dims[:] = list(reversed(found.dims))

    def integers(proto: onnx.ModelProto) -> None:
        (found,) = (item for item in proto.graph.initializer if item.name == "transformer.h.1.ln_1.weight")
        found.data_type = onnx.TensorProto.INT32

    good = (tiny_copy / MODEL).read_bytes()
    for change in (transposed, integers):
        (tiny_copy / MODEL).write_bytes(good)
        refused(rewrite(tiny_copy, change), "the file's own table says", of=WEIGHTS)


# What is said, and what is read later


def test_a_model_says_what_was_checked(tiny_copy: Path) -> None:
    graph, weights = HookedTransformer.from_onnx(tiny_copy, "cpu").checked.splitlines()
    assert graph.startswith("model.onnx: as it was written")
    assert weights.startswith(f"model.safetensors: all {(tiny_copy / WEIGHTS).stat().st_size:,} bytes as recorded")


def test_a_weight_is_not_read_from_a_file_that_was_written_over(tiny_copy: Path) -> None:
    model = HookedTransformer.from_onnx(tiny_copy, "cpu")
    _ = model.W_E
    data = bytearray((tiny_copy / WEIGHTS).read_bytes())
    data[-4:] = b"\0\0\0\0"
    time.sleep(0.02)  # longer than the file system's clock ticks
    with (tiny_copy / WEIGHTS).open("r+b") as file:
        file.write(data)
    for read in (
        lambda: model.W_E,
        lambda: model.b_O,
        lambda: model.run_with_interventions([[1, 2]], Ablate("hook_embed")),
    ):
        with pytest.raises(ModelFileError, match=r"since the model was opened"):
            read()


def test_an_open_session_does_not_compute_with_a_file_that_was_written_over(
    tiny_copy: Path, tokens: np.ndarray
) -> None:
    model = HookedTransformer.from_onnx(tiny_copy, "cpu")
    expected = model(tokens)
    good = (tiny_copy / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    doubled = good[:start] + (np.frombuffer(good[start:], np.float32) * 2).tobytes()
    time.sleep(0.02)  # longer than the file system's clock ticks
    with (tiny_copy / WEIGHTS).open("r+b") as file:
        file.write(doubled)
    with pytest.raises(ModelFileError, match=r"since the model was opened"):
        model(tokens)
    with (tiny_copy / WEIGHTS).open("r+b") as file:
        file.write(good)
    np.testing.assert_array_equal(model(tokens), expected)


def test_an_open_session_lives_on_the_old_file_when_another_takes_its_place(
    tiny_copy: Path, tokens: np.ndarray
) -> None:
    model = HookedTransformer.from_onnx(tiny_copy, "cpu")
    expected = model(tokens)
    (tiny_copy / "new").write_bytes(bytes((tiny_copy / WEIGHTS).stat().st_size))
    (tiny_copy / "new").replace(tiny_copy / WEIGHTS)
    np.testing.assert_array_equal(model(tokens), expected)


def test_a_file_that_was_only_touched_is_still_read(tiny_copy: Path, tokens: np.ndarray) -> None:
    model = HookedTransformer.from_onnx(tiny_copy, "cpu")
    expected, embedding = model(tokens), np.array(model.W_E)
    for file in (MODEL, WEIGHTS):
        (tiny_copy / file).touch()
    np.testing.assert_array_equal(model(tokens), expected)
    np.testing.assert_array_equal(model.W_E, embedding)


def test_a_file_written_in_the_very_instant_of_opening_is_compared_again(
    tiny_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (digests, opened_files):
        monkeypatch.setattr(module, "settled", lambda mark: False)  # as if the file had just been written
    model = HookedTransformer.from_onnx(tiny_copy, "cpu")
    seen = Mark.of(tiny_copy / WEIGHTS)
    data = bytearray((tiny_copy / WEIGHTS).read_bytes())
    data[-4:] = b"\0\0\0\0"
    (tiny_copy / WEIGHTS).write_bytes(data)
    monkeypatch.setattr(Mark, "of", lambda path: seen)  # the clock did not tick in between
    with pytest.raises(ModelFileError, match=r"since the model was opened"):
        model([[1, 2]])


def test_weights_that_are_replaced_while_a_session_opens_are_refused(
    tiny_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphlens.engine import opener

    opening = opener.open_session

    def late(*given: Any) -> Any:
        data = bytearray((tiny_copy / WEIGHTS).read_bytes())
        data[-4:] = b"\0\0\0\0"
        (tiny_copy / "new").write_bytes(data)
        (tiny_copy / "new").replace(tiny_copy / WEIGHTS)
        return opening(*given)

    monkeypatch.setattr(opener, "open_session", late)
    model = HookedTransformer.from_onnx(tiny_copy, "cpu")
    with pytest.raises(ModelFileError, match=r"since the model was opened"):
        model([[1, 2]])


# Writes through a mapping


@pytest.fixture
def telling(tmp_path: Path) -> None:
    """Skips where a write through a mapping does not move a file's times: file systems in memory are so."""
    path = tmp_path / "probe"
    path.write_bytes(bytes(4096))
    before = path.stat().st_mtime_ns
    time.sleep(0.02)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        os.fsync(file.fileno())
        mapped[0] = 1
    if path.stat().st_mtime_ns == before:
        pytest.skip("this file system does not tell of writes through mappings")


@pytest.mark.usefixtures("telling")
def test_a_byte_written_through_a_mapping_again_and_again_is_seen(tiny_copy: Path) -> None:
    """A mapped page that is dirty already takes more writes without touching the file's times."""
    path = tiny_copy / WEIGHTS
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        for value in range(4):
            mapped[-1] = value
            time.sleep(0.12)  # long enough that a digest of it is remembered
            assert digest_of(path) == sha256(path), value


@pytest.mark.usefixtures("telling")
def test_a_run_after_a_write_through_a_mapping_is_refused(tiny_copy: Path) -> None:
    path = tiny_copy / WEIGHTS
    last = path.read_bytes()[-1]
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[-1] = last  # the page is dirty, and holds what it held
        time.sleep(0.12)
        model = HookedTransformer.from_onnx(tiny_copy, "cpu")
        model([[1, 2, 3]])
        mapped[-1] = last ^ 1
        with pytest.raises(ModelFileError, match="replaced since the model was opened"):
            model([[1, 2, 3]])
