"""The edges of the residual graph: who writes, who reads, in which order, and circuits made of some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

EMBED, LOGITS = "embed", "logits"
LETTERS = ("q", "k", "v")


@dataclass(frozen=True, order=True)
class Node:
    """A component that writes to the residual stream or reads it.

    Attributes:
        kind: What it is: "embed", "head", "mlp" or "logits".
        layer: Its layer, where it has one.
        head: The number of the head.
        letter: Of a head that reads, which input: "q", "k" or "v".
    """

    kind: str
    layer: int = -1
    head: int = -1
    letter: str = ""

    def __str__(self) -> str:
        if self.kind == "head":
            return f"L{self.layer}H{self.head}{f'.{self.letter}' if self.letter else ''}"
        return f"L{self.layer}MLP" if self.kind == "mlp" else self.kind

    def feeds(self, receiver: Node, parallel: bool = False) -> bool:
        """True if what this sender writes reaches the input of another node.

        Args:
            receiver: The node that reads.
            parallel: True in a model whose attention and MLP of a block read the same residual stream.
        """
        if self.kind == EMBED or receiver.kind == LOGITS:
            return True
        if self.layer != receiver.layer:
            return self.layer < receiver.layer
        return self.kind == "head" and receiver.kind == "mlp" and not parallel


@dataclass(frozen=True, order=True)
class Edge:
    """What one sender writes, on its way to one receiver, before the receiver's LayerNorm."""

    sender: Node
    receiver: Node

    def __str__(self) -> str:
        return f"{self.sender}->{self.receiver}"


def senders(n_layers: int, n_heads: int) -> list[Node]:
    """The components that write to the residual stream, in order: the embeddings, then each layer's heads and MLP."""
    return [Node(EMBED), *_layered(n_layers, lambda layer: [Node("head", layer, head) for head in range(n_heads)])]


def receivers(n_layers: int, n_heads: int, n_key_value_heads: int) -> list[Node]:
    """The inputs that read the residual stream, in order: each layer's q, k and v of each head and its MLP, then the logits."""
    counts = {"q": n_heads, "k": n_key_value_heads, "v": n_key_value_heads}

    def heads(layer: int) -> list[Node]:
        return [Node("head", layer, head, letter) for letter in LETTERS for head in range(counts[letter])]

    return [*_layered(n_layers, heads), Node(LOGITS)]


def _layered(n_layers: int, heads: Callable[[int], list[Node]]) -> Iterator[Node]:
    """The nodes of each layer: its heads, as a function gives them, and its MLP."""
    for layer in range(n_layers):
        yield from heads(layer)
        yield Node("mlp", layer)


def edges(writers: Sequence[Node], readers: Sequence[Node], parallel: bool = False) -> list[Edge]:
    """Every edge from a writer to a reader that it reaches, sorted by writer, then by reader.

    Args:
        writers: The nodes that write.
        readers: The nodes that read.
        parallel: See ``Node.feeds``.
    """
    return [Edge(s, r) for s in writers for r in readers if s.feeds(r, parallel)]
