"""How good an SAE is on some texts: what a model loses by it, how few features it takes, how much it reconstructs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Literal, Unpack

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT
from graphlens.analysis.numerics import log_softmax
from graphlens.edits.kinds import Patch
from graphlens.errors import InputError, checked_number, is_one_of
from graphlens.experiments.sae_in_run import InRun

if TYPE_CHECKING:
    from graphlens.edits.sae import Sae
    from graphlens.model.hooked_transformer import HookedTransformer
    from graphlens.model.request import ForwardOptions, Request
    from graphlens.model.runner import Runner
    from graphlens.model.text import Input

ABLATIONS = ("zero", "mean")


@dataclass(frozen=True, eq=False)
class SaeScores:
    """Scores of an SAE, as SAELens's evaluations define them and by their names. Losses and divergences are in nats a token.

    Attributes:
        ce_loss_score: How much of the loss that ablating the activation costs is saved: 1 for an SAE that the model does not
            notice, 0 for one that is as bad as the ablation.
        ce_loss_without_sae: The model's loss.
        ce_loss_with_sae: Its loss with the SAE's reconstruction in place of the activation.
        ce_loss_with_ablation: Its loss with the ablation in its place.
        kl_div_score: The same share of the divergence.
        kl_div_with_sae: The divergence of the predictions with the SAE from the model's own.
        kl_div_with_ablation: That of the predictions with the ablation.
        l0: How many features of a token are not 0.
        l1: The sum of the sizes of a token's features.
        explained_variance: 1 - mean squared error / variance, each summed over the activation's numbers.
        explained_variance_legacy: SAELens's older one: the mean over tokens of 1 - squared error / summed squared distance of
            that batch's number from its mean.
        mse: The squared error of a token, summed over its numbers.
        cossim: The cosine of activation and reconstruction.
        l2_norm_in: The norm of the activation.
        l2_norm_out: The norm of the reconstruction.
        l2_ratio: The second over the first.
        relative_reconstruction_bias: Below 1 where reconstructions are too short (Rajamanoharan et al. 2024); over batches.
        dead: The share of features that are 0 at every token.
        tokens: How many tokens were counted.
        density: float64 [d_sae], the share of tokens where each feature is not 0.
    """

    ce_loss_score: float
    ce_loss_without_sae: float
    ce_loss_with_sae: float
    ce_loss_with_ablation: float
    kl_div_score: float
    kl_div_with_sae: float
    kl_div_with_ablation: float
    l0: float
    l1: float
    explained_variance: float
    explained_variance_legacy: float
    mse: float
    cossim: float
    l2_norm_in: float
    l2_norm_out: float
    l2_ratio: float
    relative_reconstruction_bias: float
    dead: float
    tokens: int
    density: Array = field(repr=False)

    def to_dict(self) -> dict[str, float]:
        """The numbers by name, without the density of each feature."""
        return {name: value for name, value in asdict(self).items() if name != "density"}

    def __str__(self) -> str:
        width = max(len(each.name) for each in fields(self))
        return "\n".join(f"{name:{width}} {value:,.6g}" for name, value in self.to_dict().items())


def sae_scores(
    model: HookedTransformer[ArrayT],
    sae: Sae,
    input: Input[ArrayT],
    *,
    ablation: Literal["zero", "mean"] = "zero",
    exclude_special_tokens: bool | Sequence[int] = False,
    batch_size: int = 8,
    **forward_options: Unpack[ForwardOptions[ArrayT]],
) -> SaeScores:
    """Scores an SAE on texts: loss recovered, L0, explained variance and others, equal to those of SAELens's evaluations.

    A transcoder is compared with what the hook point that it stands for holds.

    Args:
        model: The model, without an SAE at this one's place.
        sae: The SAE.
        input: Texts, or token ids [n, p]; at least two tokens each. Padding counts for nothing.
        ablation: What the loss is compared with: "zero", as in SAELens, or the activation's "mean" over all tokens, which takes
            a second pass.
        exclude_special_tokens: True leaves the SAE out at BOS, EOS, PAD and SEP, and a list at its token ids; none of them
            is counted.
        batch_size: How many prompts a run has.
        **forward_options: Those of ``forward``: attention_mask, prepend_bos, padding_side.

    Returns:
        The scores.

    Raises:
        UnknownHookPoint: The model lacks a hook point of the SAE's.
        InputError: For an SAE at this one's place, an SAE that does not fit, and texts that leave nothing to score.
    """
    if not is_one_of(ablation, ABLATIONS):
        raise InputError(f"ablation={ablation!r}: there are 'zero' and 'mean'.")
    batch_size = checked_number(batch_size, "batch_size", least=1)
    there = {one.writes for one in model.runner.flags.saes.now}
    with model.saes(sae, use_error_term=False, exclude_special_tokens=exclude_special_tokens):
        one = InRun(model.runner.flags.saes.by_hook[sae.cfg.hook])
    if one.spliced.writes in there:
        raise InputError(
            f"an SAE is attached to {one.spliced.hook!r}, and scores compare with the model without: reset_saes first."
        )
    runner = model.runner
    whole = runner.whole_prompts(input, **forward_options)
    if whole.shape[1] < 2:
        raise InputError("a loss is of the next token: give texts of two tokens or more.")
    sums = _Sums(sae.cfg.d_sae)
    put = _mean(runner, whole, one, batch_size) if ablation == "mean" else np.float32(0)
    for ids, real in _batches(whole, batch_size):
        counted = real & ~np.isin(ids, one.spliced.excluded)
        plain = _logits(runner, ids, real)
        with model.saes(sae, use_error_term=False, exclude_special_tokens=exclude_special_tokens):
            request = _request(runner, ids, real)
            ran = runner.run(request, [one.features, one.output, one.spliced.writes])
        with runner.editing(Patch(one.spliced.writes, put)):
            ablated = _logits(runner, ids, real)
        sums.losses(ids, real, counted, plain, ran.logits, ablated)
        target, made = (ran.values[name].reshape(*ids.shape, -1)[counted] for name in (one.spliced.writes, one.output))
        sums.activations(ran.values[one.features], counted, target, made)
    return sums.scores()


def _batches(whole: Request, size: int) -> Iterator[tuple[Array, Array]]:
    """(token ids, which of them are no padding) of so many prompts each."""
    ids = whole.need_tokens()
    real = np.ones(ids.shape, bool) if whole.mask is None else np.asarray(whole.mask).astype(bool)
    for start in range(0, len(ids), size):
        yield ids[start : start + size], real[start : start + size]


def _request(runner: Runner[ArrayT], ids: Array, real: Array) -> Request:
    options = {} if real.all() else {"attention_mask": real.astype(np.int64)}
    return runner.whole_prompts(runner.border.to_user(ids), **options)


def _logits(runner: Runner[ArrayT], ids: Array, real: Array) -> Array:
    return runner.run(_request(runner, ids, real)).logits


def _mean(runner: Runner[ArrayT], whole: Request, one: InRun, size: int) -> Array:
    """The mean of the activation over all tokens that count, float32."""
    total: Array = np.zeros(())
    count, hook = 0, one.spliced.writes
    for ids, real in _batches(whole, size):
        counted = real & ~np.isin(ids, one.spliced.excluded)
        found = runner.run(_request(runner, ids, real), [hook], output=False).values[hook][counted]
        total, count = total + found.sum(0, dtype=np.float64), count + len(found)
    _ensure_some(count)
    return np.asarray(total / count, np.float32)


def _ensure_some(count: int) -> None:
    if not count:
        raise InputError("no token is left to score: all are padding or left out.")


class _Sums:
    """What is summed up on the way.

    Args:
        d_sae: The number of features.
    """

    def __init__(self, d_sae: int) -> None:
        self._means: dict[str, list[Array]] = {}
        self._squared, self._residual, self._tokens = 0.0, 0.0, 0
        self._sum: Array = np.zeros(())
        self._active = np.zeros(d_sae)

    def losses(self, ids: Array, real: Array, counted: Array, plain: Array, with_sae: Array, ablated: Array) -> None:
        """Takes in the logits of a batch: the model's, with the SAE, and with the ablation.

        Args:
            ids: Token ids [b, p].
            real: bool [b, p], False at padding.
            counted: bool [b, p], False also where the SAE is left out.
            plain: [b, p, V], as for the other two.
            with_sae: See there.
            ablated: See there.
        """
        pairs = counted[:, :-1] & real[:, 1:]
        own = log_softmax(plain)
        probability = np.exp(own)
        for name, logits in (("without_sae", plain), ("with_sae", with_sae), ("with_ablation", ablated)):
            logs = own if logits is plain else log_softmax(logits)
            loss = -np.take_along_axis(logs[:, :-1], ids[:, 1:, None], -1)[..., 0]
            self._take(f"ce_loss_{name}", loss[pairs])
            if logits is not plain:
                self._take(f"kl_div_{name}", (probability * (own - logs)).sum(-1)[counted])

    def activations(self, features: Array, counted: Array, target: Array, made: Array) -> None:
        """Takes in the features of a batch, and what they reconstruct.

        Args:
            features: [b, p, d_sae].
            counted: bool [b, p].
            target: The activation at tokens that count, [n, width].
            made: Its reconstruction.
        """
        if not len(target):
            return
        target, made = target.astype(np.float64), made.astype(np.float64)
        acts = features[counted]
        error = ((target - made) ** 2).sum(-1)
        norms = [np.sqrt((each**2).sum(-1)) for each in (target, made)]
        self._take("l0", (acts != 0).sum(-1))
        self._take("l1", np.abs(acts).sum(-1, dtype=np.float64))
        self._take("mse", error)
        around = ((target - target.mean(0)) ** 2).sum(-1)
        with np.errstate(divide="ignore", invalid="ignore"):  # one token has no variance, and a zero no direction
            self._take("explained_variance_legacy", 1 - error / around)
            self._take("cossim", (target * made).sum(-1) / (norms[0] * norms[1]))
            self._take(
                "relative_reconstruction_bias", (norms[1] ** 2).mean(keepdims=True) / (target * made).sum(-1).mean()
            )
        self._take("l2_norm_in", norms[0])
        self._take("l2_norm_out", norms[1])
        self._take("l2_ratio", norms[1] / np.where(norms[0] < 1e-4, 1, norms[0]))
        self._sum = self._sum + target.sum(0)
        self._squared += float((target**2).sum())
        self._residual += float(error.sum())
        self._tokens += len(target)
        self._active += (acts != 0).sum(0)

    def scores(self) -> SaeScores:
        """The scores of all batches."""
        _ensure_some(self._tokens)
        mean = {name: float(np.concatenate(parts).mean()) for name, parts in self._means.items()}
        variance = self._squared / self._tokens - float(((self._sum / self._tokens) ** 2).sum())
        error = self._residual / self._tokens
        explained = 1 - error / variance if variance >= 1e-10 else float(error < 1e-10)
        return SaeScores(
            ce_loss_score=_share(mean["ce_loss_with_ablation"], mean["ce_loss_with_sae"], mean["ce_loss_without_sae"]),
            kl_div_score=_share(mean["kl_div_with_ablation"], mean["kl_div_with_sae"], 0.0),
            explained_variance=explained,
            dead=float((self._active == 0).mean()),
            tokens=self._tokens,
            density=self._active / self._tokens,
            **mean,
        )

    def _take(self, name: str, values: Array) -> None:
        self._means.setdefault(name, []).append(values)


def _share(ablated: float, with_sae: float, without: float) -> float:
    """How much of what an ablation costs an SAE saves; NaN where the ablation costs nothing."""
    return (ablated - with_sae) / (ablated - without) if ablated != without else float("nan")
