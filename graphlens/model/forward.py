"""One forward as a user asks for it, with ``return_type``, ``names_filter`` and ``incl_bwd`` carried out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from graphlens.analysis.arrays import Array, ArrayT
from graphlens.analysis.slices import SliceInput, of_positions
from graphlens.errors import InputError, checked_number, is_one_of, warn
from graphlens.file.names import NamesFilter
from graphlens.model.hook_calls import Hooks
from graphlens.model.hooks import BACKWARD
from graphlens.model.request import RETURN_TYPES, ForwardOptions, Output, Request
from graphlens.model.text import Input

if TYPE_CHECKING:
    from graphlens.analysis.cache.activation_cache import ActivationCache
    from graphlens.model.runner import Runner


CacheT = TypeVar("CacheT", bound="ActivationCache[Any]")


class CacheOptions(ForwardOptions[ArrayT], total=False):
    """The arguments of ``run_with_cache`` that are its own, and those of ``forward``; see there."""

    loss_per_token: bool
    names_filter: NamesFilter
    device: Any
    remove_batch_dim: bool
    incl_bwd: bool
    reset_hooks_end: bool
    clear_contexts: bool
    pos_slice: SliceInput


class HookOptions(ForwardOptions[ArrayT], total=False):
    """The arguments of ``run_with_hooks`` that are its own, and those of ``forward``; see there."""

    loss_per_token: bool
    fwd_hooks: Hooks
    bwd_hooks: Hooks
    reset_hooks_end: bool
    clear_contexts: bool


class InterventionOptions(ForwardOptions[ArrayT], total=False):
    """The last arguments of ``run_with_interventions``, and those of ``forward``; see there."""

    loss_per_token: bool
    fwd_hooks: Hooks
    strict: bool


@dataclass(frozen=True)
class Forwarded(Generic[ArrayT]):
    """What a forward gave.

    Attributes:
        result: What ``return_type`` asked for.
        values: Activations, and gradients as ``<name>_grad``, by name.
        request: The run.
        straight_through: What the gradients passed as if it did not round; see ``Ran``.
    """

    result: ArrayT | Output[ArrayT] | None
    values: dict[str, Array]
    request: Request
    straight_through: Mapping[str, int] = field(default_factory=dict)


def run_forward(
    runner: Runner[ArrayT],
    names_filter: NamesFilter | Literal[False],
    incl_bwd: bool,
    input: Input[ArrayT],
    /,
    return_type: str | None = "logits",
    loss_per_token: bool = False,
    *forward_args: Any,
    **forward_options: Any,
) -> Forwarded[ArrayT]:
    """Runs the model once as ``forward`` does, and keeps activations where they are wanted.

    Args:
        runner: Runs the model.
        names_filter: Which activations are wanted; False for none.
        incl_bwd: True for the gradients of the loss with respect to these too.
        input: See ``HookedTransformer.forward``, as for the next two.
        return_type: See there.
        loss_per_token: See there.
        *forward_args: The arguments of ``forward`` after ``loss_per_token``.
        **forward_options: The same by name.

    Returns:
        The result, the activations and the request.

    Raises:
        InputError: For arguments that do not go together, and what Runner.request and Runner.run raise.
    """
    if not is_one_of(return_type, RETURN_TYPES):
        raise InputError(f"return_type must be one of {RETURN_TYPES}, not {return_type!r}.")
    incl_bwd, loss_per_token = (
        checked_number(incl_bwd, "incl_bwd", bool),
        checked_number(loss_per_token, "loss_per_token", bool),
    )
    request = runner.request(input, *forward_args, **forward_options)
    stops = request.plan.stop is not None
    return_type = return_type if stops else asked_of(runner, return_type, names_filter)
    wants_loss = return_type in ("loss", "both") and not stops
    if wants_loss:
        request.need_tokens()
    if wants_loss and request.mask is None and request.real is not None:
        runner.text.warn_of_padding_in_loss()
    if wants_loss and request.shape[1] < 2:
        raise InputError("a loss needs at least 2 tokens: it is that of each next token.")
    fetch = [] if names_filter is False else runner.select(names_filter, request)
    scalar = return_type == "loss" and wants_loss and not loss_per_token
    if incl_bwd and not scalar:
        raise InputError(
            "incl_bwd runs backward from a scalar: pass return_type='loss' (without loss_per_token), or take "
            "model.gradients(tokens, metric)."
        )
    # Arrays have no backward(): their backward hooks are called here, if at all.
    if incl_bwd or (scalar and not runner.border.backward_later and runner.hooks.active(dir=BACKWARD)):
        ran = runner.run_loss(request, fetch, fetch if incl_bwd else [])
    else:
        ran = runner.run(request, fetch, output=stops or return_type is not None)
    if ran.output is None:
        return Forwarded(None, ran.values, request, ran.straight_through)
    result = runner.border.finish(ran.output, request, runner, ran.learned)
    if stops or return_type == "logits":
        return Forwarded(result, ran.values, request, ran.straight_through)
    loss = runner.border.loss(result, ran.output, request, loss_per_token)
    asked = loss if return_type == "loss" else Output(result, loss)
    return Forwarded(asked, ran.values, request, ran.straight_through)


def asked_of(runner: Runner[ArrayT], return_type: str | None, names_filter: NamesFilter | Literal[False]) -> str | None:
    """What a run is asked to return: nothing in place of logits that an adopted file lacks, where activations are read.

    Args:
        runner: The model's.
        return_type: What the user, or a default, asks for.
        names_filter: Which activations are wanted; False for none.
    """
    reads = names_filter is not False
    return None if reads and return_type == "logits" and runner.engine.manifest.headless else return_type


def unbatched(cache: CacheT, prompts: int) -> CacheT:
    """The cache of a run with ``remove_batch_dim``: of several prompts the first one's, as in TransformerLens.

    Args:
        cache: The cache of the whole run; that of one prompt is changed in place.
        prompts: How many prompts the run had.
    """
    if prompts == 1:
        return cache.remove_batch_dim()
    warn(
        f"remove_batch_dim=True with {prompts} prompts: the cache holds the activations of the first one, as TransformerLens's "
        "does. Leave it out for all of them."
    )
    return cache.apply_slice_to_batch_dim(0)


def positions_of(runner: Runner[ArrayT], ran: Forwarded[ArrayT], pos_slice: SliceInput) -> dict[str, Array]:
    """Some positions of every activation and gradient of a forward.

    Args:
        runner: What ran it.
        ran: The forward.
        pos_slice: The positions; see ``HookedTransformer.run_with_cache``.

    Returns:
        The same names, with the shorter arrays.
    """
    entries = runner.engine.hooks(ran.request.plan)
    return {
        name: of_positions(array, entries[name.removesuffix("_grad")].axes, pos_slice, ran.request.shape)
        for name, array in ran.values.items()
    }
