"""How ONNX Runtime's calls come into Python: never through a step at which an exception could go out into C++."""

from __future__ import annotations

import _thread
import cProfile
import dis
import functools
import inspect
import operator
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from graphlens import HookedTransformer
from graphlens.errors import RunError
from graphlens.runtime import callbacks, entry
from graphlens.runtime.entry import Called, here

Z, PRE = "blocks.1.attn.hook_z", "blocks.1.hook_resid_pre"
X = np.arange(6, dtype=np.float32).reshape(2, 3)
# Where Python looks for signals, besides where a function begins or a generator is resumed ("RESUME").
LOOKS = ("CALL", "JUMP_BACKWARD", "POP_JUMP_BACKWARD", "RESUME", "SEND", "FOR_ITER", "END_ASYNC_FOR")
QUIET = {"JUMP_BACKWARD_NO_INTERRUPT", "CALL_INTRINSIC_1", "CALL_INTRINSIC_2"}


class Fake:
    """Callbacks that do what a test wants."""

    def __init__(self, work: Callable[[np.ndarray], Any]) -> None:
        self.error: BaseException | None = None
        self.options = SimpleNamespace(terminate=False)
        self.work = work

    def call(self, activation: np.ndarray, run: np.ndarray, attributes: Mapping[str, str]) -> Any:
        return self.work(activation)

    def interrupt(self) -> None:
        raise AssertionError


@pytest.fixture
def entered() -> Any:
    """Has this thread's calls answered by some callbacks until the end of a test."""
    before, kept = here.turn, []

    def enter(calls: Fake) -> None:
        here.turn = turn = entry.Turn(calls)
        answers = entry.answers(calls, turn)
        next(answers)
        kept.append(answers)
        turn.throw = answers.throw

    yield enter
    here.turn = before


def called(*, before: Callable[[], object] = int) -> tuple[int, tuple[int, ...], np.ndarray]:
    """One call as from C++. All is one call in C: what ``before`` leaves for Python to do waits until it is in the generator."""
    call = Called(7, [X, np.asarray(1)], {"index": "0"})
    answer = list(map(operator.call, (before, functools.partial(tuple, call))))[1]
    assert len(answer) == 3
    return answer


def exposed(code: Any) -> tuple[list[dis.Instruction], int]:
    """Follows a generator from where a ``Called`` is thrown into it to where it gives an answer.

    Args:
        code: Its code.

    Returns:
        The steps at which Python looks for signals and what a handler raises would not be caught, or would end the generator, or
        would come before there is an ``answer``; and the number of all steps at which it looks.
    """
    steps = {step.offset: step for step in dis.get_instructions(code)}
    following = dict(zip(steps, [*list(steps)[1:], -1], strict=True))
    handlers = {
        place: entry.target
        for entry in dis.Bytecode(code).exception_entries
        for place in range(entry.start, entry.end, 2)
    }

    def looks(offset: int) -> bool:
        name = steps[offset].opname
        return name.startswith(LOOKS) and name not in QUIET

    def caught(offset: int, kind: str) -> int | None:
        """Where an exception that comes at a step leads to: the first step of the clause that is for it."""
        at, clause = handlers.get(offset), ""
        while at is not None:
            step = steps[at]
            assert not looks(at), step
            if step.opname == "LOAD_GLOBAL":
                clause = step.argval
            if step.opname.startswith("POP_JUMP") and clause in (kind, "BaseException"):
                return following[at]
            if step.opname == "RERAISE":
                at = handlers.get(at)
            else:
                at = step.argval if step.opname.startswith("POP_JUMP") else following[at]
        return None

    yields = [offset for offset, step in steps.items() if step.opname == "YIELD_VALUE"]
    todo = [(first, False) for offset in yields if (first := caught(offset, "Called")) is not None]
    found, count, seen = list[dis.Instruction](), 0, set[tuple[int, bool]]()
    while todo:
        offset, answered = todo.pop()
        step = steps[offset]
        if (offset, answered) in seen:
            continue
        seen.add((offset, answered))
        if step.opname in ("YIELD_VALUE", "RETURN_VALUE", "RETURN_CONST", "RERAISE"):
            # Without an answer, with StopIteration or the error itself.
            found += [step] if step.opname != "YIELD_VALUE" or not answered else []
            continue
        if looks(offset):
            count += 1
            # Python looks after a jump back, and takes the error for one of the step before its target.
            places = [offset, step.argval - 2] if "JUMP" in step.opname else [offset]
            clauses = [caught(place, "what a handler raises") for place in places]
            found += [step for clause in clauses if clause is None or not answered]
            todo += [(clause, answered) for clause in clauses if clause is not None]
        answered = answered or ("STORE_FAST" in step.opname and "answer" in step.argrepr)
        if step.opcode in dis.hasjrel:
            todo.append((step.argval, answered))
        if not step.opname.startswith("JUMP"):
            todo.append((following[offset], answered))
    return found, count


def test_from_the_call_to_the_answer_all_steps_at_which_python_looks_for_signals_are_in_a_try() -> None:
    found, count = exposed(entry.answers.__code__)
    assert found == []
    assert count >= 2  # the call and the jump back

    def naked(calls: Any) -> Any:
        try:
            yield
        except Called as called:
            op, inputs, attributes = called.args
        answer = calls.call(inputs, attributes)
        yield (op, *answer).__iter__

    def calls_in_the_handler(calls: Any) -> Any:
        answer = None
        try:
            while True:
                try:
                    yield answer
                except Called as called:
                    op, inputs, attributes = called.args
                    answer = (op, *inputs).__iter__
                try:
                    answer = (op, *calls.call(inputs, attributes)).__iter__
                except BaseException as error:  # noqa: BLE001 - as in the original
                    calls.fail(error)
        except BaseException as error:  # noqa: BLE001
            calls.error = error

    def too_late(calls: Any) -> Any:
        answer = None
        try:
            while True:
                try:
                    yield answer
                except Called as called:
                    op, inputs, attributes = called.args
                answer = (op, *calls.call(inputs, attributes)).__iter__
        except BaseException as error:  # noqa: BLE001
            calls.error = error
            yield answer

    for careless in (naked, calls_in_the_handler, too_late):
        assert exposed(careless.__code__)[0] != []


def test_a_signal_that_waits_at_the_entry_is_kept_and_stops_the_run(entered: Any) -> None:
    for _ in range(50):
        calls = Fake(lambda x: x * 2)
        entered(calls)
        op, shape, values = called(before=_thread.interrupt_main)
        assert (op, shape) == (7, (2, 3))
        np.testing.assert_array_equal(values, X)
        assert isinstance(calls.error, KeyboardInterrupt)
        assert calls.options.terminate is True


def test_a_signal_that_waits_at_the_end_of_a_call_is_kept(entered: Any) -> None:
    """Where the answer is made: the activation then goes on unchanged. The jump back is read in the bytecode alone."""

    class Trips(int):
        shape = property(_thread.interrupt_main)  # C, which leaves the signal for Python's next look

    calls = Fake(lambda x: Trips(signal.SIGINT))
    entered(calls)
    op, shape, values = called()
    assert (op, shape) == (7, (2, 3))
    np.testing.assert_array_equal(values, X)
    assert isinstance(calls.error, KeyboardInterrupt)
    assert calls.options.terminate is True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entry, "ours", {7})
        op, shape, values = called()  # whatever is called afterwards goes on unchanged
    np.testing.assert_array_equal(values, X)


def test_calls_are_answered_one_after_the_other_and_only_the_first_error_is_kept(entered: Any) -> None:
    faults = iter([None, ValueError("first"), KeyError("second"), None])

    def work(x: np.ndarray) -> np.ndarray:
        fault = next(faults)
        if fault is not None:
            raise fault
        return x + 1

    calls = Fake(work)
    entered(calls)
    found = [called()[2] for _ in range(4)]
    for array, more in zip(found, (1, 0, 0, 1), strict=True):
        np.testing.assert_array_equal(array, X + more)
    assert repr(calls.error) == "ValueError('first')"


def test_a_hook_is_not_in_the_handling_of_an_exception(entered: Any) -> None:
    """The call comes in as an exception, which no hook may see: it would be the context of the hook's own errors."""
    seen = list[Any]()
    entered(Fake(lambda x: seen.append(sys.exc_info()) or x))
    called()
    try:
        raise OSError("around")
    except OSError as error:
        called()
        around = error, error.__traceback__
    assert seen == [(None, None, None), (OSError, *around)]


def test_nothing_of_a_call_is_kept(entered: Any) -> None:
    import weakref

    given, returned = list[Any](), list[Any]()

    class Mine(np.ndarray):
        pass

    def work(x: np.ndarray) -> np.ndarray:
        given.append(weakref.ref(x))
        returned.append(weakref.ref(result := np.array(x)))
        return result

    entered(Fake(work))
    for _ in range(3):
        tuple(Called(7, [X.copy().view(Mine), np.asarray(1)], {"index": "0"}))
    assert [ref() for ref in (*given[:-1], *returned[:-1])] == [None] * 4  # the last is in the generator until the next


def test_a_run_at_any_depth_is_right_or_a_recursion_error(tiny_folder: Path) -> None:
    """Never an abort: where the calls into a hook do not fit, the run does not begin."""
    code = """
import sys
import numpy as np
from graphlens import HookedTransformer
model = HookedTransformer.from_onnx(sys.argv[1], "cpu")
hooks = [("blocks.1.hook_resid_pre", lambda x, hook: x * np.float32(2))]
run = lambda: model.run_with_hooks([[1, 2, 3]], fwd_hooks=hooks)
expected = run()
def deep(levels):
    return run() if levels == 0 else deep(levels - 1)
right = wrong = errors = 0
sys.setrecursionlimit(400)
for levels in range(300, 400):
    try:
        found = deep(levels)
    except RecursionError:
        errors += 1
    else:
        right += 1
        wrong += not (found == expected).all()
assert right > 10 and errors > 10 and not wrong, (right, errors, wrong)
print("done")
"""
    ran = subprocess.run([sys.executable, "-c", code, str(tiny_folder)], capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout.strip()) == (0, "done"), (ran.returncode, ran.stderr[-2000:])


def test_a_call_of_another_run_is_refused(tiny: HookedTransformer) -> None:
    first, second = callbacks.PythonCalls({0: lambda x: x}), callbacks.PythonCalls({0: lambda x: x * 2})

    def work() -> None:
        _, _, values = Called(7, [X, second.run_id], {"index": "0"})
        np.testing.assert_array_equal(values, X)

    with pytest.raises(RunError, match="in the middle of another"):
        first.run(work)


def test_the_first_call_imports_nothing_where_a_signal_could_come(tiny_folder: Path) -> None:
    """pybind11 imports modules of NumPy in Python when an operator's answer is first taken: that was done beforehand."""
    code = """
import sys, threading
import numpy as np
from graphlens.runtime import open_session
from graphlens.runtime.operators import callback_library
from graphlens.runtime import first_call, entry
model = []
class Stop(Exception): pass
def keep(given, *arguments, **options):
    model.append(given)
    raise Stop
library = callback_library()
first_call.open_session = keep
try:
    first_call.make_first_call(library)
except Stop:
    pass
session = open_session(model[0], "cpu", custom_ops=library)
feeds = {"x": np.asarray(3, np.float32), "run": np.asarray(0, np.int64)}
frames = []
sys.setprofile(lambda frame, event, argument: event == "call" and frames.append(frame.f_code.co_filename))
found = session.run(["y"], feeds)
sys.setprofile(None)
inside = frames[frames.index(entry.__file__):]
assert found[0] == 3
assert not [name for name in frames if "numpy" in name or "importlib" in name], frames
print("done")
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout.strip()) == (0, "done"), (ran.returncode, ran.stderr[-2000:])


# Tracers and profilers


def test_a_tracer_sees_hooks_and_nothing_between_them(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    seen, tracers = list[str](), list[Any]()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        seen.append(frame.f_code.co_name)
        return trace

    def looks(activation: np.ndarray, hook: Any) -> None:
        tracers.append(sys.gettrace())

    outside = sys.gettrace()
    sys.settrace(trace)
    try:
        found = tiny.run_with_hooks(tokens, fwd_hooks=[(Z, looks), ("unembed.hook_in", looks)])
        after = sys.gettrace()
    finally:
        sys.settrace(outside)
    np.testing.assert_array_equal(found, tiny(tokens))
    assert tracers == [trace, trace]
    assert after is trace
    assert {"looks", "run_with_hooks"} <= set(seen)
    assert "answers" not in seen[seen.index("looks") :]  # it is entered where a tracer would do harm


def test_a_tracer_that_a_hook_sets_stays_as_a_debugger_wants_it(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    seen = list[str]()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        seen.append(frame.f_code.co_name)
        return trace

    def sets(activation: np.ndarray, hook: Any) -> None:
        sys.settrace(trace)

    def later(activation: np.ndarray, hook: Any) -> None:
        pass

    outside = sys.gettrace()
    try:
        tiny.run_with_hooks(tokens, fwd_hooks=[(Z, sets), ("unembed.hook_in", later)])
        after = sys.gettrace()
    finally:
        sys.settrace(outside)
    assert after is trace
    assert "later" in seen


def test_profilers_see_hooks_in_python_and_in_c(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    seen = list[str]()

    def mine(activation: np.ndarray, hook: Any) -> None:
        pass

    outside = sys.getprofile()
    sys.setprofile(lambda frame, event, argument: seen.append(frame.f_code.co_name))
    try:
        profile = sys.getprofile()
        tiny.run_with_hooks(tokens, fwd_hooks=[(Z, mine)])
        assert sys.getprofile() is profile
    finally:
        sys.setprofile(outside)
    assert "mine" in seen
    profiler = cProfile.Profile()
    with profiler:
        tiny.run_with_hooks(tokens, fwd_hooks=[(Z, mine), ("unembed.hook_in", mine)])
    profiler.create_stats()
    calls = {name: stats[0] for (_, _, name), stats in profiler.stats.items()}  # type: ignore[attr-defined]
    assert calls["mine"] == 2


def test_a_hook_runs_in_the_callers_thread(tiny: HookedTransformer, tokens: np.ndarray) -> None:
    """So what belongs to one thread is the hook's too: a connection of sqlite3, say."""
    local, seen = threading.local(), list[Any]()
    local.value = "caller's"

    def look(activation: np.ndarray, hook: Any) -> None:
        seen.append((threading.get_ident(), local.value, inspect.stack()[-1].filename))

    tiny.run_with_hooks(tokens, fwd_hooks=[(Z, look)])
    assert seen == [(threading.get_ident(), "caller's", inspect.stack()[-1].filename)]


def test_nothing_of_a_call_is_kept_until_the_next(entered: Any) -> None:
    """An activation may be as large as a model's logits."""

    class Watched(np.ndarray):
        pass

    given, made = (np.ones((2, 3), np.float32).view(Watched) for _ in range(2))
    calls = Fake(lambda x: results.pop())
    entered(calls)
    results, alive = [made], [weakref.ref(given), weakref.ref(made)]
    answer = tuple(Called(7, [given, np.asarray(0)], {}))
    assert answer[2] is made
    del given, made, answer
    assert [reference() for reference in alive] == [None, None]
