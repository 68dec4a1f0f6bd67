"""Ctrl-C, and any signal handler that raises: it ends runs with Python hooks, never the process, and leaves nothing on."""

from __future__ import annotations

import _thread
import contextvars
import dis
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from graphlens import Ablate, HookedTransformer
from graphlens.model import hooks, per_thread
from graphlens.runtime import callbacks, ctrl_c
from graphlens.runtime.entry import here

Z, PRE = "blocks.1.attn.hook_z", "blocks.1.hook_resid_pre"
ALL = [(lambda name: True, lambda activation, hook: None)]
ROOT = Path(__file__).parents[2]
STUCK = 20  # seconds after which a hook that should have been ended gives up

PROGRAM = '''
import asyncio, atexit, ctypes, os, random, signal, sys, threading, time
import numpy as np

RUNS = {runs}
random.seed(int(sys.argv[2]))
now = lambda: (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM), signal.pthread_sigmask(signal.SIG_BLOCK, ()))
MAIN = threading.main_thread().ident
seen, state, swallowed = [], [], []
sys.unraisablehook = lambda lost: swallowed.append(repr(lost.object))

def hook(activation, hook):
    if random.random() < 0.02:  # rarely: it would take most of the time
        state.append(now())
    if random.random() < 0.02:
        time.sleep(0.001)
    if hook.name == "blocks.1.hook_resid_pre":
        return activation * np.float32(2)

class Alarm(Exception):
    pass

def alarm(number, frame):
    raise Alarm

signal.signal(signal.SIGALRM, alarm)
before = now()
from graphlens import HookedTransformer
model = HookedTransformer.from_onnx(sys.argv[1], "cpu")
tokens = np.arange(24).reshape(2, 12)
plain = model(tokens)
hooks = [(lambda name: True, hook)]
expected = model.run_with_hooks(tokens, fwd_hooks=hooks)
assert not np.allclose(expected, plain, atol=1e-3)
started = time.perf_counter()
for _ in range(5):
    assert (model.run_with_hooks(tokens, fwd_hooks=hooks) == expected).all()
one_run = (time.perf_counter() - started) / 5

class Sender(threading.Thread):
    """Sends one signal at a random moment of a run after each ``ask``."""
    def __init__(self, send):
        super().__init__(daemon=True)
        self.asked, self.sent, self.send = threading.Semaphore(0), 0, send
        self.start()
    def run(self):
        while True:
            self.asked.acquire()
            time.sleep(random.random() * one_run)
            self.send()
            self.sent += 1

def interrupted(sender, kind, run):
    """Makes runs until the signal comes."""
    sender.asked.release()
    target = sender.sent + 1
    try:
        while True:
            assert (run() == expected).all()
            if sender.sent >= target:
                time.sleep(0.01)
                # Python itself loses what a handler raises in a function that it calls when an object goes (asyncio has such).
                assert swallowed and "WeakSet" in swallowed.pop(), "the signal was lost"
                return 1
    except kind:
        assert (run() == expected).all()  # nothing is left for the next run
        return 1

run = lambda: model.run_with_hooks(tokens, fwd_hooks=hooks)
ints = Sender(lambda: os.kill(os.getpid(), signal.SIGINT))
alarms = Sender(lambda: signal.pthread_kill(MAIN, signal.SIGALRM))
{body}
assert model.runner.active().plain
assert (model(tokens) == plain).all()
assert set(map(str, state)) == {{str(before)}} == {{str(now())}}, (before, now())
print("done")
'''
BODIES = {
    "main thread": """
count = sum(interrupted(ints, KeyboardInterrupt, run) for _ in range(RUNS))
count += sum(interrupted(alarms, Alarm, run) for _ in range(RUNS // 4))
assert count == RUNS + RUNS // 4
""",
    # What a kernel of Jupyter does: cells are coroutines of a loop in the main thread, and Ctrl-C comes to it.
    "event loop": """
async def cell():
    return run()
loop = asyncio.new_event_loop()
assert sum(interrupted(ints, KeyboardInterrupt, lambda: loop.run_until_complete(cell())) for _ in range(RUNS)) == RUNS
loop.close()
""",
    # Runs of another thread go on as if nothing happened; the main thread alone is interrupted.
    "worker thread": """
found, ended = [], threading.Event()
def work():
    while not ended.is_set():
        found.append((run() == expected).all())
other = threading.Thread(target=work)
other.start()
count = 0
for _ in range(RUNS):
    ints.asked.release()
    try:
        time.sleep(10)  # Thread.join takes a thread for ended when it is interrupted (Python 3.11)
    except KeyboardInterrupt:
        count += 1
ended.set()
other.join()
assert count == RUNS, count
assert all(found) and len(found) > 10, len(found)
""",
    # What a thread raises in another one comes where signal handlers come in the main thread.
    "exceptions of another thread": """
found, ended = [], threading.Event()
def work():
    while not ended.is_set():
        try:
            while not ended.is_set():
                found.append((run() == expected).all())
        except Alarm:
            found.append(None)
other = threading.Thread(target=work)
other.start()
for _ in range(RUNS):
    time.sleep(random.random() * one_run)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(other.ident), ctypes.py_object(Alarm))
    while (None not in found[-3:]) and other.is_alive():
        time.sleep(0.001)
assert other.is_alive()
ended.set()
other.join()
assert found.count(False) == 0 and found.count(None) > RUNS // 4, (found.count(False), found.count(None), len(found))
""",
}


def done(code: str, *arguments: object) -> None:
    """Runs a program, which must end well and say so: an abort would show as a negative exit code."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (ran.returncode, ran.stdout.strip()) == (0, "done"), (ran.returncode, ran.stdout, ran.stderr[-3000:])


@pytest.mark.parametrize("body", BODIES)
def test_interrupted_at_random_moments_no_run_aborts_and_the_next_is_right(body: str, tiny_folder: Path) -> None:
    runs = 200 if body == "main thread" else 50
    done(PROGRAM.format(runs=runs, body=BODIES[body]), tiny_folder, 1)


@pytest.mark.parametrize("earlier", [True, False], ids=["registered before graphlens", "registered last"])
def test_a_run_at_the_end_of_the_interpreter(earlier: bool, tiny_folder: Path) -> None:
    code = """
import atexit, sys
import numpy as np
double = [("blocks.1.hook_resid_pre", lambda x, hook: x * np.float32(2))]
def last():
    print("done" if (model.run_with_hooks([[1, 2, 3]], fwd_hooks=double) == expected).all() else "wrong")
if sys.argv[2] == "True":
    atexit.register(last)
from graphlens import HookedTransformer
model = HookedTransformer.from_onnx(sys.argv[1], "cpu")
expected = model.run_with_hooks([[1, 2, 3]], fwd_hooks=double)
if sys.argv[2] == "False":
    atexit.register(last)
"""
    done(code, tiny_folder, earlier)


def test_a_first_run_at_the_end_of_the_interpreter(tiny_folder: Path) -> None:
    code = """
import atexit, sys
import numpy as np
def last():
    found = model.run_with_hooks([[1, 2, 3]], fwd_hooks=[("hook_embed", lambda x, hook: x * np.float32(1))])
    print("done" if (found == plain).all() else "wrong")
atexit.register(last)
from graphlens import HookedTransformer
model = HookedTransformer.from_onnx(sys.argv[1], "cpu")
plain = model([[1, 2, 3]])
"""
    done(code, tiny_folder)


# Inside a hook


def until(condition: Callable[[], Any]) -> None:
    """Spends time in Python until a condition holds."""
    end = time.monotonic() + STUCK
    while not condition():
        assert time.monotonic() < end, "nothing ended the hook"


def never() -> bool:
    return False


@pytest.mark.parametrize("nested", [False, True])
def test_a_ctrl_c_ends_a_hook_that_would_go_on(nested: bool, tiny: HookedTransformer, tokens: np.ndarray) -> None:
    seen, expected = list[str](), tiny(tokens)

    def stuck(activation: np.ndarray, hook: Any) -> None:
        seen.append(hook.name)
        os.kill(os.getpid(), signal.SIGINT)
        until(never)

    def runs_the_model(activation: np.ndarray, hook: Any) -> None:
        tiny.run_with_hooks(tokens, fwd_hooks=[(PRE, stuck)])
        seen.append("after the run inside")

    with pytest.raises(KeyboardInterrupt):
        tiny.run_with_hooks(tokens, fwd_hooks=[(Z, runs_the_model if nested else stuck), ("unembed.hook_in", stuck)])
    assert seen == [PRE if nested else Z]
    np.testing.assert_array_equal(tiny.run_with_hooks(tokens, fwd_hooks=ALL), expected)


def test_a_ctrl_c_ends_a_hook_that_waits(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    expected, free, ended = tiny(tokens), threading.Event(), list[bool]()

    def waits(activation: np.ndarray, hook: Any) -> None:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            free.wait(STUCK)
        finally:
            ended.append(True)

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt) as caught:
        tiny.run_with_hooks(tokens, fwd_hooks=[(Z, waits)])
    assert ended
    assert time.monotonic() - started < STUCK / 2
    assert "waits" in [entry.name for entry in caught.traceback]  # as it would be without a run around it
    np.testing.assert_array_equal(tiny.run_with_hooks(tokens, fwd_hooks=ALL), expected)


def test_a_hook_that_catches_a_ctrl_c_never_makes_numbers_wrong(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    """The run goes on, or it is over: a thread may have stopped it before the hook was told."""
    expected, caught, over = tiny(tokens), 0, 0

    def deaf(activation: np.ndarray, hook: Any) -> None:
        nonlocal caught
        try:
            os.kill(os.getpid(), signal.SIGINT)
            until(never)
        except KeyboardInterrupt:
            caught += 1

    for _ in range(20):
        try:
            found = tiny.run_with_hooks(tokens, fwd_hooks=[(PRE, deaf)])
        except KeyboardInterrupt:
            over += 1
        else:
            np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(tiny.run_with_hooks(tokens, fwd_hooks=ALL), expected)  # nothing is left for it
    assert caught == 20


def test_a_signal_to_another_thread_or_from_python_is_seen_in_the_hook(
    tiny: HookedTransformer, tokens: np.ndarray
) -> None:
    other = threading.Thread(target=time.sleep, args=(STUCK,), daemon=True)
    other.start()
    assert other.ident is not None
    to_another = partial(signal.pthread_kill, other.ident, signal.SIGINT)
    for send in (_thread.interrupt_main, to_another):
        seen = list[int]()

        def stuck(activation: np.ndarray, hook: Any, send: Callable[[], None] = send, seen: list[int] = seen) -> None:
            seen.append(threading.get_ident())
            send()
            until(never)

        with pytest.raises(KeyboardInterrupt):
            tiny.run_with_hooks(tokens, fwd_hooks=[(Z, stuck)])
        assert seen == [threading.get_ident()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_runs_of_a_forked_process(tiny_folder: Path) -> None:
    """Forked between runs, and in a hook, of the main thread and of another. A signal to the child stops no run of its parent."""
    code = """
import os, signal, sys, threading
import numpy as np
from graphlens import HookedTransformer
from graphlens.runtime import PythonCalls
double = lambda x, hook: x * np.float32(2)
model = HookedTransformer.from_onnx(sys.argv[1], "cpu")
tokens = [[1, 2, 3]]
run = lambda hook: model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_pre", hook)])
expected = run(double)
def child():
    right = [PythonCalls({}).run(lambda: 7) for _ in range(3)] == [7, 7, 7]
    try:
        PythonCalls({}).run(lambda: os.kill(os.getpid(), signal.SIGINT))
        right = False
    except KeyboardInterrupt:
        pass
    os._exit(0 if right else 1)
def forks(x=None, hook=None):
    pid = os.fork()
    if pid == 0:
        child()
    codes.append(os.waitpid(pid, 0)[1])
    return None if x is None else double(x, hook)
def all_forks():
    forks()
    found.extend([run(forks), run(double)])
codes, found = [], []
all_forks()
other = threading.Thread(target=all_forks)
other.start()
other.join()
print("done" if all((array == expected).all() for array in found) and codes == [0] * 4 else (codes, "wrong"))
"""
    done(code, tiny_folder)


def test_a_hook_sees_and_sets_the_callers_context(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    seen = list[Any]()

    def hook(activation: np.ndarray, hook: Any) -> None:
        seen.append((variable.get(), np.geterr()["over"], tiny.runner.active().interventions))
        variable.set(f"{variable.get()} hook")

    def call() -> str:
        variable.set("caller")
        edit = Ablate(Z, heads=0)
        with np.errstate(over="raise"), tiny.intervene(edit):
            tiny.run_with_hooks(tokens, fwd_hooks=[(PRE, hook), ("unembed.hook_in", hook)])
        assert [(over, list(items)) for _, over, items in seen[-2:]] == [("raise", [edit])] * 2
        return variable.get()

    assert contextvars.copy_context().run(call) == "caller hook hook"
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(call).result() == "caller hook hook"
    assert [name for name, *_ in seen] == ["caller", "caller hook"] * 2


def test_a_hooks_error_keeps_what_it_says_of_its_cause(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    """Also where the run is made while another error is handled, as if the hook were called there."""

    def fails(activation: np.ndarray, hook: Any) -> None:
        try:
            raise KeyError("first")
        except KeyError:
            raise ValueError("second")  # noqa: B904 - its context is what is looked at

    def fails_of(activation: np.ndarray, hook: Any) -> None:
        raise ValueError("third") from OSError("its cause")

    for hook, kept in ((fails, (type(None), KeyError)), (fails_of, (OSError, ZeroDivisionError))):
        try:
            raise ZeroDivisionError("around the run")
        except ZeroDivisionError:
            with pytest.raises(ValueError, match="second" if hook is fails else "third") as caught:
                tiny.run_with_hooks(tokens, fwd_hooks=[(Z, hook)])
        error = caught.value
        assert (type(error.__cause__), type(error.__context__)) == kept


def test_an_error_stops_the_run_at_once(
    tiny: HookedTransformer, tokens: np.ndarray, capfd: pytest.CaptureFixture[str]
) -> None:
    # ONNX Runtime is told to stop (RunOptions.terminate) and does so before its next operator.
    invoked, stops = list[str](), list[Any]()

    class Noting(callbacks.PythonCalls):
        def call(self, activation: np.ndarray, run: np.ndarray, attributes: Mapping[str, str]) -> np.ndarray:
            invoked.append(attributes["index"])
            return super().call(activation, run, attributes)

        def on_start(self, options: Any) -> None:
            stops.append(options)
            super().on_start(options)

    def fail(activation: np.ndarray, hook: Any) -> None:
        raise ZeroDivisionError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graphlens.engine.feeding.PythonCalls", Noting)
        with tiny.hooks(ALL), pytest.raises(ZeroDivisionError):
            tiny.run_with_hooks(tokens, fwd_hooks=[("hook_embed", fail)])
    assert len(stops) == 1
    assert len(invoked) == 1  # of 74
    assert capfd.readouterr() == ("", "")  # ONNX Runtime would print that it was told to stop


# At every single step


# After these Python looks for signals, and where a function begins. Nowhere else: after taking a lock for ``with``, say.
LOOKS = {dis.opmap[name] for name in ("CALL", "CALL_KW", "CALL_FUNCTION_EX", "JUMP_BACKWARD") if name in dis.opmap}


@contextmanager
def interrupted_at(step: int, *modules: Any) -> Iterator[None]:
    """Raises KeyboardInterrupt on this thread's way through some modules, as a signal handler would.

    Args:
        step: At which of the places where Python would call one, in the order in which they are passed.
        modules: The modules.
    """
    files, left = {module.__file__ for module in modules}, step

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        before = None

        def inside(frame: FrameType, event: str, _: object) -> Any:
            nonlocal before
            if event == "opcode":
                if before in LOOKS:
                    pass_one()
                before = frame.f_code.co_code[frame.f_lasti]
            return inside

        pass_one()
        return inside

    def pass_one() -> None:
        nonlocal left
        if left == 0:
            sys.settrace(None)
            raise KeyboardInterrupt
        left -= 1

    outside = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(outside)


def test_an_interrupted_block_is_never_left_open(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    registry = tiny.runner.hooks

    def double(z: np.ndarray, hook: Any) -> np.ndarray:
        return z * 2

    def block() -> None:
        with tiny.hooks([(Z, double)], clear_contexts=True), tiny.intervene(Ablate(Z, heads=0)):
            tiny.add_hook(PRE, double, level=1)  # it goes with the block
            registry.point(Z).ctx["kept"] = True

    kept, step = [], 0
    while True:
        try:
            with interrupted_at(step, per_thread, hooks):
                block()
        except KeyboardInterrupt as error:
            kept.append(error)  # the traceback, with all that its frames hold, as a prompt keeps the last one
            assert tiny.runner.active().plain, step
            assert registry.snapshot() == (), step
            assert registry.point(Z).ctx == {}, step
            step += 1
        else:
            break
    assert step > 60
    assert tiny.runner.active().plain


def test_blocks_of_an_exit_stack_and_of_a_decorator(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    plain = tiny(tokens)
    with ExitStack() as stack:
        stack.enter_context(tiny.hooks([(Z, lambda z, hook: z * 0)]))
        edited = tiny(tokens)
        assert np.abs(edited - plain).max() > 1e-3
    np.testing.assert_array_equal(tiny(tokens), plain)
    decorated = tiny.hooks([(Z, lambda z, hook: z * 0)])(lambda: tiny(tokens))
    for _ in range(2):
        np.testing.assert_array_equal(decorated(), edited)
    np.testing.assert_array_equal(tiny(tokens), plain)


def test_a_run_interrupted_at_any_step_leaves_nothing_behind(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    def double(z: np.ndarray, hook: Any) -> np.ndarray:
        return z * 2

    expected = tiny.run_with_hooks(tokens, fwd_hooks=[(Z, double)])
    step, threads = 0, threading.active_count()
    while True:
        try:
            with interrupted_at(step, callbacks, ctrl_c):
                found = tiny.run_with_hooks(tokens, fwd_hooks=[(Z, double)])
        except KeyboardInterrupt:
            assert here.turn.calls is None, step
            again = tiny.run_with_hooks(tokens, fwd_hooks=[(Z, double)])
            np.testing.assert_array_equal(again, expected)
            assert signal.set_wakeup_fd(-1) == -1, step
            step += 1
        else:
            break
    np.testing.assert_array_equal(found, expected)
    assert step > 10
    assert threading.active_count() <= threads + 1


# What else runs


JOBS = """
import os, random, signal, sys, threading, time
from graphlens import HookedTransformer
from tests.soak.soak_jobs import differs, jobs

random.seed(2)
model = HookedTransformer.from_onnx(sys.argv[1], "cpu")
work = jobs(model)
expected = {name: job() for name, job in work.items()}

def press(seconds):
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGINT)

for name, job in work.items():
    started = time.perf_counter()
    job()
    took = time.perf_counter() - started
    for _ in range(4):
        keyboard = threading.Thread(target=press, args=(random.random() * took,))
        try:
            keyboard.start()
            job()
            time.sleep(10)
            raise AssertionError("the Ctrl-C was lost")
        except KeyboardInterrupt as error:
            kept = error  # its traceback holds what was under way
        assert model.runner.active().plain, name
        for other in (name, "run", "hooks"):
            assert not differs(work[other](), expected[other]), (name, other, differs(work[other](), expected[other]))
print("done")
"""


def test_interrupted_sweeps_generations_and_gradients_leave_the_model_as_it_was(tiny_copy: Path) -> None:
    done(JOBS, tiny_copy)
