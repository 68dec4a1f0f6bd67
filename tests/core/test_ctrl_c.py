"""Ctrl-C while a run with Python hooks is between two of them: it stops at once, and nobody's signals or files are touched."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphlens import HookedTransformer
from graphlens.runtime import ctrl_c

PRE = "blocks.1.hook_resid_pre"
ALL = [(lambda name: True, lambda activation, hook: None)]


def test_a_ctrl_c_between_two_hooks_stops_the_run_at_once(tiny: HookedTransformer) -> None:
    tokens = np.random.default_rng(1).integers(0, tiny.cfg.d_vocab, (96, tiny.cfg.n_ctx))

    def press(activation: np.ndarray, hook: Any) -> None:
        threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()

    def took(*hooks: Callable[..., None]) -> float:
        started = time.perf_counter()
        with contextlib.suppress(KeyboardInterrupt):
            tiny.run_with_hooks(tokens, fwd_hooks=[("hook_embed", hook) for hook in hooks])
            assert not hooks or hooks[0] is not press, "the Ctrl-C was lost"
        return time.perf_counter() - started

    took(lambda activation, hook: None)
    whole = min(took(lambda activation, hook: None) for _ in range(3))
    stopped = min(took(press) for _ in range(3))
    assert stopped < whole / 2, (stopped, whole)


def test_the_run_is_stopped_before_python_calls_the_handler() -> None:
    told = list[float]()

    class Run:
        def interrupt(self) -> None:
            told.append(time.monotonic())

    def press() -> None:
        time.sleep(0.05)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)  # so that the sleep in C goes on

    before = signal.getsignal(signal.SIGINT)
    keyboard = threading.Thread(target=press)
    over = list[float]()

    def waits() -> None:
        assert ctrl_c.begin(Run(), None)
        try:
            keyboard.start()
            ctypes.CDLL(None).usleep(400_000)
        finally:
            over.append(time.monotonic())
            ctrl_c.end(None)

    with pytest.raises(KeyboardInterrupt):
        waits()
    keyboard.join()
    assert signal.getsignal(signal.SIGINT) is before
    assert len(told) == 1
    assert told[0] < over[0] - 0.1


@pytest.mark.parametrize("handler", ["mine", "none"])
def test_a_handler_that_may_not_raise_stops_nothing_on_its_own(
    handler: str, tiny: HookedTransformer, tokens: np.ndarray
) -> None:
    expected, called = tiny(tokens), list[int]()

    def mine(number: int, frame: Any) -> None:
        called.append(number)

    def press(activation: np.ndarray, hook: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, mine if handler == "mine" else signal.SIG_IGN)
    try:
        found = tiny.run_with_hooks(tokens, fwd_hooks=[(lambda name: True, press)])
    finally:
        signal.signal(signal.SIGINT, before)
    np.testing.assert_array_equal(found, expected)
    assert bool(called) == (handler == "mine")


def test_somebody_elses_wakeup_descriptor_stays_and_gets_every_signal(
    tiny: HookedTransformer, tokens: np.ndarray
) -> None:
    """That of asyncio, say, which is told of signals in no other way."""
    tiny.run_with_hooks(tokens, fwd_hooks=ALL)
    assert signal.set_wakeup_fd(-1) == -1  # nothing stays after a run
    out, into = os.pipe()
    os.set_blocking(into, False)
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    try:
        signal.set_wakeup_fd(into)
        for _ in range(5):
            signal.raise_signal(signal.SIGALRM)
            tiny.run_with_hooks(tokens, fwd_hooks=[(PRE, lambda activation, hook: signal.raise_signal(signal.SIGALRM))])
        assert signal.set_wakeup_fd(-1) == into
        assert os.read(out, 100) == bytes([signal.SIGALRM]) * 10
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGALRM, before)
        os.close(out)
        os.close(into)


def test_no_signal_is_written_into_a_file_that_has_the_number_of_a_closed_pipe(
    tiny_folder: Path, tmp_path: Path
) -> None:
    code = """
import os, signal, sys
import numpy as np
from graphlens import HookedTransformer
model = HookedTransformer.from_onnx(sys.argv[1], "cpu")
press = lambda x, hook: os.kill(os.getpid(), signal.SIGINT)
def interrupted():
    try:
        model.run_with_hooks([[1, 2, 3]], fwd_hooks=[("hook_embed", press)])
    except KeyboardInterrupt:
        return True
assert interrupted()
os.closerange(3, 64)  # as a daemon does
files = [open(os.path.join(sys.argv[2], str(number)), "w+b", buffering=0) for number in range(60)]
assert {file.fileno() for file in files} >= set(range(3, 63))
assert interrupted() and interrupted()
print("done" if all(os.fstat(file.fileno()).st_size == 0 for file in files) else "written")
"""
    command = [sys.executable, "-c", code, str(tiny_folder), str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout.strip()) == (0, "done"), (ran.returncode, ran.stdout, ran.stderr[-3000:])


_RUNS_IN_HANDLERS = """
import signal, sys
import numpy as np
from graphlens import HookedTransformer

one, other = (HookedTransformer.from_onnx(sys.argv[1], "cpu") for _ in range(2))
tokens, hooks = np.arange(2)[None], [("blocks.1.attn.hook_z", lambda activation, hook: activation * 0)]
expected = one.run_with_hooks(tokens, fwd_hooks=hooks)
other.run_with_hooks(tokens, fwd_hooks=hooks)
random, made, inside = np.random.default_rng(0), 0, False

def handler(number, frame):
    global made, inside
    if inside:
        return
    inside = True
    assert np.array_equal(other.run_with_hooks(tokens, fwd_hooks=hooks), expected)
    made, inside = made + 1, False

signal.signal(signal.SIGALRM, handler)
for _ in range(2500):
    signal.setitimer(signal.ITIMER_REAL, 1e-4 + 8e-4 * random.random())
    assert np.array_equal(one.run_with_hooks(tokens, fwd_hooks=hooks), expected)
signal.setitimer(signal.ITIMER_REAL, 0)
assert made > 500, made
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no such timers here")
def test_a_signals_handler_may_make_runs_itself_at_any_moment_of_one(tiny_folder: Path) -> None:
    command = [sys.executable, "-c", _RUNS_IN_HANDLERS, str(tiny_folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
