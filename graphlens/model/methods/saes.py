"""What every model has of SAELens's HookedSAETransformer: SAEs are put into it and taken away, by SAELens's names.

These functions are methods: ``EditMethods`` takes them in by their names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from graphlens.edits.sae_training import warn_of_another_model
from graphlens.edits.spliced_sae import SplicedSae
from graphlens.engine.plan import Plan
from graphlens.engine.sae_places import ensure_fit
from graphlens.errors import InputError, checked_number, warn
from graphlens.model.per_thread import Block

if TYPE_CHECKING:
    from graphlens.edits.sae import Sae
    from graphlens.engine.engine import Engine
    from graphlens.file.manifest import ModelConfig
    from graphlens.model.flags import Flags

# Tokens that stand for no text, by the names that tokenizers have for them; those of a chat are none of them, as in SAELens.
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id")


class _Reads(Protocol):
    @property
    def tokenizer(self) -> object: ...


class _Runs(Protocol):
    engine: Engine
    flags: Flags

    @property
    def config(self) -> ModelConfig: ...

    @property
    def text(self) -> _Reads: ...


class _Takes(Protocol):
    """A model, by what these methods ask of it."""

    @property
    def runner(self) -> _Runs: ...


Model = TypeVar("Model", bound=_Takes)


def add_sae(
    self: _Takes,
    sae: Sae,
    use_error_term: bool | None = None,
    exclude_special_tokens: bool | Sequence[int] = False,
    features: Sequence[int] | None = None,
) -> None:
    """Attaches an SAE or a transcoder, for every thread, until ``reset_saes``. SAELens: the same name.

    It takes the place of one that reads the same hook point.

    Args:
        sae: The SAE.
        use_error_term: True adds what it does not reconstruct to its output, so that the model computes what it did until a
            feature is edited. None is False.
        exclude_special_tokens: True leaves it out at BOS, EOS, PAD and SEP; a list of token ids, at those.
        features: Attaches these features alone, in this order (``sae.only(features)``): a wide SAE's others are then neither
            in memory nor computed. With an error term the model still computes what it did.

    Raises:
        UnknownHookPoint: The model lacks a hook point of the SAE's.
        InputError: The SAE's width is not the activations', another SAE stands for the same hook point, or there is no
            tokenizer that knows special tokens.
    """
    sae = sae if features is None else sae.only(features)
    found = _checked(self.runner, [sae], use_error_term, exclude_special_tokens)
    self.runner.flags.saes.add(found)


def reset_saes(self: _Takes, act_names: str | Sequence[str] | None = None) -> None:
    """Takes SAEs away. SAELens: the same name.

    Args:
        act_names: The hook points that they read; None for all.
    """
    attached = self.runner.flags.saes
    names = list(attached.by_hook) if act_names is None else [act_names] if isinstance(act_names, str) else act_names
    for name in names:
        if name not in attached.by_hook:
            warn(f"no SAE is attached to {name!r}, so there is nothing to reset.")
    attached.remove(names)


def acts_to_saes(self: _Takes) -> dict[str, Sae]:
    """The SAEs that are attached, by the hook point that each reads. SAELens: the same name."""
    return {hook: one.sae for hook, one in self.runner.flags.saes.by_hook.items()}


def saes(
    self: Model,
    saes: Sae | Sequence[Sae] = (),
    reset_saes_end: bool = True,
    use_error_term: bool | None = None,
    exclude_special_tokens: bool | Sequence[int] = False,
) -> Block[Model]:
    """Attaches SAEs to every call inside the ``with`` block, in the thread that entered it. SAELens: the same name.

    Args:
        saes: One, or several. Those that were attached to the same hook points are back after the block.
        reset_saes_end: False lets them stay, as if added.
        use_error_term: See ``add_sae``, as for the next.
        exclude_special_tokens: See there.

    Raises:
        UnknownHookPoint: See there.
        InputError: See there.
    """
    found = _checked(
        self.runner, saes if isinstance(saes, Sequence) else [saes], use_error_term, exclude_special_tokens
    )
    stay = not checked_number(reset_saes_end, "reset_saes_end", bool)
    if stay:
        self.runner.flags.saes.add(found)
    return self.runner.flags.saes.during(() if stay else found).giving(self)


def _checked(
    runner: _Runs, saes: Sequence[Sae], use_error_term: bool | None, exclude: bool | Sequence[int]
) -> list[SplicedSae]:
    """SAEs as records, once they are known to fit the model and those that are attached."""
    excluded = _excluded(runner, exclude)
    found = [SplicedSae.of(sae, use_error_term or False, excluded) for sae in saes]
    hooks = [one.hook for one in found]
    if twice := [hook for hook in hooks if hooks.count(hook) > 1]:
        raise InputError(
            f"two SAEs of one call read {twice[0]!r}, and a model has one at a time that reads a hook point. Pass one; "
            "surgery.with_sae and bake_model(saes=) take both where they stand for different hook points."
        )
    flags = runner.flags
    ensure_fit(runner.engine, Plan(flags.names), flags.saes.with_others(found))
    for one in found:
        warn_of_another_model(one.sae, runner.engine.manifest)
    return found


def _excluded(runner: _Runs, exclude: bool | Sequence[int]) -> Sequence[int]:
    """The ids of the tokens that SAEs are left out at."""
    if exclude is None or exclude is False:  # as SAELens takes None
        return ()
    if not isinstance(exclude, bool):
        found = list(exclude) if isinstance(exclude, Iterable) else [exclude]
    else:
        tokenizer = runner.text.tokenizer
        if tokenizer is None:
            raise InputError(
                "exclude_special_tokens=True: this model has no tokenizer that knows special tokens. Pass their ids."
            )
        ids: Mapping[str, int | None] = {name: getattr(tokenizer, name, None) for name in _SPECIAL}
        found = [index for index in ids.values() if index is not None]
    if found and runner.config.is_vision:
        raise InputError("exclude_special_tokens: a vision model reads no tokens. Leave it out.")
    return found
