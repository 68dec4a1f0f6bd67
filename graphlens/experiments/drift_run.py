"""The two sides of a drift: which runs are compared, whether the models fit each other, and a run in steps."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Generic, Protocol

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT, UserArray
from graphlens.analysis.drift_figures import Bools
from graphlens.engine.feeding import Enough
from graphlens.errors import InputError
from graphlens.experiments.stepped_run import Passing
from graphlens.file.io_names import PIXELS
from graphlens.file.manifest import HookEntry
from graphlens.file.names import split_name
from graphlens.model.text import Input

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    from graphlens.model.request import Request
    from graphlens.model.runner import Runner

    OtherT = TypeVar("OtherT", bound=UserArray, default=Array)
else:  # see analysis/arrays.py
    from typing import TypeVar

    OtherT = TypeVar("OtherT", bound=UserArray)

# What two versions of one model have in common: field of the config -> in words.
_SHAPE = {
    "n_layers": "n_layers (blocks)",
    "d_model": "d_model (the width of the residual stream)",
    "n_heads": "n_heads",
    "n_key_value_heads": "n_key_value_heads",
    "d_head": "d_head",
    "d_mlp": "d_mlp (neurons)",
    "d_vocab_out": "d_vocab (logits)",
    "num_experts": "num_experts",
}
ENDS = ("unembed.hook_out", "head.hook_out")  # what a model's last matrix gives
LOGITS = "logits"  # what a run may be read at the end of, besides a hook point
_ENDING = re.compile(r"_(?:quant|Q\d+)$")  # what quantisers add to the name of the node that they replace


class Progress(Protocol):
    """A progress bar."""

    def advance(self, count: int = 1) -> None:
        """Counts so many steps as done."""


class Side(Generic[ArrayT]):
    """One of the two models, with the run that is compared.

    Args:
        runner: Runs the model.
        request: The run, over whole prompts.

    Attributes:
        runner: See above.
        request: See above.
        names: The hook points that the run passes, in firing order.
        entries: What the hook map says of each.
    """

    def __init__(self, runner: Runner[ArrayT], request: Request) -> None:
        self.runner, self.request = runner, request
        self.names: Sequence[str] = runner.engine.names(request.plan)
        self.entries: Mapping[str, HookEntry] = runner.engine.hooks(request.plan)
        # What is active belongs to this thread, and the run is made in another.
        self._plan, self._edits = runner.edits.gates(request.plan, request.window)
        self._own = runner.hooks.callbacks(runner.border, self.names)

    @property
    def real(self) -> Bools | None:
        """True at real tokens, [b, p]; None where all are."""
        mask = self.request.mask if self.request.mask is not None else self.request.real
        return None if mask is None or bool(np.all(mask)) else mask != 0

    def heads(self, name: str) -> int | None:
        """The axis of a hook point's heads; None without one."""
        axes = self.entries[name].axes
        found = [axis for axis, kind in enumerate(axes) if kind.endswith("head_index")]
        return found[0] if found and found[0] else None

    @property
    def nodes(self) -> Mapping[str, tuple[str, ...]]:
        """Hook point -> the nodes of the original file whose result it is; empty where the model was not adopted."""
        adopted = self.runner.engine.manifest.adopted
        nodes = {} if adopted is None else adopted.nodes
        # ONNX Runtime's quantisers compare these names: they make matrix products of Gemm nodes first, under other names.
        return {hook: tuple(_ENDING.sub("", name) for name in names) for hook, names in nodes.items()}

    def run(self, passing: Passing, at: Sequence[str], read: str = "") -> Array | None:
        """Makes the run with what was active when this object was made.

        Args:
            passing: Called at hook points, after the model's own hooks there.
            at: Which hook points.
            read: What is wanted of it: LOGITS, a hook point, or "" for nothing.

        Returns:
            That.
        """
        chosen = set(at)
        # Behind the last matrix the logits would be copied once more, and they are as large as all else.
        end = self.names[-1] if not read and self.names[-1] in ENDS else ""
        calls = {
            name: self._called(name, passing if name in chosen else None, name == end)
            for name in self.names
            if name in chosen or name in self._own
        }
        fetch = [read] if read not in ("", LOGITS) else []
        try:
            found = self.runner.engine.run(self.request.feeds, fetch, calls, read == LOGITS, self._plan, self._edits)
        except Enough as error:
            error.__traceback__ = None  # its frames hold the last activation
            return None
        return found.values[read] if fetch else found.output

    def _called(self, name: str, passing: Passing | None, last: bool) -> Callable[[Array], Array]:
        """What a hook point calls: the model's own hooks, and then ``passing``. Behind the last one the run ends."""
        own = self._own.get(name)

        def call(activation: Array) -> Array:
            activation = activation if own is None else own(activation)
            found = activation if passing is None else passing(name, activation)
            if last:
                raise Enough("nothing more of this run is wanted.")
            return found

        return call


def requests(
    first: Runner[ArrayT], second: Runner[OtherT], tokens: Input[ArrayT], options: Mapping[str, object]
) -> tuple[Request, Request]:
    """The runs that are compared: the same tokens for both, which the first model's tokenizer makes of text.

    Args:
        first: The reference.
        second: The other model.
        tokens: Text or tokens; images of a vision model.
        options: The arguments of ``forward`` by name.

    Raises:
        InputError: For what one of the models does not take.
    """
    right = first.whole_prompts(tokens, **options)
    if right.tokens is None:
        return right, second.whole_prompts(second.border.to_user(right.feeds[PIXELS]), **options)
    asked = {name: value for name, value in options.items() if name not in ("prepend_bos", "padding_side")}
    if right.mask is not None:
        asked.pop("one_zero_attention_mask", None)
        asked["attention_mask"] = right.mask
    return right, second.whole_prompts(second.border.to_user(right.tokens), **asked)


def ensure_one_shape(first: Runner[ArrayT], second: Runner[OtherT]) -> None:
    """Raises InputError for two models whose activations cannot be compared entry by entry."""
    mine, theirs = first.config, second.config
    kinds = [
        "a vision model" if config.is_vision else "an encoder" if config.is_encoder else "a decoder"
        for config in (mine, theirs)
    ]
    if kinds[0] != kinds[1]:
        raise InputError(
            f"the reference ({mine.model_name}) is {kinds[0]} and the other model ({theirs.model_name}) {kinds[1]}: drift "
            "compares two versions of one model."
        )
    apart = [
        f"{words} is {getattr(mine, name)} in the reference and {getattr(theirs, name)} in the other model"
        for name, words in _SHAPE.items()
        if getattr(mine, name) != getattr(theirs, name)
    ]
    if apart:
        raise InputError(
            f"{'; '.join(apart)}: drift compares two versions of one model ({mine.model_name} and {theirs.model_name} are "
            "not), hook point by hook point."
        )


def step_of(names: Sequence[str], n_layers: int) -> dict[str, int]:
    """Which step a hook point belongs to: 0 before the blocks, layer + 1, and ``n_layers + 1`` after them.

    Args:
        names: Hook points in firing order.
        n_layers: The number of blocks.
    """
    found: dict[str, int] = {}
    begun = False
    for name in names:
        layer = split_name(name)[0]
        begun = begun or layer is not None
        found[name] = layer + 1 if layer is not None else (n_layers + 1 if begun else 0)
    return found
