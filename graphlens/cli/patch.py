"""``graphlens patch`` and ``graphlens attribute``: a pair of prompts, patched or estimated, kept in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphlens.cli.options import Json, Model, NoBos, Out, Provider, open_model
from graphlens.errors import InputError

if TYPE_CHECKING:
    from graphlens.analysis.metrics import Metric
    from graphlens.analysis.result import SweepResult
    from graphlens.analysis.sites import Sites

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


def patch(
    model: Model,
    clean: Clean,
    corrupted: Corrupted,
    answer: Answer,
    out: Out,
    wrong: Wrong = None,
    sites: Annotated[
        list[str] | None,
        typer.Option(
            "--sites", help="resid_pre (default), attn_out, mlp_out, attn_head_out_all_pos, ...; several times."
        ),
    ] = None,
    metric: MetricName = "logit-diff",
    normalise: Normalise = True,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what an interrupted run kept in --out.")] = False,
    picture: Picture = None,
    no_bos: NoBos = False,
    provider: Provider = None,
    as_json: Json = False,
) -> None:
    """Patch activations of one prompt into another's run, one at a time, and show what each restores.

    Example: [bold]graphlens patch gpt2-hooked --clean "Ann and Bob met. Bob gave a book to" --corrupted
    "Ann and Bob met. Ann gave a book to" --answer " Ann" --wrong " Bob" -o out[/]
    """
    asked = _prepare(open_model(model, provider), clean, corrupted, answer, wrong, metric, normalise, not no_bos)
    _patch_prompts(asked, sites or ["resid_pre"], out, resume, picture, as_json)


def attribute(
    model: Model,
    clean: Clean,
    corrupted: Corrupted,
    answer: Answer,
    out: Out,
    wrong: Wrong = None,
    sites: Annotated[
        list[str] | None,
        typer.Option("--sites", help="attn_head_out_by_pos (default), resid_pre, mlp_out, ...; several times."),
    ] = None,
    metric: MetricName = "logit-diff",
    normalise: Normalise = True,
    steps: Annotated[int, typer.Option("--steps", min=0, help="Integrated gradients with so many steps.")] = 0,
    compare: Annotated[bool, typer.Option("--compare", help="Patch for real too, and show how far it is off.")] = False,
    picture: Picture = None,
    no_bos: NoBos = False,
    provider: Provider = None,
    as_json: Json = False,
) -> None:
    """Estimate every patch at once, from one forward and backward (attribution patching).

    Example: [bold]graphlens attribute gpt2-hooked --clean "Ann and Bob met. Bob gave a book to" --corrupted
    "Ann and Bob met. Ann gave a book to" --answer " Ann" --wrong " Bob" -o out[/]
    """
    from rich.console import Console

    from graphlens.analysis.compare import compare_with_sweep
    from graphlens.experiments.attribution import attribution_patch
    from graphlens.experiments.sweep import sweep

    console = Console()
    asked = _prepare(open_model(model, provider), clean, corrupted, answer, wrong, metric, normalise, not no_bos)
    grids = asked.grids(sites or ["attn_head_out_by_pos"])
    written = [f"{name}-{kind}" for name in grids for kind in (("estimate", "exact") if compare else ("estimate",))]
    for kept in (out / name for name in written):
        if kept.with_suffix(".json").exists():
            raise InputError(f"{kept}.json exists. Name another folder.")
    out.mkdir(parents=True, exist_ok=True)
    for name, grid in grids.items():
        kept = out / f"{name}-estimate"
        found = attribution_patch(asked.model, asked.corrupted, grid, asked.cache, asked.measure, steps=steps)
        found.save(kept)
        if picture is not None:
            found.plot(out / f"{kept.name}.{picture}")
        if as_json:
            typer.echo(kept.with_suffix(".json").read_text(), nl=False)
        else:
            _show(console, f"{name}, estimated", found, kept)
        if compare:
            exact = sweep(asked.model, asked.corrupted, grid, asked.cache, asked.measure)
            exact.save(out / f"{name}-exact")
            typer.echo(f"Against the patches themselves: {compare_with_sweep(found, exact, 5)}", err=as_json)


@dataclass(frozen=True)
class _Asked:
    """A pair of prompts and a metric, ready to patch."""

    model: Any
    corrupted: Any
    cache: Any
    measure: Metric

    def grids(self, names: list[str]) -> dict[str, Sites]:
        """The sites of each name, positions labelled by their tokens."""
        from graphlens.experiments.act_patch import act_patch_sites

        tokens = [f"{text}_{i}" for i, text in enumerate(self.model.to_str_tokens(self.corrupted[0]))]
        labels = dict.fromkeys(("pos", "dest_pos", "src_pos"), tokens)
        return {name: act_patch_sites(self.model, self.corrupted, name, labels) for name in names}


def _prepare(
    model: Any,
    clean: str,
    corrupted: str,
    answer: str,
    wrong: str | None,
    metric: str,
    normalise: bool,
    prepend_bos: bool,
) -> _Asked:
    tokens = {"clean": model.to_tokens(clean, prepend_bos), "corrupted": model.to_tokens(corrupted, prepend_bos)}
    lengths = {name: ids.shape[1] for name, ids in tokens.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(
            f"the clean prompt has {lengths['clean']} tokens and the corrupted one {lengths['corrupted']}: patching needs "
            "them position by position. Reword one of them."
        )
    logits, cache = model.run_with_cache(tokens["clean"])
    measure = _metric(metric, answer, wrong, logits)
    if normalise:
        plain = measure.bound(model.to_single_token)
        measure = plain.normalised(float(plain(logits)), float(plain(model(tokens["corrupted"]))))
    return _Asked(model, tokens["corrupted"], cache, measure)


def _patch_prompts(
    asked: _Asked, sites: list[str], out: Path, resume: bool, picture: str | None, as_json: bool
) -> None:
    """Runs the sweeps, one file each in ``out``, and shows them. Exits with 130 after Ctrl-C, what is done being kept."""
    from rich.console import Console

    from graphlens.experiments.sweep import sweep

    grids = asked.grids(sites)
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    for name, grid in grids.items():
        kept = out / name
        if not resume and kept.with_suffix(".json").exists():
            raise InputError(f"{kept}.json exists. Go on with it by --resume, or name another folder.")
        try:
            found = sweep(asked.model, asked.corrupted, grid, asked.cache, asked.measure, save_to=kept, resume=resume)
        except KeyboardInterrupt:
            typer.echo(f"\nInterrupted. {_done(kept)} Go on with the same command and --resume.", err=True)
            raise typer.Exit(INTERRUPTED) from None
        if picture is not None:
            found.plot(out / f"{name}.{picture}")
        if as_json:
            typer.echo((out / f"{name}.json").read_text(), nl=False)
        else:
            _show(console, name, found, kept)


def _metric(metric: str, answer: str, wrong: str | None, clean_logits: Any) -> Metric:
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
    import numpy as np

    from graphlens.analysis.result import SweepResult

    if not kept.with_suffix(".json").exists():
        return "Nothing was done yet."
    values = SweepResult.load(kept).values
    return f"{int((~np.isnan(values)).sum()):,} of {values.size:,} values are in {kept}.json."


def _show(console: Any, name: str, found: SweepResult, kept: Path) -> None:
    from graphlens.views.heat_map import HeatMap

    baselines = ", ".join(
        f"{which} {float(value):+.3f}" for which, value in found.baselines.items() if value is not None
    )
    console.print(f"[bold]{name}[/]: {found.metadata['metrics'][0]}; {baselines}", highlight=False)
    console.print(HeatMap(found))
    for labels, value in found.top(5):
        console.print(
            f"  {value:+.3f}  {', '.join(f'{axis} {label}' for axis, label in labels.items())}",
            highlight=False,
            markup=False,
        )
    console.print(f"Kept in {kept}.json and .safetensors", highlight=False)
