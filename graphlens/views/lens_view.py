"""The logit lens as a view: the likeliest tokens after each block at each position, with probability, entropy and rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from graphlens.errors import InputError, checked_number
from graphlens.views.encoded import Json, floats, packed, shape_of
from graphlens.views.labelled import Array
from graphlens.views.pages import View
from graphlens.views.words import Tokenizing, chosen, id_of, ids_of, model_of, real_positions, sent, text_of_ids, words

MOST = 20_000  # cells of a table
_NAMES = (
    "probability of the likeliest token",
    "entropy (nats)",
    "rank of the token in question",
    "probability of the token in question",
)


@runtime_checkable
class HasLens(Protocol):
    """A cache that reads its residual stream through the unembedding; an ActivationCache is one."""

    def logit_lens(self, *, pos_slice: int, return_labels: bool) -> tuple[object, list[str]]:
        """The logits of every residual [n, *b, V] at a position, with their labels."""


def lens(
    cache: Mapping[str, object],
    tokens: object,
    *,
    top: int = 8,
    answer: int | str | None = None,
    prompt: int = 0,
    positions: Sequence[int] | slice | None = None,
    title: str = "Logit lens",
) -> View:
    """Shows what the model would say next after each block: ``views.lens(cache, tokens)``.

    Args:
        cache: An ActivationCache with the residual stream before each block and after the last.
        tokens: The prompt that ran, ids [p], or the text of each token, of which no token in question is known.
        top: How many tokens each cell lists.
        answer: The token in question at the last position, an id or a text of one token: its rank and probability are shown
            there. At each other position it is the token that comes next in the prompt.
        prompt: Which prompt of a batch. Its padding is left out.
        positions: Which positions; None for all.
        title: The line above it.

    Returns:
        The view. Probabilities are a softmax in float64 of ``cache.logit_lens()``.

    Raises:
        InputError: For tokens that do not fit, and for more cells than a page shows.
        UnknownHookPoint: For a residual that was not cached.
    """
    if not isinstance(cache, HasLens):
        raise InputError(f"the logit lens needs an ActivationCache, which knows its model, not {type(cache).__name__}.")
    top, model = checked_number(top, "top", least=1, most=50), model_of(cache)
    residuals = [name for name in cache if name.endswith(("hook_resid_pre", "hook_resid_post"))]
    if not residuals:
        raise InputError(
            "this cache has no residual stream (blocks.L.hook_resid_pre): run with a names_filter that keeps it."
        )
    shape = shape_of(cache[residuals[0]])
    if len(shape) == 3:
        prompt = checked_number(prompt, "prompt", least=-shape[0], most=shape[0] - 1)
    real = real_positions(cache, prompt, shape[-2])
    texts = words(tokens, shape[-2], model, real)
    shown = chosen(positions, len(real), "positions")
    questions = _questions(tokens, model, shape[-2], real, answer)
    layers = 1 + len([name for name in residuals if name.endswith("hook_resid_pre")])
    if layers * len(shown) > MOST:
        raise InputError(
            f"{layers} layers x {len(shown)} positions are {layers * len(shown):,} cells, and a page shows {MOST:,}: choose some "
            f"with positions=slice(-{MOST // layers}, None)."
        )
    labels: list[str] = []
    columns: list[tuple[Array, ...]] = []
    own, off = _own_logits(cache, prompt), [0.0]
    for place in shown:
        found, labels = cache.logit_lens(pos_slice=int(real[place]), return_labels=True)
        logits = floats(found, "logits").astype(np.float64)
        logits = logits[:, prompt] if logits.ndim == 3 else logits
        questions[place] = _within(questions[place], logits.shape[-1], answer if place == len(real) - 1 else None)
        columns.append(_column(logits, top, questions[place]))
        if own is not None:
            off.append(float(np.abs(_softmax(own[real[place]]) - _softmax(logits[-1])).max()))
    compared = [difference for difference in off if np.isfinite(difference)]
    where = "" if len(compared) == len(off) else " where both are finite"
    tops, probabilities, *figures = (np.stack(parts, 1) for parts in zip(*columns, strict=True))
    vocabulary, at = np.unique(tops, return_inverse=True)
    asked = [None if questions[place] is None else text_of_ids([questions[place] or 0], model)[0] for place in shown]
    data: dict[str, Json] = {
        "tokens": sent([texts[place] for place in shown]),
        "labels": [_label(label) for label in labels],
        "places": shown.tolist(),
        "vocabulary": sent(text_of_ids(vocabulary.tolist(), model)),
        "top": tops.shape[-1],
        "ids": packed(at.reshape(tops.shape), "i4"),
        "probability": packed(probabilities, "f8" if probabilities.size < 20_000 else "f4"),
        "figures": {name: packed(figure, "f8") for name, figure in zip(_NAMES, figures, strict=True)},
        "targets": [None if text is None else sent([text])[0] for text in asked],
    }
    says = (
        "The final norm and the unembedding applied to the residual stream before each block and after the last (nostalgebraist "
        "2020). "
        + (
            ""
            if own is None
            else f"The last row is the model's own output, to within {max(compared):.1g} in any probability{where}. "
        )
        + "Probabilities are of a softmax over the vocabulary.",
        "The token in question is the one that comes next in the prompt"
        + (", and at the last position the answer" if answer is not None else "")
        + "; rank 0 is the likeliest.",
    )
    return View("lens", title, data, says, 220 + 24 * len(labels))


def _own_logits(cache: Mapping[str, object], prompt: int) -> Array | None:
    """The logits that the run itself gave, float64 [p, V]; None where the cache does not hold them."""
    if "unembed.hook_out" not in cache:
        return None
    found = floats(cache["unembed.hook_out"], "unembed.hook_out").astype(np.float64)
    cfg = getattr(getattr(cache, "model", None), "cfg", None)
    scale, cap = (
        float(getattr(cfg, f"output_logits_{name}", default)) for name, default in (("scale", 1.0), ("soft_cap", -1.0))
    )
    scaled = (found[prompt] if found.ndim == 3 else found) * scale
    return np.asarray(np.tanh(scaled / cap) * cap) if cap > 0 else scaled


def _softmax(logits: Array) -> Array:
    """Probabilities of logits [..., V]; NaN where they are not finite."""
    with np.errstate(invalid="ignore"):
        exponents = np.exp(logits - logits.max(-1, keepdims=True))
        return np.asarray(exponents / exponents.sum(-1, keepdims=True))


def _label(label: str) -> str:
    """A label of ``accumulated_resid`` as a reader knows it: "0_pre" is what comes before block 0."""
    number, _, part = label.partition("_")
    if part == "pre":
        return "embeddings" if number == "0" else f"block {int(number) - 1}"
    return "output" if label == "final_post" else label


def _questions(
    tokens: object, model: Tokenizing | None, length: int, real: Array, answer: int | str | None
) -> list[int | None]:
    """The id of the token in question at each real position; None where none is known."""
    ids = ids_of(tokens, model)
    last = None if answer is None else id_of(answer, model)
    if ids is None:
        return [*[None] * (len(real) - 1), last]
    own = [ids[i] for i in real] if len(ids) == length else ids
    return [*own[1:], last]


def _within(question: int | None, count: int, answer: int | str | None) -> int | None:
    """The token in question where it is one that the model predicts; of a prompt's own tokens some may not be.

    Raises InputError for an answer that is none.
    """
    if question is None or question < count:
        return question
    if answer is not None:
        raise InputError(f"answer={answer!r}: the tokens that this model predicts are 0 to {count - 1}.")
    return None


def _column(logits: Array, top: int, question: int | None) -> tuple[Array, ...]:
    """What one position shows after each block.

    Args:
        logits: float64 [layer, V].
        top: How many tokens to list.
        question: The id of the token in question.

    Returns:
        (ids [layer, top], their probabilities, the highest probability [layer], entropy in nats, rank and probability of the
        token in question), NaN where there is none.
    """
    with np.errstate(invalid="ignore"):  # infinite logits have no softmax, and are shown as NaN
        shifted = logits - logits.max(-1, keepdims=True)
        logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        probabilities = np.exp(logs)
        entropy = -np.where(probabilities > 0, probabilities * logs, 0.0 * probabilities).sum(-1)
    top = min(top, logits.shape[-1])
    # The likeliest few, then in order; NaN, which is no number to be likely by, comes last.
    some = np.sort(np.argpartition(-logits, top - 1, axis=-1)[:, :top], axis=-1)
    order = np.argsort(-np.take_along_axis(logits, some, -1), axis=-1, kind="stable")
    best = np.take_along_axis(some, order, -1)
    rank, own = np.full((2, len(logits)), np.nan)
    if question is not None:
        asked = logits[:, question, None]
        rank = np.where(np.isnan(asked[:, 0]), np.nan, (logits > asked).sum(-1))
        own = probabilities[:, question]
    return best, np.take_along_axis(probabilities, best, -1), probabilities.max(-1), entropy, rank, own
