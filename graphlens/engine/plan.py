"""What kind of graph a run needs, whatever it is fed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

LOGITS = "logits"
RESIDUAL_OUT = "residual_out"
Gates = tuple[tuple[str, tuple[str, ...]], ...]  # hook name -> kinds of change, firings of a hook point together


@dataclass(frozen=True)
class Plan:
    """What kind of graph a run needs, whatever it is fed: the key of its session.

    ``flags`` of hook points; blocks ``start`` to ``stop`` (see surgery.segment); ``past``: with a KV cache; ``gates``:
    which kinds of change are inputs at which hook points (see surgery.with_gates); ``gradients``: the hook points whose
    gradients are outputs too, from a ``seed`` (see surgery.differentiate); ``python``: with a callable gate at every hook
    point; ``bare``: no hook point is an output, so more can be fused; ``body``: it ends where the unembedding begins.
    """

    flags: tuple[str, ...] = ()
    start: int | None = None
    stop: int | None = None
    past: bool = False
    gates: Gates = ()
    gradients: tuple[str, ...] = ()
    seed: str = "dense"
    python: bool = False
    bare: bool = False
    body: bool = False

    @property
    def result(self) -> str:
        """The output that the run is for."""
        return LOGITS if self.stop is None else RESIDUAL_OUT

    @property
    def ungated(self) -> Self:
        """The plan without what does not change its hook points."""
        if not (self.gates or self.python or self.bare):
            return self
        return replace(self, gates=(), python=False, bare=False)
