"""A model run block by block from its file, cold and cached, beside the disk's read speed and the model in memory."""

from __future__ import annotations

from functools import partial
from typing import Any

from tools.bench.children import run_child
from tools.bench.harness import Case, Findings, Row, Setup, Target, rounds

_BATCH, _LENGTH = 16, 128


def _read(folder: str) -> dict[str, float]:
    """How fast the weights' files are read, of pages that were dropped before, in blocks of 4 MB."""
    import os
    import time
    from pathlib import Path

    files = sorted(path.resolve() for path in Path(folder).glob("*.safetensors"))
    size = 0
    for path in files:
        number = os.open(path, os.O_RDONLY)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)
    buffer = bytearray(1 << 22)
    began = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as opened:
            while count := opened.readinto(buffer):
                size += count
    return {"MB/s": size / 1e6 / (time.perf_counter() - began)}


def _run(folder: str, limit: int, vocabulary: int, batch: int, length: int, cold: bool) -> dict[str, float]:
    """A forward after a first one: its milliseconds, MB of weights read a second, and MB resident at most."""
    import ctypes
    import mmap
    import os
    import time
    from pathlib import Path

    import numpy

    from graphlens import HookedTransformer

    files = sorted(path.resolve() for path in Path(folder).glob("*.safetensors"))

    def cached() -> float:
        """MB of the files in the page cache."""
        found = 0
        for path in files:
            with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as area:
                pages = (len(area) + mmap.PAGESIZE - 1) // mmap.PAGESIZE
                there = (ctypes.c_ubyte * pages)()
                start = ctypes.addressof(ctypes.c_char.from_buffer(area))
                ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(area)), there)
                found += sum(page & 1 for page in bytes(there)) * mmap.PAGESIZE
        return found / 1e6

    model = HookedTransformer.from_onnx(folder, "cpu", max_memory=limit or None)
    ids = numpy.random.default_rng(0).integers(0, vocabulary, (batch, length))
    model(ids)
    for path in files if cold else ():
        with path.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = cached()
    began = time.perf_counter()
    model(ids)
    seconds = time.perf_counter() - began
    size = sum(path.stat().st_size for path in files) / 1e6
    return {"ms": seconds * 1e3, "MB/s": size / seconds, "cached": before}


def run(setup: Setup) -> Findings:
    """Tokens and MB of weights a second, each contender in processes of its own. Linux only."""
    model = setup.model
    limit, shape = model.weights_bytes, (model.d_vocab, _BATCH, _LENGTH)
    folder = str(model.hooked)

    def measured(*arguments: Any) -> dict[str, float]:
        found = run_child(*arguments)
        return {**found.result, "peak": found.peak_bytes / 1e6}

    one_token = (model.d_vocab, 1, 1)
    contenders = {
        "disk": partial(measured, _read, folder),
        "cold": partial(measured, _run, folder, limit, *shape, True),
        "warm": partial(measured, _run, folder, limit, *shape, False),
        "memory": partial(measured, _run, folder, 0, *shape, False),
        "cold, one token": partial(measured, _run, folder, limit, *one_token, True),
    }
    found = rounds(contenders, setup.repeats, warmup=0)

    def of(contender: str, key: str) -> list[float]:
        return [one[key] for one in found[contender]]

    tokens = _BATCH * _LENGTH
    speed = {name: [tokens / (ms / 1e3) for ms in of(name, "ms")] for name in ("cold", "warm", "memory")}
    label = f"b{_BATCH} s{_LENGTH}"

    def share(contender: str) -> float:
        pairs = zip(speed[contender], speed["memory"], strict=True)
        return sorted(one / two for one, two in pairs)[setup.repeats // 2]

    rate = sorted(a / b for a, b in zip(of("cold, one token", "MB/s"), of("disk", "MB/s"), strict=True))[
        setup.repeats // 2
    ]
    rows = [
        Row(f"{label}, cold", "tokens/s", speed["cold"], speed["memory"], _at_least(share("cold"), 0.9, "in memory")),
        Row(f"{label}, cached", "tokens/s", speed["warm"], speed["memory"], _at_least(share("warm"), 0.9, "in memory")),
        Row(
            "one token, cold: weights read",
            "MB/s",
            of("cold, one token", "MB/s"),
            of("disk", "MB/s"),
            _at_least(rate, 0.8, "the disk"),
        ),
        Row("peak memory of the process", "MB", of("cold", "peak"), of("memory", "peak")),
    ]
    cold = max(of("cold", "cached") + of("cold, one token", "cached"))
    reads = "cold" if cold < 0.01 * model.weights_bytes / 1e6 else "NOT all cold"
    notes = (
        f"Weights {model.weights_bytes / 1e6:,.1f} MB, which is what max_memory is. The file's pages are dropped before the "
        f"measured run (posix_fadvise), which follows a first one; reads were {reads}: at most {cold:,.1f} MB were cached.",
        "The disk's own read speed is that of the same files in blocks of 4 MB, dropped before, in a process of its own. A "
        "virtual disk may be cached by its host.",
    )
    return Findings(rows, "the same model in memory; for MB/s the disk", notes)


def _at_least(value: float, least: float, of: str) -> Target:
    """A target for a share that should not be smaller: held as its inverse."""
    return Target(1 / value, 1 / least, "x", f"the time of {of}")


CASE = Case(run, repeats=3)
