"""Commands that make a hooked model into files for other programs: bake, drivable, strip; and check, for such files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphlens.cli.options import Hooked, KeepHooks, Layout, Out, SelfContained, WithPast


def bake(
    model: Hooked,
    edits: Annotated[Path, typer.Argument(help="Interventions as JSON (graphlens.interventions.save writes it).")],
    out: Out,
    with_past: WithPast = False,
    keep_hooks: KeepHooks = False,
    self_contained: SelfContained = False,
    layout: Layout = "plain",
) -> None:
    """Write a model with interventions inside: a plain ONNX file that any ONNX Runtime runs.

    Example: [bold]graphlens bake gpt2-hooked edits.json -o gpt2-edited[/]
    """
    from graphlens.edits.files import load
    from graphlens.pipelines.deploy import bake_model

    folder = bake_model(
        model,
        load(edits),
        out,
        with_past=with_past,
        keep_hooks=keep_hooks,
        self_contained=self_contained,
        layout=layout,
    )
    typer.echo(f"Wrote {folder}")


def drivable(
    model: Hooked,
    gates: Annotated[list[str], typer.Option("--gates", help="Hook points, as names or shell patterns.")],
    out: Out,
    kinds: Annotated[
        str, typer.Option("--kinds", help="Which changes: scale, add, patch; with commas.")
    ] = "scale,add,patch",
    required_gates: Annotated[
        bool, typer.Option("--required-gates", help="Without defaults: JavaScript can't feed optional inputs.")
    ] = False,
    with_past: WithPast = False,
    keep_hooks: KeepHooks = False,
    self_contained: SelfContained = False,
) -> None:
    """Write a model whose hook points can be changed through inputs, from any ONNX Runtime language.

    Example: [bold]graphlens drivable gpt2-hooked --gates "blocks.*.attn.hook_z" -o gpt2-drivable[/]
    """
    from graphlens.pipelines.deploy import write_drivable

    names = write_drivable(
        model,
        gates,
        out,
        kinds=[kind.strip() for kind in kinds.split(",")],
        required=required_gates,
        with_past=with_past,
        keep_hooks=keep_hooks,
        self_contained=self_contained,
    )
    typer.echo(f"Wrote {out}: {len(names)} gates, the inputs <hook>/" + ", <hook>/".join(_parts(kinds)))


def _parts(kinds: str) -> list[str]:
    """The parts of the inputs of some kinds of change, which are separated by commas."""
    from graphlens.edits.parts import PARTS

    return [part for kind in kinds.split(",") for part in PARTS[kind.strip()].inputs]


def strip(model: Hooked, out: Out, self_contained: SelfContained = False) -> None:
    """Write the plain model of a hooked or drivable file: no hook points as outputs, no gates.

    Example: [bold]graphlens strip gpt2-drivable -o gpt2-plain[/]
    """
    from graphlens.pipelines.deploy import write_stripped

    typer.echo(f"Wrote {write_stripped(model, out, self_contained=self_contained)}")


def check(model: Annotated[Path, typer.Argument(help="A hooked folder or model.onnx.")]) -> None:
    """Check a file from a stranger: what it contains, and every byte of its weights.

    Example: [bold]graphlens check gpt2-hooked[/]
    """
    from graphlens.surgery import check as check_file

    report = check_file(model)
    typer.echo(
        f"{model}: safe to open. {report.nodes:,} nodes, {report.external_bytes / 1e6:,.1f} MB of weights in "
        f"{', '.join(report.external_files) or 'the file itself'}; fingerprints match."
    )
