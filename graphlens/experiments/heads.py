"""Detecting attention heads by what they attend to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from graphlens.analysis.arrays import Array, ArrayInput, ArrayT, UserArray, as_array, is_tensor, like, working
from graphlens.errors import InputError, InputShapeError, checked_number, is_one_of, warn
from graphlens.file.names import in_block

if TYPE_CHECKING:
    from graphlens.model.hooked_transformer import HookedTransformer


def _previous_token(tokens: Array) -> Array:
    return np.eye(len(tokens), k=-1)


def _duplicate_token(tokens: Array) -> Array:
    same: Array = tokens[:, None] == tokens[None, :]
    return np.tril(same.astype(float), k=-1)


def _induction(tokens: Array) -> Array:
    """Attention to the token after an earlier occurrence of the current one."""
    pattern = np.zeros((len(tokens), len(tokens)))
    pattern[:, 1:] = _duplicate_token(tokens)[:, :-1]
    return pattern


HEAD_PATTERNS = {
    "previous_token_head": _previous_token,
    "duplicate_token_head": _duplicate_token,
    "induction_head": _induction,
}
HEAD_NAMES = tuple(HEAD_PATTERNS)


def get_previous_token_head_detection_pattern(tokens: ArrayT) -> ArrayT:
    """Where a previous-token head attends: from each position to the one before. TransformerLens: the same name.

    Args:
        tokens: Ids of one prompt, [1, p] or [p].

    Returns:
        float32 [p, p] by query and key, 1 where it attends; a tensor for a tensor.

    Raises:
        InputError: For several prompts.
    """
    return _pattern(tokens, _previous_token)


def get_duplicate_token_head_detection_pattern(tokens: ArrayT) -> ArrayT:
    """Where a duplicate-token head attends: to earlier occurrences of the same token. TransformerLens: the same name.

    Args:
        tokens: Ids of one prompt, [1, p] or [p].

    Returns:
        float32 [p, p] by query and key, 1 where it attends; a tensor for a tensor.

    Raises:
        InputError: For several prompts.
    """
    return _pattern(tokens, _duplicate_token)


def get_induction_head_detection_pattern(tokens: ArrayT) -> ArrayT:
    """Where an induction head attends: to the token after an earlier occurrence. TransformerLens: the same name.

    Args:
        tokens: Ids of one prompt, [1, p] or [p].

    Returns:
        float32 [p, p] by query and key, 1 where it attends; a tensor for a tensor.

    Raises:
        InputError: For several prompts.
    """
    return _pattern(tokens, _induction)


def get_supported_heads() -> None:
    """Prints the names of heads that ``detect_head`` knows. TransformerLens: the same name."""
    print(f"Supported heads: {HEAD_NAMES}")


def compute_head_attention_similarity_score(
    attention_pattern: ArrayInput | UserArray,
    detection_pattern: ArrayInput | UserArray,
    *,
    exclude_bos: bool,
    exclude_current_token: bool,
    error_measure: str,
) -> float:
    """How much one head's attention is where a kind of head would attend. TransformerLens: the same name.

    Args:
        attention_pattern: The head's attention, [p, p] by query and key. It stays as it is.
        detection_pattern: Where to attend, of the same shape.
        exclude_bos: See ``detect_head``.
        exclude_current_token: See there.
        error_measure: See there.

    Returns:
        The score; NaN for "mul" where no attention is left.

    Raises:
        InputError: For arrays that are no square of one size or reach above the diagonal, and for another measure.
    """
    _check_measure(error_measure)
    attention, expected = (working(as_array(given)) for given in (attention_pattern, detection_pattern))
    if attention.ndim != 2 or attention.shape[0] != attention.shape[1] or expected.shape != attention.shape:
        raise InputShapeError(
            f"attention_pattern has shape {list(attention.shape)} and detection_pattern {list(expected.shape)}: both must be "
            "the same square, [pos, pos]."
        )
    if error_measure == "abs" and np.triu(attention - expected, 1).any():
        raise InputError(
            "attention_pattern or detection_pattern is not lower triangular: a query attends to no later key."
        )
    return _score(attention, expected, exclude_bos, exclude_current_token, error_measure)


def _pattern(tokens: ArrayT, pattern_of: Callable[[Array], Array]) -> ArrayT:
    """A pattern of tokens in the tokens' kind of array."""
    ids = np.atleast_2d(as_array(tokens))
    if ids.ndim != 2 or len(ids) != 1:
        raise InputShapeError(f"tokens have shape {list(ids.shape)}: a pattern is of one prompt, [1, pos] or [pos].")
    kind = cast(ArrayT, tokens.float()) if is_tensor(tokens) else tokens
    return like(kind, pattern_of(ids[0]).astype(np.float32))


def _check_measure(error_measure: object) -> None:
    if not is_one_of(error_measure, ("mul", "abs")):
        raise InputError(f"error_measure must be 'mul' or 'abs', not {error_measure!r}.")


def detect_head(
    model: HookedTransformer[ArrayT],
    seq: str | Sequence[str],
    detection_pattern: Any,
    heads: Sequence[tuple[int, int]] | Mapping[int, Sequence[int]] | None = None,
    cache: Any = None,
    *,
    exclude_bos: bool = False,
    exclude_current_token: bool = False,
    error_measure: str = "mul",
) -> ArrayT:
    """How much each head attends to where a kind of head would. TransformerLens: ``head_detector.detect_head``.

    Args:
        model: The model.
        seq: A prompt, or a list of prompts to average over.
        detection_pattern: "previous_token_head", "duplicate_token_head" or "induction_head" (Olsson et al. 2022), or a
            lower triangular array [p, p] of where to attend.
        heads: The heads that are scored, as [(layer, head)] or {layer: [head]}; None for all.
        cache: The cache of ``seq``, a single prompt then; None runs the model.
        exclude_bos: True leaves attention to the first position out.
        exclude_current_token: True leaves attention to the query's own position out.
        error_measure: "mul" for the share of attention that lies on the pattern; "abs" for 1 minus the mean absolute
            difference per row, to 3 decimals.

    Returns:
        [n_layers, n_heads] in the dtype of ``model.cfg``, float32 for bfloat16; -1 for heads that are not in ``heads``.

    Raises:
        InputError: For an unknown pattern or measure, prompts that do not fit, and heads that are not there.
    """
    _check_measure(error_measure)
    if isinstance(detection_pattern, str) and detection_pattern not in HEAD_PATTERNS:
        raise InputError(f"{detection_pattern!r} is no known head: {', '.join(HEAD_PATTERNS)}, or a pattern [p, p].")
    if not isinstance(seq, str) and cache is not None:
        raise InputError(
            "a cache holds one prompt and cannot be reused across multiple prompts: pass one string with it, or a list of "
            "prompts without it."
        )
    prompts = [seq] if isinstance(seq, str) else seq
    if not isinstance(prompts, Sequence) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError("seq must be a string or a list of strings, at least one.")
    wanted = _wanted_heads(heads, model.cfg.n_layers, model.cfg.n_heads)
    scores = [
        _scores(model, prompt, detection_pattern, wanted, cache, exclude_bos, exclude_current_token, error_measure)
        for prompt in prompts
    ]
    dtype = model.runner.config.dtype
    return model.border.to_user(np.mean(scores, axis=0).astype(np.float32 if dtype == "bfloat16" else dtype))


def _scores(
    model: HookedTransformer[ArrayT],
    prompt: str,
    detection_pattern: Any,
    wanted: Mapping[int, list[int]],
    cache: Any,
    exclude_bos: bool,
    exclude_current_token: bool,
    error_measure: str,
) -> Array:
    tokens = model.border.from_user(model.to_tokens(prompt, truncate=False))
    length = tokens.shape[-1]
    if not 1 < length <= model.cfg.n_ctx:
        raise InputError(
            f"{prompt!r} is {length} tokens: it takes 2 to {model.cfg.n_ctx} (n_ctx) to compare attention."
        )
    expected = _expected(detection_pattern, tokens[0], error_measure)
    if cache is None:
        names = [in_block(layer, "attn.hook_pattern") for layer in wanted]
        _, cache = model.run_with_cache(prompt, names_filter=names, return_type=None) if names else (None, {})
    scores = np.full((model.cfg.n_layers, model.cfg.n_heads), -1.0)
    for layer, indices in wanted.items():
        patterns = working(model.border.from_user(cache["pattern", layer, "attn"]))
        if patterns.ndim == 4 and patterns.shape[0] == 1:
            patterns = patterns[0]
        if patterns.shape[-2:] != (length, length) or patterns.ndim != 3:
            raise InputError(
                f"the cache's pattern of layer {layer} has shape {list(patterns.shape)}, and {prompt!r} is {length} "
                "tokens: pass the cache of that one prompt."
            )
        for head in indices:
            scores[layer, head] = _score(patterns[head], expected, exclude_bos, exclude_current_token, error_measure)
    return scores


def _expected(detection_pattern: Any, tokens: Array, error_measure: str) -> Array:
    if isinstance(detection_pattern, str):
        return HEAD_PATTERNS[detection_pattern](tokens)
    try:
        pattern = working(as_array(detection_pattern))
    except TypeError as error:
        raise InputError(f"detection_pattern must be a name or an array, not {detection_pattern!r}.") from error
    size = len(tokens)
    if pattern.shape != (size, size) or np.triu(pattern, 1).any():
        raise InputShapeError(
            f"detection_pattern has shape {list(pattern.shape)}: it must be lower triangular, [{size}, {size}] for "
            f"this prompt of {size} tokens."
        )
    if error_measure == "mul" and not np.isin(pattern, (0, 1)).all():
        warn("error_measure 'mul' reads as a share only for patterns of zeros and ones.")
    return pattern


def _score(
    attention: Array, expected: Array, exclude_bos: bool, exclude_current_token: bool, error_measure: str
) -> float:
    counted = np.ones_like(attention)
    if exclude_bos:
        counted[:, 0] = 0
    if exclude_current_token:
        np.fill_diagonal(counted, 0)
    if error_measure == "abs":
        return 1 - round(float((np.abs(attention - expected) * counted).mean() * len(attention)), 3)
    total = float((attention * counted).sum())
    return float((attention * counted * expected).sum()) / total if total else float("nan")


def _wanted_heads(heads: Any, n_layers: int, n_heads: int) -> dict[int, list[int]]:
    if heads is None:
        return {layer: list(range(n_heads)) for layer in range(n_layers)}
    try:
        pairs = (
            [(layer, head) for layer, several in heads.items() for head in several]
            if isinstance(heads, Mapping)
            else [(layer, head) for layer, head in heads]
        )
    except (TypeError, ValueError) as error:
        raise InputError("heads must be a list of (layer, head) or a dictionary {layer: [head, ...]}.") from error
    wanted: dict[int, list[int]] = {}
    for layer, head in pairs:
        layer, head = checked_number(layer, "layer"), checked_number(head, "head")
        if not 0 <= layer < n_layers or not 0 <= head < n_heads:
            raise InputError(
                f"there is no head {head} in layer {layer}: this model has {n_layers} layers of {n_heads} heads."
            )
        wanted.setdefault(layer, []).append(head)
    return wanted
