"""``graphlens patch`` and ``graphlens attribute``: a pair of prompts, patched or estimated, kept in a folder."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphlens.cli.options import (
    Bos,
    Ids,
    Json,
    Model,
    Provider,
    Read,
    Results,
    Strict,
    Tokenizer,
    flag,
    open_model,
    print_json,
    read_text,
    say,
)
from graphlens.cli.results import json_of, number_of, show
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

Clean = Annotated[str, typer.Option("--clean", metavar="TEXT", help="The prompt whose activations are put in.")]
Corrupted = Annotated[
    str, typer.Option("--corrupted", metavar="TEXT", help="The prompt that they are put into; as many tokens.")
]
Answer = Annotated[
    str, typer.Option("--answer", metavar="TOKEN", help='The clean prompt\'s answer, one token: " Mary".')
]
Wrong = Annotated[str | None, typer.Option("--wrong", metavar="TOKEN", help='The corrupted prompt\'s answer: " John".')]
MetricName = Annotated[str, typer.Option("--metric", metavar="|".join(METRICS), help="What is measured.")]
Normalise = Annotated[
    bool, flag("--normalise/--raw", help="0 at the corrupted prompt's value and 1 at the clean one's.")
]
Picture = Annotated[
    str | None,
    typer.Option(
        "--picture", metavar="png|svg|pdf|html|txt", help="Also write a picture of each result, in this format."
    ),
]
Csv = Annotated[bool, flag("--csv", help="Also write each result as a table: a row for each value.")]


@dataclass(frozen=True)
class Pair:
    """A pair of prompts and a metric, ready to patch, and where the results go.

    Attributes:
        model: The model.
        corrupted: The corrupted prompt.
        cache: The activations of the clean prompt.
        measure: The metric.
        raw: The metric before it is normalised, of the clean and of the corrupted prompt.
        normalised: Whether ``measure`` is 0 at the corrupted prompt's value and 1 at the clean one's.
        out: The folder for the results.
        picture: The ending of the pictures to write, if any.
        csv: Whether to write tables too.
        as_json: Whether to print JSON instead of tables.
    """

    model: HookedTransformer
    corrupted: Read
    cache: ActivationCache
    measure: Metric
    raw: Mapping[str, float]
    normalised: bool
    out: Path
    picture: str | None
    csv: bool
    as_json: bool

    def grids(self, names: Sequence[str]) -> dict[str, Sites]:
        """The sites of each name, positions labelled by their tokens."""
        from graphlens.experiments.act_patch import act_patch_sites

        tokens = [f"{text}_{i}" for i, text in enumerate(texts_of(self.model, self.corrupted.tokens[0]))]
        labels = dict.fromkeys(("pos", "dest_pos", "src_pos"), tokens)
        return {name: act_patch_sites(self.model, self.corrupted.tokens, name, labels) for name in names}

    def report(self, title: str, found: SweepResult, kept: Path) -> dict[str, object]:
        """Writes a result's picture and table beside it, and shows it unless JSON is wanted.

        Args:
            title: What it is called for people.
            found: The result.
            kept: Where it is kept, without an ending.

        Returns:
            What JSON says of it.
        """
        if self.picture is not None:
            found.plot(kept.with_name(f"{kept.name}.{self.picture}"))
        if self.csv:
            found.to_csv(kept.with_name(f"{kept.name}.csv"))
        if not self.as_json:
            show(
                f"{title}, {self.corrupted.used}" if self.corrupted.is_cut else title,
                found,
                kept,
                self.raw if self.normalised else None,
            )
        return json_of(found, kept, self.raw, self.normalised)


def _pair(
    model: Model,
    clean: Clean,
    corrupted: Corrupted,
    answer: Answer,
    out: Results,
    wrong: Wrong = None,
    metric: MetricName = METRICS[0],
    normalise: Normalise = True,
    picture: Picture = None,
    csv: Csv = False,
    ids: Ids = False,
    tokenizer: Tokenizer = None,
    bos: Bos = None,
    strict: Strict = False,
    provider: Provider = None,
    as_json: Json = False,
) -> Pair:
    """The pair that these options describe. Raises InputError for prompts of different lengths."""
    opened = open_model(model, provider, tokenizer)
    right = read_text(opened, "--clean", clean, bos, strict, ids)
    other = read_text(opened, "--corrupted", corrupted, bos, strict, ids)
    if right.length != other.length:
        raise InputError(
            f"the clean prompt has {right.length} tokens and the corrupted one {other.length}: patching needs them position "
            "by position. Reword one of them."
        )
    right_one = answer_of(opened, "--answer", answer, ids)
    wrong_one = None if wrong is None else answer_of(opened, "--wrong", wrong, ids)
    logits, cache = opened.run_with_cache(right.tokens)
    measure = _metric(metric, right_one, wrong_one, logits).bound(opened.to_single_token)
    raw = {"clean": float(measure(logits)), "corrupted": float(measure(opened(other.tokens)))}
    if normalise:
        measure = measure.normalised(raw["clean"], raw["corrupted"])
    return Pair(opened, other, cache, measure, raw, normalise, user_path(out), picture, csv, as_json)


def _ensure_possible(metric: str, wrong: str | None, picture: str | None, out: str, sites: Sequence[str]) -> Path:
    """Checks what can be checked before a model is opened.

    Returns:
        The folder for the results.

    Raises:
        InputError: There is no such metric, no such picture or no such sites, or a difference lacks its other answer.
        RuntimeUnavailable: The package that draws the picture is not installed.
    """
    from graphlens.analysis.sites import GRIDS
    from graphlens.views.heat_map import BACKENDS, ensure_drawable

    if metric not in METRICS:
        raise InputError(f"--metric {metric!r}: there is {', '.join(METRICS)}.")
    if metric == METRICS[0] and wrong is None:
        raise InputError("a logit difference needs --wrong, the answer that the corrupted prompt calls for.")
    for name in sites:
        if name not in GRIDS:
            raise InputError(f"--sites: no sites are called {name!r}: there are {', '.join(GRIDS)}.")
    formats = [ending.removeprefix(".") for endings in BACKENDS.values() for ending in endings]
    if picture is not None and picture.lower() not in formats:
        raise InputError(f"--picture {picture!r}: there is {', '.join(formats)}.")
    if picture is not None:
        ensure_drawable(Path(f"picture.{picture}"))
    folder = user_path(out)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: this is a file, and a folder is wanted. Name another one.")
    return folder


def on_a_pair(ready: Callable[..., None], usual: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options that describe a pair of prompts.

    Args:
        ready: Called before anything is done, with the folder for the results, the names of the sites, and the command's
            other options by name. It raises where the command would fail in the end.
        usual: The sites where the command is given none.

    Returns:
        A decorator for a function of a Pair, the names of its sites, and options of its own. What it makes is for typer: its
        signature holds the options of ``_pair`` too, in the order of the help.
    """

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        shared = inspect.signature(_pair, eval_str=True).parameters
        _, sites, *own = inspect.signature(command, eval_str=True).parameters.values()

        @functools.wraps(command)
        def run(**given: Any) -> None:
            options = {name: given.pop(name) for name in shared}
            chosen = given.pop(sites.name) or [usual]
            needed = {name: options[name] for name in ("metric", "wrong", "picture", "out")}
            ready(_ensure_possible(sites=chosen, **needed), chosen, **given)
            command(_pair(**options), chosen, **given)

        names, parameters = list(shared), list(shared.values())
        at, end = names.index("metric"), names.index("picture")
        parameters = [*parameters[:at], sites, *parameters[at:end], *own, *parameters[end:]]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorated


def _ready_to_patch(out: Path, sites: Sequence[str], resume: bool) -> None:
    """Raises InputError where an earlier run kept results that are not to be gone on with."""
    for name in sites:
        kept = out / name
        if not resume and kept.with_suffix(".json").exists():
            raise InputError(f"{kept}.json exists. Go on with it by --resume, or name another folder.")


@on_a_pair(_ready_to_patch, "resid_pre")
def patch(
    pair: Pair,
    sites: Annotated[
        list[str] | None,
        typer.Option(
            "--sites",
            metavar="NAME",
            help="resid_pre (default), attn_out, mlp_out, attn_head_out_all_pos, ...; may be given several times.",
        ),
    ] = None,
    resume: Annotated[bool, flag("--resume", help="Go on with what an interrupted run kept in --out.")] = False,
) -> None:
    """Patch activations of one prompt into another's run, one at a time, and show what each restores.

    --out gets a .json and a .safetensors for each of --sites; --json prints values, baselines and the largest effects.

    Example: [bold]graphlens patch tiny-gpt2 --clean "When John and Mary met, John called" --corrupted
    "When John and Mary met, Mary called" --answer " Mary" --wrong " John" -o out[/]
    """
    from graphlens.experiments.sweep import sweep

    grids = pair.grids(sites or [])
    make_folder(pair.out)
    told = {}
    for name, grid in grids.items():
        kept = pair.out / name
        try:
            found = sweep(
                pair.model, pair.corrupted.tokens, grid, pair.cache, pair.measure, save_to=kept, resume=resume
            )
        except KeyboardInterrupt:
            say(f"\nInterrupted. {_done(kept)} Go on with the same command and --resume.")
            raise typer.Exit(INTERRUPTED) from None
        told[name] = pair.report(name, found, kept)
    if pair.as_json:
        print_json({"model": pair.model.cfg.model_name, "tokens": pair.corrupted.length, "results": told})


def _ready_to_attribute(out: Path, sites: Sequence[str], steps: int, compare: bool) -> None:
    """Raises InputError where what an earlier run kept cannot be read."""
    for kept in _kept(out, sites, compare):
        _held(kept)


def _kept(out: Path, sites: Sequence[str], compare: bool) -> list[Path]:
    """Where an attribution keeps its results, without an ending."""
    return [out / f"{name}-{kind}" for name in sites for kind in (("estimate", "exact") if compare else ("estimate",))]


@on_a_pair(_ready_to_attribute, "attn_head_out_by_pos")
def attribute(
    pair: Pair,
    sites: Annotated[
        list[str] | None,
        typer.Option(
            "--sites",
            metavar="NAME",
            help="attn_head_out_by_pos (default), resid_pre, mlp_out, ...; may be given several times.",
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option("--steps", metavar="N", min=0, help="Integrated gradients with so many steps; 0 for none.")
    ] = 0,
    compare: Annotated[bool, flag("--compare", help="Patch for real too, and show how far it is off.")] = False,
) -> None:
    """Estimate every patch at once, from one forward and backward (attribution patching).

    --out gets a .json and a .safetensors for each of --sites; --json prints values, baselines and the largest effects.

    Example: [bold]graphlens attribute tiny-gpt2 --clean "When John and Mary met, John called" --corrupted
    "When John and Mary met, Mary called" --answer " Mary" --wrong " John" -o out[/]
    """
    from graphlens.analysis.compare import compare_with_sweep
    from graphlens.experiments.attribution import attribution_patch
    from graphlens.experiments.sweep import sweep

    grids = pair.grids(sites or [])
    held = {kept: _held(kept) for kept in _kept(pair.out, list(grids), compare)}
    make_folder(pair.out)
    told: dict[str, dict[str, object]] = {}
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
        kept = pair.out / f"{name}-estimate"
        told[name] = {"estimate": pair.report(f"{name}, estimated", made["estimate"], kept)}
        rounded = made["estimate"].metadata.get("straight_through")
        if rounded:
            counts = ", ".join(f"{count} {operator}" for operator, count in rounded.items())
            typer.echo(
                f"The model is quantised: its gradients pass {counts} as if they did not round, so they are those of the "
                "dequantised weights.",
                err=pair.as_json,
            )
        if compare:
            told[name]["exact"] = json_of(made["exact"], pair.out / f"{name}-exact", pair.raw, pair.normalised)
            against = compare_with_sweep(made["estimate"], made["exact"], 5)
            told[name]["compared"] = {"correlation": number_of(against.correlation), "slope": number_of(against.slope)}
            typer.echo(f"Against the patches themselves: {against}", err=pair.as_json)
    if pair.as_json:
        print_json({"model": pair.model.cfg.model_name, "tokens": pair.corrupted.length, "results": told})


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
    """The metric of a name of METRICS."""
    from graphlens.analysis.metrics import KLDivergence, LogitDiff, Probability

    if metric == "probability":
        return Probability(answer)
    if metric == "kl" or wrong is None:
        return KLDivergence(clean_logits)
    return LogitDiff(answer, wrong)


def _done(kept: Path) -> str:
    """How much of an interrupted sweep is kept, as a sentence."""
    import numpy as np

    from graphlens.analysis.result import SweepResult

    if not kept.with_suffix(".json").exists():
        return "Nothing was done yet."
    values = SweepResult.load(kept).values
    return f"{int((~np.isnan(values)).sum()):,} of {values.size:,} values are in {kept}.json."
