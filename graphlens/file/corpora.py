"""Corpora: what a file, a dataset or a list holds, document by document, as text or token ids."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt

from graphlens.errors import InputError, RuntimeUnavailable
from graphlens.file.remote import fetched, local_path, url_of

Ids = npt.NDArray[np.int64]
Document: TypeAlias = "str | Ids"
"""A text, or int64 [p] token ids."""
# What a harvest reads: the path of a file or of a saved dataset, a list of Paths, texts, rows of token ids, a dataset.
Corpus: TypeAlias = "str | os.PathLike[str] | Iterable[object]"

COLUMNS = ("text", "input_ids", "tokens")  # that are looked for where none is named
ENDINGS = ".txt (a document a line), .jsonl, .parquet and .npy"
_PARQUET_ROWS = 1024  # that are read at once
_SHOWN = 12  # columns that an error names


def documents(corpus: Corpus, column: str | None = None) -> Iterator[Document]:
    """The documents of a corpus, in its order. Nothing is read before the first is asked for.

    Args:
        corpus: The path or URL of a .txt file (a document a line), .jsonl, .parquet or .npy file, or of a folder that
            ``Dataset.save_to_disk`` wrote; a list of ``Path`` objects for several of them; a list of texts; token ids, as an
            array [n, p] or a list of rows; a Hugging Face dataset, or any iterable of texts, ids or rows with columns.
        column: The column of texts or token ids, where there are columns; by default "text", "input_ids" or "tokens".

    Yields:
        Each document, empty ones too: a document's number is its place.

    Raises:
        InputError: There is no such file or column, or it holds something else than UTF-8 text or token ids.
        RuntimeUnavailable: The package that reads such a corpus is not installed.
    """
    if isinstance(corpus, (str, os.PathLike)):
        yield from _of_place(corpus, column)
        return
    if isinstance(corpus, Mapping):
        raise InputError(
            f"this corpus has parts ({', '.join(map(str, list(corpus)[:_SHOWN]))}): pass one of them, as in corpus['train']."
        )
    names = getattr(corpus, "column_names", None)
    if names is not None:
        column = _column(column, names, "the dataset")
        selected = getattr(corpus, "select_columns", None)  # others may hold pictures, slow to decode
        corpus = corpus if selected is None else selected([column])
    array = _as_rows(corpus)
    if array is not None:
        corpus = array
    try:
        rows = iter(corpus)
    except TypeError as error:
        raise InputError(
            f"a corpus is a path, a list of texts, token ids or a dataset, not {type(corpus).__name__}."
        ) from error
    for number, row in enumerate(rows):
        if isinstance(row, os.PathLike):
            yield from _of_place(row, column)
        elif isinstance(row, Mapping):
            yield _document(
                row[_column(column, list(row), f"row {number} of the corpus")], f"row {number} of the corpus"
            )
        else:
            yield _document(row, f"document {number} of the corpus")


def _as_rows(corpus: object) -> npt.NDArray[np.generic] | None:
    """An array or tensor of token ids as an array [n, p]; None for what is neither."""
    if not hasattr(corpus, "ndim") or not hasattr(corpus, "shape"):
        return None
    if hasattr(corpus, "detach"):
        corpus = corpus.detach().cpu()
    array = np.asarray(corpus)
    if array.ndim not in (1, 2) or array.dtype.kind not in "iuU":
        raise InputError(
            f"token ids of a corpus are whole numbers [documents, positions], not {array.dtype} {list(array.shape)}."
        )
    return np.atleast_2d(array) if array.dtype.kind in "iu" else array


def _document(value: object, where: str) -> Document:
    """A text or a row of ids, checked."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        raise InputError(f"{where} is bytes, not text: decode them first.")
    try:
        ids = np.asarray(cast("Sequence[int]", value))
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{where} is neither text nor token ids ({error}).") from error
    if ids.size == 0:
        return np.zeros(0, np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InputError(f"{where} is neither text nor a row of token ids, but {type(value).__name__}.")
    return ids.astype(np.int64)


def _column(asked: str | None, names: Iterable[str] | None, where: str) -> str:
    """The column of documents. Raises InputError where there is none."""
    known = list(names or ())
    if asked is None:
        found = next((name for name in COLUMNS if name in known), None)
        if found is None:
            raise InputError(
                f"{where} has no column text, input_ids or tokens: name one with column=. It has "
                f"{', '.join(map(str, known[:_SHOWN])) or 'none'}."
            )
        return found
    if asked not in known:
        raise InputError(f"{where} has no column {asked!r}. It has {', '.join(map(str, known[:_SHOWN])) or 'none'}.")
    return asked


def _of_place(place: str | os.PathLike[str], column: str | None) -> Iterator[Document]:
    """The documents of a path or URL."""
    url = url_of(place)
    if url is not None and PurePosixPath(url).suffix.lower() not in _READERS:
        raise InputError(f"{url}: files that hold a corpus end in {ENDINGS}.")
    yield from _of_path(local_path(place) if url is None else fetched(url), column)


def _of_path(path: Path, column: str | None) -> Iterator[Document]:
    """The documents of a file or saved dataset."""
    if path.is_dir():
        yield from documents(_saved_dataset(path), column)
        return
    if not path.is_file():
        raise InputError(
            f"{path}: no such file. A corpus is a file ({ENDINGS}), a saved dataset, or a list of texts: [text] for one."
        )
    ending = path.suffix.lower()
    if ending not in _READERS:
        raise InputError(
            f"{path}: files that hold a corpus end in {ENDINGS}. Rename it, or pass its documents as a list."
        )
    if ending in (".txt", ".npy") and column is not None:
        raise InputError(f"{path}: there are no columns in such a file; leave column={column!r} out.")
    try:
        yield from _READERS[ending](path, column)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from error


def _saved_dataset(path: Path) -> Iterable[object]:
    if not (path / "state.json").is_file():
        raise InputError(f"{path}: this folder holds no dataset that Dataset.save_to_disk wrote. Name a file in it.")
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise RuntimeUnavailable(
            f"{path}: reading a saved dataset needs the package datasets: pip install datasets."
        ) from error
    return cast("Iterable[object]", load_from_disk(str(path)))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file, from 1, without their ends."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            raw = line.rstrip(b"\r\n")
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, as Windows's editors write it
            if b"\0" in raw:
                raise InputError(f"{path}, line {number}: this is binary, not text: it holds a null character.")
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}, line {number}: not UTF-8 (byte {error.start}: {error.reason}). Convert the file to UTF-8 first."
                ) from error


def _of_text(path: Path, column: str | None) -> Iterator[Document]:
    for _, line in _lines(path):
        yield line


def _of_jsonl(path: Path, column: str | None) -> Iterator[Document]:
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON ({error}).") from error
        if isinstance(row, dict):
            row = row[_column(column, row, where)]
        yield _document(row, where)


def _of_parquet(path: Path, column: str | None) -> Iterator[Document]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise RuntimeUnavailable(f"{path}: reading Parquet needs the package pyarrow: pip install pyarrow.") from error
    try:
        with parquet.ParquetFile(path) as file:
            name = _column(column, file.schema_arrow.names, str(path))
            number = 0
            for batch in file.iter_batches(_PARQUET_ROWS, columns=[name]):
                for value in batch.column(0).to_pylist():
                    yield _document(value, f"{path}, row {number}")
                    number += 1
    except pa.ArrowException as error:
        raise InputError(f"{path}: not a Parquet file that can be read ({error}).") from error


def _of_array(path: Path, column: str | None) -> Iterator[Document]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: not an array that can be read ({error}).") from error
    yield from documents(array)


_READERS: Mapping[str, Callable[[Path, str | None], Iterator[Document]]] = {
    ".txt": _of_text,
    ".jsonl": _of_jsonl,
    ".ndjson": _of_jsonl,
    ".parquet": _of_parquet,
    ".npy": _of_array,
}
