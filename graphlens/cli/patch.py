"""``graphlens patch`` and ``graphlens attribute``: a pair of prompts, patched or estimated, kept in a folder."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphlens.cli.options import Bos, Json, Model, Out, Provider, Read, Strict, open_model, read_text, say
from graphlens.cli.token_text import answer_of, texts_of
from graphlens.errors import InputError
from graphlens.file.folder import make_folder, user_path

if TYPE_CHECKING:
    from graphlens.analysis.arrays import Array
    from graphlens.analysis.cache.activation_cache import ActivationCache
    from graphlens.analysis.metric import Metric
    from graphlens.analysis.result import SweepResult
    from graphlens.analysis.sites import Sites
    from graphlens.model.hooked_transformer import HookedTransformer

METRICS = ("logit-diff", "probability", "kl")
INTERRUPTED = 130  # what a shell gives a program that Ctrl-C ended

Clean = Annotated[str, typer.Option("--clean", help="The prompt whose activations are put in.")]
Corrupted = Annotated[str, typer.Option("--corrupted", help="The prompt that they are put into; as many tokens.")]
Answer = Annotated[str, typer.Option("--answer", help='The clean prompt\'s answer, one token: " Mary".')]
Wrong = Annotated[str | None, typer.Option("--wrong", help='The corrupted prompt\'s answer: " John".')]
MetricName = Annotated[str, typer.Option("--metric", help="logit-diff, probability or kl.")]
Normalise = Annotated[
    bool, typer.Option("--normalise/--raw", help="0 at the corrupted prompt's value and 1 at the clean one's.")
]
Picture = Annotated[str | None, typer.Option("--picture", help="Also write a picture: png, svg, pdf, html or txt.")]


@dataclass(frozen=True)
class Pair:
    """A pair of prompts and a metric, ready to patch, and where the results go.

    Attributes:
        model: The model.
        corrupted: The corrupted prompt.
        cache: The activations of the clean prompt.
        measure: The metric.
        out: The folder for the results.
        picture: The ending of the pictures to write, if any.
        as_json: Whether to print JSON instead of tables.
    """

    model: HookedTransformer
    corrupted: Read
    cache: ActivationCache
    measure: Metric
    out: Path
    picture: str | None
    as_json: bool

    def grids(self, names: list[str]) -> dict[str, Sites]:
        """The sites of each name, positions labelled by their tokens."""
        from graphlens.experiments.act_patch import act_patch_sites

        tokens = [f"{text}_{i}" for i, text in enumerate(texts_of(self.model, self.corrupted.tokens[0]))]
        labels = dict.fromkeys(("pos", "dest_pos", "src_pos"), tokens)
        return {name: act_patch_sites(self.model, self.corrupted.tokens, name, labels) for name in names}

    def report(self, title: str, found: SweepResult, kept: Path) -> None:
        """Shows a result that is kept at a path, and writes its picture."""
        if self.picture is not None:
            found.plot(kept.with_name(f"{kept.name}.{self.picture}"))
        if self.as_json:
            typer.echo(kept.with_suffix(".json").read_text(), nl=False)
        else:
            _show(f"{title}, {self.corrupted.used}" if self.corrupted.is_cut else title, found, kept)


def _pair(
    model: Model,
    clean: Clean,
    corrupted: Corrupted,
    answer: Answer,
    out: Out,
    wrong: Wrong = None,
    metric: MetricName = "logit-diff",
    normalise: Normalise = True,
    picture: Picture = None,
    bos: Bos = None,
    strict: Strict = False,
    provider: Provider = None,
    as_json: Json = False,
) -> Pair:
    """The pair that these options describe. Raises InputError for prompts of different lengths."""
    opened = open_model(model, provider)
    right = read_text(opened, "--clean", clean, bos, strict)
    other = read_text(opened, "--corrupted", corrupted, bos, strict)
    if right.length != other.length:
        raise InputError(
            f"the clean prompt has {right.length} tokens and the corrupted one {other.length}: patching needs them position "
            "by position. Reword one of them."
        )
    logits, cache = opened.run_with_cache(right.tokens)
    right_one = answer_of(opened, "--answer", answer)
    measure = _metric(metric, right_one, None if wrong is None else answer_of(opened, "--wrong", wrong), logits)
    if normalise:
        plain = measure.bound(opened.to_single_token)
        measure = plain.normalised(float(plain(logits)), float(plain(opened(other.tokens))))
    return Pair(opened, other, cache, measure, user_path(out), picture, as_json)


def on_a_pair(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options that describe a pair of prompts.

    Args:
        command: A function of a Pair and of options of its own, the first of which is the sites.

    Returns:
        The command for typer: its signature holds the options of ``_pair`` too, in the order of the help.
    """
    shared = inspect.signature(_pair, eval_str=True).parameters
    _, sites, *own = inspect.signature(command, eval_str=True).parameters.values()

    @functools.wraps(command)
    def run(**given: Any) -> None:
        pair = _pair(**{name: given.pop(name) for name in shared})
        command(pair, **given)

    names, parameters = list(shared), list(shared.values())
    at, end = names.index("metric"), names.index("picture")
    parameters = [*parameters[:at], sites, *parameters[at:end], *own, *parameters[end:]]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


@on_a_pair
def patch(
    pair: Pair,
    sites: Annotated[
        list[str] | None,
        typer.Option(
            "--sites", help="resid_pre (default), attn_out, mlp_out, attn_head_out_all_pos, ...; several times."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what an interrupted run kept in --out.")] = False,
) -> None:
    """Patch activations of one prompt into another's run, one at a time, and show what each restores.

    Example: [bold]graphlens patch gpt2-hooked --clean "Ann and Bob met. Bob gave a book to" --corrupted
    "Ann and Bob met. Ann gave a book to" --answer " Ann" --wrong " Bob" -o out[/]
    """
    from graphlens.experiments.sweep import sweep

    grids = pair.grids(sites or ["resid_pre"])
    make_folder(pair.out)
    for name, grid in grids.items():
        kept = pair.out / name
        if not resume and kept.with_suffix(".json").exists():
            raise InputError(f"{kept}.json exists. Go on with it by --resume, or name another folder.")
        try:
            found = sweep(
                pair.model, pair.corrupted.tokens, grid, pair.cache, pair.measure, save_to=kept, resume=resume
            )
        except KeyboardInterrupt:
            say(f"\nInterrupted. {_done(kept)} Go on with the same command and --resume.")
            raise typer.Exit(INTERRUPTED) from None
        pair.report(name, found, kept)


@on_a_pair
def attribute(
    pair: Pair,
    sites: Annotated[
        list[str] | None,
        typer.Option("--sites", help="attn_head_out_by_pos (default), resid_pre, mlp_out, ...; several times."),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=0, help="Integrated gradients with so many steps.")] = 0,
    compare: Annotated[bool, typer.Option("--compare", help="Patch for real too, and show how far it is off.")] = False,
) -> None:
    """Estimate every patch at once, from one forward and backward (attribution patching).

    Example: [bold]graphlens attribute gpt2-hooked --clean "Ann and Bob met. Bob gave a book to" --corrupted
    "Ann and Bob met. Ann gave a book to" --answer " Ann" --wrong " Bob" -o out[/]
    """
    from graphlens.analysis.compare import compare_with_sweep
    from graphlens.experiments.attribution import attribution_patch
    from graphlens.experiments.sweep import sweep

    grids = pair.grids(sites or ["attn_head_out_by_pos"])
    kinds = ("estimate", "exact") if compare else ("estimate",)
    held = {kept: _held(kept) for kept in (pair.out / f"{name}-{kind}" for name in grids for kind in kinds)}
    make_folder(pair.out)
    for name, grid in grids.items():
        made = {
            "estimate": attribution_patch(
                pair.model, pair.corrupted.tokens, grid, pair.cache, pair.measure, steps=steps
            )
        }
        if compare:
            made["exact"] = sweep(pair.model, pair.corrupted.tokens, grid, pair.cache, pair.measure)
        results = {pair.out / f"{name}-{kind}": found for kind, found in made.items()}
        for kept, found in results.items():
            if held[kept] not in (None, found):
                raise InputError(f"{kept}.json exists, and is the result of something else. Name another folder.")
        for kept, found in results.items():
            found.save(kept)
        pair.report(f"{name}, estimated", made["estimate"], pair.out / f"{name}-estimate")
        rounded = made["estimate"].metadata.get("straight_through")
        if rounded:
            counts = ", ".join(f"{count} {operator}" for operator, count in rounded.items())
            typer.echo(
                f"The model is quantised: its gradients pass {counts} as if they did not round, so they are those of the "
                "dequantised weights.",
                err=pair.as_json,
            )
        if compare:
            against = compare_with_sweep(made["estimate"], made["exact"], 5)
            typer.echo(f"Against the patches themselves: {against}", err=pair.as_json)


def _held(kept: Path) -> SweepResult | None:
    """What an earlier run of a command kept: the same command may run again, after it was interrupted.

    Raises InputError for what cannot be read.
    """
    from graphlens.analysis.result import SweepResult

    if not kept.with_suffix(".json").exists():
        return None
    try:
        return SweepResult.load(kept)
    except InputError as error:
        raise InputError(f"{kept}.json exists, and cannot be read ({error}). Name another folder.") from error


def _metric(metric: str, answer: str | int, wrong: str | int | None, clean_logits: Array) -> Metric:
    """The metric of a name. Raises InputError for another name, and for a difference without a wrong answer."""
    from graphlens.analysis.metrics import KLDivergence, LogitDiff, Probability

    if metric == "logit-diff":
        if wrong is None:
            raise InputError("a logit difference needs --wrong, the answer that the corrupted prompt calls for.")
        return LogitDiff(answer, wrong)
    if metric == "probability":
        return Probability(answer)
    if metric == "kl":
        return KLDivergence(clean_logits)
    raise InputError(f"--metric {metric!r}: there is {', '.join(METRICS)}.")


def _done(kept: Path) -> str:
    """How much of an interrupted sweep is kept, as a sentence."""
    import numpy as np

    from graphlens.analysis.result import SweepResult

    if not kept.with_suffix(".json").exists():
        return "Nothing was done yet."
    values = SweepResult.load(kept).values
    return f"{int((~np.isnan(values)).sum()):,} of {values.size:,} values are in {kept}.json."


def _show(title: str, found: SweepResult, kept: Path) -> None:
    """Prints a result: its baselines, a heat map, the largest effects, and where it is kept."""
    from rich.console import Console

    from graphlens.views.heat_map import HeatMap

    console = Console()
    baselines = ", ".join(
        f"{which} {float(value):+.3f}" for which, value in found.baselines.items() if value is not None
    )
    console.print(f"[bold]{title}[/]: {found.metadata['metrics'][0]}; {baselines}", highlight=False)
    console.print(HeatMap(found))
    for labels, value in found.top(5):
        console.print(
            f"  {value:+.3f}  {', '.join(f'{axis} {label}' for axis, label in labels.items())}",
            highlight=False,
            markup=False,
        )
    console.print(f"Kept in {kept}.json and .safetensors", highlight=False)
