"""A process that has everything imported, and forks for each job: in the fork the job meets a fault.

It reads requests, a line of JSON each, and answers with one. Run by tests/faults/harness.py.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

NOBODY = 65534  # the uid and gid of the children who lack permissions
LIMIT = 120  # seconds for one fork
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Event of the audit hook -> where its arguments hold (path, folder that the path is relative to).
EVENTS: Mapping[str, tuple[tuple[int, int | None], ...]] = {
    "open": ((0, None),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),),
    "os.mkdir": ((0, 2),),
    "os.rmdir": ((0, 1),),
    "os.remove": ((0, 1),),
    "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.utime": ((0, 3),),
    "shutil.rmtree": ((0, None),),
    "shutil.copyfile": ((1, None),),
    "fcntl.ioctl": ((0, None),),
    "fcntl.flock": ((0, None),),
}


class Watch:
    """An audit hook: it counts the events that write below a folder, and does something before one of them.

    Args:
        folder: The folder.
        at: The number of the event, from 0; None only counts.
        act: What to do before it.
    """

    def __init__(self, folder: str, at: int | None, act: Callable[[], object]) -> None:
        self.folder, self.at, self.act = os.path.realpath(folder), at, act
        self.seen: list[str] = []
        self.on = True

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "ctypes.dlsym":  # which exchanges two folders
            names = [self.folder] if arguments[1] == "renameat2" else []
        elif event in EVENTS and not (event == "open" and not arguments[2] & WRITING):
            names = [self._path(arguments, *where) for where in EVENTS[event]]
        else:
            return
        if not any(name == self.folder or name.startswith(f"{self.folder}/") for name in names):
            return
        self.seen.append(f"{event} {' '.join(name.removeprefix(self.folder) for name in names)}")
        if len(self.seen) - 1 == self.at:
            self.on = False
            self.act()

    @staticmethod
    def _path(arguments: tuple[Any, ...], at: int, base_at: int | None) -> str:
        given, base = arguments[at], -1 if base_at is None else arguments[base_at]
        if isinstance(given, int):
            return os.readlink(f"/proc/self/fd/{given}") if given >= 0 else ""
        folder = os.readlink(f"/proc/self/fd/{base}") if isinstance(base, int) and base >= 0 else os.getcwd()
        return os.path.normpath(os.path.join(folder, os.fsdecode(given)))


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def lose_permissions(refused: str) -> None:
    """Goes on as a user who may read everything and not write into a folder, and makes sure of that.

    Reading stays allowed (CAP_DAC_READ_SEARCH), since Python itself may lie in root's own folder.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    keep_capabilities, read_everything, version = 8, 1 << 2, 0x20080522
    assert libc.prctl(keep_capabilities, 1, 0, 0, 0) == 0
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    sets = (ctypes.c_uint32 * 6)(read_everything, read_everything, 0, 0, 0, 0)  # effective, permitted, inheritable
    assert libc.capset((ctypes.c_uint32 * 2)(version, 0), sets) == 0, os.strerror(ctypes.get_errno())
    try:
        Path(refused, "probe").write_text("probe")
    except PermissionError:
        return
    raise AssertionError(f"{refused} can be written")


def child(request: Mapping[str, Any]) -> dict[str, Any]:
    """What a fork does: a job, or a look at what one left."""
    from graphlens.errors import GraphlensError
    from tests.faults.jobs import JOBS, SCENES, make_templates

    signal.alarm(LIMIT)
    folder = request["folder"]
    os.environ["GRAPHLENS_CACHE"] = request.get("cache", f"{folder}/cache")
    if request["do"] == "templates":
        make_templates(Path(folder))
        return {"done": True}
    job = {**JOBS, **SCENES}[request["job"]]
    if request["do"] == "found":
        return {"found": job.found(Path(folder))}
    if request["do"] == "prepare":
        job.prepare(Path(request["templates"]), Path(folder))
        return {"done": True}
    acts: dict[str, Callable[[], object]] = {
        "kill": kill,
        "remove cache": lambda: shutil.rmtree(os.environ["GRAPHLENS_CACHE"], ignore_errors=True),
    }
    if "refused" in request:
        lose_permissions(request["refused"])
    watch = Watch(folder, request.get("at"), acts[request.get("act", "kill")])
    sys.addaudithook(watch)
    try:
        job.run(Path(folder))
    except GraphlensError as error:
        return {"refused": f"{type(error).__name__}: {error}", "events": watch.seen}
    finally:
        watch.on = False
    return {"done": True, "events": watch.seen}


def start(request: Mapping[str, Any]) -> tuple[int, int]:
    """Forks for a request. Returns the process and the end of the pipe that its answer comes from."""
    out, into = os.pipe()
    process = os.fork()
    if process:
        os.close(into)
        return process, out
    try:
        silent = os.open(os.devnull, os.O_RDWR)
        os.dup2(silent, 0)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        answer = child(request)
    except BaseException:  # noqa: BLE001 - whatever it is, the test that asked is to see it
        answer = {"traceback": traceback.format_exc()}
    os.write(into, json.dumps(answer).encode())
    os._exit(0)


def end(process: int, out: int) -> dict[str, Any]:
    """The answer of a fork, with the seconds of processor time that it took, and "killed" for the signal that ended it."""
    with os.fdopen(out, "rb") as pipe:
        text = pipe.read()
    _, status, used = os.wait4(process, 0)
    answer: dict[str, Any] = json.loads(text) if text else {}
    answer["cpu"] = used.ru_utime + used.ru_stime
    if os.WIFSIGNALED(status):
        answer["killed"] = os.WTERMSIG(status)
    return answer


def warm() -> None:
    """Imports everything, and makes tracing, which takes seconds, remember its graphs."""
    import torch

    from graphlens.export import trace as module
    from tests.faults import jobs

    torch.set_num_threads(1)
    trace, traced = module.trace, {}

    def remembered(config: Any, spec: Any, layers: Any = None) -> Any:
        facts = {
            k: v
            for k, v in config.to_dict().items()
            if k not in ("dtype", "transformers_version", "architectures", "_name_or_path")
        }
        key = repr((layers, sorted(facts.items())))
        if key not in traced:
            traced[key] = trace(config, spec, layers)
        return traced[key].clone()

    module.trace = remembered
    assert jobs.JOBS


def main() -> None:
    warm()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin:
        requests = json.loads(line)
        if requests[0]["do"] == "templates":
            # Here and not in a fork, so that forks find what was imported and traced for it.
            found = [child(requests[0])]
            signal.alarm(0)
        else:
            found = [end(*fork) for fork in [start(request) for request in requests]]
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
