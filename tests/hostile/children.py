"""Playing cases, each in a child of this process with limits of memory and time, and watching what it opens and leaves."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import selectors
import shutil
import signal
import stat
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphlens.errors import GraphlensError
from tests.hostile.cases import (
    ABORT,
    CLEAN,
    ESCAPE,
    HANG,
    LEFTOVER,
    MEMORY,
    RAW,
    RIGHT,
    WRONG,
    Case,
    HarnessError,
    Place,
    Verdict,
)

SECONDS = 10  # of processor time for a case; twice that by the clock
BYTES = 1 << 29  # of private memory for a case, beyond what this process holds
FILE_BYTES = 1 << 30  # of a file that a case may write
_NO_MEMORY = ("bad_alloc", "Failed to allocate memory", "memory allocation of", "Cannot allocate memory", "MemoryError")
_OPENED_OR_CHANGED = 0x3E6  # of inotify: open, modify, attributes, move, create, delete
_PR_SET_PDEATHSIG = 1
_SECRET = b"a file outside the folder"


# What a case opens


class _Watch:
    """Sees, from now on, what this process opens outside of what it may: Python's opens, and all of the outside folder."""

    place: Place | None = None
    seen: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()

    def begin(self, place: Place) -> None:
        """Watches from now on."""
        ours = (place.model.parent, place.out.parent, place.cache, place.temporary, place.root / "cwd", place.log)
        code = (sys.prefix, sys.base_prefix, Path(__file__).parents[2], "/proc", "/sys", "/usr", "/lib", "/lib64")
        also = ("/dev/null", "/dev/urandom", "/etc/localtime", "/etc/ld.so.cache", *(p for p in sys.path if p))
        self.allowed = tuple(os.path.realpath(path) for path in (*ours, *code, *also))
        self._inotify = ctypes.CDLL(None, use_errno=True)
        self._fd = self._inotify.inotify_init1(os.O_NONBLOCK)
        for folder in (place.outside, *(path for path in place.outside.rglob("*") if path.is_dir())):
            self._inotify.inotify_add_watch(self._fd, os.fsencode(folder), _OPENED_OR_CHANGED)
        self.place = place

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        """The audit hook: notes an open, or a change of the file system, of what is not allowed."""
        if self.place is None or event not in ("open", "os.listdir", "os.scandir", "os.link", "os.symlink", "os.rename",
                                               "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod"):  # fmt: skip
            return
        paths = args[:2] if event in ("os.link", "os.rename") else args[1:2] if event == "os.symlink" else args[:1]
        for path in paths:
            if isinstance(path, str | bytes) and not self._is_allowed(os.path.realpath(os.fsdecode(path))):
                self.seen = (*self.seen, f"{event} {os.fsdecode(path)!r}")

    def _is_allowed(self, path: str) -> bool:
        return any(path == root or path.startswith(f"{root}/") for root in self.allowed)

    def end(self) -> tuple[str, ...]:
        """What was seen, and watches no more."""
        assert self.place is not None, "begin comes first"
        found, self.place = list(self.seen), None
        try:
            events = os.read(self._fd, 1 << 16)
        except BlockingIOError:
            events = b""
        while events:
            _, mask, _, length = struct.unpack("iIII", events[:16])
            name = events[16 : 16 + length].rstrip(b"\0")
            found.append(f"something opened or changed outside/{os.fsdecode(name)} (inotify {mask:#x})")
            events = events[16 + length :]
        return tuple(dict.fromkeys(found))


_watch = _Watch()
_hooked = False


def _install() -> None:
    """Installs the audit hook, once: Python has no way to take one out again."""
    global _hooked
    if not _hooked:
        sys.addaudithook(_watch.hook)
        _hooked = True


# What a case leaves


def _inventory(folder: Path) -> dict[str, tuple[int, ...]]:
    """What lies under a folder: path -> what changes when it is written."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
        found[str(path.relative_to(folder))] = (status.st_mode, size, status.st_mtime_ns, status.st_ino)
    return found


def _leftovers(place: Place, before: dict[str, tuple[int, ...]], failed: bool) -> list[str]:
    """What lies there that should not."""
    found = [f"changed or left in the input: {name}" for name in _changed(before, _inventory(place.model.parent))]
    found += [f"left in the temporary folder: {path.name}" for path in place.temporary.iterdir()]
    for folder in (place.out.parent, place.cache):
        found += [f"left: {path.relative_to(place.root)}" for path in folder.rglob("*") if _is_partial(path.name)]
    if failed and any(place.out.parent.iterdir()):
        left = sorted(str(path.relative_to(place.out.parent)) for path in place.out.parent.rglob("*"))
        found.append(f"left after an error: {', '.join(left[:5])}")
    if (place.outside / "secret.txt").read_bytes() != _SECRET:
        found.append("the file outside was written")
    return found


def _is_partial(name: str) -> bool:
    return name.endswith((".partial", ".unverified"))


def _changed(before: dict[str, tuple[int, ...]], after: dict[str, tuple[int, ...]]) -> list[str]:
    return [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]


# One case


def set_up(root: Path, base: Path) -> Place:
    """An empty place for a case.

    Args:
        root: The folder, made anew.
        base: The untouched model folder.
    """
    shutil.rmtree(root, ignore_errors=True)
    place = Place(root, base)
    for folder in (place.model.parent, place.out.parent, place.cache, place.temporary, place.outside, root / "cwd"):
        folder.mkdir(parents=True)
    (place.outside / "secret.txt").write_bytes(_SECRET)
    place.log.touch()
    return place


def _private_bytes() -> int:
    """How much private memory this process holds, as RLIMIT_DATA counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData"):
            return int(line.split()[1]) << 10
    raise HarnessError("/proc/self/status has no VmData: this needs Linux")


def _limit(seconds: int) -> None:
    """Limits of this process: memory, processor time, the size of files; no core dumps."""
    for kind, amount in (
        (resource.RLIMIT_DATA, _private_bytes() + BYTES),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        # Beyond the first of the two a process gets the signal SIGXCPU, which tells it from what we end ourselves.
        resource.setrlimit(kind, (amount, amount + (kind == resource.RLIMIT_CPU)))


def _play(case: Case, place: Place, seconds: int) -> dict[str, Any]:
    """Plays a case in this process; returns a record of what came of it."""
    os.environ |= {"GRAPHLENS_CACHE": str(place.cache), "TMPDIR": str(place.temporary)}
    tempfile.tempdir = str(place.temporary)
    os.chdir(place.root / "cwd")
    try:
        case.prepare(place)
    except Exception:  # noqa: BLE001  whatever it is, it is told as a defect of these tests
        return {"harness": traceback.format_exc()}
    before = _inventory(place.model.parent)
    _limit(seconds)
    _watch.begin(place)
    failed, verdict = True, Verdict(RIGHT, "")
    try:
        differences = case.use(place)
        failed = False
        verdict = _of_numbers(case, differences)
    except GraphlensError as error:
        verdict = _of_error(case, error)
    except HarnessError:
        return {"harness": traceback.format_exc()}
    except MemoryError:
        verdict = Verdict(MEMORY, traceback.format_exc(limit=-3))
    except BaseException:  # noqa: BLE001  a Rust panic is no Exception, and it is what we are looking for
        verdict = Verdict(RAW, traceback.format_exc(limit=-4))
    escapes = _watch.end()
    if escapes:
        verdict = Verdict(ESCAPE, "; ".join(escapes[:3]))
    elif verdict.good and (left := _leftovers(place, before, failed)):
        verdict = Verdict(LEFTOVER, "; ".join(left[:3]))
    return {"outcome": verdict.outcome, "detail": verdict.detail}


def _of_numbers(case: Case, differences: list[str]) -> Verdict:
    """The verdict on a route that came to its end."""
    if case.owed == "refused":
        return Verdict(
            WRONG, "accepted, where a clean error is owed" + "".join(f"; {text}" for text in differences[:2])
        )
    if differences and case.owed != "safe":
        return Verdict(WRONG, "; ".join(differences[:3]))
    return Verdict(RIGHT, "")


def _of_error(case: Case, error: GraphlensError) -> Verdict:
    """The verdict on a route that ended in an error of ours."""
    text = f"{type(error).__name__}: {error}"
    if case.owed == "refused" and any(mark in text for mark in _NO_MEMORY):
        return Verdict(MEMORY, text)  # it must be refused before it eats all there is
    if case.owed == "right":
        return Verdict(WRONG, f"refused, where nothing is wrong: {text}")
    return Verdict(CLEAN, text)


# Many cases


@dataclass
class _Running:
    """A child that plays a case."""

    case: Case
    place: Place
    process: int
    pipe: int
    seconds: int
    started: float
    said: bytes = b""


def play_all(
    cases: Iterable[Case],
    base: Path,
    scratch: Path,
    jobs: int = 2,
    keep: Path | None = None,
    seconds: int = SECONDS,
) -> Iterator[tuple[Case, Verdict]]:
    """Plays cases, each in a child of its own.

    Args:
        cases: The cases.
        base: The untouched model folder.
        scratch: A folder for the places of cases.
        jobs: How many play at once.
        keep: Where the places of cases that end in a fault are kept, in folders of the cases' names.
        seconds: How much processor time a case has; by the clock it has twice that.

    Yields:
        Each case with what came of it, in the order in which they end.

    Raises:
        HarnessError: A variant could not be made.
    """
    _install()
    waiting, running = iter(cases), {}
    free = [scratch / f"slot{index}" for index in range(jobs)]
    with selectors.DefaultSelector() as pipes:
        try:
            while True:
                while free and (case := next(waiting, None)) is not None:
                    child = _start(case, set_up(free.pop(), base), seconds)
                    running[child.pipe] = child
                    pipes.register(child.pipe, selectors.EVENT_READ)
                if not running:
                    return
                for key, _ in pipes.select(timeout=0.2):
                    child = running[key.fd]
                    data = os.read(child.pipe, 1 << 16)
                    child.said += data
                    if not data:
                        _forget(child, running, pipes)
                        yield child.case, _ended(child, False, keep)
                        free.append(child.place.root)
                for child in list(running.values()):
                    if _is_late(child):
                        _forget(child, running, pipes)
                        yield child.case, _ended(child, True, keep)
                        free.append(child.place.root)
        finally:
            for child in running.values():
                _kill(child)
                os.waitpid(child.process, 0)


def _is_late(child: _Running) -> bool:
    """True for a child that waits after twice its time, or that is not done after many times of it on a busy machine."""
    age = time.monotonic() - child.started
    if age <= 2 * child.seconds:
        return False
    state = Path(f"/proc/{child.process}/stat").read_text().rpartition(")")[2].split()[0]
    return state == "S" or age > 12 * child.seconds


def _forget(child: _Running, running: dict[int, _Running], pipes: selectors.BaseSelector) -> None:
    """Takes a child off the lists of those that run, and ends what is left of it."""
    pipes.unregister(child.pipe)
    del running[child.pipe]
    os.close(child.pipe)


def _start(case: Case, place: Place, seconds: int) -> _Running:
    """Starts a child that plays a case."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of forks beside threads: this process has none that matter
        process = os.fork()
    if process:
        os.close(writing)
        return _Running(case, place, process, reading, seconds, time.monotonic())
    code = 1
    try:
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # it ends with this process, however that ends
        os.close(reading)
        log = os.open(place.log, os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        record = _play(case, place, seconds)
        sys.stdout.flush()
        sys.stderr.flush()
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(json.dumps(record).encode())
        code = 0
    except BaseException:  # noqa: BLE001  the child must not go on as if it were the parent
        traceback.print_exc()
    finally:
        os._exit(code)


def _kill(child: _Running) -> None:
    """Ends a child and the processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.process, signal.SIGKILL)


def _ended(child: _Running, late: bool, keep: Path | None) -> Verdict:
    """The verdict on a child that ended, or that ran out of time and is ended now."""
    if late:
        _kill(child)
    _, status = os.waitpid(child.process, 0)
    seconds = time.monotonic() - child.started
    _kill(child)
    verdict = _read(child, status, late)
    if not verdict.good and keep is not None:
        kept = keep / child.case.id.replace("/", "__")
        shutil.rmtree(kept, ignore_errors=True)
        os.rename(child.place.root, kept)
        (kept / "about.txt").write_text(f"{child.case.id}\n{verdict.outcome}\n{verdict.detail}\n{child.case.about}\n")
    return Verdict(verdict.outcome, verdict.detail, seconds)


def _read(child: _Running, status: int, late: bool) -> Verdict:
    """The verdict by what a child said and how it ended."""
    log = child.place.log.read_bytes().decode(errors="replace")
    if late:
        return Verdict(HANG, f"not done after {time.monotonic() - child.started:.0f} s")
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGXCPU:
            return Verdict(HANG, f"more than {child.seconds} s of processor time")
        name = signal.Signals(number).name
        if any(mark in log for mark in _NO_MEMORY):
            return Verdict(MEMORY, f"{name}: {log[:500]}")
        return Verdict(ABORT, f"{name}: {log[:500]}")
    if not child.said:
        return Verdict(ABORT, f"exit code {os.WEXITSTATUS(status)} without a word: {log[-600:]}")
    record = json.loads(child.said)
    if "harness" in record:
        raise HarnessError(f"{child.case.id}: {record['harness']}")
    return Verdict(record["outcome"], record["detail"])
