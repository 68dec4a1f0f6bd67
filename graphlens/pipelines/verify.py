"""Verification: what must hold of an exported file before it is called good, tried on the file itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from graphlens.analysis.arrays import Array
from graphlens.analysis.numerics import log_softmax
from graphlens.engine.engine import Engine
from graphlens.errors import InputError, VerificationError
from graphlens.file.io_names import ATTENTION_MASK, INPUT_IDS, TOKEN_TYPE_IDS
from graphlens.file.names import KEYS, QUERIES, SCORES, TOKENS, axis_sizes, split_name
from graphlens.pipelines.memory import peak_memory
from graphlens.views.progress import steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Differences are relative to max(1, the largest value that is compared with).
TOLERANCE = 1e-4  # of the logits from transformers'
_HALF_TOLERANCE = 1e-2  # the same of two computations in a half precision
_NO_EFFECT = 1e-6  # of the logits after a change that should matter
_NO_LEAK = 1e-5  # of earlier logits after a change of the last token
_ROW_SUM = 1e-4  # of a pattern's row from 1, absolute
_BATCH, _LENGTH = 2, 11
_MAX_WINDOW = 1024  # that is tried: beyond, a run past the window takes too long
_TRIED_AT_ONCE = 16
_EFFECT_LENGTH = 5  # a perturbed hook point needs at least 4 positions to be sure of an effect
_PATTERN = "attn.hook_pattern"


@dataclass(frozen=True)
class Verification:
    """What a verification found.

    Attributes:
        logits_difference: The largest absolute difference of the logits from transformers'.
        allowed: How large it may be.
        hook_points: How many hook points were tried.
        peak_bytes: The peak memory of the verification.
        seconds: How long it took.
        causal: False where tokens attend to later ones too.
        reference: Whose logits they were compared with.
    """

    logits_difference: float
    allowed: float
    hook_points: int
    peak_bytes: int
    seconds: float
    causal: bool = True
    reference: str = "transformers'"

    def lines(self) -> list[str]:
        """The findings, in lines of text for people."""
        return [
            f"Logits differ from {self.reference} by at most {self.logits_difference:.1e} (allowed {self.allowed:.1e})",
            f"{self.hook_points} hook points: shapes, finite values, {'causal ' if self.causal else ''}patterns and causal "
            "effect hold",
            f"Verified in {self.seconds:.1f} s, peak memory {self.peak_bytes / 1e6:,.0f} MB",
        ]


def verify_export(model: Path, reference: Path | Callable[[Array], Array], effects: bool = True) -> Verification:
    """Verifies a hooked file against the checkpoint it came from, on seeded random tokens.

    Logits equal the reference's, which for a checkpoint are transformers' (log-probabilities for processed weights, which
    centre the unembedding); every hook point has its shape and finite values; patterns sum to 1; a causal model's patterns and
    earlier logits do not depend on later tokens; and changing the value at each hook point changes the logits.

    Args:
        model: The graph file.
        reference: The checkpoint folder, or what gives the logits of tokens [b, p].
        effects: False leaves out that changes must change the logits: in a model of a few positions or dimensions they need
            not.

    Raises:
        VerificationError: The first of these that does not hold.
    """
    started = time.perf_counter()
    with peak_memory() as peak:
        engine = Engine(model, "cpu")
        config = engine.manifest.config
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, config.d_vocab, (_BATCH, min(_LENGTH, config.n_ctx)))
        causal = config.is_causal
        window, inputs = config.window_size, [{INPUT_IDS: tokens}]
        if window is not None and window <= _MAX_WINDOW and tokens.shape[1] <= window < config.n_ctx:
            # A mask that ignored the window would be right up to here.
            inputs.append({INPUT_IDS: rng.integers(0, config.d_vocab, (1, min(window + 3, config.n_ctx)))})
        if config.is_encoder:
            inputs.append(_padded(tokens, config.n_token_types or 1))
        # Before there is a session: transformers' copy of the weights is gone by then.
        whose = "transformers'"
        if callable(reference):
            whose = "those of a second implementation in NumPy"
            references = [reference(given[INPUT_IDS]) for given in inputs]
        else:
            references = _references(reference, inputs, not config.is_encoder)
        results = engine.run(inputs[0], engine.hook_names)
        logits, values = results.output, results.values
        assert logits is not None
        _check_finite(values)
        _check_shapes(engine, values, tokens.shape[1])
        _check_patterns(values, causal)
        if causal:
            _check_future(engine, tokens, logits)
        del values, results
        outputs = [logits, *(_output(engine, given) for given in inputs[1:])]
        processed = bool(engine.manifest.processing)
        found = [_compare(ours, theirs, processed, whose) for ours, theirs in zip(outputs, references, strict=True)]
        difference, allowed = max(largest for largest, _ in found), found[0][1]
        # With the sessions that were needed so far gone, their mappings of the weights are too.
        engine = Engine(model, "cpu")
        if effects:
            _check_effects(engine, tokens[:1, :_EFFECT_LENGTH], rng)
    seconds = time.perf_counter() - started
    return Verification(difference, allowed, len(engine.hook_names), peak.bytes, seconds, causal, whose)


def _scale(array: Array) -> float:
    """What differences from an array are relative to: its largest absolute value, at least 1."""
    return max(1.0, float(np.abs(array).max()))


def _logits(engine: Engine, tokens: Array, callbacks: Mapping[str, Callable[[Array], Array]] | None = None) -> Array:
    """The logits [b, p, d_vocab] of tokens [b, p], with ``callbacks`` at hook points."""
    return _output(engine, {INPUT_IDS: tokens}, callbacks)


def _output(
    engine: Engine, feeds: Mapping[str, Array], callbacks: Mapping[str, Callable[[Array], Array]] | None = None
) -> Array:
    """The logits of a run."""
    output = engine.run(feeds, (), callbacks).output
    assert output is not None
    return output


def _padded(tokens: Array, types: int) -> dict[str, Array]:
    """Tokens [b, p] of an encoder as a graph and transformers are fed them, with padding and with types."""
    real = np.ones_like(tokens)
    real[0, tokens.shape[1] // 2 + 1 :] = 0
    return {
        INPUT_IDS: tokens, ATTENTION_MASK: real, TOKEN_TYPE_IDS: np.arange(tokens.size).reshape(tokens.shape) % types,
    }  # fmt: skip


def _references(checkpoint: Path, inputs: Sequence[Mapping[str, Array]], decoder: bool) -> list[Array]:
    """transformers' logits [b, p, d_vocab] of each of some inputs in float32, by its own attention.

    Raises:
        VerificationError: It cannot run the checkpoint.
    """
    import torch
    import transformers

    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        kind = transformers.AutoModelForCausalLM if decoder else transformers.AutoModelForMaskedLM
        model = kind.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        ).eval()
        with torch.no_grad():
            return [
                model(**{name: torch.from_numpy(array) for name, array in given.items()}).logits.numpy()
                for given in inputs
            ]
    except (ValueError, TypeError, RuntimeError, LookupError, AttributeError, ArithmeticError, AssertionError) as error:
        # At values of a config that contradict one another.
        raise VerificationError(
            f"{checkpoint}: transformers itself cannot run this checkpoint ({type(error).__name__}: {error}), so there are no "
            "logits to compare with. Look at its config.json; --no-verify exports it all the same."
        ) from error
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()


def ensure_computes_as_its_class(hf_model: PreTrainedModel, folder: Path) -> None:
    """Refuses a model in memory that computes something else than transformers makes of its checkpoint.

    The export reads the weights and the config alone. A class of one's own, modules that were put in place of others, their
    settings, buffers that no checkpoint stores and hooks may make something else of them, so the logits are compared.

    Args:
        hf_model: The transformers model.
        folder: The checkpoint that it was written to.

    Raises:
        InputError: The logits differ.
    """
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    encoder = str((config.architectures or [""])[0]).endswith("ForMaskedLM")
    kind = transformers.AutoModelForMaskedLM if encoder else transformers.AutoModelForCausalLM
    try:
        with torch.device("meta"):
            usual = {name: type(module) for name, module in kind.from_config(config).named_modules()}
    except (ValueError, KeyError):  # no class of transformers': export says which there are
        return
    strange = [
        f"{name or 'the model'} ({type(module).__name__})"
        for name, module in hf_model.named_modules()
        if type(module) is not usual.get(name)
        or "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
    ]
    few = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.get_text_config().vocab_size, (_BATCH, 4), generator=few)
    attention = hf_model.config._attn_implementation
    plain = kind.from_pretrained(folder, dtype=hf_model.dtype, attn_implementation=attention, local_files_only=True)
    plain = plain.eval().to(hf_model.device)
    training = hf_model.training
    try:
        with torch.no_grad():
            theirs = plain(ids.to(hf_model.device)).logits.float()
            own = getattr(hf_model.eval()(ids.to(hf_model.device)), "logits", None)
    finally:
        hf_model.train(training)
    allowed = (TOLERANCE if hf_model.dtype == torch.float32 else _HALF_TOLERANCE) * max(1.0, float(theirs.abs().max()))
    if own is None or own.shape != theirs.shape or not float((own.float() - theirs).abs().max()) <= allowed:
        shown = ", ".join(strange[:3]) + (", ..." if len(strange) > 3 else "") or "a setting or a buffer of a module"
        raise InputError(
            f"hf_model computes something else than its weights say: its logits are not those of the {kind.__name__} that its "
            f"checkpoint holds. What differs from transformers' own: {shown}. The export reads weights; put into them what "
            "was changed, or pass the plain model."
        )


def _check_finite(values: Mapping[str, Array]) -> None:
    """Raises VerificationError for NaN, and for infinite values other than the -inf of masked scores."""
    for name, value in values.items():
        bad = np.isnan(value) | (np.isinf(value) & (value > 0))
        if split_name(name)[1] != SCORES:
            bad |= np.isinf(value)
        if bad.any():
            raise VerificationError(
                f"{name!r} holds {int(bad.sum())} values that are NaN or infinite. The weights are damaged, or overflow "
                "in float32; look at them before exporting."
            )


def _compare(logits: Array, reference: Array, processed: bool, whose: str) -> tuple[float, float]:
    """The largest difference of the logits and how large it may be. Raises VerificationError for a larger one."""
    if processed:
        logits, reference = log_softmax(logits), log_softmax(reference)
    allowed = TOLERANCE * _scale(reference)
    difference = float(np.abs(logits - reference).max())
    if not difference <= allowed:
        raise VerificationError(
            f"the exported logits differ from {whose} by {difference:.2e}, more than the {allowed:.1e} allowed. "
            "This is a defect of the exporter: please report it with the model's config.json."
        )
    return difference, allowed


def _check_shapes(engine: Engine, values: Mapping[str, Array], length: int) -> None:
    """Raises VerificationError for an activation that has not the shape and dtype that the manifest gives it."""
    sizes = axis_sizes(engine.manifest.config)
    sizes |= {"batch": _BATCH, "pos": length, "query_pos": length, "key_pos": length}
    tokens = _BATCH * length
    sizes |= {TOKENS: tokens, QUERIES: tokens * sizes["head_index"], KEYS: tokens * sizes["key_value_head_index"]}
    for name, entry in engine.manifest.hooks.items():
        expected = tuple(entry.sizes(sizes)[axis] for axis in entry.axes)
        if values[name].shape != expected or str(values[name].dtype) != entry.dtype:
            raise VerificationError(
                f"{name!r} has shape {list(values[name].shape)} and dtype {values[name].dtype}, not {list(expected)} "
                f"and {entry.dtype}. This is a defect of the exporter: please report it."
            )


def _check_patterns(values: Mapping[str, Array], causal: bool) -> None:
    """Raises VerificationError for attention patterns whose rows do not sum to 1, or that attend to later positions."""
    for name, pattern in values.items():
        if split_name(name)[1] != _PATTERN:
            continue
        if np.abs(pattern.sum(-1) - 1).max() > _ROW_SUM:
            raise VerificationError(f"{name!r}: its rows do not sum to 1, so it is not an attention pattern.")
        if causal and np.abs(np.triu(pattern, 1)).max() != 0:
            raise VerificationError(f"{name!r}: attends to later positions, so the attention is not causal.")


def _check_future(engine: Engine, tokens: Array, logits: Array) -> None:
    """Raises VerificationError if another last token changes earlier logits."""
    changed = tokens.copy()
    changed[:, -1] = (changed[:, -1] + 1) % engine.manifest.config.d_vocab
    other = _logits(engine, changed)
    if logits.shape[1] > 1 and np.abs(other[:, :-1] - logits[:, :-1]).max() > _NO_LEAK * _scale(logits):
        raise VerificationError("changing the last token changed earlier logits: the model is not causal.")


def _check_effects(engine: Engine, tokens: Array, rng: np.random.Generator) -> None:
    """Raises VerificationError for the first hook point at which a change does not change the logits.

    A run tries several hook points, each in a row of its own of the batch: that takes a third of the time.

    Args:
        engine: The hooked file.
        tokens: One row of tokens [1, p].
        rng: What the changes are drawn from.
    """
    names = list(engine.hook_names)
    with steps("Trying every hook point", len(names)) as progress:
        for start in range(0, len(names), _TRIED_AT_ONCE):
            tried = names[start : start + _TRIED_AT_ONCE]
            rows = 1 + len(tried)  # the first stays as it is
            changes = {name: _disturbing(engine, row, rows, rng) for row, name in enumerate(tried, 1)}
            before, *changed = _logits(engine, tokens.repeat(rows, 0), changes)
            for name, after in zip(tried, changed, strict=True):
                if not np.abs(after - before).max() > _NO_EFFECT * _scale(before):
                    raise VerificationError(
                        f"changing the value at {name!r} does not change the logits. Either this hook point is not where it "
                        "should be, or the checkpoint ignores it (weights of zero after it); --no-verify exports it all the "
                        "same."
                    )
                progress.advance()


def _disturbing(engine: Engine, row: int, rows: int, rng: np.random.Generator) -> Callable[[Array], Array]:
    """What changes an activation in one of so many rows of the batch, and leaves the others as they are."""

    def disturb(activation: Array) -> Array:
        changed = activation.copy()
        # The first axis is that of the batch, or one that the batch and others are joined into.
        of_row = changed.reshape(rows, -1, *changed.shape[1:])[row]
        if activation.dtype.kind == "i":  # numbers of experts: take the next one, after the last the first
            of_row += 1
            of_row %= engine.manifest.config.num_experts or 2
            return changed
        # Different noise at every element: softmax and LayerNorm absorb a constant. Masked scores stay masked.
        finite = np.isfinite(of_row)
        spread = float(np.std(of_row[finite])) or 1.0
        noise = rng.standard_normal(of_row.shape).astype(activation.dtype) * np.asarray(spread, activation.dtype)
        np.add(of_row, noise, out=of_row, where=finite)
        return changed

    return disturb
