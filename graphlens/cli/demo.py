"""The demonstration: the indirect-object task on a hooked model, every figure computed in the run that shows it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from graphlens.analysis.arrays import Array
from graphlens.analysis.cache.activation_cache import ActivationCache
from graphlens.analysis.metrics import LogitDiff, Metric
from graphlens.analysis.numerics import log_softmax, softmax
from graphlens.analysis.result import SweepResult
from graphlens.experiments.act_patch import act_patch_sites
from graphlens.experiments.attribution import attribution_patch
from graphlens.experiments.sweep import sweep
from graphlens.file.names import in_block
from graphlens.views.heat_map import HeatMap

if TYPE_CHECKING:
    from rich.console import Console

    from graphlens.model.hooked_transformer import HookedTransformer
    from graphlens.model.hooks import HookPoint

PROMPT = "When John and Mary went to the store, John gave a drink to"
CORRUPTED = "When John and Mary went to the store, Mary gave a drink to"
ANSWER, WRONG = " Mary", " John"
Difference = Callable[[Array], float]  # logits [b, p, V] -> that of the answer minus that of the wrong one


@dataclass(frozen=True)
class Attended:
    """The head whose last position attends most to the answer's name.

    Attributes:
        layer: Its layer.
        head: Its number.
        token: The token that it attends to most.
        weight: How much, 0 to 1.
        top: The three tokens that it attends to most, with their weights.
    """

    layer: int
    head: int
    token: str
    weight: float
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class LensRow:
    """The logit lens after one point of the residual stream: its best token, and how likely the answer is there."""

    hook: str
    top_token: str
    probability: float
    answer_probability: float
    logit_difference: float


@dataclass(frozen=True)
class Ablation:
    """One head's hook_z set to 0: the logit difference before and after, and KL(before || after) in nats."""

    hook: str
    head: int
    before: float
    after: float
    kl: float


@dataclass(frozen=True)
class PatchRow:
    """One activation of the clean prompt patched into the corrupted run at one position, and what it restores."""

    hook: str
    position: int
    logit_difference: float
    restored: float


@dataclass(frozen=True)
class HeadMap:
    """A number for every head [layer][head], and what it is without an edit."""

    values: tuple[tuple[float, ...], ...]
    unedited: float


@dataclass(frozen=True)
class Demo:
    """All figures of a demonstration; logit differences are answer minus wrong at the last position.

    Attributes:
        model: The model's name.
        tokens: The prompt's tokens.
        predicted: The likeliest next token.
        clean: The logit difference of the prompt.
        corrupted: That of the corrupted prompt.
        corrupted_token: The token that differs there.
        activations: How many activations were read.
        megabytes: Their size, in 10^6 bytes.
        cache_ms: How long that run took, in milliseconds.
        attended: The head that attends most to the answer's name.
        lens: The logit lens after each layer.
        ablation: What that head is worth.
        patches: What each layer's residual stream restores.
        patched_heads: The share restored by patching each head's output, at all positions, into the corrupted run.
        estimated_heads: The same as attribution patching estimates it, from one gradient.
        ablated_heads: The logit difference of the prompt with each head's output set to zero.
    """

    model: str
    tokens: tuple[str, ...]
    predicted: str
    clean: float
    corrupted: float
    corrupted_token: str
    activations: int
    megabytes: float
    cache_ms: float
    attended: Attended
    lens: tuple[LensRow, ...]
    ablation: Ablation
    patches: tuple[PatchRow, ...]
    patched_heads: HeadMap
    estimated_heads: HeadMap
    ablated_heads: HeadMap


def run_demo(model: HookedTransformer) -> Demo:
    """Runs the demonstration.

    Args:
        model: A model whose tokenizer has " Mary" and " John" as single tokens.

    Raises:
        InputError: For another tokenizer, or none.
    """
    answer, wrong = model.to_single_token(ANSWER), model.to_single_token(WRONG)
    tokens, corrupted = model.to_tokens(PROMPT), model.to_tokens(CORRUPTED)
    words, other_words = ([str(word) for word in model.to_str_tokens(text)] for text in (PROMPT, CORRUPTED))
    model(tokens)  # the first run of a session allocates; the timed one is an ordinary one

    def difference(logits: Array) -> float:
        return float(logits[0, -1, answer] - logits[0, -1, wrong])

    started = time.perf_counter()
    logits, cache = model.run_with_cache(tokens)
    elapsed = (time.perf_counter() - started) * 1e3
    attended = _attended(model, cache, tokens, words, answer)
    corrupted_logits = model(corrupted)
    return Demo(
        model=model.cfg.model_name,
        tokens=tuple(words),
        predicted=str(model.to_string([int(logits[0, -1].argmax())])),
        clean=difference(logits),
        corrupted=difference(corrupted_logits),
        corrupted_token=next(b for a, b in zip(words, other_words, strict=True) if a != b),
        activations=len(cache),
        megabytes=sum(value.nbytes for value in cache.values()) / 1e6,
        cache_ms=elapsed,
        attended=attended,
        lens=_lens(model, cache, answer, wrong),
        ablation=_ablate(model, tokens, logits, attended, difference),
        patches=_patch(model, tokens, corrupted, cache, difference, difference(logits), difference(corrupted_logits)),
        patched_heads=_head_map(model, corrupted, cache, LogitDiff(answer, wrong).normalised()),
        estimated_heads=_head_map(model, corrupted, cache, LogitDiff(answer, wrong).normalised(), attribution_patch),
        ablated_heads=_head_map(model, tokens, "zero", LogitDiff(answer, wrong)),
    )


def _head_map(
    model: HookedTransformer,
    tokens: Array,
    source: ActivationCache | str,
    metric: Metric,
    by: Callable[..., SweepResult] = sweep,
) -> HeadMap:
    """The metric for every head, as a sweep or an estimate finds it."""
    sites = act_patch_sites(model, tokens, "attn_head_out_all_pos")
    found = by(model, tokens, sites, source, metric, verbose=False)
    rows = tuple(tuple(float(value) for value in row) for row in found.values)
    return HeadMap(rows, float(found.against()))


def _attended(
    model: HookedTransformer, cache: ActivationCache, tokens: Array, words: list[str], answer: int
) -> Attended:
    """The head whose last position attends most to the answer."""
    position = int(np.flatnonzero(tokens[0] == answer)[-1])
    patterns = np.stack([cache["pattern", layer][0, :, -1] for layer in range(model.cfg.n_layers)])  # [L, h, key]
    layer, head = np.unravel_index(int(patterns[:, :, position].argmax()), patterns.shape[:2])
    row = patterns[layer, head]
    top = tuple((words[i], float(row[i])) for i in np.argsort(-row)[:3])
    return Attended(int(layer), int(head), top[0][0], top[0][1], top)


def _lens(model: HookedTransformer, cache: ActivationCache, answer: int, wrong: int) -> tuple[LensRow, ...]:
    """The logit lens at the last position, before the first layer and after each."""
    rows = []
    for hook in [in_block(0, "hook_resid_pre"), *(in_block(i, "hook_resid_post") for i in range(model.cfg.n_layers))]:
        logits = model.unembed(model.ln_final(cache[hook][:, -1]))[0]
        probabilities = softmax(logits)
        best = int(logits.argmax())
        rows.append(
            LensRow(
                hook,
                str(model.to_string([best])),
                float(probabilities[best]),
                float(probabilities[answer]),
                float(logits[answer] - logits[wrong]),
            )
        )
    return tuple(rows)


def _ablate(
    model: HookedTransformer, tokens: Array, logits: Array, attended: Attended, difference: Difference
) -> Ablation:
    """What the run becomes without one head."""
    name = in_block(attended.layer, "attn.hook_z")

    def zero_head(z: Array, hook: HookPoint, head: int) -> None:
        z[:, :, head] = 0

    ablated = model.run_with_hooks(tokens, fwd_hooks=[(name, partial(zero_head, head=attended.head))])
    before, after = log_softmax(logits[0, -1]), log_softmax(ablated[0, -1])
    kl = float((np.exp(before) * (before - after)).sum())
    return Ablation(name, attended.head, difference(logits), difference(ablated), kl)


def _patch(
    model: HookedTransformer,
    tokens: Array,
    corrupted: Array,
    cache: ActivationCache,
    difference: Difference,
    clean: float,
    baseline: float,
) -> tuple[PatchRow, ...]:
    """What each layer's residual stream restores at the position where the prompts differ."""
    position = int(np.flatnonzero(tokens[0] != corrupted[0])[0])
    rows = []
    for layer in range(model.cfg.n_layers):
        name = in_block(layer, "hook_resid_pre")

        def restore(residual: Array, hook: HookPoint) -> None:
            residual[:, position] = cache[hook.name][:, position]

        value = difference(model.run_with_hooks(corrupted, fwd_hooks=[(name, restore)]))
        rows.append(PatchRow(name, position, value, (value - baseline) / (clean - baseline)))
    return tuple(rows)


def show_demo(demo: Demo, console: Console) -> None:
    """Prints a demonstration for people."""
    from rich.markup import escape
    from rich.panel import Panel
    from rich.table import Table

    def quoted(token: str) -> str:
        return escape(repr(token))

    def table(*columns: str) -> Table:
        made = Table()
        for index, column in enumerate(columns):
            made.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
        return made

    best = f"[bold green]{escape(demo.predicted.strip())}[/]"
    console.print(Panel(f"{escape(PROMPT)} [dim]...[/dim] {best}", title=escape(demo.model)))
    console.print(f"[dim]{len(demo.tokens)} tokens:[/] " + escape(" | ".join(demo.tokens)))
    console.print(
        f"Read all [bold]{demo.activations}[/] activations, {demo.megabytes:.1f} MB, in [bold]{demo.cache_ms:.1f} ms[/]. "
        f"Logit difference {quoted(ANSWER)} - {quoted(WRONG)}: [bold]{demo.clean:+.2f}[/]\n"
    )
    head = demo.attended
    console.print(
        f"[bold]Attention[/] of head {head.layer}.{head.head}, from the last position; most: {quoted(head.token)}"
    )
    heads = table("token", "attention")
    for token, weight in head.top:
        heads.add_row(quoted(token), f"{weight:.3f}")
    console.print(heads)
    console.print("[bold]Logit lens[/] at the last position")
    lens = table("residual stream", "best token", "p(best)", f"p({ANSWER.strip()})", "logit difference")
    for row in demo.lens:
        figures = (f"{row.probability:.3f}", f"{row.answer_probability:.3f}", f"{row.logit_difference:+.2f}")
        lens.add_row(row.hook, quoted(row.top_token), *figures)
    console.print(lens)
    edit = demo.ablation
    console.print(
        f"[bold]Ablate[/] {edit.hook} head {edit.head}: logit difference {edit.before:+.2f} -> [bold]{edit.after:+.2f}[/], "
        f"KL {edit.kl:.3f} nats\n"
    )
    position = demo.patches[0].position
    console.print(
        f"[bold]Patch[/] the residual stream at position {position} from this run into one where {quoted(demo.tokens[position])}"
        f" is {quoted(demo.corrupted_token)} (logit difference {demo.corrupted:+.2f})"
    )
    patches = table("patched", "logit difference", "restored")
    for patch in demo.patches:
        patches.add_row(patch.hook, f"{patch.logit_difference:+.2f}", f"{patch.restored:+.0%}")
    console.print(patches)
    for title, heads_map in (
        ("[bold]Patch[/] each head's output there instead; what it restores", demo.patched_heads),
        ("[bold]Estimate[/] that for all heads at once, from one gradient", demo.estimated_heads),
        ("[bold]Ablate[/] each head's output in this run; the logit difference left", demo.ablated_heads),
    ):
        values = np.asarray(heads_map.values)
        layer, number = np.unravel_index(int(np.abs(values - heads_map.unedited).argmax()), values.shape)
        console.print(f"\n{title}. Most: head {layer}.{number}, {values[layer, number]:+.2f}")
        console.print(_picture(heads_map))


def _picture(heads: HeadMap) -> HeatMap:
    """A number for every head as a heat map."""
    labels = {
        "layer": [f"L{i}" for i in range(len(heads.values))],
        "head": [f"H{i}" for i in range(len(heads.values[0]))],
    }
    found = SweepResult(np.asarray(heads.values), ("layer", "head"), labels, {"corrupted": heads.unedited})
    return HeatMap(found)
