"""The formats that a harvest could be written in: write, read in order, read shuffled; safetensors, Arrow and Parquet."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tools.bench.harness import Case, Findings, Row, Setup, rounds

WIDTH, TOKENS, BATCH = 768, 131_072, 4096
DTYPES = ("float16", "float32")


def _safetensors(folder: Path, array: Any) -> tuple[Callable[[], None], Callable[[], Any]]:
    from graphlens.file.safetensors import SafetensorsFile, TensorEntry, write_safetensors

    path = folder / "a.safetensors"
    words = {"float16": "F16", "float32": "F32"}
    entry = TensorEntry(words[str(array.dtype)], array.shape, 0, array.nbytes)

    def write() -> None:
        path.unlink(missing_ok=True)
        write_safetensors(path, {"a": entry}, [array])

    return write, lambda: SafetensorsFile(path).array("a")


def _arrow(folder: Path, array: Any) -> tuple[Callable[[], None], Callable[[], Any]]:
    import pyarrow as pa

    path = folder / "a.arrow"

    def write() -> None:
        flat = pa.Array.from_buffers(pa.from_numpy_dtype(array.dtype), array.size, [None, pa.py_buffer(array)])
        table = pa.table({"a": pa.FixedSizeListArray.from_arrays(flat, WIDTH)})
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=BATCH)

    def read() -> Any:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        return [chunk.flatten().to_numpy().reshape(-1, WIDTH) for chunk in table.column(0).chunks]

    return write, read


def _parquet(folder: Path, array: Any) -> tuple[Callable[[], None], Callable[[], Any]]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path = folder / "a.parquet"

    def write() -> None:
        flat = pa.Array.from_buffers(pa.from_numpy_dtype(array.dtype), array.size, [None, pa.py_buffer(array)])
        parquet.write_table(
            pa.table({"a": pa.FixedSizeListArray.from_arrays(flat, WIDTH)}),
            path,
            compression="none",
            use_dictionary=False,
        )

    def read() -> Any:
        table = parquet.read_table(path)
        return [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, WIDTH) for chunk in table.column(0).chunks]

    return write, read


def _summed(pieces: Any) -> int:
    """Reads every byte."""
    pieces = pieces if isinstance(pieces, list) else [pieces]
    return sum(int(piece.reshape(-1).view(np.uint64).sum()) for piece in pieces)


def _shuffled(pieces: Any) -> int:
    """Batches of rows from anywhere, as one gather from each piece."""
    pieces = pieces if isinstance(pieces, list) else [pieces]
    order, done = np.random.default_rng(0).permutation(TOKENS), 0
    starts = np.cumsum([0, *(len(piece) for piece in pieces)])
    for first in range(0, TOKENS, BATCH):
        chosen = order[first : first + BATCH]
        if len(pieces) == 1:
            batch = pieces[0][chosen]
        else:
            batch = np.empty((len(chosen), WIDTH), pieces[0].dtype)
            owners = np.searchsorted(starts, chosen, side="right") - 1
            for owner in np.unique(owners):
                mine = owners == owner
                batch[mine] = pieces[owner][chosen[mine] - starts[owner]]
        done += len(batch)
    return done


def run(setup: Setup) -> Findings:
    """GB a second of each format, each against safetensors; everything in the page cache."""
    rows = []
    with tempfile.TemporaryDirectory(dir=setup.workdir) as name:
        for dtype in DTYPES:
            array = np.random.default_rng(0).standard_normal((TOKENS, WIDTH)).astype(dtype)
            size = array.nbytes / 1e9
            formats = {kind.__name__[1:]: kind for kind in (_safetensors, _arrow, _parquet)}
            made = {}
            for kind, make in formats.items():
                (folder := Path(name) / dtype / kind).mkdir(parents=True)
                made[kind] = make(folder, array)
                made[kind][0]()

            def speed(work: Callable[[], object], size: float = size) -> Callable[[], float]:
                def measured() -> float:
                    start = time.perf_counter()
                    work()
                    return size / (time.perf_counter() - start)

                return measured

            works: dict[str, Callable[[Any], Callable[[], object]]] = {
                "written": lambda pair: pair[0],
                "read in order": lambda pair: lambda: _summed(pair[1]()),
                "read shuffled": lambda pair: lambda: _shuffled(pair[1]()),
            }
            for label, work in works.items():
                found = rounds({kind: speed(work(pair)) for kind, pair in made.items()}, setup.repeats)
                rows += [Row(f"{dtype}, {label}, {kind}", "GB/s", found[kind], found["safetensors"]) for kind in made]
            shutil.rmtree(Path(name) / dtype)
    return Findings(
        rows, "safetensors", (f"An array [{TOKENS:,}, {WIDTH}], in the page cache; the disk is not waited for.",)
    )


CASE = Case(run, repeats=5, model="tiny")
