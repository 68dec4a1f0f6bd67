"""What kind of graph a run needs, whatever it is fed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from graphlens.file.io_names import DENSE, LOGITS, RESIDUAL_OUT
from graphlens.file.names import split_name

if TYPE_CHECKING:
    from graphlens.edits.spliced_sae import SplicedSae

# The gates of a graph: hook names, each with the kinds of change that are its inputs. All firings of a hook point are
# there, next to one another.
Gates = tuple[tuple[str, tuple[str, ...]], ...]


def hook_point(firing: str) -> str:
    """The hook point that a name in a graph's hook map belongs to. A further firing of one has a suffix.

    >>> hook_point("blocks.0.ln1.hook_scale@q")
    'blocks.0.ln1.hook_scale'
    """
    return firing.partition("@")[0]


def sorts(gates: Gates) -> set[tuple[str, tuple[str, ...]]]:
    """Gates whatever their block.

    Args:
        gates: The gates.

    Returns:
        (hook point without its block, kinds of change), each once.
    """
    return {(split_name(name)[1], kinds) for name, kinds in gates}


@dataclass(frozen=True)
class Plan:
    """What kind of graph a run needs, whatever it is fed. Two runs with equal plans share a session.

    Attributes:
        flags: The flags that are set, sorted (``use_attn_result``, say). Each adds hook points: see
            ``surgery.with_flagged``.
        saes: The SAEs that the model runs with: see ``surgery.with_saes``.
        start: The first block that runs, fed with the residual before it. None starts from the tokens.
        stop: The block before which the run ends, with the residual as its result. None runs to the logits.
        past: True for a graph with a KV cache: see ``surgery.with_past``.
        part: "attn" or "mlp" for that of one block alone, which ``start`` names: see ``surgery.part_alone``; "block" for a block
            that is called; "" otherwise.
        gates: Which kinds of change are inputs of the graph, and at which hook points: see ``surgery.with_gates``.
        gradients: The hook points whose gradients are outputs too: see ``surgery.differentiate``.
        seed: What the gradients start from: "dense", "sparse" or "loss".
        of: What is differentiated: the logits or a hook point.
        held: The hook points that gradients take for constants.
        python: True for a graph that can call Python at hook points: see ``surgery.with_python_gates``.
        calls: The firings of hook points that alone can; empty for all. See ``engine.callers``.
        bare: True for a graph whose hook points are no outputs, so that ONNX Runtime can fuse more of it.
        reads: The hook points that alone are outputs, in firing order: what only later values need does not run. Empty for all.
        body: True for a graph that ends where the unembedding begins. The engine sets it, never a run.
    """

    flags: tuple[str, ...] = ()
    saes: tuple[SplicedSae, ...] = ()
    start: int | None = None
    stop: int | None = None
    past: bool = False
    part: str = ""
    gates: Gates = ()
    gradients: tuple[str, ...] = ()
    seed: str = DENSE
    of: str = LOGITS
    held: tuple[str, ...] = ()
    python: bool = False
    calls: tuple[str, ...] = ()
    bare: bool = False
    reads: tuple[str, ...] = ()
    body: bool = False

    @property
    def result(self) -> str:
        """The name of the output that the run is for: the logits, or the residual where it stops early."""
        return LOGITS if self.stop is None else RESIDUAL_OUT

    @property
    def ungated(self) -> Self:
        """The same plan without gates, Python calls, ``bare`` and ``reads``, none of which adds or removes a hook point."""
        if not (self.gates or self.python or self.bare or self.reads):
            return self
        return replace(self, gates=(), python=False, calls=(), bare=False, reads=())

    @property
    def kept(self) -> Self:
        """An equal plan to be kept as a key after its run: it keeps no SAE's weights in memory, and no graph is made of it."""
        return replace(self, saes=tuple(one.without_weights for one in self.saes)) if self.saes else self

    def serves(self, other: Self) -> bool:
        """Whether a run of another plan can use this one's session, leaving some gates of it unfed.

        Args:
            other: The plan of the run.
        """
        return (
            replace(self, gates=()) == replace(other, gates=())
            and set(other.gates) <= set(self.gates)
            and sorts(other.gates) == sorts(self.gates)
        )
