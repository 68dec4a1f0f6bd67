"""Cases that do what no library may, to see that each kind of fault is noticed."""

from __future__ import annotations

import ctypes
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import graphlens
from graphlens.errors import InputError
from tests.hostile import cases
from tests.hostile.cases import Case, Owed, Place
from tests.hostile.children import BYTES, play_all

Use = Callable[[Place], list[str]]


def _clean(_: Place) -> list[str]:
    raise InputError("a clean error")


def _panic(_: Place) -> list[str]:
    raise BaseException("as a Rust panic is")


def _spin(_: Place) -> list[str]:
    while True:
        pass


def _wait(_: Place) -> list[str]:
    time.sleep(3600)
    return []


def _fifo(place: Place) -> list[str]:
    os.mkfifo(place.temporary / "pipe")
    return [(place.temporary / "pipe").read_text()]


def _eat(_: Place) -> list[str]:
    return [str(len(bytearray(2 * BYTES)))]


def _said_no_memory(_: Place) -> list[str]:
    raise InputError("ONNX Runtime: std::bad_alloc")


def _read_outside(place: Place) -> list[str]:
    (place.outside / "secret.txt").read_bytes()
    return []


def _read_outside_natively(place: Place) -> list[str]:
    os.close(ctypes.CDLL(None).open(os.fsencode(place.outside / "secret.txt"), os.O_RDONLY))
    return []


def _read_by_link(place: Place) -> list[str]:
    (place.temporary / "link").symlink_to("/etc/hostname")
    Path(place.temporary / "link").read_bytes()
    (place.temporary / "link").unlink()
    return []


def _list_outside(place: Place) -> list[str]:
    os.listdir(place.outside)
    return []


def _write_outside(place: Place) -> list[str]:
    (place.outside / "new").write_text("new")
    return []


def _leave_temporary(place: Place) -> list[str]:
    (place.temporary / "left").touch()
    return []


def _leave_partial(place: Place) -> list[str]:
    (place.out.parent / ".out.1-2-3.partial").mkdir()
    return []


def _leave_after_error(place: Place) -> list[str]:
    place.out.mkdir()
    raise InputError("after half of it was written")


def _write_input(place: Place) -> list[str]:
    (place.model.parent / "new").touch()
    return []


def _exit(_: Place) -> list[str]:
    os._exit(3)


def _abort(_: Place) -> list[str]:
    os.abort()


def _crash(_: Place) -> list[str]:
    ctypes.string_at(0)
    return []


# What is done, what the case is owed, and what must come of it.
ALL: tuple[tuple[Use, Owed, str], ...] = (
    (_clean, "refused", cases.CLEAN),
    (_clean, "either", cases.CLEAN),
    (_clean, "right", cases.WRONG),
    (lambda _: [], "right", cases.RIGHT),
    (lambda _: [], "refused", cases.WRONG),
    (lambda _: ["off by 1"], "either", cases.WRONG),
    (lambda _: ["off by 1"], "right", cases.WRONG),
    (lambda _: ["off by 1"], "safe", cases.RIGHT),
    (lambda _: [][0], "either", cases.RAW),
    (_panic, "either", cases.RAW),
    (_abort, "either", cases.ABORT),
    (_crash, "either", cases.ABORT),
    (_exit, "either", cases.ABORT),
    (_spin, "either", cases.HANG),
    (_wait, "either", cases.HANG),
    (_fifo, "either", cases.HANG),
    (_eat, "either", cases.MEMORY),
    (_said_no_memory, "refused", cases.MEMORY),
    (_said_no_memory, "either", cases.CLEAN),
    (_read_outside, "safe", cases.ESCAPE),
    (_read_outside_natively, "safe", cases.ESCAPE),
    (_read_by_link, "safe", cases.ESCAPE),
    (_list_outside, "safe", cases.ESCAPE),
    (_write_outside, "safe", cases.ESCAPE),
    (_leave_temporary, "safe", cases.LEFTOVER),
    (_leave_partial, "safe", cases.LEFTOVER),
    (_leave_after_error, "refused", cases.LEFTOVER),
    (_write_input, "safe", cases.LEFTOVER),
)


def check(jobs: int) -> int:
    """Plays them; 1 if one of them came to something else than it must.

    Args:
        jobs: How many play at once.
    """
    made = [
        Case(f"itself/{index:02}{use.__name__}", "itself", lambda _: None, use, owed)
        for index, (use, owed, _) in enumerate(ALL)
    ]
    wanted = {case.id: outcome for case, (_, _, outcome) in zip(made, ALL, strict=True)}
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="hostile-") as scratch:
        for case, verdict in play_all(made, graphlens.embedded_model(), Path(scratch), jobs, seconds=1):
            if verdict.outcome != wanted[case.id]:
                wrong += 1
                print(f"{case.id}: {verdict.outcome} ({verdict.detail}), where it must be {wanted[case.id]}")
    print(f"{len(made) - wrong} of {len(made)} are noticed as what they are")
    return int(wrong > 0)
