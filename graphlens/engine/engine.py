"""The engine: what was asked for -> which graph -> which session. Where surgery and runtime meet."""

from __future__ import annotations

import copy
import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from graphlens.engine.block_pieces import Proof
from graphlens.engine.callers import Callers
from graphlens.engine.collecting import uncollected
from graphlens.engine.feeding import ensure_heeded, gate_feeds, run_with_callbacks, without_idle_inputs
from graphlens.engine.footprint import Footprints
from graphlens.engine.max_memory import checked_memory, opener
from graphlens.engine.opened_files import OpenedFiles
from graphlens.engine.plan import Gates, Plan, sorts
from graphlens.engine.results import LAST, Results, ensure_readable
from graphlens.engine.session_pool import POOL, LatelyUsed
from graphlens.errors import InputError, checked_number
from graphlens.file.folder import converted_weights, model_path
from graphlens.file.io_names import LOGITS, PRESENT
from graphlens.file.manifest import HookEntry, Manifest
from graphlens.file.names import UNEMBEDDED, split_name
from graphlens.file.safetensors import WeightStore
from graphlens.runtime.operators import callback_library
from graphlens.runtime.providers import CPU, Providers
from graphlens.runtime.sessions import Chain, Runnable
from graphlens.runtime.types import Array, Callback, DeviceValue, Feed

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphlens.engine import packed_weights

MAX_SESSIONS = 6  # see Engine.max_sessions
SMALL = 1 << 26  # bytes of activations that are nothing to worry about, however small the weights


class Engine:
    """A hooked file ready to run. Opening it checks the file but starts no session.

    Args:
        path: A hooked folder, or its graph file.
        providers: The execution providers to ask for. See ``choose_providers``.
        n_ctx: How many tokens a run may have; by default what the export set, at most what the model was trained for.
        max_memory: Bytes that the weights may take in memory, or text such as "4GB"; None for no limit. See ``opener``.

    Attributes:
        path: The graph file.
        folder: The folder that it lies in.
        asked: The execution providers asked for.
        files: The files that it was opened from.
        manifest: What the file says about itself.
        weights: The model's weights by TransformerLens's names.
        replaced: Those of them that are not the file's: see ``with_weights``.
        identity: A digest that tells this model from any other, by its file and the weights that are not the file's.
        proof: Whether the model's pieces were found to compute what it computes. See ``BlockPieces``.
        opener: Opens its sessions.
        sessions_built: How many sessions this engine has opened so far.
        held_limit: Bytes of activations that a run may hold unasked. Beyond that its session has no hook points as outputs.

    Raises:
        ModelFileError: The file is damaged, unsafe or no hooked file.
        InputError: For an ``n_ctx`` beyond what the model was trained for, and for a ``max_memory`` that is none.
    """

    @uncollected
    def __init__(
        self,
        path: str | os.PathLike[str],
        providers: Providers = None,
        n_ctx: int | None = None,
        max_memory: str | float | None = None,
    ) -> None:
        from graphlens import surgery

        found = model_path(path)
        # In the hub's cache the file itself is a link, and the weights lie beside the link.
        self.folder = found.parent.resolve()
        self.path = self.folder / found.name
        self.asked = tuple(providers) if isinstance(providers, (list, tuple)) else providers
        self.max_memory, self.files = checked_memory(max_memory), OpenedFiles(self.path)
        self._file_model = surgery.load(self.path)
        self.manifest: Manifest = surgery.read_manifest(self._file_model)
        self.files.add(self.manifest)
        if n_ctx is not None:
            self.manifest = self.manifest.with_length(n_ctx)
        self._size = sum(file.size for file in self.manifest.files.values())
        self.weights: Mapping[str, Array] = WeightStore(self.folder, self.manifest.weights, self.files.ensure_unchanged)
        self.replaced: Mapping[str, Array] = {}
        self.identity, self.held_limit = self.files.identity, max(self._size, SMALL)
        self._start(self._file_model, {})

    def _start(self, model: ir.Model, contents: Mapping[str, Array]) -> None:
        """Begins without a session, over a graph whose initializers may hold something else than the file."""
        from graphlens.engine.graphs import Graphs

        self._model, self.proof, self.sessions_built = model, Proof(), 0
        self.opener = opener(self.path, self._file_model, self.asked, self._size, contents, self.max_memory)
        self._graphs = Graphs(model, self.manifest.hooks, kept=2 * MAX_SESSIONS)
        self._sessions: OrderedDict[Plan, Runnable] = OrderedDict()
        self._gated: dict[tuple[str, tuple[str, ...]], set[str]] = {}  # (hook without its block, kinds) -> where asked
        self._footprints = Footprints(self._graphs.hooks, self.manifest.config)  # no circle
        self._callers, self._parts, self._lock = Callers(self._graphs, self._size), LatelyUsed(), threading.RLock()
        self.max_sessions = MAX_SESSIONS

    def with_weights(self, given: Mapping[str, Array]) -> Engine:
        """An engine over the same file that computes with other weights, with sessions of its own. This one stays as it is.

        Args:
            given: TransformerLens name -> the weight, of any floating dtype. All others are the file's.

        Raises:
            InputError: For a weight that does not fit; nothing is made then. See ``replaced_weights.replace_weights``.
            ModelFileError: The model's files were replaced since it was opened.
        """
        from graphlens.engine.replaced_weights import OverlaidWeights, replace_weights

        self.files.ensure_unchanged()
        found = replace_weights(self._file_model, self.manifest, given)
        stored = WeightStore(self.folder, self.manifest.weights, self.files.ensure_unchanged)
        other = copy.copy(self)
        other.weights, other.replaced = OverlaidWeights(stored, found.values), found.values
        other.identity = found.digest(self.files.identity)
        other._start(found.model, found.contents)
        other.max_sessions = self.max_sessions
        return other

    @property
    def max_sessions(self) -> int:
        """How many sessions stay open besides the plain one and those of called parts; those used longest ago go first."""
        return self._max_sessions

    @max_sessions.setter
    def max_sessions(self, number: int) -> None:
        with self._lock:
            self._max_sessions = checked_number(number, "max_sessions", least=1)
            self._graphs.kept = 2 * self._max_sessions
            self._close_extra()

    def _close_extra(self) -> None:
        """Gives up the sessions that are too many, those used longest ago first."""
        for parts, most in ((False, self.max_sessions), (True, 3 * self.manifest.config.n_layers)):
            extra = [other for other in self._sessions if other != Plan() and bool(other.part) == parts]
            for old in extra[: max(0, len(extra) - most)]:
                del self._sessions[old]

    # What the file holds

    @property
    def hook_names(self) -> list[str]:
        """The hook points of the plain file, in firing order."""
        return list(self.manifest.hooks)

    @property
    def dtype(self) -> str:
        """The dtype of the weights, and of the activations where it is another."""
        computed = self.manifest.config.dtype
        stored = converted_weights("bfloat16") in self.manifest.files
        return f"bfloat16 weights, {computed} activations" if stored else computed

    def hooks(self, plan: Plan) -> Mapping[str, HookEntry]:
        """The hook map of a plan's graph: name -> entry, in firing order.

        Args:
            plan: The plan. What its graph costs to make is paid on the first call.
        """
        return self._graphs.hooks(plan)

    def names(self, plan: Plan) -> list[str]:
        """The hook points that a run of a plan passes, in firing order, each once however often it fires."""
        return list(self.passed(plan))

    def passed(self, plan: Plan) -> Collection[str]:
        """The same as ``names``, as a set in that order: to look a name up takes equally long however many there are."""
        return self._graphs.firings(plan.ungated).keys()

    def gates(self, kinds: Mapping[str, tuple[str, ...]], plan: Plan) -> Gates:
        """The gates that a plan needs.

        Args:
            kinds: Hook point -> the kinds of change wanted there ("scale", "add", "patch").
            plan: The plan to be gated.

        Returns:
            The gates in firing order, further firings of a hook point included.
        """
        firings = self._graphs.firings(plan.ungated)
        return tuple((one.name, kinds[hook]) for hook, some in firings.items() if hook in kinds for one in some)

    # Running

    def run(
        self,
        feeds: Mapping[str, Feed],
        fetch: Sequence[str],
        callbacks: Mapping[str, Callback] | None = None,
        output: bool | str = True,
        plan: Plan | None = None,
        edits: Mapping[str, Mapping[str, Array]] | None = None,
    ) -> Results:
        """Runs the graph of a plan once.

        Args:
            feeds: Arrays by input name, or what an earlier run left on its device.
            fetch: The hook points whose activations are wanted. Each comes as it is after its own callback.
            callbacks: Functions activation -> activation by hook point, called in firing order as the run passes them.
            output: True to get the logits, or the residual where the plan stops early; LAST where those of the last position do.
            plan: What kind of graph to run; by default the file's own.
            edits: The arrays of the plan's gates: firing -> part -> array (see ``edits.gate.compose``). A part left out
                changes nothing. An edit applies before the callback at the same hook point.

        Raises:
            InputError: The file does not return a hook point that was asked for.
            Exception: Whatever a callback raised.
        """
        plan = plan or Plan()
        ensure_heeded(feeds, self.manifest, plan.stop is None and bool(output or plan.gradients))
        plan = self._serving(self._leanest(plan, feeds, fetch, callbacks or ()))
        session = self.session(plan)
        if output == LAST and isinstance(session, Chain):
            session = session.of_last_position()
        present = [name for name in session.outputs if name.startswith(PRESENT)] if plan.past else []
        hooks = self.hooks(plan) if fetch else {}
        values = {name: hooks[name].value for name in fetch}
        wanted = dict.fromkeys([plan.result, *values.values()] if output else values.values())
        ensure_readable(session, wanted, self.path)
        feeds = without_idle_inputs({**feeds, **gate_feeds(edits or {}, plan.gates)}, session)
        asked = [*wanted, *(name for name in present if name not in wanted)]
        found: dict[str, DeviceValue] = {}
        if callbacks:
            # A run that reads nothing still has to happen: its callbacks may be what it is for.
            found = run_with_callbacks(session, self._graphs.firings(plan), asked or [plan.result], feeds, callbacks)
        elif asked:
            found = dict(zip(asked, session.run_on_device(asked, feeds), strict=True))
        arrays = {name: found[name].numpy() for name in wanted}
        return Results(
            arrays[plan.result] if output else None,
            {name: arrays[value] for name, value in values.items()},
            {name: found[name] for name in present},
            self._graphs.straight_through(plan),
        )

    def _leanest(self, plan: Plan, feeds: Mapping[str, Feed], fetch: Sequence[str], called: Collection[str]) -> Plan:
        """The plan with what callbacks need, and without hook points as outputs where a run is better off so."""
        python, bare = bool(plan.python or called), plan.bare
        if not (bare or fetch or plan.gradients):
            # Edited runs mostly read nothing; in adopted graphs ONNX Runtime then fuses again what was expanded.
            lean = bool(plan.gates) or self.manifest.adopted is not None
            bare = (lean and not python) or self._footprints.of_run(plan, feeds) > self.held_limit
        if called:
            return self._callers.chosen(plan, bare, called)
        return plan if bare == plan.bare else replace(plan, bare=bare)

    # Which session serves a plan

    def _serving(self, plan: Plan) -> Plan:
        """The plan whose session serves a plan with gates. A loop over layers ends with one session, not one per layer.

        It is the plan itself, or that of an open session with the same kinds of gates and more of them. Once the same
        kinds were asked for at the same hook of two blocks, it is one with that gate in every block.
        """
        if not plan.gates:
            return plan
        with self._lock:
            if plan in self._sessions:
                return plan
            for other in reversed(self._sessions):
                if other.serves(plan):
                    return other
            for name, kinds in plan.gates:
                self._gated.setdefault((split_name(name)[1], kinds), set()).add(name)
            asked = sorts(plan.gates)
            repeated = {sort for sort in asked if len(self._gated[sort]) > 1}
            if len(plan.gates) > len(asked) or not repeated:
                return plan
            # Only blocks' hook points repeat; one outside the blocks is there once.
            spread = {
                name: kinds
                for name in self.hooks(plan.ungated)
                for tail, kinds in repeated
                if split_name(name)[1] == tail
            }
            return replace(plan, gates=self.gates({**spread, **dict(plan.gates)}, plan))

    @property
    def open_sessions(self) -> list[Plan]:
        """The plans that have a session now, least recently used first."""
        with self._lock:
            return list(self._sessions)

    @property
    def providers(self) -> list[str]:
        """The execution providers that are active, first choice first.

        This opens a session only if no session is open and something other than the CPU was asked for.
        """
        with self._lock:
            open_ = next(iter(self._sessions.values()), None)
        if open_ is None and self.opener.asked_providers == [CPU]:
            return [CPU]
        return (open_ or self.session(Plan())).providers

    def session(self, plan: Plan) -> Runnable:
        """The session of a plan, opened on first use. A bounded number stays open; the plain one always does.

        Args:
            plan: The plan.

        Raises:
            RuntimeUnavailable: An execution provider, or the package for Python hooks, is not there.
            ModelFileError: ONNX Runtime refuses the graph.
        """
        with self._lock:
            self.files.ensure_not_written_over()
            session = self._sessions.get(plan)
            if session is None:
                session = self._sessions[plan] = self._pooled(plan)
                self._close_extra()
            self._sessions.move_to_end(plan)
            return session

    def part(
        self, inputs: Sequence[str], outputs: Sequence[str], also: Sequence[str] = (), plan: Plan | None = None
    ) -> Runnable:
        """A session that computes some values of a graph from others. A bounded number stays open.

        Args:
            inputs: Names of hook points or other values. See ``surgery.cut``.
            outputs: Names of hook points or other values.
            also: Names of values that may be inputs besides, where they are needed.
            plan: The plan of the graph, for a piece of one batch and one length; that of the file's own graph by default.

        Raises:
            InputError: The outputs need more of the model than the inputs.
        """

        def build() -> Runnable:
            from graphlens import surgery

            piece, frontier = surgery.cut(self._graphs.graph(plan or Plan()), inputs, outputs, also, plan is not None)
            if frontier:
                raise InputError(f"{outputs[0]!r} needs more than {', '.join(inputs)}: {', '.join(frontier)}.")
            part = self.opener.open(piece, self._packed(make=True), one_of_many=True)
            self.files.ensure_unchanged()
            self.sessions_built += 1
            return part

        with self._lock:
            self.files.ensure_not_written_over()
            return self._parts.get((tuple(inputs), tuple(outputs), tuple(also), plan or Plan()), build)

    # Opening sessions

    def _pooled(self, plan: Plan) -> Runnable:
        """The session of a plan that every engine over this state of the file shares."""

        def build() -> Runnable:
            self.sessions_built += 1
            session = self._build(plan)
            self.files.ensure_unchanged()  # nor while it was opened
            return session

        self.files.ensure_unchanged()
        return POOL.get((str(self.path), self.files.version, self.identity, self.asked, self.max_memory, plan), build)

    def _build(self, plan: Plan) -> Runnable:
        """Opens the session of a plan."""
        library = callback_library() if plan.python else None  # it says so when the package for Python hooks is missing
        packed = self._packed(make=plan != Plan())
        if packed is not None and (plan.gates or plan.past) and self._graphs.ends_alike(plan):
            return self._with_shared_end(plan, packed)
        return self.opener.open(self._graphs.graph(plan), packed, library)

    def _with_shared_end(self, plan: Plan, packed: packed_weights.Packed) -> Runnable:
        """A session over a plan's graph whose unembedding is a session of its own, the same for all such graphs.

        Opening one takes time in proportion to its weights, packed before or not, and a third of them are the unembedding's.
        """
        from concurrent.futures import ThreadPoolExecutor

        graph = self._graphs.graph(replace(plan, body=True))
        with ThreadPoolExecutor(1) as beside:  # ONNX Runtime lets other threads run while it opens a session
            body = beside.submit(self.opener.open, graph, packed)
            try:
                end = self.part([UNEMBEDDED], [LOGITS])
            except InputError:  # there is more in this file between the two: a gate, say
                return self.opener.open(self._graphs.graph(plan), packed)
            return Chain(body.result(), end, self.hooks(plan)[UNEMBEDDED].value)

    def _packed(self, make: bool) -> packed_weights.Packed | None:
        """The packed weights that sessions share. They are made for the second session: the first works without."""
        found = self.opener.packed()
        if found is None and make and (found := self.opener.pack()) is not None:
            self._sessions.pop(Plan(), None)  # it holds a copy of its own: it is opened again when it is needed
        return found
