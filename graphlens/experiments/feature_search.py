"""What features of an SAE stand for: the tokens they are largest at, the logits that they raise, a page of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT
from graphlens.analysis.feature_examples import FeatureExamples, Search, chosen_of
from graphlens.engine.block_layout import Z
from graphlens.errors import InputError, checked_number
from graphlens.experiments.sae_in_run import in_run
from graphlens.file.names import in_block, split_name

if TYPE_CHECKING:
    from graphlens.edits.sae import Sae
    from graphlens.model.hooked_transformer import HookedTransformer
    from graphlens.model.request import ForwardOptions
    from graphlens.model.text import Input
    from graphlens.views.pages import Report

_MOST = 1 << 28  # activations that are kept


def feature_examples(
    model: HookedTransformer[ArrayT],
    input: Input[ArrayT],
    sae: Sae | str,
    features: Sequence[int] | None = None,
    *,
    k: int = 10,
    exclude: Sequence[int] = (),
    batch_size: int = 8,
    **forward_options: Unpack[ForwardOptions[ArrayT]],
) -> FeatureExamples:
    """The tokens of some texts at which each feature of an SAE is largest.

    Args:
        model: The model.
        input: Texts, or token ids [n, p]. Padding counts for nothing.
        sae: The SAE; or the hook point that one reads which is attached already.
        features: Which features, by number; every activation of these is kept, for histograms and contexts. None for the largest
            tokens of all.
        k: How many tokens for each.
        exclude: The ids of tokens that are left out, a BOS token say, at which many features are large.
        batch_size: How many prompts a run has.
        **forward_options: Those of ``forward``: attention_mask, prepend_bos, padding_side.

    Returns:
        The examples: ``.contexts(17)``, ``.histogram(17)``, ``.density``.

    Raises:
        UnknownHookPoint: The model lacks a hook point of the SAE's.
        InputError: For features that are not there, or more than can be kept, and an SAE that does not fit.
    """
    k, batch_size = checked_number(k, "k", least=1), checked_number(batch_size, "batch_size", least=1)
    runner = model.runner
    if features is not None and (not len(features) or len(set(features)) < len(features)):
        raise InputError("features=: name each feature once, one at least, or leave it out for all.")
    whole = runner.whole_prompts(input, **forward_options)
    ids = whole.need_tokens()
    real = np.ones(ids.shape, bool) if whole.mask is None else np.asarray(whole.mask).astype(bool)
    left = real & ~np.isin(ids, np.asarray(exclude, np.int64))
    with in_run(model, sae) as (one,):
        numbers = list(one.numbers)
        chosen = chosen_of(None, len(numbers)) if features is None else [_place(each, numbers) for each in features]
        if features is not None and len(chosen) * real.sum() > _MOST:
            raise InputError(f"{len(chosen)} features at {real.sum():,} tokens are more than are kept: ask for fewer.")
        search = Search(len(chosen), k, keep=features is not None)
        for start in range(0, len(ids), batch_size):
            some = slice(start, start + batch_size)
            options = {} if real[some].all() else {"attention_mask": real[some].astype(np.int64)}
            request = runner.whole_prompts(runner.border.to_user(ids[some]), **options)
            acts = runner.run(request, [one.features], output=False, only=True).values[one.features]
            acts = acts[real[some]]
            search.add(acts if features is None else acts[:, chosen], left[some][real[some]])
    prompts = np.broadcast_to(np.arange(len(ids))[:, None], ids.shape)[real]
    positions = (np.cumsum(real, 1) - 1)[real]
    named = tuple(numbers[each] for each in chosen)
    return search.found(named, ids[real], prompts, positions, left[real])


def feature_logits(model: HookedTransformer[ArrayT], sae: Sae | str, features: Sequence[int]) -> Array:
    """What features write to the logits directly, for an activation of 1 and up to the scale of the final norm.

    Each is the feature's decoder row, centred where the final norm centres, times its weight and W_U; the mean over the
    vocabulary is taken off, as it changes no probability.

    Args:
        model: The model.
        sae: The SAE; or the hook point that one reads which is attached already.
        features: Which features, by number.

    Returns:
        float64 [n, d_vocab].

    Raises:
        UnknownHookPoint: The model lacks a hook point of the SAE's.
        InputError: For features that are not there, and an SAE whose rows are not in the residual stream.
    """
    runner = model.runner
    with in_run(model, sae) as (one,):
        chosen = [_place(each, list(one.numbers)) for each in features]
    rows = one.sae.directions[chosen].astype(np.float64)
    layer, rest = split_name(one.spliced.writes)
    if rest == Z and layer is not None:
        w_o = np.asarray(runner.weights[in_block(layer, "attn.W_O")], np.float64)
        rows = rows @ w_o.reshape(-1, w_o.shape[-1])
    if rows.shape[-1] != runner.config.d_model:
        raise InputError(f"the features at {one.spliced.writes!r} are not of the residual stream: they have no logits.")
    if runner.config.norm_centres("ln_final"):
        rows = rows - rows.mean(-1, keepdims=True)
    weight = runner.weights.stored.get("ln_final.w")
    rows = rows if weight is None else rows * np.asarray(weight, np.float64)
    found: Array = rows @ np.asarray(runner.weights["unembed.W_U"], np.float64)
    return np.asarray(found - found.mean(-1, keepdims=True))


def feature_page(
    model: HookedTransformer[ArrayT],
    input: Input[ArrayT],
    sae: Sae,
    features: Sequence[int],
    *,
    k: int = 10,
    exclude: Sequence[int] = (),
    **forward_options: Unpack[ForwardOptions[ArrayT]],
) -> Report:
    """A page of features: how often each is how large, the tokens it is largest at, and the logits it raises and lowers.

    Args:
        model: The model.
        input: Texts, or token ids [n, p].
        sae: The SAE.
        features: Which features, by number.
        k: How many tokens for each.
        exclude: The ids of tokens that are left out.
        **forward_options: See ``feature_examples``.

    Returns:
        The page: ``.save("features.html")`` writes it, a notebook shows it.

    Raises:
        UnknownHookPoint: See ``feature_examples``.
        InputError: See there.
    """
    from graphlens.views.feature_view import feature
    from graphlens.views.pages import report

    examples = feature_examples(model, input, sae, features, k=k, exclude=exclude, **forward_options)
    try:
        logits: Sequence[Array | None] = list(feature_logits(model, sae, features))
    except InputError:
        logits = [None] * len(features)  # of an SAE that does not write to the residual stream
    tokens = model if model.tokenizer is not None else None
    parts = [feature(examples, number, model=tokens, logits=row) for number, row in zip(features, logits, strict=True)]
    title = f"Features at {sae.cfg.hook}"
    return report(parts, title, f"{model.cfg.model_name}; {sae!r}; {len(examples.tokens):,} tokens.")


def _place(feature: int, numbers: list[int]) -> int:
    """The column of a feature by its number."""
    if feature not in numbers:
        raise InputError(
            f"there is no feature {feature!r}: the SAE has {len(numbers)}, from {min(numbers)} to {max(numbers)}."
        )
    return numbers.index(feature)
