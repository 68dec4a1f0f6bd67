"""A model's weights as TransformerLens's state dict: loaded, processed, drawn anew. The graph is never exported again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from graphlens.analysis.arrays import Array, ArrayInput, ArrayT, as_array
from graphlens.errors import InputError, StateDictError, checked_number, warn
from graphlens.file.processing import FOLDED_NORMS, STEPS, steps_for
from graphlens.model.weights import Weights

if TYPE_CHECKING:
    from graphlens.engine.engine import Engine
    from graphlens.model.config import HookedTransformerConfig
    from graphlens.model.runner import Runner

# What TransformerLens's state dicts hold besides weights.
_BUFFERS = (".attn.mask", ".attn.IGNORE", ".attn.rotary_sin", ".attn.rotary_cos")
_POSITIONS = "pos_embed.W_pos"
_OF_NORMS = (*FOLDED_NORMS, "mlp.ln")


@dataclass(frozen=True)
class Made:
    """What a model was made of.

    Attributes:
        base: The graph file whose weights are not processed, in float32; None for the file that is open.
        weights: The weights it was given, by the names that they are stored by; none where they are the file's.
    """

    base: Path | None = None
    weights: Mapping[str, Array] = field(default_factory=dict)


class IncompatibleKeys(NamedTuple):
    """What did not fit of a state dict, as torch has it.

    Attributes:
        missing_keys: The weights of the model that were not given.
        unexpected_keys: What was given, and is no weight of the model.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


class Weighted(Protocol[ArrayT]):
    """What is asked of a model whose weights are set."""

    runner: Runner[ArrayT]
    _made: Made

    @property
    def cfg(self) -> HookedTransformerConfig:
        """Its configuration."""


def _of_model(model: Weighted[ArrayT], state_dict: object) -> dict[str, ArrayInput]:
    """What a state dict holds, without what has no effect in TransformerLens, by the names that this model has."""
    if not isinstance(state_dict, Mapping):
        raise InputError(f"a state dict is a dictionary of name -> array, not {type(state_dict).__name__}.")
    weights, alibi = model.runner.weights, model.runner.config.positional_embedding_type == "alibi"
    found: dict[str, ArrayInput] = {}
    for name, value in state_dict.items():
        if not isinstance(name, str):
            raise InputError(f"the names in a state dict are text, not {type(name).__name__}.")
        if not name.endswith(_BUFFERS) and not (alibi and name == _POSITIONS):
            once = weights.canonical(name)
            if once in found:
                raise InputError(f"{name!r} and another name in the state dict are one weight: leave one of them out.")
            found[once] = value if once == name else weights.as_stored(name, as_array(value))
    return found


def load_state_dict(
    self: Weighted[ArrayT], state_dict: Mapping[str, ArrayInput], strict: bool = True, assign: bool = False
) -> IncompatibleKeys:
    """Computes with the weights of a state dict from now on. TransformerLens: the same name.

    It is as ``set_weights``: nothing is exported or written.

    Args:
        state_dict: TransformerLens name -> array or tensor, of any floating dtype: what ``state_dict()`` gives here or there,
            or ``torch.load(path, weights_only=True)``. TransformerLens's buffers (``mask``, ``IGNORE``, ``rotary_sin``) have
            no effect, as there.
        strict: Whether names that are missing or that the model has not are an error. False takes those that fit.
        assign: torch's; changes nothing.

    Returns:
        The names that did not fit.

    Raises:
        StateDictError: For such names with ``strict``, and shapes that are not the model's. Nothing is changed then. It is
            a RuntimeError, as torch's.
        InputError: For what is no dictionary of arrays, and for numbers that are not finite.
    """
    given, weights = _of_model(self, state_dict), self.runner.weights
    names = weights.names()
    missing = [name for name in names if name not in given]
    unexpected = [name for name in given if name not in weights]
    if checked_number(strict, "strict", bool) and (missing or unexpected):
        parts = [
            f"{what}: {_listed(some)}" for what, some in (("missing", missing), ("not its weights", unexpected)) if some
        ]
        raise StateDictError(
            f"the state dict does not fit {self.runner.config.model_name}: {'; '.join(parts)}. strict=False takes what fits."
        )
    fitting = {name: value for name, value in given.items() if name in weights}
    wrong = [
        f"{name} is {list(weights[name].shape)} here and {list(shape)} there"
        for name, value in fitting.items()
        if (shape := tuple(getattr(value, "shape", ()) or np.shape(value))) != weights[name].shape
    ]
    if wrong:
        raise StateDictError(f"the state dict does not fit {self.runner.config.model_name}: {_listed(wrong)}.")
    self.runner.use(weights.with_others(fitting))
    return IncompatibleKeys(missing, unexpected)


def _listed(names: Iterable[str]) -> str:
    """Some of many names."""
    every = list(names)
    return ", ".join(every[:5]) + (f" and {len(every) - 5} more" if len(every) > 5 else "")


def init_weights(self: Weighted[ArrayT]) -> None:
    """Draws every weight matrix anew, by ``cfg.init_mode``, ``cfg.initializer_range`` and ``cfg.seed``. TransformerLens: the
    same name. With torch's generator and in its order: the numbers are TransformerLens's. Biases and norms stay.

    Raises:
        InputError: For a model whose weights are not those of a TransformerLens config (several experts, say).
        RuntimeUnavailable: torch is not installed.
    """
    from graphlens.model.initial import initial_weights, parameters

    cfg, weights = self.cfg, self.runner.weights
    drawn = [parameter.name for parameter in parameters(cfg) if parameter.begins is None]
    absent = [name for name in drawn if name not in weights and name != _POSITIONS]
    if absent:
        raise InputError(f"init_weights: {cfg.model_name} has no {_listed(absent)}, so its weights cannot be drawn.")
    found = initial_weights(cfg)
    self.runner.use(weights.with_others({name: found[name] for name in drawn if name in weights}))


def load_and_process_state_dict(
    self: Weighted[ArrayT],
    state_dict: Mapping[str, ArrayInput],
    fold_ln: bool = True,
    center_writing_weights: bool = True,
    center_unembed: bool = True,
    fold_value_biases: bool = True,
    refactor_factored_attn_matrices: bool = False,
) -> None:
    """Processes the weights of a state dict, and computes with them from now on. TransformerLens: the same name.

    With ``fold_ln`` the model goes on with a graph whose norms have no weights; ``cfg.normalization_type`` then ends in "Pre".
    That graph is made once for each architecture, without an export.

    Args:
        state_dict: See ``load_state_dict``. Weights that are missing are the model's own, norms' that it lacks 1, biases 0.
        fold_ln: Moves the norms' weights and biases into what reads them; see ``process_weights``, as for the others.
        center_writing_weights: See there.
        center_unembed: See there.
        fold_value_biases: See there.
        refactor_factored_attn_matrices: See there.

    Raises:
        StateDictError: For a missing weight matrix of a block, and shapes that are not the model's.
        InputError: For a name that is no weight of the model, and a norm's bias that cannot be folded.
        ExportError: For a step that cannot be done for the architecture.
    """
    asked = (fold_ln, center_writing_weights, center_unembed, fold_value_biases, refactor_factored_attn_matrices)
    _process(self, _of_model(self, state_dict), _steps(asked))


def process_weights_(
    self: Weighted[ArrayT],
    fold_ln: bool = True,
    center_writing_weights: bool = True,
    center_unembed: bool = True,
    refactor_factored_attn_matrices: bool = False,
) -> None:
    """Processes the weights that the model computes with; value biases are folded too. TransformerLens: the same name.

    Args:
        fold_ln: See ``load_and_process_state_dict``, as for the others.
        center_writing_weights: See there.
        center_unembed: See there.
        refactor_factored_attn_matrices: See there.

    Raises:
        ExportError: For a step that cannot be done for the architecture.
        InputError: For a norm's bias that cannot be folded.
    """
    asked = (fold_ln, center_writing_weights, center_unembed, True, refactor_factored_attn_matrices)
    weights = self.runner.weights
    _process(self, {name: weights[name] for name in weights.names()}, _steps(asked))


def _steps(asked: Iterable[object]) -> tuple[str, ...]:
    return tuple(step for step, on in zip(STEPS, asked, strict=True) if checked_number(on, step, bool))


def _process(model: Weighted[ArrayT], given: Mapping[str, ArrayInput], asked: tuple[str, ...]) -> None:
    """Processes weights, and goes on with a graph that computes with them."""
    from graphlens.engine.engine import Engine
    from graphlens.pipelines.cache import converted_export, processed_export
    from graphlens.pipelines.processed_state import processed_state

    now = model.runner.engine
    path = model._made.base or now.path
    base = (
        now.with_weights({}) if path == now.path else Engine(path, now.asked, now.manifest.config.n_ctx, now.max_memory)
    )
    steps, notes = steps_for(base.manifest, asked)
    for sentence in notes:
        warn(sentence)
    folder = base.folder
    if steps and not base.manifest.processing:
        folder = processed_export(base.folder, steps)
    dtype = now.manifest.config.dtype
    if dtype != base.manifest.config.dtype:
        folder = converted_export(folder, dtype)
    state = processed_state(_filled(model.runner.weights, Weights(base), given), steps, base.manifest.config)
    engine = base if folder == base.folder else Engine(folder, now.asked, now.manifest.config.n_ctx, now.max_memory)
    new = _with_all(engine, state, "fold_ln" in steps)
    new.max_sessions = now.max_sessions
    model.runner.use(new)
    model._made = Made(path, new.replaced)


def _filled(own: Weights, unprocessed: Weights, given: Mapping[str, ArrayInput]) -> dict[str, Array]:
    """A whole state: what is given, and of the rest the model's own; norms' that it lacks are those that do nothing."""
    state: dict[str, Array] = {}
    for name in unprocessed.names():
        matrix = name.startswith("blocks.") and "W_" in name
        if name in given:
            state[name] = as_array(given[name])
            if state[name].shape != (shape := unprocessed[name].shape):
                raise StateDictError(f"{name} is {list(shape)} here and {list(state[name].shape)} there.")
        elif matrix:
            raise StateDictError(
                f"the state dict has no {name!r}, and a block without its matrix computes something else."
            )
        elif name in own:
            state[name] = own[name]
        else:
            state[name] = np.full(unprocessed[name].shape, 1 if name.endswith(".w") else 0, np.float32)
    unknown = [name for name in given if name not in state]
    # A model whose file is processed may be given what it was before.
    extra = [name for name in unknown if name.rpartition(".")[0].split(".")[-1] in ("ln1", "ln2", "ln_final", "ln")]
    if set(unknown) - set(extra):
        raise StateDictError(f"no weights of this model: {_listed(sorted(set(unknown) - set(extra)))}.")
    return {**state, **{name: as_array(given[name]) for name in extra}}


def _with_all(engine: Engine, state: Mapping[str, Array], folded: bool) -> Engine:
    """An engine that computes with a whole state. Norms that its graph has no weights of must do nothing."""
    weights = Weights(engine)
    taken = {}
    for name, array in state.items():
        if name in weights:
            taken[name] = array
        elif not np.all(array == (1 if name.endswith(".w") else 0)):
            raise InputError(
                f"{name!r}: the graph of this model has no such weight, and what was given does something."
            )
    return weights.with_others(taken)


def fold_layer_norm(
    self: Weighted[ArrayT],
    state_dict: MutableMapping[str, ArrayT],
    fold_biases: bool = True,
    center_weights: bool = True,
) -> MutableMapping[str, ArrayT]:
    """The same state dict with the norms moved into what reads them; they are then 1 and 0. TransformerLens: the same name.

    Args:
        state_dict: TransformerLens name -> array; it is changed.
        fold_biases: Whether the norms' biases are moved; False for RMSNorm.
        center_weights: Whether what reads a norm is centred; False for RMSNorm.

    Raises:
        InputError: For a norm's bias that cannot be folded.
    """
    return _processed(self, state_dict, "fold_ln", "LN" if center_weights else "RMS", not fold_biases)


def center_writing_weights(
    self: Weighted[ArrayT], state_dict: MutableMapping[str, ArrayT]
) -> MutableMapping[str, ArrayT]:
    """The same state dict with what writes to the residual stream centred. TransformerLens: the same name.

    Args:
        state_dict: TransformerLens name -> array; it is changed.
    """
    return _processed(self, state_dict, "center_writing_weights", "LN")


def center_unembed(self: Weighted[ArrayT], state_dict: MutableMapping[str, ArrayT]) -> MutableMapping[str, ArrayT]:
    """The same state dict with W_U and b_U centred over the vocabulary. TransformerLens: the same name.

    Args:
        state_dict: TransformerLens name -> array; it is changed.
    """
    return _processed(self, state_dict, "center_unembed")


def fold_value_biases(self: Weighted[ArrayT], state_dict: MutableMapping[str, ArrayT]) -> MutableMapping[str, ArrayT]:
    """The same state dict with b_V moved into b_O. TransformerLens: the same name.

    Args:
        state_dict: TransformerLens name -> array; it is changed.
    """
    return _processed(self, state_dict, "fold_value_biases")


def refactor_factored_attn_matrices(
    self: Weighted[ArrayT], state_dict: MutableMapping[str, ArrayT]
) -> MutableMapping[str, ArrayT]:
    """The same state dict with W_Q W_K^T and W_V W_O of each head rewritten by their singular value decompositions.
    TransformerLens: the same name.

    Args:
        state_dict: TransformerLens name -> array; it is changed.

    Raises:
        ExportError: For an architecture of whose scores W_Q W_K^T is not all (rotary positions, say).
    """
    steps_for(self.runner.engine.manifest, ["refactor_factored_attn_matrices"])
    return _processed(self, state_dict, "refactor_factored_attn_matrices")


def _processed(
    model: Weighted[ArrayT],
    state_dict: MutableMapping[str, ArrayT],
    step: str,
    norms: str | None = None,
    without_biases: bool = False,
) -> MutableMapping[str, ArrayT]:
    """A user's state dict after one step."""
    from graphlens.pipelines.processed_state import processed_state

    config, border = model.runner.config, model.runner.border
    config = config if norms is None else replace(config, normalization_type=norms)
    plain = {name: value for name, value in state_dict.items() if not name.endswith(_BUFFERS)}
    arrays = {name: as_array(value) for name, value in plain.items()}
    for name, array in processed_state(arrays, [step], config, without_biases).items():
        state_dict[name] = border.to_user(array.astype(arrays[name].dtype) if name in arrays else array)
    return state_dict


def fill_missing_keys(self: Weighted[ArrayT], state_dict: MutableMapping[str, ArrayT]) -> MutableMapping[str, ArrayT]:
    """The same state dict, with the model's own weights where it lacks one. TransformerLens: the same name.

    Args:
        state_dict: TransformerLens name -> array; it is changed.

    Raises:
        StateDictError: For a missing matrix of a block, without which it would compute something else.
    """
    given, weights = set(_of_model(self, state_dict)), self.runner.weights
    missing = [name for name in weights.names() if name not in given]
    fatal = [name for name in missing if name.startswith("blocks.") and "W_" in name]
    if fatal:
        raise StateDictError(f"the state dict has no {_listed(fatal)}.")
    if missing:
        warn(f"the state dict has no {_listed(missing)}: they are the model's own.")
    for name in missing:
        state_dict[name] = self.runner.weight(name)
    return state_dict
