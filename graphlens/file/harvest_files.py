"""The folder of a harvest: its files, how a shard comes into it whole, and which of them are sound."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from graphlens.errors import ModelFileError
from graphlens.file.folder import writing
from graphlens.file.harvest_folder import HarvestFolder
from graphlens.file.harvest_layout import Ints, Laid, Layout
from graphlens.file.harvest_plan import DTYPES, SIZES, HarvestPlan
from graphlens.file.safetensors import Array, SafetensorsFile, TensorEntry, write_safetensors

PLAN, CORPUS, FINISHED, DIRECTIONS, REDUCED = (
    "harvest.json", "corpus.safetensors", "finished.json", "directions.safetensors", "reduced.safetensors",
)  # fmt: skip
TOKENS, DOCUMENTS, POSITIONS = "tokens", "documents", "positions"
_BESIDE = {TOKENS: ("I32", 4), DOCUMENTS: ("I64", 8), POSITIONS: ("I32", 4)}
_DIGEST = "digest"  # the tensor of a file of partial results that holds the digest of the others


def shard_file(index: int) -> str:
    """The name of a shard's file.

    >>> shard_file(3)
    'shard-000003.safetensors'
    """
    return f"shard-{index:06d}.safetensors"


def record_file(index: int) -> str:
    """The name of the file that says that a shard is done, until all are."""
    return f"shard-{index:06d}.json"


def partial_file(index: int) -> str:
    """The name of the file of what was computed of a shard on the way, until it is merged into that of all."""
    return f"shard-{index:06d}.reduced.safetensors"


def read_plan(folder: HarvestFolder) -> HarvestPlan:
    """The plan of a harvest.

    Args:
        folder: Its folder.

    Raises:
        ModelFileError: There is none, or it is damaged.
    """
    place = folder.at(PLAN)
    try:
        return HarvestPlan.from_json(folder.read(PLAN), place)
    except FileNotFoundError as error:
        raise ModelFileError(
            f"{place}: no such file, so {folder} is no harvest. Make one: graphlens harvest."
        ) from error
    except OSError as error:
        raise ModelFileError(f"{place}: cannot be read ({error.strerror or error}).") from error


# The corpus


def write_corpus(folder: HarvestFolder, ids: npt.NDArray[np.int32], segments: Ints, rows: Ints, lengths: Ints) -> str:
    """Writes a laid out corpus.

    Args:
        folder: The harvest's folder.
        ids: int32 [tokens].
        segments: See ``Layout.rows``.
        rows: See there.
        lengths: int64 [documents].

    Returns:
        The SHA-256 of its file.
    """
    arrays: dict[str, Array] = {"ids": ids, "segments": segments, "rows": rows, "lengths": lengths}
    words = {np.dtype(np.int32): "I32", np.dtype(np.int64): "I64"}
    entries = {name: TensorEntry(words[a.dtype], a.shape, 0, a.nbytes) for name, a in arrays.items()}
    with writing(folder.at(CORPUS)), folder.becoming(CORPUS) as partial:
        write_safetensors(partial, entries, arrays.values())
    return folder.sealed(CORPUS)[0]


def corpus_digest(plan: HarvestPlan) -> str | None:
    """The SHA-256 of the file of the corpus; None where the plan does not hold it.

    Args:
        plan: The plan.
    """
    found = plan.corpus.get("file")
    return None if found is None else str(found)


def corpus_is_sound(folder: HarvestFolder, plan: HarvestPlan) -> bool:
    """False if the file of the corpus is missing, or is not what was written. Every byte of it is read.

    Args:
        folder: The harvest's folder.
        plan: Its plan.

    Raises:
        ModelFileError: It is there and cannot be read.
    """
    digest = corpus_digest(plan)
    try:
        return folder.has(CORPUS) and (digest is None or folder.digest(CORPUS) == digest)
    except OSError as error:
        raise ModelFileError(f"{folder.at(CORPUS)}: cannot be read ({error.strerror or error}).") from error


def read_corpus(folder: HarvestFolder, layout: Layout, digest: str | None) -> Laid:
    """The corpus of a harvest, laid out in rows; its tokens are mapped.

    Args:
        folder: Its folder.
        layout: How it was laid out.
        digest: See ``corpus_digest``. What is fetched is compared with it; a folder of this machine is not read for that.

    Raises:
        ModelFileError: The file is missing or damaged.
    """
    file = SafetensorsFile(folder.mapped(CORPUS, digest))
    return Laid(layout, file.array("ids"), file.array("segments"), file.array("rows"))


# Shards


class ShardWriter:
    """The file of a shard while it is written. Rows go to their places in any order.

    Args:
        place: Where it lies until it is whole.
        plan: The plan.
        index: Which shard.
    """

    def __init__(self, place: Path, plan: HarvestPlan, index: int) -> None:
        count = plan.shards[index][3]
        entries: dict[str, tuple[str, tuple[int, ...], int]] = {
            name: (dtype, (count,), size * count) for name, (dtype, size) in _BESIDE.items()
        }
        if plan.written:
            for name in plan.names:
                length = count * plan.width(name) * SIZES[plan.dtype]
                entries[name] = (DTYPES[plan.dtype], (count, *plan.shapes[name]), length)
        header, self._starts, end = _header(entries)
        self._file = place.open("xb", buffering=0)
        self._file.write(header)
        size = len(header) + end
        self._file.truncate(size)
        if hasattr(os, "posix_fallocate") and end:
            try:
                os.posix_fallocate(self._file.fileno(), 0, size)  # a full disk is met before the first run
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # a file system without it
                    self._file.close()
                    raise
        self._base = len(header)

    def put(self, name: str, row: int, values: Array) -> None:
        """Writes rows of an array.

        Args:
            name: Which.
            row: The first row of it.
            values: The rows, in the dtype of the file.
        """
        if not values.size:
            return
        values = np.ascontiguousarray(values)
        self._file.seek(self._base + self._starts[name] + row * (values.nbytes // len(values)))
        left = values.reshape(-1).view(np.uint8).data
        while left:
            left = left[self._file.write(left) :]

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _header(entries: Mapping[str, tuple[str, Sequence[int], int]]) -> tuple[bytes, dict[str, int], int]:
    """The head of a safetensors file, where each array begins behind it, and their size."""
    described, starts, position = {}, {}, 0
    for name, (dtype, shape, length) in sorted(entries.items(), key=lambda one: -_alignment(one[1][0])):
        starts[name] = position
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + length]}
        position += length
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text, starts, position


def _alignment(dtype: str) -> int:
    """Bytes of a number: arrays of wide ones come first, so that each begins at a multiple of its own."""
    return {"I64": 8, "F32": 4, "I32": 4}.get(dtype, 2)


@contextlib.contextmanager
def writing_shard(folder: HarvestFolder, plan: HarvestPlan, index: int) -> Iterator[ShardWriter]:
    """The file of a shard, which takes its place whole at the end of the ``with`` block, or vanishes on an error.

    Args:
        folder: The harvest's folder.
        plan: Its plan.
        index: Which shard.

    Yields:
        What writes it.

    Raises:
        ExportError: It cannot be written; a full disk, say.
    """
    name = shard_file(index)
    with writing(folder.at(name)), folder.becoming(name) as partial:
        writer = ShardWriter(partial, plan, index)
        try:
            yield writer
        finally:
            writer.close()
    with writing(folder.at(name)):
        digest, size = folder.sealed(name)
        folder.write(record_file(index), json.dumps({"sha256": digest, "size": size}).encode())


def recorded(folder: HarvestFolder, plan: HarvestPlan) -> list[str | None]:
    """The digest that each shard had when it was written; None for those that are not done.

    Args:
        folder: The harvest's folder.
        plan: Its plan.

    Raises:
        ModelFileError: A record is there and cannot be read now.
    """
    finished = read_finished(folder)
    if finished is not None and len(finished) == len(plan.shards):
        return list(finished)
    return [_record(folder, index) for index in range(len(plan.shards))]


def _record(folder: HarvestFolder, index: int) -> str | None:
    """The digest in the record of one shard; None where there is none, or it is damaged."""
    data = _read(folder, record_file(index))
    try:
        return None if data is None else str(json.loads(data)["sha256"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _read(folder: HarvestFolder, name: str) -> bytes | None:
    """A file's content; None where there is none. What cannot be read now may be sound: it counts as neither."""
    try:
        return folder.read(name)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelFileError(f"{folder.at(name)}: cannot be read ({error.strerror or error}).") from error


def read_finished(folder: HarvestFolder) -> list[str] | None:
    """The digests of all shards of a harvest that was finished; None for one that was not.

    Args:
        folder: Its folder.

    Raises:
        ModelFileError: It cannot be read whether it was.
    """
    data = _read(folder, FINISHED)
    try:
        return None if data is None else [str(digest) for digest in json.loads(data)["shards"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def finish(folder: HarvestFolder, plan: HarvestPlan) -> None:
    """Writes that a harvest is finished, with the digest of every shard, and removes what was needed until then.

    Args:
        folder: Its folder.
        plan: Its plan.

    Raises:
        ModelFileError: A shard is not there, or one of a finished harvest was made again and came out otherwise.
        ExportError: It cannot be written.
    """
    digests = recorded(folder, plan)
    if None in digests:
        raise ModelFileError(
            f"{folder.at(shard_file(digests.index(None)))}: written and not there. Whoever wrote it sees another {folder}."
        )
    for index, digest in enumerate(digests):
        if (now := _record(folder, index)) not in (None, digest):
            raise ModelFileError(
                f"{folder.at(shard_file(index))}: made again, it has other bytes ({now:.12}... and not {digest:.12}...). This "
                "machine has changed in a way that the plan does not hold: harvest into another folder."
            )
    with writing(folder.at(FINISHED)):
        text = json.dumps({"tokens": plan.tokens, "shards": digests}, indent=1) + "\n"
        folder.write(FINISHED, text.encode())
        for index in range(len(plan.shards)):
            folder.remove(record_file(index))


def damaged(folder: HarvestFolder, plan: HarvestPlan, digests: Sequence[str | None]) -> Iterator[tuple[int, str]]:
    """The shards that are missing or are not what was written, with what is wrong.

    Args:
        folder: The harvest's folder.
        plan: Its plan.
        digests: What ``recorded`` gave. Every byte of the shards that have one is read.
    """
    for index, digest in enumerate(digests):
        name = shard_file(index)
        if digest is None:
            yield index, "not written yet"
        elif not folder.has(name):
            yield index, "missing"
        else:
            try:
                found = folder.digest(name)
            except OSError as error:  # a disk with a bad place in it
                yield index, f"cannot be read ({error.strerror or error})"
                continue
            if found != digest:
                yield index, "other bytes than were written"


# What was computed on the way


def write_results(folder: HarvestFolder, name: str, arrays: Mapping[str, Array]) -> None:
    """Writes partial results with a digest of them.

    Args:
        folder: The harvest's folder.
        name: The file; one that is there is replaced.
        arrays: The arrays by name: float64, float32, int64 or uint32.

    Raises:
        ExportError: It cannot be written.
    """
    from safetensors.numpy import save

    plain = {key: np.ascontiguousarray(array) for key, array in sorted(arrays.items())}
    sealed = {**plain, _DIGEST: np.frombuffer(_sealed(plain), np.uint8)}
    with writing(folder.at(name)):
        folder.write(name, save(sealed))


def read_results(folder: HarvestFolder, name: str) -> dict[str, Array] | None:
    """What ``write_results`` wrote; None where there is no such file, or it is damaged.

    Args:
        folder: The harvest's folder.
        name: The file.

    Raises:
        ModelFileError: It is there and cannot be read now.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    data = _read(folder, name)
    try:
        found = {} if data is None else load(data)
    except (SafetensorError, ValueError, KeyError):
        return None
    digest = found.pop(_DIGEST, None)
    return found if digest is not None and digest.tobytes() == _sealed(found) else None


def _sealed(arrays: Mapping[str, Array]) -> bytes:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape};".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if math.prod(array.shape) else b"")
    return digest.digest()
