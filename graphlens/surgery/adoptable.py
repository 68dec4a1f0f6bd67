"""What kind of network a foreign file holds, and why it cannot be adopted where it cannot: a sentence for each kind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx_ir as ir

from graphlens.errors import GraphlensError, ModelFileError
from graphlens.surgery.anatomy import SOFTMAXES, Anatomy, anatomy, source_of
from graphlens.surgery.well_formed import malformed

STILL = "`graphlens expose FILE --like GLOB -o OUT` still makes any of its values readable."
"""What can be done with a file that cannot be adopted."""
_CONVOLUTIONS = frozenset(
    {"Conv", "ConvInteger", "ConvTranspose", "FusedConv", "NhwcConv", "NhwcFusedConv", "QLinearConv"}
)
_RECURRENT = frozenset({"GRU", "LSTM", "RNN"})
_REPEATING = frozenset({"Loop", "Scan", "SequenceMap"})
_STATE_SPACE = frozenset({"CausalConvWithState", "LinearAttention", "SelectiveScan"})


class NotAdoptable(ModelFileError):
    """An ONNX file that is in order and holds no transformer whose hook points graphlens can find."""


# Why a file cannot be adopted


def ensure_adoptable(model: ir.Model, where: str | Path) -> Anatomy:
    """Refuses a file that is no transformer whose hook points could be found, in a sentence that says what it is.

    Nothing is run. That it raises nothing does not yet mean that each hook point is there: matching finds that out.

    Args:
        model: The model as it was read, before its fused operators are expanded.
        where: How an error calls the file.

    Returns:
        What the graph is made of.

    Raises:
        NotAdoptable: (a ModelFileError) It is a convolutional or recurrent network, has no attention, holds its attention
            in branches or loops, attends across from a decoder to an encoder, or holds several networks.
    """
    found = anatomy(model)
    why = obstacle(model, found)
    if why is not None:
        raise NotAdoptable(f"{where}: {why} {STILL}")
    return found


@contextlib.contextmanager
def making_sense(where: str | Path) -> Iterator[None]:
    """Turns what unfusing and matching raise over a graph that contradicts itself, inside the ``with`` block, into an error.

    No ONNX Runtime has opened the graph yet, so shapes and attributes in it may be anything.

    Args:
        where: How the error calls the file.

    Raises:
        NotAdoptable: The block raised an error of Python's own.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, GraphlensError):
            raise
        raise NotAdoptable(
            f"{where}: no sense could be made of its graph ({type(error).__name__}: {error!s:.200}). If ONNX Runtime opens the "
            f"file, this is a defect of graphlens: please report it. {STILL}"
        ) from error


def obstacle(model: ir.Model, found: Anatomy) -> str | None:
    """Why a file cannot be adopted, in a sentence; None where nothing says so before matching.

    Args:
        model: The model.
        found: What it is made of.
    """
    damage = malformed(model)
    if damage is not None:
        return damage
    repeating = sorted(_REPEATING & found.operators.keys())
    if repeating:
        return (
            f"it has {_count(found, repeating)}, which {'run' if len(repeating) > 1 else 'runs'} a part of the graph as often "
            "as its data say, so a hook point would have as many values; graphlens adopts graphs without loops."
        )
    if not found.cores and found.hidden_cores:
        return (
            "its attention lies inside the branches of an If: two graphs in one file, as optimum's merged decoders "
            "(decoder_model_merged.onnx) are. Adopt decoder_with_past_model.onnx or model.onnx of the same export instead, "
            "or export without merging (optimum-cli export onnx --no-post-process)."
        )
    if not found.cores:
        return _without_attention(found)
    return _across(model, found) or _several(model, found) or _sound(model)


def _count(found: Anatomy, operators: Sequence[str]) -> str:
    """Operators with how many nodes there are: "53 Conv and 2 LSTM"."""
    return " and ".join(f"{found.operators[name]:,} {name}" for name in operators)


def _without_attention(found: Anatomy) -> str:
    """What a file without attention is."""
    recurrent = sorted(_RECURRENT & found.operators.keys())
    states = sorted(name for name in found.operators if name.rpartition("::")[2] in _STATE_SPACE)
    convolutions = [name for name in found.operators if name.rpartition("::")[2] in _CONVOLUTIONS]
    count = sum(found.operators[name] for name in convolutions)
    transformer = "graphlens adopts transformers, whose hook points are found from their attention."
    if recurrent:
        return (
            f"this is a recurrent network ({_count(found, recurrent)}), and no attention was found in it; {transformer}"
        )
    if states:
        return f"this is a state space model ({_count(found, states)}), and no attention was found in it; {transformer}"
    if count:
        return f"this is a convolutional network ({count:,} {convolutions[0]}), and no attention was found in it; {transformer}"
    softmax = sum(count for name, count in found.operators.items() if name.rpartition("::")[2] in SOFTMAXES)
    if not softmax:
        return f"no attention was found in it: it has no Softmax and no fused attention; {transformer}"
    return f"no attention was found in it: none of its {softmax:,} Softmax stands between two products; {transformer}"


def _across(model: ir.Model, found: Anatomy) -> str | None:
    """Why an encoder-decoder cannot be adopted: queries depend on an input that the keys do not depend on."""
    for core in found.cores:
        query, key = found.reads.get(core.query, 0), found.reads.get(core.key, 0)
        if query & ~key and key:
            return (
                f"it attends across, as encoder-decoders do (T5, Whisper, BART, ...): the attention at {core.node.name!r} "
                f"takes its queries from {_inputs(model, query & ~key)} and its keys from {_inputs(model, key)}. graphlens "
                "adopts what attends to its own tokens: adopt the encoder's file, if there is one beside it."
            )
    return None


def _several(model: ir.Model, found: Anatomy) -> str | None:
    """Why a file with several networks side by side cannot be adopted: two attentions read inputs that are disjoint."""
    first = found.reads.get(found.cores[0].query, 0)
    for core in found.cores:
        other = found.reads.get(core.query, 0)
        if first and other and not first & other:
            return (
                f"it holds two transformers side by side, one that reads {_inputs(model, first)} and one that reads "
                f"{_inputs(model, other)} (CLIP, a dual encoder). Export each into a file of its own, and adopt that."
            )
    return None


def _sound(model: ir.Model) -> str | None:
    """Why a network that reads sound cannot be adopted: its input is a float array of three axes in a convolution."""
    sounds = {
        value
        for value in model.graph.inputs
        if value.dtype is not None
        and value.dtype.is_floating_point()
        and value.shape is not None
        and len(value.shape) in (2, 3)
    }
    for node in model.graph:
        if node.op_type == "Conv" and len(node.inputs) > 1 and node.inputs[1] is not None:
            weight = node.inputs[1].shape
            source = source_of(node.inputs[0])
            if weight is not None and len(weight) == 3 and source in sounds:
                return (
                    f"its input {source.name!r} is sound or another series ({source.type} {source.shape}) that goes through "
                    "a convolution (an encoder of Whisper or wav2vec2, say). graphlens adopts models of tokens and of images."
                )
    return None


def _inputs(model: ir.Model, bits: int) -> str:
    """The names of some inputs, as text."""
    names = [repr(value.name) for index, value in enumerate(model.graph.inputs) if bits >> index & 1]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# What a user should know of a file that can be adopted

_WITH_PAST = ("decoder_with_past_model", "decoder_model_merged")  # as optimum calls the files of one model


def remarks(model: ir.Model, file: Path) -> tuple[str, ...]:
    """What is worth knowing of a file that can be adopted, a sentence each.

    Args:
        model: The model as it was read.
        file: Its graph file: what lies beside it may belong to the same model.

    Returns:
        Sentences: that another file is this model's other half.
    """
    found = []
    stem = file.stem
    if stem == "decoder_model":
        others = [name for name in _WITH_PAST if (file.parent / f"{name}.onnx").is_file()]
        if others:
            found.append(
                f"{others[0]}.onnx beside it is the same decoder with a KV cache: adopt that one if it is to generate quickly."
            )
    if (file.parent / "encoder_model.onnx").is_file() and stem != "encoder_model":
        found.append(
            "encoder_model.onnx beside it is the other half of this model; it is adopted by itself, if at all."
        )
    return tuple(found)
