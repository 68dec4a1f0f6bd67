"""The engine: what was asked for -> which graph -> which session. Where surgery and runtime meet."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from graphlens.engine.block_pieces import Proof
from graphlens.engine.footprint import Footprint
from graphlens.engine.opener import Opener
from graphlens.engine.plan import LOGITS, Gates, Plan
from graphlens.errors import InputError
from graphlens.file.manifest import HookEntry, Manifest
from graphlens.file.names import UNEMBEDDED, axis_sizes, split_name
from graphlens.file.safetensors import WeightStore
from graphlens.runtime.callbacks import Callback, PythonCalls, callback_library
from graphlens.runtime.providers import CPU, Providers
from graphlens.runtime.sessions import Chain, Session

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphlens.engine import packed_weights

Array = npt.NDArray[Any]
_MAX_SESSIONS = 6
_SMALL = 1 << 26  # bytes of activations that are nothing to worry about, however small the weights

# Sessions of this process, shared by every engine over the same file: a second one would hold the weights again.
_pool: weakref.WeakValueDictionary[tuple[Any, ...], Session] = weakref.WeakValueDictionary()
_pool_lock = threading.RLock()


@dataclass(frozen=True)
class Results:
    """What a run gave: ``output`` (logits or residual, None if not asked for), activations by hook name, and the keys
    and values by output name, still where they were computed."""

    output: Array | None
    values: dict[str, Array]
    present: dict[str, Any]


class Engine:
    """A hooked file ready to run. Opening checks the file (surgery.check, fingerprints) but starts no session."""

    def __init__(self, path: str | os.PathLike[str], providers: Providers = None, n_ctx: int | None = None) -> None:
        from graphlens import surgery
        from graphlens.file.folder import model_path

        self.path = model_path(path).resolve()
        self.folder = self.path.parent
        self._asked = providers
        self._model = surgery.load(self.path)
        self.manifest: Manifest = surgery.read_manifest(self._model)
        if n_ctx is not None:
            longest = self.manifest.config.n_ctx
            if not 1 <= n_ctx <= longest:
                raise InputError(f"n_ctx={n_ctx}: this model has position embeddings for 1 to {longest} tokens.")
            self.manifest = replace(self.manifest, config=replace(self.manifest.config, n_ctx=n_ctx))
        size = sum(file.size for file in self.manifest.files.values())
        self._opener = Opener(self.path, self._model, providers, size)
        self.weights = WeightStore(self.folder, self.manifest.weights)
        self._graphs: OrderedDict[Plan, ir.Model] = OrderedDict()
        self._sessions: OrderedDict[Plan, Session] = OrderedDict()
        self._hooks: dict[Plan, Mapping[str, HookEntry]] = {}
        self._fired: dict[Plan, Mapping[str, Sequence[str]]] = {}
        self._gated: dict[tuple[str, tuple[str, ...]], set[str]] = {}  # (hook without its block, kinds) -> where asked
        self._footprints: dict[Plan, Footprint] = {}
        self._parts: dict[tuple[tuple[str, ...], tuple[str, ...]], Session] = {}
        self.sessions_built = 0
        self.proof = Proof()
        self._lock = threading.RLock()

    @property
    def hook_names(self) -> list[str]:
        """The hook points of the plain file, in firing order."""
        return list(self.manifest.hooks)

    @property
    def providers(self) -> list[str]:
        """The execution providers that are active, first choice first. Opens a session only where one tells: the CPU is
        always there, and any open session knows."""
        with self._lock:
            open_ = next(iter(self._sessions.values()), None)
        if open_ is None and self._opener.asked_providers == [CPU]:
            return [CPU]
        return (open_ or self.session(Plan())).providers

    @property
    def dtype(self) -> str:
        """The dtype of the weights, and of the activations where it is another."""
        computed = self.manifest.config.dtype
        stored = "weights.bfloat16.safetensors" in self.manifest.files
        return f"bfloat16 weights, {computed} activations" if stored else computed

    @property
    def open_sessions(self) -> list[Plan]:
        """The kinds of graph that have a session now, least recently used first."""
        with self._lock:
            return list(self._sessions)

    def hooks(self, plan: Plan) -> Mapping[str, HookEntry]:
        """The hook map of the graph that a plan asks for: name -> entry, in firing order."""
        if plan == Plan():
            return self.manifest.hooks
        if plan not in self._hooks:
            from graphlens import surgery

            plainly = self._ends_plainly(plan)
            hooks = surgery.read_manifest(self._graph(replace(plan, body=plainly))).hooks
            if plainly:  # what fires after the body is as it was
                last = {name: entry for name, entry in self.hooks(plan.ungated).items() if name not in hooks}
                hooks = {**hooks, **last}
            self._hooks[plan] = hooks
        return self._hooks[plan]

    def names(self, plan: Plan) -> list[str]:
        """The hook points a user sees in that graph, in firing order."""
        return list(self._firings(plan.ungated))

    def run(
        self,
        feeds: Mapping[str, Any],
        fetch: Sequence[str],
        callbacks: Mapping[str, Callback] | None = None,
        output: bool = True,
        plan: Plan | None = None,
        edits: Mapping[str, Mapping[str, Array]] | None = None,
    ) -> Results:
        """Runs the graph of a plan once. ``output`` asks for logits (or the residual, where the plan stops early).

        ``edits`` maps hook names of the plan's gates to the arrays of the gate by part (see gating.compose); a part left
        out changes nothing. They apply before the callbacks at the same hook point.

        ``callbacks`` maps hook names to functions activation -> activation, called in firing order as the run passes
        them; every fetched activation is the one after its own callback. Raises what a callback raised, and InputError for
        a hook point that the file does not return.
        """
        plan = plan or Plan()
        gate_feeds = _gate_feeds(edits, plan.gates) if edits else {}
        plan = replace(plan, python=True) if callbacks else plan
        if not (fetch or plan.gradients):
            few_read = bool(plan.gates) and not plan.python  # edited runs mostly read nothing
            plan = replace(plan, bare=plan.bare or few_read or self._outweighs(plan, feeds))
        plan = self._serving(plan)
        session, hooks = self.session(plan), self.hooks(plan)
        feeds = {**feeds, **gate_feeds}
        # A segment without blocks reads neither: there is nothing that a mask or a position could change.
        feeds = {k: v for k, v in feeds.items() if k in session.feedable or k not in ("attention_mask", "position_ids")}
        present = [name for name in session.outputs if name.startswith("present.")] if plan.past else []
        wanted = [*([plan.result] if output else []), *(hooks[name].value for name in fetch)]
        if not session.readable.issuperset(wanted):
            lost = [name for name in wanted if name not in session.readable]
            raise InputError(
                f"{lost[0]!r} ({len(lost)} of {len(wanted)} asked for) is not an output of {self.path}: the file was pruned, "
                "stripped or exposes other hook points. Ask for those it has, or export the model again."
            )
        # A run that fetches nothing still has to happen: its callbacks may be what it is for.
        values = list(dict.fromkeys(wanted)) or [plan.result]
        kept = {*present}
        if callbacks:
            results = self._run_with_callbacks(session, hooks, [*values, *present], feeds, callbacks, kept)
        elif wanted or present:
            results = session.run([*values, *present], feeds, keep=kept)
        else:
            results = []
        found = dict(zip([*values, *present], results, strict=False))
        return Results(
            found[plan.result] if output else None,
            {name: found[hooks[name].value] for name in fetch},
            {name: found[name] for name in present},
        )

    def _run_with_callbacks(
        self,
        session: Session,
        hooks: Mapping[str, HookEntry],
        values: Sequence[str],
        feeds: Mapping[str, Any],
        callbacks: Mapping[str, Callback],
        keep: set[str],
    ) -> list[Any]:
        from graphlens.surgery.python_gates import RUN_INPUT, gate_input

        at = {i: name for i, name in enumerate(hooks) if name.partition("@")[0] in callbacks}
        called = {
            i: _in_half(callback) if hooks[name].dtype == "float16" else callback
            for i, name in at.items()
            for callback in [callbacks[name.partition("@")[0]]]
        }
        on = np.asarray(True)
        with PythonCalls(called) as calls:
            gates = {gate_input(name): on for name in at.values()}
            return session.run(values, {**feeds, **gates, RUN_INPUT: calls.run_id}, calls.on_start, keep=keep)

    def gates(self, kinds: Mapping[str, tuple[str, ...]], plan: Plan) -> Gates:
        """The gates of a plan for the kinds of change wanted at hook points, further firings of theirs included."""
        firings = self._firings(plan.ungated)
        return tuple((name, kinds[hook]) for hook, names in firings.items() if hook in kinds for name in names)

    def _outweighs(self, plan: Plan, feeds: Mapping[str, Any]) -> bool:
        """Whether the hook points of a run come to more than the weights, all of which a session of its own might load.

        ONNX Runtime keeps what is an output until the run ends, fetched or not.
        """
        plan = plan.ungated
        if plan not in self._footprints:
            held = [entry for entry in self.hooks(plan).values() if entry.value != LOGITS]
            self._footprints[plan] = Footprint.of(held, axis_sizes(self.manifest.config))
        batch, pos = np.shape(feeds["input_ids" if plan.start is None else "residual"])[:2]
        keys = np.shape(feeds["attention_mask"])[1] if "attention_mask" in feeds else pos
        return self._footprints[plan].of_run(batch, pos, keys) > max(self._opener.weights, _SMALL)

    def _firings(self, plan: Plan) -> Mapping[str, Sequence[str]]:
        """Hook name -> the names of all its firings in the graph of a plan, itself first, in firing order."""
        if plan not in self._fired:
            found: dict[str, list[str]] = {}
            for name in self.hooks(plan):
                found.setdefault(name.partition("@")[0], []).append(name)
            self._fired[plan] = found
        return self._fired[plan]

    def _serving(self, plan: Plan) -> Plan:
        """The plan whose session serves a plan with gates: its own, an open one with those gates and more of the same
        hook, or, once the same change was asked for in two blocks, one with the gate in every block.

        A loop over layers thus ends with one session and not with one per layer.
        """
        if not plan.gates:
            return plan
        with self._lock:
            if plan in self._sessions:
                return plan
            wanted = set(plan.gates)
            kinds_of = {(split_name(name)[1], kinds) for name, kinds in plan.gates}
            for other in reversed(self._sessions):
                there = {(split_name(name)[1], kinds) for name, kinds in other.gates}
                if (
                    replace(other, gates=()) == replace(plan, gates=())
                    and wanted <= set(other.gates)
                    and there == kinds_of
                ):
                    return other
            for name, kinds in plan.gates:
                self._gated.setdefault((split_name(name)[1], kinds), set()).add(name)
            repeated = {kind for kind in kinds_of if len(self._gated[kind]) > 1}
            if len(plan.gates) > len(kinds_of) or not repeated:
                return plan
            # Only blocks' hook points repeat; one outside the blocks is there once.
            spread = {
                name: kinds
                for name in self.hooks(plan.ungated)
                for tail, kinds in repeated
                if split_name(name)[1] == tail
            }
            return replace(plan, gates=self.gates({**spread, **dict(plan.gates)}, plan))

    def session(self, plan: Plan) -> Session:
        """The session of a plan, opened on first use. A bounded number stays open; the plain one always does."""
        with self._lock:
            if plan not in self._sessions:
                self._sessions[plan] = self._pooled(plan)
                extra = [other for other in self._sessions if other != Plan()]
                for old in extra[: max(0, len(extra) - _MAX_SESSIONS)]:
                    del self._sessions[old]
            self._sessions.move_to_end(plan)
            return self._sessions[plan]

    def part(self, inputs: Sequence[str], outputs: Sequence[str]) -> Session:
        """A session that computes some values of the plain graph from others (see surgery.cut), kept once opened.

        Raises InputError where the piece needs more of the model than ``inputs``.
        """
        key = (tuple(inputs), tuple(outputs))
        with self._lock:
            if key not in self._parts:
                from graphlens import surgery

                piece, frontier = surgery.cut(self._model, inputs, outputs)
                if frontier:
                    raise InputError(f"{outputs[0]!r} needs more than {', '.join(inputs)}: {', '.join(frontier)}.")
                self._parts[key] = self._opener.open(piece, self._packed(make=True), one_of_many=True)
                self.sessions_built += 1
            return self._parts[key]

    def _build(self, plan: Plan) -> Session:
        library = callback_library() if plan.python else None  # it says so when the package for Python hooks is missing
        packed = self._packed(make=plan != Plan())
        if packed is not None and self._ends_plainly(plan):
            return self._with_shared_end(plan, packed)
        return self._opener.open(self._graph(plan), packed, library)

    def _with_shared_end(self, plan: Plan, packed: packed_weights.Packed) -> Session:
        """A session over a plan's graph whose unembedding is a session of its own, the same for all such graphs.

        Opening one takes time in proportion to its weights, packed before or not, and a third of them are the unembedding's.
        """
        from concurrent.futures import ThreadPoolExecutor

        graph = self._graph(replace(plan, body=True))
        with ThreadPoolExecutor(1) as beside:  # ONNX Runtime lets other threads run while it opens a session
            body = beside.submit(self._opener.open, graph, packed)
            try:
                end = self.part([UNEMBEDDED], [LOGITS])
            except InputError:  # there is more in this file between the two: a gate, say
                return self._opener.open(self._graph(plan), packed)
            return Chain(body.result(), end, self.hooks(plan)[UNEMBEDDED].value)

    def _ends_plainly(self, plan: Plan) -> bool:
        """Whether a plan's graph has gates, and ends in an unembedding as the plain one does."""
        whole = plan.stop is None and not plan.gradients and not plan.python and UNEMBEDDED in self.manifest.hooks
        return whole and bool(plan.gates) and not any(name.startswith("unembed.hook_out") for name, _ in plan.gates)

    def _packed(self, make: bool) -> packed_weights.Packed | None:
        """The packed weights that sessions share; made, where asked, for the second session."""
        found = self._opener.packed()
        if found is None and make:
            found = self._opener.pack()
            if found is not None:  # the plain session holds a copy of its own: it is opened again when it is needed
                self._sessions.pop(Plan(), None)
        return found

    def _graph(self, plan: Plan) -> ir.Model:
        """The graph of a plan: flags, then the segment, the cache, what is left out, the gates of data, the gradients, the
        gates of Python. What costs the same for every kind of gate comes first, and is kept."""
        from graphlens import surgery

        with self._lock:
            if plan == Plan():
                return self._model
            if plan not in self._graphs:
                step: Callable[[ir.Model], ir.Model]
                if plan.python:
                    before, step = replace(plan, python=False), surgery.with_python_gates
                elif plan.gradients:
                    before = replace(plan, gradients=(), seed=Plan.seed)
                    step = lambda model: surgery.differentiate(model, plan.gradients, seed=plan.seed)  # noqa: E731
                elif plan.gates:
                    before, step = replace(plan, gates=()), lambda model: surgery.with_gates(model, dict(plan.gates))
                elif plan.body:
                    before, step = replace(plan, body=False), surgery.without_logits
                elif plan.bare:
                    before, step = replace(plan, bare=False), surgery.keep_results
                elif plan.past:
                    before, step = replace(plan, past=False), surgery.with_past
                elif plan.start is not None or plan.stop is not None:
                    before = replace(plan, start=None, stop=None)
                    step = lambda model: surgery.segment(model, plan.start, plan.stop)  # noqa: E731
                else:
                    before, step = Plan(), lambda model: surgery.with_flagged(model, plan.flags)
                self._graphs[plan] = step(self._graph(before))
                while len(self._graphs) > 2 * _MAX_SESSIONS:
                    old, _ = self._graphs.popitem(last=False)
                    self._hooks.pop(replace(old, body=False), None)
                    self._fired.pop(old, None)
            self._graphs.move_to_end(plan)
            return self._graphs[plan]

    def _pooled(self, plan: Plan) -> Session:
        stat = self.path.stat()
        asked = tuple(self._asked) if isinstance(self._asked, (list, tuple)) else self._asked
        key = (str(self.path), stat.st_mtime_ns, stat.st_size, stat.st_ino, asked, plan)
        with _pool_lock:
            session = _pool.get(key)
            if session is None:
                self.sessions_built += 1
                session = _pool[key] = self._build(plan)
            return session


def _gate_feeds(edits: Mapping[str, Mapping[str, Array]], gates: Gates) -> dict[str, Array]:
    """The feeds of the gates, further firings of a hook point (``name@q``) getting the same as the point."""
    from graphlens.surgery.gates import gate_input

    return {
        gate_input(name, part): array
        for name, _ in gates
        for part, array in edits.get(name.partition("@")[0], {}).items()
    }


def _in_half(callback: Callback) -> Callback:
    """A callback of float16 activations for an operator that works in float32."""
    return lambda activation: callback(activation.astype(np.float16)).astype(np.float32)
